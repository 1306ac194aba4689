"""``pdm admin upgrade``: bring the database to the schema of this version, with a backup first."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from pathlib import Path

from attrs import frozen

from pdm.workqueue.admin.backup import make_backup
from pdm.workqueue.admin.rekey import stopped
from pdm.workqueue.config.settings import Settings
from pdm.workqueue.store.backup import database_kind, schema_of, upgrade_database

#: Below the state directory, unless another place is named.
BACKUPS = "backups"


@frozen(kw_only=True)
class Upgraded:
    """Revisions of the schema; ``before`` is None for a database without tables.

    Attributes:
        backup: None if nothing was changed.
    """

    before: str | None
    after: str
    backup: Path | None


def upgrade(settings: Settings, backup: Path | None = None) -> Upgraded:
    """Upgrade a database that is older than this version.

    An SQLite database is locked meanwhile. Nodes that share a PostgreSQL database may run: migrations only add what
    the previous version ignores.

    Args:
        backup: directory for the backup; None for one below the state directory.

    Raises:
        BackupError: the backup cannot be made; nothing was changed.
        InstanceLockedError: the daemon runs.
        DatabaseUnusableError: the database cannot be used, or is of a newer version.
    """
    url = settings.database.url
    lock = stopped(settings) if database_kind(url) == "sqlite" else contextlib.nullcontext()
    with lock:
        before, newest = schema_of(url)
        if before is None or before == newest:
            return Upgraded(before=before, after=newest, backup=None)
        if backup is None:
            parent = settings.state.folder / BACKUPS
            parent.mkdir(mode=0o700, exist_ok=True)
            backup = parent / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-schema-{before}"
        make_backup(settings, backup)
        before, after = upgrade_database(url)
        return Upgraded(before=before, after=after, backup=backup)
