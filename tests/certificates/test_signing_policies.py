"""Who may sign whose subject: real handshakes with two authorities, each of which tries to sign the other's user."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from cryptography import x509
from twisted.internet.threads import deferToThread

from pdm.workqueue.certificates.pem import to_pem
from pdm.workqueue.certificates.trust import read_trust
from pdm.workqueue.certificates.verification import ChainRefusedError
from pdm.workqueue.domain.signing_policy import PolicyFile, SigningPolicies
from tests.certificates.test_tls_server import refusal
from tests.support import forging
from tests.support.forging import as_authority, certified, odd_proxy

ALICE = "/DC=org/DC=test/CN=Alice Jones"


def replace_policy(directory: Path, text: str | None, suffix: str = "signing_policy", authority: Any = None) -> None:
    """Write the policies of an authority anew, or remove them."""
    for path in directory.glob("*.[0-9]"):
        if authority is None or path.read_bytes() == to_pem(authority.certificate):
            target = path.with_suffix(f".{suffix}")
            target.unlink(missing_ok=True)
            if text is not None:
                target.write_text(text)


def eacl(authority: str, *subjects: str, rights: str = "pos_rights") -> str:
    quoted = " ".join(f'"{subject}"' for subject in subjects)
    return f"access_id_CA X509 '{authority}'\n{rights} globus CA:sign\ncond_subjects globus '{quoted}'\n"


@pytest.fixture
def forged(pki: Any) -> Any:
    """Alice, as the stranger's authority signs her."""
    return certified(pki.stranger_authority, ALICE)


@pytest_twisted.ensureDeferred
async def test_an_authority_signs_no_subject_of_another(
    serve: Any, pki: Any, forged: Any, tmp_path: Path, tls_lines: list[str]
) -> None:
    server = serve("off")
    pki.stranger_authority.write_trust(tmp_path / "trust")
    server.tls.reload()
    bobs = certified(pki.authority, pki.stranger.dn)
    for each in (forged, forged.proxy(), bobs, bobs.proxy().proxy()):
        await refusal(server.client(each))
    assert [line.split("authority ")[1].split(",")[0] for line in tls_lines] == [
        *["/DC=org/DC=stranger/CN=Stranger CA may not sign such a subject"] * 2,
        *["/DC=org/DC=test/CN=Test CA may not sign such a subject"] * 2,
    ]
    assert all(line.split("subject=")[1].startswith("/DC=org/") and ".signing_policy" in line for line in tls_lines)
    for each in (pki.alice, pki.alice_proxy, pki.stranger, pki.stranger.proxy()):
        assert (await server.client(each)())[0] == 200
    # What comes by delegation is judged by the same.
    trust = server.tls.trust
    with pytest.raises(ChainRefusedError, match="may not sign"):
        trust.verify((forged.proxy().certificate, forged.certificate), datetime.now(UTC))
    assert len(trust.verify((pki.alice_proxy.certificate, pki.alice.certificate), datetime.now(UTC))) == 3


_TEST, _SIGN = "/DC=org/DC=test/CN=Test CA", "pos_rights globus CA:sign"
_NAMESPACE = f'TO Issuer "{_TEST}" PERMIT Subject '


