"""``pdm admin prune``: remove what is old now, or say what would be removed; and rewrite an SQLite file."""

from __future__ import annotations

import os
import secrets
import shutil
import sqlite3
from collections.abc import Callable, Collection, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import attrs
import sqlalchemy as sa
from attrs import frozen
from sqlalchemy.orm import Session

from pdm.workqueue.certificates.signatures import service_name, sign_detached
from pdm.workqueue.config.settings import Settings
from pdm.workqueue.domain.retention import KEYS_KEPT, RetentionPolicy
from pdm.workqueue.execution.retention import Retention
from pdm.workqueue.execution.site_directory import site_of
from pdm.workqueue.http.receipts import whole_receipt
from pdm.workqueue.instance_lock import InstanceLockedError, lock_database
from pdm.workqueue.logstore.store import measure_logs
from pdm.workqueue.policies import database_timeouts, retention_policy, server_tls
from pdm.workqueue.sites.registry import SiteRegistry
from pdm.workqueue.store import expiry, retention, sites
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.engines import make_engines
from pdm.workqueue.store.errors import DatabaseUnavailableError
from pdm.workqueue.store.expiry import Survey
from pdm.workqueue.telemetry.background import run_in_thread
from pdm.workqueue.telemetry.clocks import utc_now

_JOBS_AT_ONCE = 1000


class PruneError(Exception):
    """Nothing can be removed now; the text is one line that says why and what to do."""


@frozen(kw_only=True)
class Forecast:
    """What would be removed.

    Attributes:
        log_files: of jobs that would be purged, and of those whose logs are old.
        keeps_receipts: whether the receipts of these jobs would be stored.
    """

    survey: Survey
    log_files: int
    log_bytes: int
    keeps_receipts: bool


def policy_of(settings: Settings, older_than: timedelta | None) -> RetentionPolicy:
    """The policy of the settings; with ``older_than``, jobs are kept only for so long.

    Raises:
        PruneError: that is too short.
    """
    policy = retention_policy(settings)
    if older_than is None:
        return policy
    if older_than < KEYS_KEPT:
        raise PruneError(
            f"jobs are kept for at least {KEYS_KEPT.days} days: for so long a request may be repeated with its"
            " Idempotency-Key, and must not submit another job"
        )
    return attrs.evolve(policy, jobs=older_than)


def forecast(settings: Settings, policy: RetentionPolicy, now: datetime | None = None) -> Forecast:
    """What a prune would remove; nothing is changed, and a daemon may run.

    Raises:
        PruneError: the database cannot be read.
    """
    now = now or utc_now()

    def before(kept: timedelta | None) -> datetime | None:
        return None if kept is None else now - kept

    files = size = 0
    engines = make_engines(settings.database.url, 1, database_timeouts(settings))
    # Opening it would create it.
    path = Path(str(engines.reader.url.database)) if engines.reader.dialect.name == "sqlite" else None
    try:
        if path is not None and not path.exists():
            raise PruneError(f"there is no database {path}: nothing is to be removed")
        with Session(engines.reader) as session:
            found = expiry.survey(
                session,
                jobs_before=before(policy.jobs),
                events_before=before(policy.events),
                audit_before=before(policy.audit),
                receipts_before=before(policy.receipts),
                summaries_before=before(policy.summaries),
            )
            oldest = [kept for kept in (policy.jobs, policy.logs) if kept is not None]
            after = None
            while oldest and (ended := retention.ended_jobs(session, now - min(oldest), after, _JOBS_AT_ONCE)):
                count, total = measure_logs(settings.logs.folder, [job.log_uid for job in ended])
                files, size, after = files + count, size + total, ended[-1].place
    except sa.exc.DBAPIError as error:
        raise PruneError(f"the database cannot be read: {' '.join(str(error.orig).split())}") from error
    finally:
        engines.dispose()
    return Forecast(survey=found, log_files=files, log_bytes=size, keeps_receipts=policy.keeps_receipts)


