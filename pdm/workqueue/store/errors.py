"""Database errors: why a database cannot be used, which driver errors mean that, and the log of outages.

The text of each error is one line that tells an operator what to do. An outage is logged once, not with each
transaction that it fails: many clients would fill the log with one fault.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

import sqlalchemy as sa
from attrs import define, field
from twisted.logger import Logger

from pdm.workqueue.telemetry.background import ReportedError


class DatabaseUnusableError(Exception):
    """The service cannot start with this database."""


class DatabaseUrlError(DatabaseUnusableError):
    """The URL names another kind of database, or is none."""


class DatabaseMissingError(DatabaseUnusableError):
    """The database cannot be reached or opened."""


class SchemaTooNewError(DatabaseUnusableError):
    """A newer version of the service has used the database."""


class ForeignSchemaError(DatabaseUnusableError):
    """The database holds tables of the same names that are not ours."""


class DatabaseUnavailableError(ReportedError):
    """The database is away, locked or full; the same may succeed later. The text is the reason, without any SQL.

    Attributes:
        alone: another transaction may succeed at the same moment (this one waited for a lock).
    """

    def __init__(self, reason: str, *, alone: bool = False) -> None:
        super().__init__(reason)
        self.alone = alone


class DatabaseClosedError(ReportedError):
    """The service is stopping: nothing is taken any more."""


_log = Logger()

#: How often an outage that goes on is told again, in seconds.
_LOG_AGAIN_AFTER_S = 60.0
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
_TRANSIENT_STATES = ("08", "53", "57P", "58", "25006")
#: A lock, statement or session that timed out: of this transaction alone.
_TIMED_OUT = frozenset({"25P03", "55P03", "57014"})


def unavailable_error(error: Exception) -> DatabaseUnavailableError | None:
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
    if away or alone or (state is not None and state.startswith(_TRANSIENT_STATES)):
        # Never with the statement: its parameters are the users'.
        return DatabaseUnavailableError(" ".join(str(cause).split())[:300] or "the connection was lost", alone=alone)
    return None


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
    _logged_at: float = field(default=0.0, init=False)
    _failed: int = field(default=0, init=False)

    def failed(self, error: DatabaseUnavailableError) -> None:
        """A transaction could not be carried out."""
        now = self.seconds()
        if self.reason is None:
            self._since, self._failed, self._logged_at = now, 0, now - _LOG_AGAIN_AFTER_S
        self.reason = str(error)
        self._failed += 1
        if now - self._logged_at >= _LOG_AGAIN_AFTER_S:
            self._logged_at = now
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
