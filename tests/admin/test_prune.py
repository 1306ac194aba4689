"""``pdm admin prune`` on an instance without a daemon."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from sqlalchemy.orm import Session

from pdm.workqueue.admin.instance import make_instance
from pdm.workqueue.admin.prune import PruneError, compact, forecast, policy_of
from pdm.workqueue.cli.admin import prune
from pdm.workqueue.config.reader import read_settings
from pdm.workqueue.config.settings import Settings
from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.instance_lock import lock_database
from pdm.workqueue.store import expiry, jobs, purged_jobs, retention
from pdm.workqueue.store.engines import make_engines
from pdm.workqueue.store.records import elements
from pdm.workqueue.store.records import jobs as job_rows
from pdm.workqueue.store.schema_revisions import migrate
from tests.execution.test_retention import _end_jobs
from tests.store.stores import Store

_OLD = datetime.now(UTC) - timedelta(days=100)


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """An instance with two old jobs."""
    made = make_instance(tmp_path_factory.mktemp("prune") / "instance", user="alice", host="localhost", port=0)
    settings = read_settings(made.config)
    engines = make_engines(settings.database.url, 1)
    with engines.writer.begin() as connection:
        migrate(connection)
    with Session(engines.writer) as session, session.begin():
        _end_jobs(session, ["aaaa0001", "aaaa0002"], JobStatus.DONE, _OLD)
    engines.dispose()
    logs = settings.logs.folder / "aa" / "aaaa0001"
    logs.mkdir(parents=True)
    (logs / "log").write_text("x" * 1000)
    return settings


def _pdm(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pdm.workqueue.cli", "admin", "prune", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_jobs_are_forecast_purged_and_the_file_shrinks(instance: Settings) -> None:
    found = forecast(instance, policy_of(instance, timedelta(days=90)))
    assert (found.survey.jobs, found.survey.elements) == (2, 2)
    assert (found.log_files, found.log_bytes) == (1, 1000)
    assert forecast(instance, policy_of(instance, None)).survey.jobs == 0
    shown = CliRunner().invoke(prune, [str(instance.source), "--dry-run", "--older-than", "90d"])
    assert "jobs                         2  2 elements, about " in shown.output
    assert "their receipts are stored" in shown.output
    done = _pdm(str(instance.source), "--older-than", "90d", "--compact")
    assert done.returncode == 0, done.stderr
    assert "2 jobs" in done.stdout
    assert "the database file: " in done.stdout
    engines = make_engines(instance.database.url, 1)
    with Session(engines.reader) as session:
        left = retention.ended_jobs(session, datetime.now(UTC), None, 10)
        purged = purged_jobs.purged_job(session, 1, None)
        assert purged_jobs.receipt_piece(session, 1, 0) is not None
    engines.dispose()
    assert left == []
    assert purged is not None
    assert purged.receipt_pieces == 1
    assert not (instance.logs.folder / "aa" / "aaaa0001").exists()


def test_a_running_daemon_is_named(instance: Settings) -> None:
    engines = make_engines(instance.database.url, 1)
    engines.dispose()
    descriptor = lock_database(Path(str(engines.writer.url.database)))
    try:
        done = _pdm(str(instance.source))
        with pytest.raises(PruneError, match="stop it first"):
            compact(instance)
    finally:
        os.close(descriptor)
    assert done.returncode == 1
    assert "is in use by another daemon" in done.stderr
    assert "stop it first" in done.stderr


def test_jobs_are_kept_while_their_requests_may_be_repeated(instance: Settings) -> None:
    with pytest.raises(PruneError, match="at least 7 days"):
        policy_of(instance, timedelta(days=6))


def test_free_pages_are_returned_in_steps(tmp_path: Path) -> None:
    path = tmp_path / "large.sqlite"
    engines = make_engines(f"sqlite:///{path}", 1)
    with engines.writer.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE t (x BLOB)")
        connection.exec_driver_sql("INSERT INTO t VALUES (?)", [(bytes(4000),)] * 3000)
        connection.exec_driver_sql("DELETE FROM t")
    with Session(engines.writer) as session, session.begin():
        assert expiry.shrink(session, 100) == 100
    with Session(engines.writer) as session, session.begin():
        assert expiry.shrink(session, 10_000) > 1000
    with Session(engines.writer) as session, session.begin():
        # The rest stays for new rows.
        assert expiry.shrink(session, 10_000) == 0
    engines.dispose()
    with sqlite3.connect(path) as connection_:
        assert connection_.execute("PRAGMA page_count").fetchone()[0] < 1500


@pytest.mark.full
def test_a_prune_that_is_killed_again_and_again_leaves_each_job_whole_or_gone(tmp_path: Path) -> None:
    made = make_instance(tmp_path / "instance", user="alice", host="localhost", port=0)
    settings = read_settings(made.config)
    engines = make_engines(settings.database.url, 1)
    with engines.writer.begin() as connection:
        migrate(connection)
    store = Store(engines.writer, _OLD)
    store.worker()
    user = store.user()
    numbers = []
    for _ in range(12):
        job = store.copy_job(user, [1] * 1500)
        numbers.append(job.id)
    store.run(_end_all, _OLD)
    killed = 0
    for turn in range(60):
        command = [sys.executable, "-m", "pdm.workqueue.cli", "admin", "prune", str(made.config), "--older-than", "90d"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            # Python alone takes a good second to import it all.
            process.wait(1.0 + turn * 0.1)
        except subprocess.TimeoutExpired:
            process.kill()
            killed += 1
        process.wait()
        for number in numbers:
            found = store.run(jobs.fetch, number, None)
            if found is None:
                assert store.run(purged_jobs.purged_job, number, user) is not None
            else:
                assert store.recount(number).elements == found.counters.elements
        if process.returncode == 0:
            break
    assert killed
    assert store.run(retention.remove_rows, 10).rows == 0
    assert store.run(lambda session: session.scalar(sa.select(sa.func.count()).select_from(elements))) == 0
    receipts = [store.run(purged_jobs.purged_job, number, user) for number in numbers]
    assert all(receipt is not None and receipt.receipt_pieces for receipt in receipts)
    engines.dispose()


def _end_all(session: Session, at: datetime) -> None:
    """Make all jobs final, as if their elements were cancelled."""
    session.execute(
        sa.update(elements).where(elements.c.status != JobStatus.DONE).values(status=JobStatus.CANCELLED, residue=False)
    )
    done = sa.update(job_rows).values(
        status=JobStatus.CANCELLED,
        finished_at=at,
        num_submitted=0,
        num_running=0,
        num_cancelled=job_rows.c.num_elements - job_rows.c.num_done,
        work_due_at=None,
        list_due_at=None,
    )
    session.execute(done)