@pytest.mark.parametrize(
    ("suffix", "text", "words"),
    [
        ("signing_policy", eacl(_TEST, "/DC=org/DC=other/*", "/DC=org/DC=test/CN=*"), ""),
        ("signing_policy", "# x\n" + eacl(_TEST, "/DC=org/DC=test/*").replace("\n", "  # y\r\n"), ""),
        ("signing_policy", eacl(_TEST, "/DC=org/DC=test/CN=Alice?Jones"), ""),
        ("signing_policy", eacl("/CN=x", "/CN=*") + eacl(_TEST, "/DC=org/*"), ""),
        ("signing_policy", eacl(_TEST, "/DC=org/DC=other/*"), "may not sign"),
        ("signing_policy", eacl(_TEST, "/DC=ORG/*", "/DC=org/DC=test/CN=Alice"), "may not sign"),
        ("signing_policy", eacl(_TEST, "*") + eacl(_TEST, ALICE, rights="neg_rights"), "may not sign"),
        ("signing_policy", eacl("/CN=Somebody Else", "*"), "may not sign"),
        ("signing_policy", "", "it grants nothing"),
        ("signing_policy", "<html>404", "line 1: a keyword"),
        ("signing_policy", f"\naccess_id_CA X509 '{_TEST}\n", "line 2: a quotation mark is missing"),
        ("signing_policy", f"access_id_CA X509 '{_TEST}'\n{_SIGN}\n", "line 2: the rights have no cond_subjects"),
        ("signing_policy", f"{_SIGN}\n" + eacl(_TEST, "*"), "line 1: pos_rights globus is not expected"),
        ("signing_policy", eacl(_TEST, "*").replace("CA:sign", "CA:all"), "line 2: pos_rights globus is not"),
        ("signing_policy", eacl(_TEST, "*") + "\0" * 70000, "more than 65536 bytes"),
        ("namespaces", f'#NAMESPACES-VERSION: 1.0\n{_NAMESPACE}\\\n  "/DC=org/(DC=a|DC=te?st)/CN=[A-Z].*"\n', ""),
        ("namespaces", 'TO Issuer SELF\\\n PERMIT\\\n Subject "/DC=org/DC=test/.*"', ""),
        ("namespaces", _NAMESPACE + '"/DC=org/DC=test/CN=[^A].*"', "may not sign"),
        ("namespaces", _NAMESPACE + '"/DC=org/DC=test"', "may not sign"),
        ("namespaces", f'{_NAMESPACE}".*"\nTO Issuer SELF DENY Subject ".*Alice.*"', "may not sign"),
        ("namespaces", 'TO Issuer "/CN=x" PERMIT Subject ".*"', "may not sign"),
        ("namespaces", f'{_NAMESPACE}".*"\n\nTO Issuer', "line 3: TO Issuer"),
        ("namespaces", _NAMESPACE + '"/DC=(.*)*x"', "line 1: a bracket may not be repeated"),
        ("namespaces", _NAMESPACE + '"/DC=(a"', "line 1: a bracket is not closed"),
        ("namespaces", _NAMESPACE + '"' + "(a|b)" * 7 + '"', "line 1: it has too many alternatives"),
        ("namespaces", _NAMESPACE + '"[a" \\', "line 1: the statement has no end"),
    ],
)
def test_what_policy_files_say(pki: Any, tmp_path: Path, suffix: str, text: str, words: str) -> None:
    pki.authority.write_trust(tmp_path)
    replace_policy(tmp_path, None)
    replace_policy(tmp_path, text, suffix)
    trust = read_trust(tmp_path)
    chain = (pki.alice.certificate, pki.authority.certificate)
    verdict = trust.check_signatures(chain)
    assert verdict.constrained
    if words:
        assert words in str(verdict.refusal)
        assert f".{suffix}" in str(verdict.refusal)
    else:
        assert verdict.refusal is None
    malformed = bool(words) and words != "may not sign"
    assert bool(trust.problems) is malformed
    # A file that cannot be understood closes its authority, and is named where the operator reads.
    assert all(words in problem and f".{suffix} is no policy" in problem for problem in trust.problems)


def test_both_kinds_of_file_have_to_permit(pki: Any, tmp_path: Path) -> None:
    pki.authority.write_trust(tmp_path)
    chain = (pki.alice.certificate, pki.authority.certificate)
    replace_policy(tmp_path, _NAMESPACE + '".*CN=B.*"', "namespaces")
    assert ".namespaces" in str(read_trust(tmp_path).check_signatures(chain).refusal)
    assert read_trust(tmp_path, signing="off").check_signatures(chain).refusal is None


def test_names_are_compared_as_the_grid_writes_them(pki: Any) -> None:
    policy = eacl(_TEST, "/DC=org/CN=host/*", "/DC=org/Email=*", r"/DC=org/CN=\xC3\x85sa", "/DC=org/USERID=7")
    file = PolicyFile.read("x.signing_policy", policy.encode(), [_TEST])
    for subject in ("/CN=host/a.b", "/emailAddress=a@b", "/CN=Åsa", "/UID=7"):
        assert SigningPolicies((file,)).evaluate([f"/DC=org{subject}", _TEST]).refusal is None
    assert SigningPolicies((file,)).evaluate(["/DC=org/CN=" + "x" * 5000, _TEST]).refusal is not None


def test_a_pattern_takes_time_in_proportion(pki: Any) -> None:
    """With backtracking this would take years."""
    text = f'TO Issuer "{_TEST}" PERMIT Subject "{".*a" * 40}b"'
    file = PolicyFile.read("x.namespaces", text.encode(), [_TEST])
    assert file.problem == ""
    assert SigningPolicies((file,)).evaluate(["a" * 400, _TEST]).refusal is not None


