"""Database errors: startup errors, the mapping of driver errors to outages, and the log of outages.

The text of each error is one line that tells an operator what to do. An outage is logged once, not per failed
transaction: otherwise many clients would fill the log with one fault.
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
    """The URL is invalid or names an unsupported database."""


class DatabaseMissingError(DatabaseUnusableError):
    """The database cannot be reached or opened."""


class SchemaTooNewError(DatabaseUnusableError):
    """A newer version of the service has used the database."""


class ForeignSchemaError(DatabaseUnusableError):
    """The database holds tables with our names that another program created."""


class DatabaseUnavailableError(ReportedError):
    """The database is away, locked or full; a retry may succeed. The text is the reason, without SQL.

    Attributes:
        alone: only this transaction is affected (it waited for a lock); others may succeed at the same time.
    """

    def __init__(self, reason: str, *, alone: bool = False) -> None:
        super().__init__(reason)
        self.alone = alone


class DatabaseClosedError(ReportedError):
    """The service is stopping: no transaction is accepted any more."""


_log = Logger()

#: Seconds between two log lines about one outage.
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
#: Timeout of a lock, a statement or a session: affects this transaction alone.
_TIMED_OUT = frozenset({"25P03", "55P03", "57014"})


def unavailable_error(error: Exception) -> DatabaseUnavailableError | None:
    """The outage that an error of a transaction shows; None if it shows none."""
    if not isinstance(error, sa.exc.DBAPIError):
        return None
    cause = error.orig
    if isinstance(cause, sqlite3.Error):
        # Errors raised by the driver itself, not by SQLite, have no code.
        code = getattr(cause, "sqlite_errorcode", -1)
        if code == sqlite3.SQLITE_READONLY:
            # A function of `Database.read` tried to write: a bug, which no retry repairs.
            return None
        reason = _SQLITE_CODES.get(code & 0xFF)
        return None if reason is None else DatabaseUnavailableError(f"{reason} ({cause})")
    state = getattr(cause, "sqlstate", None)
    # An error without SQLSTATE comes from the connection, not from the server.
    away = error.connection_invalidated or (state is None and isinstance(error, sa.exc.OperationalError))
    alone = state in _TIMED_OUT
    if away or alone or (state is not None and state.startswith(_TRANSIENT_STATES)):
        # Never include the statement: its parameters are user data.
        return DatabaseUnavailableError(" ".join(str(cause).split())[:300] or "the connection was lost", alone=alone)
    return None


@define(eq=False)
class Availability:
    """Whether the database can be read, or written; reactor thread only.

    Attributes:
        use: "reading" or "writing", for the log.
        seconds: monotonic clock.
        reason: why the last transaction failed; None while it can be used.
    """

    use: str
    seconds: Callable[[], float]
    reason: str | None = None
    _since: float = field(default=0.0, init=False)
    _logged_at: float = field(default=0.0, init=False)
    _failed: int = field(default=0, init=False)

    def failed(self, error: DatabaseUnavailableError) -> None:
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
        if self.reason is not None:
            self.reason = None
            _log.info(
                "the database can be used for {use} again, after {seconds:.0f} s and {failed} failed transactions",
                use=self.use,
                seconds=self.seconds() - self._since,
                failed=self._failed,
            )
