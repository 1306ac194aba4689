"""Two daemons on one database: what one was doing when it was suspended is done by the other, and by it alone."""

from __future__ import annotations

import secrets
import shutil
import signal
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa

from pdm.testgrid.service import TestService
from pdm.testgrid.storage_servers import descendants
from tests.store.clusters import cluster, programs
from tests.support.attempt_logs import attempt_lines, job_logs
from tests.support.cluster import runs, signal_all, until

LEASE_S = 2


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    found = programs()
    if found is None:
        pytest.skip("PostgreSQL is not installed")
    with cluster(found) as url:
        yield url.set(drivername="postgresql").render_as_string(hide_password=False)


@pytest.fixture
def pair(tmp_path: Path, database: str) -> Iterator[tuple[TestService, TestService]]:
    """Two instances with one database and the same directories as sites; the first runs."""
    name = f"lease_{secrets.token_hex(4)}"
    engine = sa.create_engine(database.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    first, second = (TestService(tmp_path / each) for each in ("first", "second"))
    for service in (first, second):
        service.init(
            # A suspended daemon may hold rows in a transaction: its database ends that.
            database={"url": database.replace("/postgres?", f"/{name}?"), "idle_timeout": "1s"},
            queue={"lease": f"{LEASE_S}s", "poll_interval": "200ms"},
        )
    # As an operator sets up the second: with the sites, certificates and keys of the first.
    for part in ("sites.d", "certificates"):
        shutil.rmtree(second.directory / part)
        shutil.copytree(first.directory / part, second.directory / part)
    first.start()
    keys = first.directory / "var" / "credentials.key"
    if keys.exists():
        shutil.copy(keys, second.directory / "var")
    yield first, second
    for service in (first, second):
        if service.process is not None:
            signal_all(service, signal.SIGCONT)
            service.kill()


@pytest.mark.full
def test_a_removal_that_was_suspended_removes_none_of_the_files_that_have_come_since(
    pair: tuple[TestService, TestService],
) -> None:
    first, second = pair
    tree = first.directory / "storage" / "a" / "tree"
    tree.mkdir()
    names = [f"file{number}" for number in range(4000)]
    for name in names:
        (tree / name).write_bytes(b"old")
    job = first.submit("admin", "remove", src_siteid=1, src_filepath="/tree", protocol="FILE")
    until("some files are removed", lambda: len(list(tree.iterdir())) < len(names) - 50)
    helpers = signal_all(first, signal.SIGSTOP)
    assert helpers
    assert list(tree.iterdir()), "it was suspended too late"
    second.start()
    ended = second.wait_for("admin", job["id"], timeout_s=60)
    assert (ended["status"], tree.exists()) == ("DONE", False), ended

    tree.mkdir()
    for name in names:
        (tree / name).write_bytes(b"new")
    signal_all(first, signal.SIGCONT)
    until("its helpers end", lambda: first.process and not set(helpers) & set(descendants(first.process.pid)))
    # It takes its lease again, and work.
    made = first.submit("admin", "mkdir", src_siteid=1, src_filepath="/after", protocol="FILE")
    assert first.wait_for("admin", made["id"])["status"] == "DONE"
    assert {path.name for path in tree.iterdir()} == set(names)
    assert first.call("admin", "GET", f"/jobs/{job['id']}")[1]["status"] == "DONE"


@pytest.mark.full
def test_helpers_of_a_suspended_daemon_are_gone_before_another_one_takes_over(
    pair: tuple[TestService, TestService],
) -> None:
    """Only the daemon is suspended: its helpers get no renewal and stop in time."""
    first, second = pair
    places = {"src_siteid": 1, "src_filepath": "/t", "dst_siteid": 2, "dst_filepath": "/c"}
    options = {"dummy": {"files": 3, "delay": 1.5 * LEASE_S}}
    job = first.submit("admin", "copy", **places, protocol="DUMMY", extra_opts=options)

    def copies_run() -> bool:
        seen = first.call("admin", "GET", f"/jobs/{job['id']}")[1]
        return bool(seen["num_done"] > 0 and seen["num_running"] > 0)

    until("the listing is done and copies run", copies_run)
    assert first.process is not None
    helpers = descendants(first.process.pid)
    first.process.send_signal(signal.SIGSTOP)
    second.start()
    until("the helpers end", lambda: not any(map(runs, helpers)))
    gone_at = datetime.now(UTC)
    ended = second.wait_for("admin", job["id"], timeout_s=50)
    assert ended["status"] == "DONE", ended
    (log,) = job_logs(second.directory / "var" / "logs")
    again = [lines for (_, attempt), lines in attempt_lines(log).items() if attempt == 2]
    assert again, "nothing was under way when the daemon was suspended"
    for lines in again:
        assert gone_at <= datetime.fromisoformat(lines[0].split()[0]), lines
    signal_all(first, signal.SIGCONT)
    made = first.submit("admin", "mkdir", src_siteid=1, src_filepath="/after", protocol="FILE")
    assert first.wait_for("admin", made["id"])["status"] == "DONE"
    # What the first says of its attempts, late, changes nothing.
    assert first.call("admin", "GET", f"/jobs/{job['id']}")[1] == ended
