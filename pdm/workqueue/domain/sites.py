"""Sites that users have added, restrictions that operators have set, and audit records, as plain values."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from datetime import datetime

from attrs import frozen

from pdm.workqueue.domain.enums import JobProtocol, MoverKind
from pdm.workqueue.domain.oidc import OidcSettings

#: Sites of the database have larger numbers; those below are for the files of ``sites.d``.
LAST_FILE_SITE = 1_000_000


@frozen
class NewSite:
    """What a user says about a site.

    Attributes:
        public: whether everybody sees and uses it; else only its owner.
        endpoints: protocol → URLs, the preferred one first.
        limit_in: streams of work that go into it at once, at most; None for what the configuration says.
        limit_out: likewise, out of it.
        authorities: PEM of the authorities that are trusted for this site only, besides the usual ones; may be empty.
        myproxy: ``HOST:PORT`` of the MyProxy server at which its users log on; None where it has none.
        mover: who carries out the elements of its jobs.
        tape: URL of its tape API; None where its HTTPS endpoint names it, or where it has none.
        fts: ``https://HOST:PORT`` of the FTS3 that carries out copies from and to it; None where there is none.
        unlisted: whether the service has made it of a URL: lists of sites leave it out.
        oidc: the issuer of its tokens, and the client that users log in with; None where it says nothing of them.
    """

    owner_id: int
    public: bool
    name: str
    description: str
    default_folder: str
    endpoints: Mapping[JobProtocol, Sequence[str]]
    limit_in: int | None
    limit_out: int | None
    authorities: str
    myproxy: str | None = None
    mover: MoverKind = MoverKind.NATIVE
    tape: str | None = None
    fts: str | None = None
    unlisted: bool = False
    oidc: OidcSettings | None = None


@frozen
class SiteRecord:
    """A site as the database knows it."""

    id: int
    content: NewSite


class RestrictionKind(enum.StrEnum):
    """What can be restricted."""

    #: A site is drained: what runs there ends, nothing new starts.
    SITE = "site"
    #: A user is banned: submits nothing, and nothing more of theirs starts.
    USER = "user"


@frozen
class Restriction:
    """What an operator has put out of use for a while.

    Attributes:
        since: when, UTC.
    """

    kind: RestrictionKind
    number: int
    message: str
    by: str
    since: datetime


@frozen
class SiteSnapshot:
    """All sites of the database and all restrictions, as of one transaction.

    Attributes:
        version: grows with each change.
    """

    version: int
    sites: Sequence[SiteRecord] = ()
    restrictions: Sequence[Restriction] = ()


@frozen
class Actor:
    """Who does something that is worth to be noted."""

    user_id: int
    subject: str


@frozen
class AuditRecord:
    """One act.

    Attributes:
        action: what was done: ``site.create``, ``user.ban``.
        target: to whom or what: ``site 1000001``, ``user 3``.
    """

    id: int
    at: datetime
    subject: str
    action: str
    target: str
    details: str