@frozen(kw_only=True)
class _ReceiptSource:
    database: Database
    sites: SiteRegistry
    clock: Callable[[], datetime]
    service_name: Callable[[], str]
    sign: Any


async def prune(reactor: Any, settings: Settings, policy: RetentionPolicy) -> Mapping[str, int]:
    """Remove what is old; the daemon of an SQLite database must not run.

    Returns:
        What was removed: name of a kind → number.

    Raises:
        PruneError: a daemon runs, or removes old rows itself right now.
        DatabaseUnusableError, ConfigError: what the settings name cannot be used.
    """
    database = Database.open(settings.database.url, reactor, timeouts=database_timeouts(settings))
    lock = None if database.file is None else _lock(database.file)
    try:
        await database.start()
        try:
            retention = Retention(
                reactor=reactor,
                database=database,
                clock=utc_now,
                policy=policy,
                incarnation=f"prune-{secrets.token_hex(8)}",
                logs=settings.logs.folder,
                receipt_of=await _receipts(settings, database, policy),
                # Nothing else uses an SQLite file now.
                rest=3.0 if database.is_shared else 0.0,
            )
            if not await retention.run():
                raise PruneError("a daemon is removing what is old: look at its log, and try again later")
            for name, why in retention.failures.items():
                raise PruneError(f"{name} could not be removed: {why}")
            return dict(retention.removed)
        except DatabaseUnavailableError as error:
            raise PruneError(f"the database cannot be written: {error}") from error
        finally:
            await database.stop()
    finally:
        if lock is not None:
            os.close(lock)


async def _receipts(settings: Settings, database: Database, policy: RetentionPolicy) -> Callable[[int], Any]:
    """Writes receipts of jobs, signed with the host key."""
    if not policy.keeps_receipts:
        # Never called: no receipt outlives its job.
        return lambda _job_id: None
    identity = server_tls(settings).identity
    registry = SiteRegistry.read(settings.sites.folder)
    registry.take_stored(map(site_of, await database.read("sites", _stored_sites)))
    source = _ReceiptSource(
        database=database,
        sites=registry,
        clock=utc_now,
        service_name=lambda: service_name(identity),
        sign=lambda payload: run_in_thread(sign_detached, identity, payload),
    )
    return lambda job_id: whole_receipt(source, job_id)


def _stored_sites(session: Session) -> Collection[Any]:
    return list(sites.all_sites(session))


def _lock(file: Path) -> int:
    try:
        return lock_database(file)
    except InstanceLockedError as error:
        raise PruneError(
            f"{error}: that daemon removes what [retention] says, every ten minutes; to remove more now, stop it first"
        ) from error


def compact(settings: Settings) -> tuple[int, int]:
    """Rewrite an SQLite file without its free pages; its daemon must not run. Bytes before and after.

    From then on, free pages are returned in small steps. It takes as much free disk space as the file has at the end,
    and some seconds for each gigabyte.

    Raises:
        PruneError: a daemon runs, the disk has too little space, or the database is not SQLite.
    """
    engines = make_engines(settings.database.url, 1)
    engines.dispose()
    if engines.shared:
        raise PruneError(
            "--compact is for SQLite: on PostgreSQL autovacuum makes the space free for new rows; VACUUM (FULL) returns"
            " it to the disk, and locks each table meanwhile"
        )
    file = Path(str(engines.writer.url.database))
    if not file.exists():
        raise PruneError(f"there is no database {file}")
    lock = _lock(file)
    try:
        before = file.stat().st_size
        free = shutil.disk_usage(file.parent).free
        if free < before:
            raise PruneError(f"{file.parent} has {free} bytes free; the database has {before}, and needs as many again")
        connection = sqlite3.connect(file, isolation_level=None)
        try:
            connection.execute("PRAGMA auto_vacuum=incremental")
            connection.execute("VACUUM")
            connection.execute("PRAGMA wal_checkpoint(truncate)").fetchall()
        finally:
            connection.close()
        return before, file.stat().st_size
    except sqlite3.Error as error:
        raise PruneError(f"{file} could not be rewritten: {error}") from error
    finally:
        os.close(lock)