@pytest.mark.parametrize("own", [None, "/DC=org/DC=test/CN=Dave", "/DC=org/DC=stranger/*"])
@pytest_twisted.ensureDeferred
async def test_authorities_below(serve: Any, pki: Any, tmp_path: Path, own: str | None) -> None:
    """What binds an authority binds those that it makes, as long as these have no policy of their own."""
    server = serve("off")
    below = pki.authority.subordinate("Below")
    if own is not None:
        below.write_trust(tmp_path / "trust")
        replace_policy(tmp_path / "trust", eacl(below.dn, own), authority=below)
    server.tls.reload()
    dave = certified(below, "/DC=org/DC=test/CN=Dave")
    outside = certified(below, "/DC=org/DC=stranger/CN=Alice Jones")
    for each, good in ((dave, own != "/DC=org/DC=stranger/*"), (outside, own == "/DC=org/DC=stranger/*")):
        if good:
            assert (await server.client(each)())[0] == 200
        else:
            await refusal(server.client(each))
    assert len(server.refused) == 1


@pytest_twisted.ensureDeferred
async def test_an_authority_makes_no_namesake_of_another(serve: Any, pki: Any, tmp_path: Path) -> None:
    """A cross-signed authority is good only where its signer may sign its subject."""
    server = serve("off")
    pki.stranger_authority.write_trust(tmp_path / "trust")
    server.tls.reload()
    fake = as_authority(certified(pki.stranger_authority, pki.authority.dn, ca=True))
    await refusal(server.client(certified(fake, ALICE)))
    assert server.refused.pop() == "certificate has a bad signature"
    crossed = certified(pki.stranger_authority, pki.authority.dn, ca=True, key=pki.authority.key)
    user = certified(pki.authority, ALICE)
    # With the trusted root itself at hand the cross-signed one does not matter; without it it is refused.
    both = type(user)(user.certificate, user.key, (crossed.certificate,))
    assert (await server.client(both)())[0] == 200
    for path in (tmp_path / "trust").glob("*.[0-9]"):
        if path.read_bytes() == to_pem(pki.authority.certificate):
            path.unlink()
    server.tls.reload()
    (tmp_path / "ca.pem").write_bytes(to_pem(pki.authority.certificate))
    await refusal(server.client(both, tmp_path / "ca.pem"))
    (reason,) = server.refused
    assert reason.startswith(f"its authority {pki.stranger_authority.dn} may not sign such a subject, says ")


@pytest_twisted.ensureDeferred
async def test_policies_are_read_again_with_the_trust(
    serve: Any, pki: Any, tmp_path: Path, tls_lines: list[str]
) -> None:
    server = serve("off")
    trust = tmp_path / "trust"
    pki.stranger_authority.write_trust(trust)
    server.tls.reload()
    alice, stranger = server.client(pki.alice), server.client(pki.stranger)
    peers = [(await ask())[1]["peer"] for ask in (alice, stranger)]
    replace_policy(trust, eacl(pki.authority.dn, "/DC=org/DC=nothing/*"), authority=pki.authority)
    assert await server.tls.refresh_if_changed(deferToThread) is True
    # The kept connection was ended, too.
    await refusal(alice)
    assert (await stranger())[1]["peer"] == peers[1]
    closed, *refused = tls_lines
    assert closed.startswith(f"tls closed peer=127.0.0.1:{peers[0]} subject={ALICE} reason=its authority")
    assert refused
    pki.authority.write_trust(trust)
    assert await server.tls.refresh_if_changed(deferToThread) is True
    assert (await alice())[0] == 200


@pytest_twisted.ensureDeferred
async def test_connections_end_with_their_authority(serve: Any, pki: Any, tmp_path: Path, tls_lines: list[str]) -> None:
    server = serve("off")
    bundle = tmp_path / "ca.pem"
    bundle.write_bytes(to_pem(pki.authority.certificate, pki.stranger_authority.certificate))
    server = serve("off", trust=bundle)
    alice, stranger = server.client(pki.alice), server.client(pki.stranger.proxy())
    peer = (await alice())[1]["peer"]
    assert (await stranger())[0] == 200
    bundle.write_bytes(to_pem(pki.authority.certificate))
    assert await server.tls.refresh_if_changed(deferToThread) is True
    assert [line.split("reason=")[1] for line in tls_lines if "closed" in line] == [
        "its authority is no longer trusted here"
    ]
    await refusal(stranger)
    assert (await alice())[1]["peer"] == peer


