"""Why a database cannot be used; each text is one line that tells an operator what to do."""

from __future__ import annotations

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


class DatabaseClosedError(Exception):
    """The service is stopping: nothing is taken any more."""
