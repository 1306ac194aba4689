"""Authentication and authorisation of callers, and the limit on failed MyProxy logons.

A user is the subject of the end entity of the certificate chain. A limited proxy is accepted like a full one: grid
sites refuse it for starting programs, but storage servers (and FTS) accept it for moving data, and this service moves
data.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any
from weakref import WeakKeyDictionary

from attrs import define, field, frozen

from pdm.workqueue.certificates.tls_server import PeerIdentity
from pdm.workqueue.config.reader import ConfigError
from pdm.workqueue.config.settings import UserSettings
from pdm.workqueue.domain.subjects import normal_subject
from pdm.workqueue.http.problems import ForbiddenError, NotAuthenticatedError
from pdm.workqueue.store import users
from pdm.workqueue.store.database import Database
from pdm.workqueue.wire.responses import timestamp_text

#: How many callers are remembered; each costs some hundred bytes.
_MAX_CACHED_CALLERS = 10_000


class Role(enum.StrEnum):
    """What a user may do."""

    #: Use the service, and see and steer what is one's own.
    USER = "user"
    #: See, cancel and retry everybody's jobs as well.
    OPERATOR = "operator"


@frozen
class Caller:
    """Who sent a request.

    Attributes:
        user_id: number in the database.
        subject: distinguished name in slash form.
        certificate_ends_at: when the first certificate of the presented chain ends.
        limited: whether a limited proxy was presented.
    """

    user_id: int
    subject: str
    role: Role
    certificate_ends_at: datetime
    limited: bool

    @property
    def scope(self) -> int | None:
        """Whose jobs the caller may see: one user's, or None for everybody's."""
        return None if self.role is Role.OPERATOR else self.user_id


@frozen
class AccessList:
    """Who may use the service, in which role.

    Attributes:
        open_to_all: whether everybody with a trusted certificate is a user.
        roles: of the subjects that are listed.
    """

    open_to_all: bool
    roles: Mapping[str, Role]

    @classmethod
    def read(cls, settings: UserSettings) -> AccessList:
        """The list that the configuration asks for.

        Raises:
            ConfigError: the file of listed users cannot be read, or a line is wrong.
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
        """None for who may not use the service."""
        return self.roles.get(subject, Role.USER if self.open_to_all else None)


def _parse_user_line(line: str, place: str) -> tuple[Role, str]:
    """Role and subject of a line; of a grid-mapfile (``"/SUBJECT" account``) the subject."""
    word, _, rest = line.partition(" ")
    role, subject = (Role(word), rest.strip()) if word in list(Role) else (Role.USER, line)
    if subject.startswith('"'):
        subject = subject[1:].partition('"')[0]
    if not subject.startswith("/"):
        raise ConfigError(f"{place}: /SUBJECT is expected, or a role ({', '.join(Role)}) and /SUBJECT")
    try:
        return role, normal_subject(subject)
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from error


@define(eq=False)
class Authenticator:
    """Finds out who calls: once for each connection; each subject costs one look into the database, then none.

    Attributes:
        identify: the verified identity of a connection, None without a certificate.
        clock: the present moment, UTC.
        binds: whether a user whom no signing policy covers is bound to the authority of the first connection.
    """

    database: Database
    access: AccessList
    identify: Callable[[Any], PeerIdentity | None]
    clock: Callable[[], datetime]
    binds: bool = True
    _known: dict[tuple[str, str, bool], tuple[int, Role]] = field(factory=dict)
    _connected: WeakKeyDictionary[Any, Caller] = field(factory=WeakKeyDictionary)

    async def authenticate(self, transport: Any) -> Caller:
        """Who is at the other end of a connection.

        Raises:
            NotAuthenticatedError: nobody who could be known, or no longer.
            ForbiddenError: somebody who is not let in.
        """
        connected = self._connected.get(transport)
        # OpenSSL looked at the times once, when the connection was made; a kept connection may outlive a proxy.
        if connected is not None and self.clock() < connected.certificate_ends_at:
            return connected
        identity = self.identify(transport)
        if identity is None:
            raise NotAuthenticatedError(
                "no client certificate was presented: call with a certificate or a grid proxy (curl: --cert and --key)"
            )
        now = self.clock()
        if identity.chain_ends_at <= now:
            end = timestamp_text(identity.chain_ends_at)
            raise NotAuthenticatedError(f"your certificate or proxy ended at {end}: make a new one and connect again")
        # An authority that no signing policy binds could sign the subject of a user of another one.
        key = (identity.subject, identity.authority, identity.constrained)
        known = self._known.get(key) or await self._register(key, now)
        caller = Caller(known[0], identity.subject, known[1], identity.chain_ends_at, identity.limited)
        self._connected[transport] = caller
        return caller

    async def _register(self, key: tuple[str, str, bool], now: datetime) -> tuple[int, Role]:
        subject, authority, constrained = key
        rebind = constrained or not self.binds
        role = self.access.role_of(subject)
        if role is None:
            raise ForbiddenError(f"{subject} is not a user of this service: ask its operator to be listed")
        record = await self.database.run(
            "register a user", users.register, subject, role.value, now, authority or None, rebind=rebind
        )
        if not rebind and authority and record.authority != authority:
            raise ForbiddenError(
                f"{subject} is known here by the authority {record.authority}, and your certificate is of {authority}:"
                " an operator has to say in a signing policy which of the two may sign it"
            )
        if len(self._known) >= _MAX_CACHED_CALLERS:
            self._known.clear()
        self._known[key] = (record.id, role)
        return self._known[key]


#: So many wrong passwords or names of one user are sent on within the time.
MAX_LOGON_FAILURES = 5
LOGON_WINDOW = timedelta(minutes=10)
#: Users that are remembered; beyond that, those longest quiet are forgotten.
_MAX_THROTTLED_USERS = 10_000


@define(eq=False)
class LogonThrottle:
    """Failed logons of users, in this daemon; nothing of what they sent.

    Only time makes them forgotten: a logon that succeeds may be at a server of the user's own.
    """

    _failures: dict[int, deque[datetime]] = field(factory=dict)

    def wait_s(self, user_id: int, now: datetime) -> int:
        """Seconds until a user may try again; 0 for now."""
        failures = self._failures.get(user_id)
        while failures and failures[0] + LOGON_WINDOW <= now:
            failures.popleft()
        if failures is None or len(failures) < MAX_LOGON_FAILURES:
            return 0
        return max(int((failures[0] + LOGON_WINDOW - now).total_seconds()) + 1, 1)

    def clock_was_set(self, step: timedelta) -> None:
        """The time of day was moved: nobody waits longer, or less, for that."""
        for failures in self._failures.values():
            for number, timestamp in enumerate(failures):
                failures[number] = timestamp + step

    def failed(self, user_id: int, now: datetime) -> None:
        """A server has refused a user's name or password."""
        failures = self._failures.pop(user_id, None) or deque(maxlen=MAX_LOGON_FAILURES)
        failures.append(now)
        # At the end again: the first ones are those longest quiet.
        self._failures[user_id] = failures
        if len(self._failures) > _MAX_THROTTLED_USERS:
            del self._failures[next(iter(self._failures))]
