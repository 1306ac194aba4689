"""Who may call an endpoint: authentication, roles, and refusal of what another site's page makes a browser send.

A browser presents the user's certificate by itself, also with what a foreign page submits or fetches. What may change
something must therefore come from a page of this service, as the browser says in headers that a page cannot set:
``Sec-Fetch-Site``, else ``Origin``. Programs send neither and are not concerned.

A user is identified by the subject of the end-entity certificate of the chain. A limited proxy is accepted like a full
one: grid sites refuse it for starting programs, but storage servers (and FTS) accept it for data transfers.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from weakref import WeakKeyDictionary

from attrs import define, field, frozen
from twisted.web.http_headers import Headers

from pdm.workqueue.certificates.tls_server import PeerIdentity
from pdm.workqueue.config.access_settings import UserSettings
from pdm.workqueue.config.reader import ConfigError
from pdm.workqueue.domain.subjects import normal_subject
from pdm.workqueue.http.problems import ForbiddenError, NotAuthenticatedError
from pdm.workqueue.store import users
from pdm.workqueue.store.database import Database
from pdm.workqueue.wire.responses import timestamp_text

#: Methods that change nothing on any route.
SAFE_METHODS = frozenset({b"GET", b"HEAD", b"OPTIONS"})

_SCHEME = b"https://"
#: A host, by name, IPv4 or IPv6 literal, and a port, as both ``Host`` and ``Origin`` have it.
_AUTHORITY = re.compile(rb"(\[[0-9a-f:.]{2,45}\]|[a-z0-9._-]{1,255})(?::([0-9]{0,5}))?")
_DEFAULT_PORT = b"443"


def foreign_origin(headers: Headers) -> str | None:
    """Whether a request that may change something comes from a page of another site.

    Where ``Sec-Fetch-Site`` says that it does not, ``Origin: null`` is accepted: browsers send it for forms of a page
    with the policy ``no-referrer``, as ours are.

    Returns:
        What the browser says about it; None for programs and for pages of this service.
    """
    sites = headers.getRawHeaders(b"Sec-Fetch-Site")
    origins = headers.getRawHeaders(b"Origin")
    if sites is None and origins is None:
        return None
    if sites is not None and sites != [b"same-origin"]:
        return f"Sec-Fetch-Site: {_shown(sites)}"
    if origins is None or (sites is not None and origins == [b"null"]):
        return None
    hosts = headers.getRawHeaders(b"Host") or []
    if len(origins) == len(hosts) == 1:
        # The daemon ends TLS itself: the scheme is always https, and Host is what the browser's user sees.
        scheme, authority = origins[0][: len(_SCHEME)].lower(), origins[0][len(_SCHEME) :]
        own = _host_and_port(hosts[0])
        if scheme == _SCHEME and own is not None and _host_and_port(authority) == own:
            return None
    return f"Origin: {_shown(origins)}"


def _host_and_port(authority: bytes) -> tuple[bytes, bytes] | None:
    """Host in lower case, and port; None if it is malformed."""
    match = _AUTHORITY.fullmatch(authority.lower())
    return None if match is None else (match[1], match[2] or _DEFAULT_PORT)


def _shown(values: Sequence[bytes]) -> str:
    return ", ".join(value.decode("latin-1") for value in values)[:200]


#: Cached callers; each takes some hundred bytes.
_MAX_CACHED_CALLERS = 10_000


class Role(enum.StrEnum):
    """Role of a user."""

    #: Submits jobs; sees and changes only the user's own.
    USER = "user"
    #: Also sees, cancels and retries the jobs of all users.
    OPERATOR = "operator"


@frozen
class Caller:
    """The authenticated sender of a request; `subject` is a distinguished name in slash form."""

    user_id: int
    subject: str
    role: Role
    #: The earliest expiry within the presented chain.
    certificate_ends_at: datetime
    #: Whether a limited proxy was presented.
    limited: bool

    @property
    def scope(self) -> int | None:
        """The user whose jobs the caller may see; None for all users."""
        return None if self.role is Role.OPERATOR else self.user_id


@frozen
class AccessList:
    """Roles of the listed subjects; `open_to_all` admits every subject with a trusted certificate as a user."""

    open_to_all: bool
    roles: Mapping[str, Role]

    @classmethod
    def read(cls, settings: UserSettings) -> AccessList:
        """Read the configured list.

        Raises:
            ConfigError: the file of listed users is unreadable, or a line of it is invalid.
        """
        roles: dict[str, Role] = {}
        if settings.listed_users is not None:
            try:
                text = settings.listed_users.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{settings.listed_users}: the list of users cannot be read: {error}") from error
            for number, line in enumerate(text.splitlines(), 1):
                if line.strip() and not line.lstrip().startswith("#"):
                    role, subject = _parse_user_line(line.strip(), f"{settings.listed_users}: line {number}")
                    roles[subject] = role
        roles.update(dict.fromkeys(settings.operators, Role.OPERATOR))
        return cls(settings.register == "anyone", roles)

    def role_of(self, subject: str) -> Role | None:
        """Role of a subject; None if it may not use the service."""
        return self.roles.get(subject, Role.USER if self.open_to_all else None)


def _parse_user_line(line: str, place: str) -> tuple[Role, str]:
    """Parse ``[ROLE] /SUBJECT``, or a line of a grid-mapfile (``"/SUBJECT" account``)."""
    word, _, rest = line.partition(" ")
    role, subject = (Role(word), rest.strip()) if word in list(Role) else (Role.USER, line)
    if subject.startswith('"'):
        subject = subject[1:].partition('"')[0]
    if not subject.startswith("/"):
        raise ConfigError(f"{place}: expected /SUBJECT, or a role ({', '.join(Role)}) and /SUBJECT")
    try:
        return role, normal_subject(subject)
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from error


@define(eq=False)
class Authenticator:
    """Authenticates callers; caches the caller of each connection, and the database row of each subject."""

    database: Database
    access: AccessList
    #: Returns the verified identity of a transport's peer; None without a certificate.
    identify: Callable[[Any], PeerIdentity | None]
    #: Current time, UTC.
    clock: Callable[[], datetime]
    #: Whether a user whom no signing policy covers is bound to the authority of the first connection.
    binds: bool = True
    _known: dict[tuple[str, str, bool], tuple[int, Role]] = field(factory=dict)
    _connected: WeakKeyDictionary[Any, Caller] = field(factory=WeakKeyDictionary)

    async def authenticate(self, transport: Any) -> Caller:
        """Authenticate the peer of a connection.

        Raises:
            NotAuthenticatedError: no certificate was presented, or it has expired.
            ForbiddenError: the subject is not a user of this service.
        """
        connected = self._connected.get(transport)
        # OpenSSL checks validity only in the handshake; a persistent connection may outlive a proxy.
        if connected is not None and self.clock() < connected.certificate_ends_at:
            return connected
        identity = self.identity(transport)
        # Without a signing policy, an authority could sign the subject of another authority's user.
        key = (identity.subject, identity.authority, identity.constrained)
        known = self._known.get(key) or await self._register(key, self.clock())
        caller = Caller(known[0], identity.subject, known[1], identity.chain_ends_at, identity.limited)
        self._connected[transport] = caller
        return caller

    def identity(self, transport: Any) -> PeerIdentity:
        """The identity of the peer of a connection, whose certificate is valid now.

        Raises:
            NotAuthenticatedError: no certificate was presented, or it has expired.
        """
        identity = self.identify(transport)
        if identity is None:
            raise NotAuthenticatedError(
                "no client certificate was presented: use a certificate or a grid proxy (curl: --cert and --key)"
            )
        if identity.chain_ends_at <= self.clock():
            end = timestamp_text(identity.chain_ends_at)
            raise NotAuthenticatedError(f"your certificate or proxy expired at {end}: make a new one and reconnect")
        return identity

    async def _register(self, key: tuple[str, str, bool], now: datetime) -> tuple[int, Role]:
        subject, authority, constrained = key
        rebind = constrained or not self.binds
        role = self.access.role_of(subject)
        if role is None:
            raise ForbiddenError(f"{subject} is not a user of this service: ask its operator to add you")
        record = await self.database.run(
            "register a user", users.register, subject, role.value, now, authority or None, rebind=rebind
        )
        if not rebind and authority and record.authority != authority:
            raise ForbiddenError(
                f"{subject} is registered with the authority {record.authority}, but your certificate was issued by"
                f" {authority}: an operator must state in a signing policy which of the two may sign this subject"
            )
        if len(self._known) >= _MAX_CACHED_CALLERS:
            self._known.clear()
        self._known[key] = (record.id, role)
        return self._known[key]


#: Failed logons of one user that are allowed within the window, at all daemons that share the database.
MAX_LOGON_FAILURES = 5
LOGON_WINDOW = timedelta(minutes=10)