@pytest_twisted.ensureDeferred
async def test_policies_beside_a_file_of_authorities(serve: Any, pki: Any, forged: Any, tmp_path: Path) -> None:
    bundle, policy = tmp_path / "ca.pem", tmp_path / "ca.signing_policy"
    bundle.write_bytes(to_pem(pki.authority.certificate, pki.stranger_authority.certificate))
    server = serve("off", trust=bundle)
    # Without a policy the handshake succeeds; who that is, is for the users' table to say.
    assert (await server.client(forged)())[0] == 200
    policy.write_text(eacl(_TEST, "/DC=org/DC=test/*") + eacl(pki.stranger_authority.dn, "/DC=org/DC=stranger/*"))
    assert await server.tls.refresh_if_changed(deferToThread) is True
    await refusal(server.client(forged))
    for each in (pki.alice, pki.stranger):
        assert (await server.client(each)())[0] == 200
    # An authority of which the file says nothing may sign nothing.
    policy.write_text(eacl(_TEST, "/DC=org/DC=test/*"))
    server.tls.reload()
    await refusal(server.client(pki.stranger))


def test_authorities_without_a_policy(pki: Any, tmp_path: Path, serve: Any, tls_lines: list[str]) -> None:
    server = serve("off")
    pki.stranger_authority.write_trust(tmp_path / "trust")
    replace_policy(tmp_path / "trust", None, authority=pki.stranger_authority)
    server.tls.reload()
    (line,) = tls_lines
    assert pki.stranger_authority.dn in line
    assert pki.authority.dn not in line
    trust = read_trust(tmp_path / "trust", "off", "require")
    chain = (pki.stranger.certificate, pki.stranger_authority.certificate)
    assert "has no signing policy here" in str(trust.check_signatures(chain).refusal)
    verdict = server.tls.trust.check_signatures(chain)
    assert (verdict.refusal, verdict.constrained) == (None, False)


@pytest_twisted.ensureDeferred
async def test_name_constraints_hold_for_users_and_their_proxies(serve: Any, pki: Any, tmp_path: Path) -> None:
    server = serve("off")
    only = x509.NameConstraints([x509.DirectoryName(x509.Name(list(pki.authority.certificate.subject)[:2]))], None)
    below = as_authority(certified(pki.authority, "/DC=org/DC=test/CN=Bound", (only, True), ca=True))
    for path in (tmp_path / "trust").glob("*.signing_policy"):
        path.unlink()
    server.tls.reload()
    inside, outside = certified(below, "/DC=org/DC=test/CN=Dave"), certified(below, "/DC=org/DC=other/CN=Dave")
    for each in (inside, inside.proxy()):
        assert (await server.client(each)())[0] == 200
    for each in (outside, outside.proxy()):
        await refusal(server.client(each))
    assert server.refused == ["an authority of its chain may not sign such a subject (name constraints)"] * 2


_LEGACY = "a legacy proxy (GT2 or GT3): make an RFC 3820 proxy instead"
_ODD_PROXIES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "independent": ((forging.INDEPENDENT,), {}, "an independent proxy, which has no rights of its user"),
    "unknown": ((forging.UNKNOWN_POLICY,), {}, "a proxy of an unknown policy"),
    "not critical": ((forging.INHERIT_ALL,), {"critical": False}, "a proxy whose ProxyCertInfo is not critical"),
    "legacy": ((None,), {"name": "proxy"}, _LEGACY),
    "limited legacy": ((None,), {"name": "limited proxy"}, _LEGACY),
    "named": ((None,), {"name": "other"}, "signed by a certificate that is no authority"),
}


@pytest.mark.parametrize("kind", _ODD_PROXIES)
@pytest_twisted.ensureDeferred
async def test_proxies_that_do_not_speak_for_their_user(serve: Any, pki: Any, kind: str) -> None:
    arguments, options, words = _ODD_PROXIES[kind]
    server = serve("off")
    odd = odd_proxy(pki.alice, *arguments, **options)
    above = odd_proxy(pki.alice_proxy, *arguments, **options)
    for each in (odd, above):
        await refusal(server.client(each))
    # Also where a good proxy was made of it.
    await refusal(server.client(odd.proxy()))
    reasons = server.refused
    assert reasons[:2] == [words] * 2
    assert len(reasons) == 3
    with pytest.raises(ChainRefusedError) as caught:
        server.tls.trust.verify((odd.certificate, pki.alice.certificate), datetime.now(UTC))
    assert caught.value.reason == words


@pytest_twisted.ensureDeferred
async def test_no_more_proxies_than_one_allows(serve: Any, pki: Any) -> None:
    server = serve("off")
    last = odd_proxy(pki.alice, forging.NO_MORE_PROXIES)
    assert (await server.client(last)())[0] == 200
    await refusal(server.client(last.proxy()))
    assert server.refused == ["chain of proxies is longer than one of them allows"]
