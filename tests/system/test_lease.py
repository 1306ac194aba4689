"""Two daemons on one database: what one was doing when it was suspended is done by the other, and by it alone."""

from __future__ import annotations

import itertools
import os
import re
import secrets
import shutil
import signal
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from pdm.testgrid.daemons import descendants
from pdm.testgrid.service import TestService
from tests.store.clusters import cluster, programs

LEASE_S = 2
LINE = re.compile(r"^(\S+)Z (\d+)\.(\d+) ")


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    found = programs()
    if found is None:
        pytest.skip("PostgreSQL is not installed")
    with cluster(found) as url:
        yield url.set(drivername="postgresql").render_as_string(hide_password=False)


@pytest.fixture
def pair(tmp_path: Path, database: str) -> Iterator[tuple[TestService, TestService]]:
    """Two instances with one database and the same folders as sites; the first runs."""
    name = f"lease_{secrets.token_hex(4)}"
    engine = sa.create_engine(database.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    first, second = (TestService(tmp_path / each) for each in ("first", "second"))
    for service in (first, second):
        service.init(
            database={"url": database.replace("/postgres?", f"/{name}?")},
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


def signal_all(service: TestService, number: int) -> list[int]:
    """Signal a daemon and its helpers, as a suspended machine would; returns the pids of the helpers."""
    assert service.process is not None
    pids = descendants(service.process.pid)
    for pid in (service.process.pid, *pids):
        os.kill(pid, number)
    return pids


def spans(*services: TestService) -> dict[str, list[tuple[datetime, datetime]]]:
    """First and last line of each attempt, by element, from the logs of all daemons."""
    found: dict[tuple[str, str], list[datetime]] = {}
    for service in services:
        for log in (service.directory / "var" / "logs").rglob("log"):
            for line in log.read_text(errors="replace").splitlines():
                if match := LINE.match(line):
                    moment = datetime.fromisoformat(match.group(1))
                    found.setdefault((match.group(2), match.group(3)), []).append(moment)
    by_element: dict[str, list[tuple[datetime, datetime]]] = {}
    for (element, _), moments in found.items():
        by_element.setdefault(element, []).append((min(moments), max(moments)))
    return by_element


def until(what: str, condition: Any, timeout_s: float = 60.0) -> None:
    give_up_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_at, f"waited in vain: {what}"
        time.sleep(0.002)


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


@pytest.mark.parametrize("who", ["daemon", "both"])
def test_no_two_attempts_run_at_once(pair: tuple[TestService, TestService], who: str) -> None:
    """The daemon alone is suspended: its helpers, which nobody tells of a renewal, stop in time by themselves."""
    first, second = pair
    source, destination = (first.directory / "storage" / site / "tree" for site in "ab")
    source.mkdir()
    for number in range(12):
        with (source / f"file{number}").open("wb") as file:
            # Long enough that some are under way when the lease ends.
            file.truncate(1 << 30)
    job = first.submit(
        "admin",
        "copy",
        src_siteid=1,
        src_filepath="/tree/",
        dst_siteid=2,
        dst_filepath="/tree",
        protocol="FILE",
    )
    until("files arrive", lambda: any(destination.glob(".pdm-*")))
    assert first.process is not None
    helpers = descendants(first.process.pid)
    if who == "both":
        signal_all(first, signal.SIGSTOP)
    else:
        first.process.send_signal(signal.SIGSTOP)
    second.start()
    until("the helpers of the suspended daemon end", lambda: who == "both" or not any(map(runs, helpers)))
    second.call("admin", "GET", f"/jobs/{job['id']}")
    until("the other takes over", lambda: any(second.directory.glob("var/logs/*/*/log")))
    signal_all(first, signal.SIGCONT)
    ended = second.wait_for("admin", job["id"], timeout_s=120)
    assert ended["status"] == "DONE", ended
    assert {path.name: path.stat().st_size for path in destination.iterdir()} == {
        path.name: 1 << 30 for path in source.iterdir()
    }
    repeated = 0
    for attempts in spans(first, second).values():
        repeated += len(attempts) > 1
        for (_, end), (start, _) in itertools.pairwise(sorted(attempts)):
            assert end <= start, attempts
    assert repeated


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
