"""What users give the service to act for them, and which of it fits the route of a job: pure decisions."""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Protocol, TypeVar

from attrs import frozen

from pdm.workqueue.domain.failures import FailureCode

#: Stands for "every site" where a credential says for which one it is.
ALL_SITES = 0
#: A credential that ends sooner is as good as ended: a process has to start before it can be used.
MIN_VALIDITY = timedelta(seconds=1)


class CredentialKind(enum.StrEnum):
    """Kinds of credentials; a mover says which one it needs."""

    #: An X.509 proxy with its key (RFC 3820), delegated or fetched from a MyProxy server.
    PROXY = "proxy"
    #: A private key for SSH.
    SSH_KEY = "ssh-key"
    #: A bearer token for HTTPS.
    TOKEN = "token"  # noqa: S105 - the name of a kind
    #: An access key with its secret key, for S3.
    S3_KEY = "s3-key"

    @property
    def words(self) -> str:
        """What people call one."""
        return {"proxy": "proxy", "ssh-key": "SSH key", "token": "token", "s3-key": "S3 key"}[self.value]

    @property
    def remedy(self) -> str:
        """What a user does to give the service one."""
        return {
            "proxy": "run 'pdm delegate', or 'pdm login SITE' where the site has a MyProxy server",
            "ssh-key": "run 'pdm ssh-key SITE', and install the public key at the site",
            "token": "run 'pdm token SITE'",
            "s3-key": "run 'pdm s3-key SITE'",
        }[self.value]


@frozen
class CredentialNeed:
    """What is needed at one site of a route.

    Attributes:
        kinds: any of them will do; the first of which there is one is taken.
        optional: the service has a credential of its own, for users without one.
    """

    kinds: tuple[CredentialKind, ...]
    optional: bool = False

    def at(self, owner_id: int | None) -> CredentialNeed:
        """What is needed at a site of somebody's own; the service lends its own at those of its operators alone.

        Else users could make sites to do with it what they like.

        Args:
            owner_id: user that registered the site; None for a site of the operators.
        """
        return self if owner_id is None else CredentialNeed(self.kinds)


class CredentialCandidate(Protocol):
    """What the choice among credentials needs to know of one.

    Attributes:
        site_id: the site that it is for; `ALL_SITES` for every one.
        valid_until: UTC; None for one that does not end.
    """

    @property
    def site_id(self) -> int: ...
    @property
    def subject(self) -> str: ...
    @property
    def valid_until(self) -> datetime | None: ...


class CandidateOfKind(CredentialCandidate, Protocol):
    """A credential that says which kind it is of."""

    @property
    def kind(self) -> CredentialKind: ...


_C = TypeVar("_C", bound=CredentialCandidate)
_K = TypeVar("_K", bound=CandidateOfKind)


class NoCredentialError(Exception):
    """None fits.

    Attributes:
        code: CREDENTIAL_MISSING or CREDENTIAL_EXPIRED.
    """

    def __init__(self, code: FailureCode, message: str, kind: CredentialKind) -> None:
        super().__init__(message)
        self.code = code
        self.kind = kind


def choose_credentials(
    found: Sequence[_C], kind: CredentialKind, sites: Collection[int], now: datetime
) -> Mapping[int, _C]:
    """The credential for each site of a route.

    A site's own one comes before the one for every site. A proxy speaks for both ends of a transfer at once, so it is
    one and the same for the whole route: one for every site, or else one of those that the sites have been given, if
    all of them are of the same subject; then no site gets more power than it has been given.

    Args:
        found: the user's of that kind, for any site.

    Raises:
        NoCredentialError: a site has none, or none that is still valid.
    """
    own = {site: _for_site(found, kind, site, now) for site in sorted(sites)}
    if kind is not CredentialKind.PROXY or len(set(map(id, own.values()))) == 1:
        return own
    if len({credential.subject for credential in own.values()}) == 1:
        longest = max(own.values(), key=_end)
        return dict.fromkeys(own, longest)
    common = [credential for credential in found if credential.site_id == ALL_SITES and _lasts(credential, now)]
    if common:
        return dict.fromkeys(own, common[0])
    raise NoCredentialError(
        FailureCode.CREDENTIAL_MISSING,
        "the proxies for the two sites are of different subjects, and a transfer needs one: run 'pdm delegate'",
        kind,
    )


def choose_credentials_by_need(
    found: Sequence[_K], needs: Mapping[int, CredentialNeed], now: datetime
) -> dict[int, _K]:
    """The credential for each site of a route whose sites may need credentials of several kinds.

    Args:
        found: the user's, of all kinds that are needed, for any site.

    Returns:
        Site → credential; a site for which the service has to take its own is left out.

    Raises:
        NoCredentialError: a site has none, or none that is still valid.
    """
    chosen: dict[int, _K] = {}
    proxied: set[int] = set()
    for site, need in sorted(needs.items()):
        for kind in need.kinds:
            if kind is CredentialKind.PROXY:
                proxied.add(site)
                break
            try:
                chosen |= choose_credentials(_of_kind(found, kind), kind, {site}, now)
                break
            except NoCredentialError as error:
                if need.optional and error.code is FailureCode.CREDENTIAL_MISSING:
                    # One that has ended is not replaced: the service may be somebody else at the site.
                    break
                if kind is need.kinds[-1]:
                    raise
    if proxied:
        # One for all of the route.
        chosen |= choose_credentials(_of_kind(found, CredentialKind.PROXY), CredentialKind.PROXY, proxied, now)
    return chosen


def needed_kinds(needs: Mapping[int, CredentialNeed]) -> list[CredentialKind]:
    """All kinds of which a credential may be taken, each once."""
    return list(dict.fromkeys(kind for need in needs.values() for kind in need.kinds))


def _of_kind(found: Sequence[_K], kind: CredentialKind) -> list[_K]:
    return [credential for credential in found if credential.kind is kind]


def earliest_expiry(chosen: Mapping[int, CredentialCandidate]) -> datetime | None:
    """When the first of the chosen ones ends; None if none does."""
    return min((each.valid_until for each in chosen.values() if each.valid_until is not None), default=None)


def _for_site(found: Sequence[_C], kind: CredentialKind, site: int, now: datetime) -> _C:
    fitting = sorted(
        (credential for credential in found if credential.site_id in (site, ALL_SITES)),
        key=lambda credential: credential.site_id == ALL_SITES,
    )
    for credential in fitting:
        if _lasts(credential, now):
            return credential
    if not fitting:
        what = "no credential has been delegated" if kind is CredentialKind.PROXY else f"there is no {kind.words}"
        raise NoCredentialError(FailureCode.CREDENTIAL_MISSING, f"{what} for site {site}", kind)
    ended = max(fitting, key=_end)
    words = f"the {kind.words} of {ended.subject} expired at {_end(ended):%Y-%m-%dT%H:%M:%SZ}"
    raise NoCredentialError(FailureCode.CREDENTIAL_EXPIRED, words, kind)


def _lasts(credential: CredentialCandidate, now: datetime) -> bool:
    return credential.valid_until is None or credential.valid_until > now + MIN_VALIDITY


def _end(credential: CredentialCandidate) -> datetime:
    return credential.valid_until or datetime.max.replace(tzinfo=UTC)
