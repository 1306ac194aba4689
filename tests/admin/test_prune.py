"""``pdm admin prune`` on an instance without a daemon."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from pdm.workqueue.admin.instance import make_instance
from pdm.workqueue.admin.prune import PruneError, compact, forecast, policy_of
from pdm.workqueue.config.reader import read_settings
from pdm.workqueue.config.settings import Settings
from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.instance_lock import lock_database
from pdm.workqueue.store import expiry, purged_jobs, retention
from pdm.workqueue.store.engines import make_engines, migrate
from tests.execution.test_retention import _end_jobs

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
