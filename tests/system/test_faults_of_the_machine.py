"""Daemons whose database, clock, helpers or copies go wrong: what a person meets, on both databases."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from pdm.testgrid.processes import GridError
from pdm.testgrid.service import TestService, service_environment, set_keys
from tests.store.clusters import cluster, programs
from tests.support.postgresql_proxy import PostgresqlProxy, postgresql_proxy

TWISTD = str(Path(sys.executable).parent / "twistd")
_FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")


@pytest.fixture(scope="module")
def server() -> Iterator[sa.URL]:
    found = programs()
    if found is None:
        text = "THE TESTS ON POSTGRESQL CANNOT RUN: no server programs (Debian: apt-get install postgresql)"
        if os.environ.get("CI") == "true":
            pytest.fail(text, pytrace=False)
        pytest.skip(text)
    with cluster(found) as url:
        yield url


@pytest.fixture
def postgresql(server: sa.URL, request: pytest.FixtureRequest) -> sa.URL:
    """An empty database."""
    name = f"q{abs(hash(request.node.name))}"
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    return server.set(database=name)


Make = Callable[..., TestService]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes instances by name, with settings; kills what still runs."""
    made: list[TestService] = []

    def make(name: str, **settings: dict[str, str]) -> TestService:
        service = TestService(tmp_path / name)
        if not service.directory.exists():
            service.init(**settings)
        made.append(service)
        return service

    yield make
    for service in made:
        if service.process is not None:
            service.kill()


def refused(service: TestService) -> str:
    """The one line of a daemon that does not start."""
    done = subprocess.run(
        [TWISTD, "--nodaemon", "pdmworkqueue", "--config", str(service.directory / "workqueue.conf")],
        env=service_environment(),
        cwd=service.directory,
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "ready" not in done.stdout
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("pdmworkqueue: ")]
    return line


def submit(service: TestService, **dummy: Any) -> int:
    job = service.submit(
        "admin", "mkdir", src_siteid=1, src_filepath="/new", protocol="DUMMY", extra_opts={"dummy": dummy}
    )
    return int(job["id"])


def helpers(service: TestService) -> list[int]:
    assert service.process is not None
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == service.process.pid and b"workqueue.helpers." in (directory / "cmdline").read_bytes():
                found.append(int(directory.name))
    return found


