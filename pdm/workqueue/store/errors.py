"""Database errors: startup errors, and the mapping of driver errors to outages.

The text of each error is one line that tells an operator what to do.
"""

from __future__ import annotations

import sqlite3

import sqlalchemy as sa

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
        may_be_done: the outcome is unknown, because the transaction was being carried out or committed.
        needs_operator: it does not pass by itself.
    """

    def __init__(
        self, reason: str, *, alone: bool = False, may_be_done: bool = False, needs_operator: bool = False
    ) -> None:
        super().__init__(reason)
        self.alone = alone
        self.may_be_done = may_be_done
        self.needs_operator = needs_operator


class ChangedMeanwhileError(Exception):
    """Another transaction has changed what this one has read: it must be repeated."""


class DatabaseFileGoneError(Exception):
    """The file of an SQLite database, or its write-ahead log, was removed or replaced while it was open.

    SQLite does not notice: it would go on to write into a file that no other process can open.
    """


class DatabaseClosedError(ReportedError):
    """The service is stopping: no transaction is accepted any more."""


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
    sqlite3.SQLITE_INTERRUPT: "the transaction was interrupted, because the service stops",
    sqlite3.SQLITE_NOTADB: "its file is damaged, restore it from a backup",
    sqlite3.SQLITE_CORRUPT: "its file is damaged, restore it from a backup",
}
_LASTING = frozenset(
    {
        *(sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM),
        *(sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT),
    }
)
#: SQLSTATE classes and codes of PostgreSQL: connection exceptions, insufficient resources, shutdown and start, system
#: errors; a standby that takes no writes.
_TRANSIENT_STATES = ("08", "53", "57P", "58", "25006")
#: Codes that concern one transaction alone: timeouts of a lock, a statement or a session, conflicts that all tries
#: have met, a table that is damaged, or missing or closed to us (while a backup is restored).
_STATES_OF_ONE = frozenset({"25P03", "25P04", "40001", "40P01", "42501", "42P01", "55P03", "57014", "XX001", "XX002"})
_LONGEST_REASON = 300


def unavailable_error(error: Exception, *, may_write: bool = True) -> DatabaseUnavailableError | None:
    """The outage that an error of a transaction shows; None if it shows none.

    ``may_write``: False for a transaction that only reads; one that writes all the same is a bug, which no retry
    repairs.
    """
    if isinstance(error, DatabaseFileGoneError):
        return DatabaseUnavailableError(str(error))
    if isinstance(error, sa.exc.TimeoutError):
        return DatabaseUnavailableError("all its connections are in use", alone=True)
    if not isinstance(error, sa.exc.DBAPIError):
        return None
    cause = error.orig
    if isinstance(cause, sqlite3.Error):
        # Errors raised by the driver itself, not by SQLite, have no code.
        code = getattr(cause, "sqlite_errorcode", -1) & 0xFF
        if code == sqlite3.SQLITE_READONLY and not may_write:
            return None
        reason = _SQLITE_CODES.get(code)
        if reason is None:
            return None
        is_alone = code == sqlite3.SQLITE_CORRUPT
        return DatabaseUnavailableError(f"{reason} ({cause})", alone=is_alone, needs_operator=code in _LASTING)
    state = getattr(cause, "sqlstate", None)
    # An error without SQLSTATE comes from the connection, not from the server.
    away = error.connection_invalidated or (state is None and isinstance(error, sa.exc.OperationalError))
    alone = state in _STATES_OF_ONE
    if away or alone or (state is not None and state.startswith(_TRANSIENT_STATES)):
        # Never include the statement: its parameters are user data.
        reason = " ".join(str(cause).split())[:_LONGEST_REASON] or "the connection was lost"
        return DatabaseUnavailableError(reason, alone=alone)
    return None
