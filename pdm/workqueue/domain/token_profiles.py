"""Bearer tokens of the WLCG (v1.0) and SciTokens (v2.0) profiles: whether one fits a site and what is to be done there.

Only what the claims say is compared; the storage verifies the signature. A token without claims (opaque, or a
macaroon) is checked by the storage, and so is one that names no capability of a storage (`wlcg.groups`).
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from urllib.parse import unquote_to_bytes, urlsplit

from attrs import frozen

#: Tolerated difference between the clocks of issuer and service.
CLOCK_SKEW = timedelta(seconds=60)
#: Audiences that stand for every service, by the claim that a profile is known by.
_ANY_AUDIENCE = frozenset({"https://wlcg.cern.ch/jwt/v1/any", "ANY"})
#: 9999-12-31; a later time is not meant.
_LAST_SECOND = 253402300799
_LONGEST_SHOWN = 300
#: A token holds no more: it is at most 16 KiB long.
_MOST_WORDS = 1000


class Capability(enum.StrEnum):
    """What scopes permit, as a storage understands them."""

    READ = "read"
    STAGE = "stage"
    CREATE = "create"
    MODIFY = "modify"


#: Word of a scope before its path → what it permits. A WLCG token creates without replacing, or changes all.
_GRANTS: Mapping[str, frozenset[Capability]] = {
    "storage.read": frozenset({Capability.READ}),
    "storage.stage": frozenset({Capability.READ, Capability.STAGE}),
    "storage.create": frozenset({Capability.CREATE}),
    "storage.modify": frozenset({Capability.CREATE, Capability.MODIFY}),
    "read": frozenset({Capability.READ}),
    "write": frozenset({Capability.CREATE, Capability.MODIFY}),
}
#: Capability → the scopes that permit it, the narrowest first, for messages.
_WORDS: Mapping[Capability, Mapping[bool, str]] = {
    Capability.READ: {True: "storage.read", False: "read"},
    Capability.STAGE: {True: "storage.stage", False: "read"},
    Capability.CREATE: {True: "storage.create", False: "write"},
    Capability.MODIFY: {True: "storage.modify", False: "write"},
}
_Path = tuple[bytes, ...]


@frozen
class Grant:
    """What one scope permits: `capabilities` at `path` and below it."""

    capabilities: frozenset[Capability]
    path: _Path


@frozen
class TokenClaims:
    """The claims of a JWT that decide where it can be used.

    Attributes:
        audiences: None if the token has no ``aud``.
        grants: of the scopes that are capabilities of a storage.
        scope: as the token has it, for messages.
        is_wlcg: whether it has ``wlcg.ver``, or scopes of that profile.
        malformed: claims of a wrong type, for messages.
    """

    issuer: str
    audiences: tuple[str, ...] | None
    grants: tuple[Grant, ...]
    scope: str
    not_before: datetime | None
    expires: datetime | None
    is_wlcg: bool
    malformed: tuple[str, ...] = ()

    @classmethod
    def of(cls, claims: Mapping[str, object]) -> TokenClaims:
        """Read the payload of a JWT; claims that cannot be read are `malformed`."""
        malformed = [name for name in ("nbf", "exp") if name in claims and _time(claims[name]) is None]
        audience, scope, issuer = claims.get("aud"), claims.get("scope", ""), claims.get("iss", "")
        audiences: tuple[str, ...] | None = None
        if isinstance(audience, str):
            audiences = (audience,)
        elif isinstance(audience, list) and all(isinstance(each, str) for each in audience[:_MOST_WORDS]):
            audiences = tuple(audience[:_MOST_WORDS])
        elif audience is not None:
            malformed.append("aud")
        if isinstance(scope, list) and all(isinstance(each, str) for each in scope):
            scope = " ".join(scope)
        if not isinstance(scope, str):
            malformed.append("scope")
            scope = ""
        if not isinstance(issuer, str):
            malformed.append("iss")
            issuer = ""
        words = scope.split()[:_MOST_WORDS]
        return cls(
            issuer=issuer,
            audiences=audiences,
            grants=tuple(grant for word in words if (grant := _grant(word)) is not None),
            scope=scope,
            not_before=_time(claims.get("nbf")),
            expires=_time(claims.get("exp")),
            is_wlcg="wlcg.ver" in claims or any(word.startswith("storage.") for word in words),
            malformed=tuple(malformed),
        )


@frozen(kw_only=True)
class TokenRules:
    """What a site expects of tokens.

    Attributes:
        servers: ``HOST:PORT`` of its endpoints.
        issuer: the only one that it accepts; None if unknown.
        audiences: that it accepts besides its own addresses.
        base_paths: directories that the paths of scopes may be relative to.
    """

    servers: Collection[str]
    issuer: str | None = None
    audiences: Sequence[str] = ()
    base_paths: Sequence[str] = ("/",)


@frozen
class Need:
    """What a token has to permit: any one of `capabilities` at `path`, a path of the URL."""

    capabilities: tuple[Capability, ...]
    path: bytes


@frozen
class Misfit:
    """Why a token cannot be used.

    Attributes:
        claim: the name of the claim.
        has: what it holds.
        needed: what it would have to hold.
        is_over: whether the token has expired.
    """

    claim: str
    has: str
    needed: str
    is_over: bool = False

    def sentence(self, site: str) -> str:
        """The misfit, for the user."""
        return (
            f"the token for site {site} does not fit: its claim {self.claim!r} is {self.has}, and {self.needed}"
            " is needed; no server was asked"
        )


def misfit(claims: TokenClaims, rules: TokenRules, now: datetime) -> Misfit | None:
    """Why a token cannot be used at a site at all; None if it can."""
    if claims.malformed:
        name = claims.malformed[0]
        return Misfit(name, "of a wrong type", "a number" if name in ("nbf", "exp") else "text")
    if claims.expires is not None and claims.expires <= now - CLOCK_SKEW:
        return Misfit("exp", _when(claims.expires), f"a time after {_when(now)}", is_over=True)
    if claims.not_before is not None and claims.not_before > now + CLOCK_SKEW:
        return Misfit("nbf", _when(claims.not_before), f"a time before {_when(now)}")
    if rules.issuer is not None and not same_issuer(claims.issuer, rules.issuer):
        return Misfit("iss", _shown(claims.issuer), _shown(rules.issuer))
    if claims.audiences is not None and not _fits_audience(claims.audiences, rules):
        wanted = [*rules.audiences, *(f"https://{server}" for server in sorted(rules.servers))]
        return Misfit("aud", _shown(" ".join(claims.audiences)), " or ".join(_shown(each) for each in wanted[:4]))
    return None


def scope_misfit(claims: TokenClaims, rules: TokenRules, needs: Iterable[Need]) -> Misfit | None:
    """The first of some needs that no scope of a token permits; None if all are permitted.

    A token without any scope of a storage permits what the storage decides by its subject or groups.
    """
    if not claims.grants:
        return None
    for need in needs:
        paths = [path for base in rules.base_paths if (path := _below(need.path, base)) is not None]
        if any(_permits(grant, need, path) for grant in claims.grants for path in paths):
            continue
        place = _text(paths[0] if paths else _parts(need.path))
        wanted = " or ".join(dict.fromkeys(f"{_WORDS[each][claims.is_wlcg]}:/{place}" for each in need.capabilities))
        if not paths:
            wanted += f" (outside {_shown(rules.base_paths[0])}, the base path of the site)"
        return Misfit("scope", _shown(claims.scope), wanted)
    return None


def same_issuer(one: str, other: str) -> bool:
    """Whether two texts name one issuer; a slash at the end makes no difference."""
    return one.rstrip("/") == other.rstrip("/")


def address_of_audience(audience: str) -> str:
    """The ``HOST[:PORT]`` that an audience names, in lower case: of a URL, or the whole text."""
    if "://" not in audience:
        return audience.rstrip("/").lower()
    try:
        return urlsplit(audience).netloc.lower()
    except ValueError:
        return ""


def _fits_audience(audiences: Sequence[str], rules: TokenRules) -> bool:
    if not _ANY_AUDIENCE.isdisjoint(audiences) or not set(rules.audiences).isdisjoint(audiences):
        return True
    known: set[str] = set()
    for server in rules.servers:
        host, _, port = server.lower().rpartition(":")
        if not host or not port.isdigit():
            host, port = server.lower(), "443"
        # An audience without a port stands for the host.
        known |= {host, f"{host}:{port}"}
    return any(address_of_audience(audience) in known for audience in audiences)


def _grant(word: str) -> Grant | None:
    """What a scope permits; None if it is no capability of a storage, or has no usable path."""
    name, colon, place = word.partition(":")
    capabilities = _GRANTS.get(name)
    if capabilities is None:
        return None
    if not colon and name.startswith("storage."):
        # The WLCG profile requires the path.
        return Grant(frozenset(), ())
    path = _parts(unquote_to_bytes(place))
    if b".." in path or (place and not place.startswith("/")):
        return Grant(frozenset(), ())
    return Grant(capabilities, path)


def _permits(grant: Grant, need: Need, path: _Path) -> bool:
    return not grant.capabilities.isdisjoint(need.capabilities) and path[: len(grant.path)] == grant.path


def _below(path: bytes, base: str) -> _Path | None:
    """The components of a path below a directory; None if it is outside."""
    parts, above = _parts(path), _parts(base.encode("utf-8", "surrogateescape"))
    return parts[len(above) :] if parts[: len(above)] == above else None


def _parts(path: bytes) -> _Path:
    return tuple(part for part in path.split(b"/") if part not in (b"", b"."))


def _text(path: _Path) -> str:
    return _shown(b"/".join(path).decode("utf-8", "replace"))


def _shown(text: str) -> str:
    printable = "".join(character if character.isprintable() else "?" for character in text[:_LONGEST_SHOWN])
    return printable + ("..." if len(text) > _LONGEST_SHOWN else "")


def _when(time: datetime) -> str:
    return f"{time:%Y-%m-%dT%H:%M:%SZ}"


def _time(value: object) -> datetime | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LAST_SECOND:
        return None
    return datetime.fromtimestamp(int(value), UTC)