def lives(pid: int) -> bool:
    """Whether a process has not ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1] != "Z"
    except OSError:
        return False


# -- copies of an instance, and what they share


@pytest.mark.full
@pytest.mark.postgresql
def test_a_copy_of_an_instance_and_a_foreign_key_are_refused(make: Make, postgresql: sa.URL) -> None:
    url = postgresql.render_as_string(hide_password=False)
    first = make("first", database={"url": url}, queue={"lease": "3s"})
    first.start()
    shutil.copytree(first.directory, first.directory.parent / "copy", ignore=shutil.ignore_patterns("daemon.log"))
    copy = make("copy")
    config = copy.directory / "workqueue.conf"
    config.write_text(config.read_text().replace(str(first.directory), str(copy.directory)))
    line = refused(copy)
    assert "another daemon" in line
    assert "worker-name" in line
    # As the line says.
    (copy.directory / "var" / "worker-name").unlink()
    (copy.directory / "var" / "credentials.key").unlink()
    assert "credentials.key" in refused(copy)
    shutil.copy2(first.directory / "var" / "credentials.key", copy.directory / "var" / "credentials.key")
    copy.start()
    jobs = [submit(copy) for _ in range(20)]
    assert {first.wait_for("admin", job)["status"] for job in jobs} == {"DONE"}
    # One that is killed and started again takes what it held at once, whatever is left of its lease.
    set_keys(first.directory / "workqueue.conf", {"queue": {"lease": "600s"}})
    assert first.stop() == 0
    first.start()
    first.kill()
    began = time.monotonic()
    first.start()
    assert time.monotonic() - began < 60
    assert (first.stop(), copy.stop()) == (0, 0)


@pytest.mark.full
def test_two_daemons_on_one_sqlite_file_are_refused(make: Make) -> None:
    first, second = make("first"), make("second")
    link = second.directory / "link.sqlite"
    link.symlink_to(first.directory / "var" / "workqueue.sqlite")
    first.start()
    set_keys(second.directory / "workqueue.conf", {"database": {"url": f"sqlite:///{link}"}})
    assert "in use by another daemon" in refused(second)
    assert first.stop() == 0


# -- a daemon that is killed


@pytest.mark.full
def test_after_a_kill_an_output_exists_and_a_stopped_helper_blocks_no_other(make: Make) -> None:
    service = make("instance", agents={"max_agents": "1"})
    service.start()
    job = service.submit(
        "admin", "copy", src_siteid=1, src_filepath="/a", dst_siteid=2, dst_filepath="/b", protocol="DUMMY",
        extra_opts={"dummy": {"files": 40, "size": 1, "delay": 0.3}},
    )["id"]  # fmt: skip
    give_up_at = time.monotonic() + 30
    while not (done := service.call("admin", "GET", f"/jobs/{job}")[1])["num_done"] or not done["num_running"]:
        assert time.monotonic() < give_up_at, service.tail()
    stopped = helpers(service)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    service.kill()
    service.start(timeout_s=9)
    assert not any(map(lives, stopped))
    status, outputs = service.call("admin", "GET", f"/jobs/{job}/output")
    assert status == 200, outputs
    assert all(isinstance(output["log"], str) for output in outputs)
    service.call("admin", "DELETE", f"/jobs/{job}")
    assert service.stop() == 0


@pytest.mark.full
def test_no_core_dump_holds_keys(make: Make) -> None:
    service = make("instance")
    service.start()
    submit(service, hang=True)
    give_up_at = time.monotonic() + 30
    while not (found := helpers(service)):
        assert time.monotonic() < give_up_at
        time.sleep(0.02)
    assert service.process is not None
    for pid in (service.process.pid, *found):
        assert resource.prlimit(pid, resource.RLIMIT_CORE) == (0, 0)
    assert service.stop() == 0


# -- a daemon that is stopped


@pytest.mark.full
def test_a_stop_ends_while_the_database_is_locked(make: Make) -> None:
    service = make("instance", database={"stop_timeout": "1s"})
    service.start()
    job = submit(service, delay=2)
    service.wait_for("admin", job, until=["RUNNING"])
    with contextlib.closing(sqlite3.connect(service.directory / "var" / "workqueue.sqlite")) as other:
        other.execute("BEGIN IMMEDIATE")
        process = service.process
        assert process is not None
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, service.tail()
        service.process = None
    assert "Traceback" not in service.tail(200)
    service.start()
    assert service.wait_for("admin", job)["status"] == "DONE"
    assert service.stop() == 0


@pytest.mark.full
def test_a_start_can_be_stopped_at_any_moment(make: Make) -> None:
    service = make("instance", database={"stop_timeout": "1s"})
    service.start()
    assert service.stop() == 0
    statuses = {}
    with contextlib.closing(sqlite3.connect(service.directory / "var" / "workqueue.sqlite")) as other:
        # With a locked database the start takes long.
        other.execute("BEGIN IMMEDIATE")
        for seconds in (1.5, 3.0):
            process = subprocess.Popen(
                [TWISTD, "--nodaemon", "pdmworkqueue", "--config", str(service.directory / "workqueue.conf")],
                env=service_environment(),
                cwd=service.directory,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            _until_it_handles_signals(process)
            time.sleep(seconds)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            said, _ = process.communicate(timeout=40)
            statuses[seconds] = process.returncode
            assert "Traceback" not in said
            assert "pdmworkqueue ready" not in said
    assert set(statuses.values()) == {0}, statuses


def _until_it_handles_signals(process: subprocess.Popen[str]) -> None:
    give_up_at = time.monotonic() + 30
    caught = 0
    while not caught & (1 << (signal.SIGTERM - 1)):
        assert time.monotonic() < give_up_at
        assert process.poll() is None
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))


@pytest.fixture
def proxy(postgresql: sa.URL) -> Iterator[PostgresqlProxy]:
    with postgresql_proxy(postgresql) as proxy:
        yield proxy


@pytest.mark.full
@pytest.mark.postgresql
def test_answers_of_the_database_are_lost_and_then_the_database(make: Make, proxy: PostgresqlProxy) -> None:
    service = make("instance", database={"url": proxy.url, "stop_timeout": "1s"}, queue={"lease": "3s"})
    service.start()
    jobs = [submit(service, delay=0.2) for _ in range(40)]
    # Of a claim, and of a result.
    for only_after in (b"SET status = 'RUNNING'", b"WITH done") * 3:
        proxy.only_after, proxy.cut_commits = only_after, 1
        give_up_at = time.monotonic() + 30
        while proxy.cut_commits:
            assert time.monotonic() < give_up_at, service.tail()
            try:
                jobs.append(submit(service, delay=0.1))
            except GridError as error:
                # It shared the commit whose answer was lost.
                if "database-unavailable" not in str(error):
                    raise
            time.sleep(0.1)
    for job in jobs:
        assert service.wait_for("admin", job)["status"] == "DONE", service.tail()
    hanging = submit(service, hang=True)
    service.wait_for("admin", hanging, until=["RUNNING"])
    proxy.frozen = True
    assert service.stop(timeout_s=40) == 0
    proxy.frozen = False


# -- clocks


@pytest.mark.full
@pytest.mark.skipif(not _FAKETIME.exists(), reason="libfaketime is not installed (Debian: apt-get install faketime)")
def test_the_time_of_day_is_set_and_nothing_stands_still_or_dies(make: Make, tmp_path: Path) -> None:
    offset = tmp_path / "offset"
    offset.write_text("+0")
    service = make("instance", queue={"first_pause": "2s", "longest_pause": "2s"})
    faked = {
        "LD_PRELOAD": str(_FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_DISABLE_SHM": "1",
    }
    # Under the library a sleep whose end has passed fails with EINVAL, as may the look at the interpreter.
    for tries_left in (3, 2, 1, 0):
        try:
            service.start(30.0, **faked)
            break
        except GridError as error:
            if "Invalid argument" not in str(error) or not tries_left:
                raise
    hanging = submit(service, delay=20)
    service.wait_for("admin", hanging, until=["RUNNING"])
    for step in ("+7200", "+7160", "+0"):
        # Nothing that would halve the route: the one that hangs is on it, too.
        failing = submit(service, fail="NO_SPACE", fail_times=1)
        service.wait_for("admin", failing, until=["RUNNING", "DONE"])
        time.sleep(0.5)
        offset.write_text(step)
        began = time.monotonic()
        # New connections are taken at their rate, and what was put off comes back.
        assert service.wait_for("admin", failing, timeout_s=15)["status"] == "DONE", service.tail()
        assert time.monotonic() - began < 15
    assert "the clock of this machine was set by" in service.tail(400)
    ended = service.wait_for("admin", hanging)
    element = service.call("admin", "GET", f"/jobs/{hanging}/elements/0")[1]
    assert (ended["status"], element["attempts"]) == ("DONE", 1), service.tail()
    assert service.stop() == 0
