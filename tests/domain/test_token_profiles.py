"""Whether a token fits a site and what is to be done there, by its claims."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdm.workqueue.domain.token_profiles import (
    Capability,
    Need,
    TokenClaims,
    TokenRules,
    misfit,
    scope_misfit,
)

_NOW = datetime(2026, 11, 30, 12, tzinfo=UTC)
_RULES = TokenRules(servers=["dav.example.org:8443"], issuer="https://issuer.example.org/vo")


def _claims(**changed: object) -> TokenClaims:
    usual: dict[str, object] = {
        "iss": "https://issuer.example.org/vo/",
        "aud": "https://dav.example.org:8443",
        "nbf": _NOW.timestamp() - 5,
        "exp": _NOW.timestamp() + 3600,
        "wlcg.ver": "1.0",
        "scope": "openid storage.read:/data",
    }
    return TokenClaims.of({name: value for name, value in (usual | changed).items() if value is not None})


@pytest.mark.parametrize(
    ("changed", "claim"),
    [
        ({}, None),
        ({"exp": _NOW.timestamp() - 30}, None),  # within the skew
        ({"exp": _NOW.timestamp() - 61}, "exp"),
        ({"exp": "soon"}, "exp"),
        ({"exp": True}, "exp"),
        ({"exp": float("inf")}, "exp"),
        ({"exp": None}, None),
        ({"nbf": _NOW.timestamp() + 30}, None),
        ({"nbf": _NOW.timestamp() + 61}, "nbf"),
        ({"iss": "https://issuer.example.org"}, "iss"),
        ({"iss": 7}, "iss"),
        ({"aud": None}, None),
        ({"aud": ["x", "https://wlcg.cern.ch/jwt/v1/any"]}, None),
        ({"aud": "ANY"}, None),
        ({"aud": "dav.example.org"}, None),
        ({"aud": "DAV.example.org:8443"}, None),
        ({"aud": "https://dav.example.org/"}, None),
        ({"aud": "https://dav.example.org:443"}, "aud"),
        ({"aud": "https://xdav.example.org"}, "aud"),
        ({"aud": "dav.example.org.evil.example"}, "aud"),
        ({"aud": {"a": 1}}, "aud"),
        ({"aud": "http://[::"}, "aud"),
    ],
)
def test_what_fits_a_site(changed: dict[str, object], claim: str | None) -> None:
    found = misfit(_claims(**changed), _RULES, _NOW)
    assert (found.claim if found else None) == claim
    if found:
        assert found.is_over == (claim == "exp" and "wrong type" not in found.has)
        assert found.needed in found.sentence("RAL")
        assert "no server was asked" in found.sentence("RAL")


def test_a_site_may_accept_other_audiences_and_any_issuer() -> None:
    rules = TokenRules(servers=["dav.example.org"], audiences=["our-storage"])
    assert misfit(_claims(aud=["our-storage"], iss="https://other"), rules, _NOW) is None
    # A port that is not written is that of the protocol.
    assert misfit(_claims(aud="https://dav.example.org:443"), rules, _NOW) is None


_READ, _WRITE, _ALL = (Capability.READ, Capability.STAGE), (Capability.CREATE, Capability.MODIFY), (Capability.MODIFY,)


@pytest.mark.parametrize(
    ("scope", "needed", "path", "permitted"),
    [
        ("storage.read:/data", _READ, "/data/a", True),
        ("storage.read:/data/", _READ, "/data", True),
        ("storage.read:/data", _READ, "/data2/a", False),
        ("storage.read:/data", _READ, "/", False),
        ("storage.read:/", _READ, "/anything", True),
        ("storage.read", _READ, "/anything", False),
        ("storage.read:/data/../..", _READ, "/data/a", False),
        ("storage.read:data", _READ, "/data/a", False),
        ("storage.read://data/./x", _READ, "/data/x/y", True),
        ("storage.read:/a%20b", _READ, "/a b/c", True),
        ("storage.stage:/data", _READ, "/data/a", True),
        ("storage.create:/data", _READ, "/data/a", False),
        ("storage.create:/data", _WRITE, "/data/a", True),
        ("storage.create:/data", _ALL, "/data/a", False),
        ("storage.modify:/data", _WRITE, "/data/a", True),
        ("storage.modify:/data", _ALL, "/data/a", True),
        ("storage.read:/data storage.create:/data/mine", _WRITE, "/data/mine/x", True),
        ("read:/data", _READ, "/data/a", True),
        ("read", _READ, "/data/a", True),
        ("read:/data", _WRITE, "/data/a", False),
        ("write:/data", _ALL, "/data/a", True),
        # Scopes of no storage: it decides by the subject or by groups.
        ("openid wlcg.groups:/vo", _ALL, "/data/a", True),
        ("", _ALL, "/data/a", True),
        ("compute.read", _ALL, "/data/a", True),
    ],
)
def test_what_a_scope_permits(scope: str, needed: tuple[Capability, ...], path: str, permitted: bool) -> None:
    found = scope_misfit(_claims(scope=scope), _RULES, [Need(needed, path.encode())])
    assert (found is None) == permitted, found
    # The scope may be a list of words.
    assert (scope_misfit(_claims(scope=scope.split()), _RULES, [Need(needed, path.encode())]) is None) == permitted


def test_the_message_names_the_scope_of_the_profile() -> None:
    wlcg = scope_misfit(_claims(), _RULES, [Need(_WRITE, b"/data/a")])
    assert wlcg is not None
    assert wlcg.needed == "storage.create:/data/a or storage.modify:/data/a"
    scitokens = scope_misfit(_claims(**{"wlcg.ver": None, "scope": "read:/x"}), _RULES, [Need(_WRITE, b"/data/a")])
    assert scitokens is not None
    assert scitokens.needed == "write:/data/a"


def test_paths_of_scopes_are_relative_to_the_base_path_of_the_site() -> None:
    rules = TokenRules(servers=["h"], base_paths=["/pnfs/vo"])
    claims = _claims(scope="storage.read:/home")
    assert scope_misfit(claims, rules, [Need(_READ, b"/pnfs/vo/home/x")]) is None
    assert scope_misfit(claims, rules, [Need(_READ, b"/pnfs/vo/homes/x")]) is not None
    outside = scope_misfit(_claims(scope="storage.read:/"), rules, [Need(_READ, b"/pnfs/other/x")])
    assert outside is not None
    assert "outside /pnfs/vo" in outside.needed


_NAMES = st.lists(st.text(alphabet="ab./%2e", max_size=4), max_size=4).map("/".join)


@given(_NAMES, st.lists(st.sampled_from([b"a", b"ab", b"b"]), max_size=4))
def test_a_scope_permits_nothing_beside_its_path(scope_path: str, parts: list[bytes]) -> None:
    claims = _claims(scope=f"storage.read:/{scope_path}")
    path = b"/" + b"/".join(parts)
    if scope_misfit(claims, _RULES, [Need(_READ, path)]) is None:
        (grant,) = claims.grants
        assert b".." not in grant.path
        assert tuple(parts[: len(grant.path)]) == grant.path


@given(
    st.dictionaries(
        st.sampled_from(["iss", "aud", "nbf", "exp", "scope", "wlcg.ver"]),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        ),
    )
)
def test_any_payload_has_an_answer(payload: dict[str, object]) -> None:
    claims = TokenClaims.of(payload)
    for found in (misfit(claims, _RULES, _NOW), scope_misfit(claims, _RULES, [Need(_ALL, b"/x")])):
        assert found is None or found.sentence("S").isprintable()


def test_a_lot_of_scopes_costs_little() -> None:
    begun = datetime.now(UTC)
    claims = _claims(scope="storage.read:/" + "a/" * 2000 + " storage.read:/b" * 2000)
    assert scope_misfit(claims, _RULES, [Need(_READ, b"/b/" + b"c/" * 1000)]) is None
    assert datetime.now(UTC) - begun < timedelta(seconds=1)
