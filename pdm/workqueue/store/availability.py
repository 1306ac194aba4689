"""Whether the database can be used now: which errors say that it cannot, and one log line for each outage.

An outage is logged once, not with each transaction that it fails: many clients would fill the log with one fault.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

import sqlalchemy as sa
from attrs import define, field
from sqlalchemy.orm import Session
from twisted.logger import Logger

from pdm.workqueue.store.errors import DatabaseUnavailableError
from pdm.workqueue.store.tables import workers

_log = Logger()

#: How often an outage that goes on is told again, in seconds.
_REPEAT_S = 60.0
#: Primary result codes of SQLite (https://sqlite.org/rescode.html) that pass when the file can be used again.
_SQLITE_CODES = {
    sqlite3.SQLITE_BUSY: "another process holds its lock",
    sqlite3.SQLITE_LOCKED: "another process holds its lock",
    sqlite3.SQLITE_FULL: "its disk is full",
    sqlite3.SQLITE_IOERR: "its disk cannot be read or written",
    sqlite3.SQLITE_CANTOPEN: "its file cannot be opened",
    sqlite3.SQLITE_READONLY: "its file cannot be written",
    sqlite3.SQLITE_PERM: "its file cannot be written",
    sqlite3.SQLITE_PROTOCOL: "another process holds its lock",
    sqlite3.SQLITE_NOMEM: "there is no memory left",
}
#: SQLSTATE classes and codes of PostgreSQL: connection exceptions, insufficient resources, shutdown and start, system
#: errors; a standby that takes no writes.
_PASSING_CLASSES = ("08", "53", "57P", "58", "25006")
#: A lock, statement or session that timed out: of this transaction alone.
_TIMED_OUT = frozenset({"25P03", "55P03", "57014"})


def unavailable(error: Exception) -> DatabaseUnavailableError | None:
    """What an error of a transaction says of the whole database; None if it says nothing of it."""
    if not isinstance(error, sa.exc.DBAPIError):
        return None
    cause = error.orig
    if isinstance(cause, sqlite3.Error):
        # An error that the driver itself raised, not SQLite, has no code.
        code = getattr(cause, "sqlite_errorcode", -1)
        if code == sqlite3.SQLITE_READONLY:
            # A function that was to read only tried to write: a fault of ours, which no waiting mends.
            return None
        reason = _SQLITE_CODES.get(code & 0xFF)
        return None if reason is None else DatabaseUnavailableError(f"{reason} ({cause})")
    state = getattr(cause, "sqlstate", None)
    # An error without a state is one of the connection, not of the server.
    away = error.connection_invalidated or (state is None and isinstance(error, sa.exc.OperationalError))
    alone = state in _TIMED_OUT
    if away or alone or (state is not None and state.startswith(_PASSING_CLASSES)):
        # Never with the statement: its parameters are the users'.
        return DatabaseUnavailableError(" ".join(str(cause).split())[:300] or "the connection was lost", alone=alone)
    return None


def write_probe(session: Session, worker: str) -> None:
    """Write something without changing anything: a transaction that only reads tells nothing of a full disk."""
    session.execute(sa.update(workers).where(workers.c.incarnation == worker).values(name=workers.c.name))


@define(eq=False)
class Availability:
    """Of one use of the database (reading, writing); the reactor's thread only.

    Attributes:
        use: what it is needed for, for the log.
        seconds: a clock that only goes forward.
        reason: why the last transaction could not be carried out; None while it can be used.
    """

    use: str
    seconds: Callable[[], float]
    reason: str | None = None
    _since: float = field(default=0.0, init=False)
    _told_at: float = field(default=0.0, init=False)
    _failed: int = field(default=0, init=False)

    def failed(self, error: DatabaseUnavailableError) -> None:
        """A transaction could not be carried out."""
        now = self.seconds()
        if self.reason is None:
            self._since, self._failed, self._told_at = now, 0, now - _REPEAT_S
        self.reason = str(error)
        self._failed += 1
        if now - self._told_at >= _REPEAT_S:
            self._told_at = now
            _log.error(
                "the database cannot be used for {use}: {reason}; requests are answered 503 until it can"
                " ({failed} transactions failed in {seconds:.0f} s)",
                use=self.use,
                reason=self.reason,
                failed=self._failed,
                seconds=now - self._since,
            )

    def worked(self) -> None:
        """A transaction was carried out."""
        if self.reason is not None:
            self.reason = None
            _log.info(
                "the database can be used for {use} again, after {seconds:.0f} s and {failed} failed transactions",
                use=self.use,
                seconds=self.seconds() - self._since,
                failed=self._failed,
            )
