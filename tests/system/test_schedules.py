"""Schedules of real daemons: over a restart, a missed time, a kill, and with two daemons on one database."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from pdm.testgrid.service import TestService
from tests.support.cluster import cluster_of

_JOB = {"type": "MKDIR", "src_siteid": 1, "src_filepath": "x", "protocol": "DUMMY"}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[TestService]:
    service = TestService(tmp_path / "instance")
    service.init()
    service.start()
    yield service
    if service.process is not None:
        service.kill()
    assert "Traceback" not in service.log_path.read_text()


def call(service: TestService, method: str, path: str, body: Any = None) -> Any:
    status, answer = service.call("admin", method, path, body)
    assert status in (200, 201), answer
    return answer


def make_due(url: str) -> None:
    """Let all schedules be due since three hours ago."""
    engine = sa.create_engine(url)
    earlier = "datetime('now', '-3 hours')" if engine.dialect.name == "sqlite" else "now() - interval '3 hours'"
    with engine.begin() as connection:
        connection.execute(sa.text(f"UPDATE schedules SET next_due = {earlier}"))
    engine.dispose()


def database_of(service: TestService) -> str:
    return f"sqlite:///{service.directory}/var/workqueue.sqlite"


def runs_of(service: TestService, numbers: list[int], timeout_s: float = 40.0) -> list[dict[str, Any]]:
    """The runs of schedules, once each has one; none has more, and their jobs are all that there are."""
    give_up_at = time.monotonic() + timeout_s
    while True:
        runs = [call(service, "GET", f"/schedules/{number}")["runs"] for number in numbers]
        if all(runs) or time.monotonic() > give_up_at:
            break
        time.sleep(0.1)
    assert [len(each) for each in runs] == [1] * len(numbers), service.tail()
    found = [each[0] for each in runs]
    jobs = call(service, "GET", "/jobs")
    assert sorted(job["schedule"] for job in jobs) == sorted(numbers)
    assert sorted(run["job"] for run in found) == sorted(job["id"] for job in jobs)
    return found


def test_a_schedule_lives_through_a_kill_and_makes_up_for_a_missed_time(service: TestService) -> None:
    command = ("mkdir", "--protocol", "dummy", "--label", "hourly", "1:/made")
    told = service.pdm("admin", "schedule", "add", "every 1h", "--timezone", "Europe/Paris", "--", *command)
    assert told.returncode == 0, told.stderr
    number = int(told.stdout)
    assert call(service, "GET", f"/schedules/{number}")["job"] == {
        "type": "MKDIR",
        "src_siteid": 1,
        "src_filepath": "/made",
        "protocol": "DUMMY",
        "label": "hourly",
        "extra_opts": {"parents": False},
    }
    # Of a protocol that needs a credential, and there is none.
    site = {"name": "KEYLESS", "endpoints": {"SSH": "sftp://keyless.example.org"}}
    site_id = call(service, "POST", "/sites", site)["id"]
    keyless = call(
        service,
        "POST",
        "/schedules",
        {"recurrence": "0 3 * * *", "job": {**_JOB, "src_siteid": site_id, "protocol": "SSH"}},
    )["id"]
    service.kill()
    make_due(database_of(service))
    service.start()
    first, second = runs_of(service, [number, keyless])
    assert first["due_at"] < first["made_at"]
    assert service.wait_for("admin", first["job"])["status"] == "DONE"
    service.wait_for("admin", second["job"], until=("HELD",))
    shown = service.pdm("admin", "schedule", "show", str(keyless)).stdout
    assert "held      CREDENTIAL_MISSING: " in shown
    assert f"job {second['job']} HELD" in shown


@pytest.mark.full
def test_a_kill_neither_doubles_nor_loses_a_run(service: TestService) -> None:
    numbers = [call(service, "POST", "/schedules", {"recurrence": "every 1h", "job": _JOB})["id"] for _ in range(25)]
    service.kill()
    make_due(database_of(service))
    for pause_s in (0.0, 0.02, 0.05):
        service.start()
        time.sleep(pause_s)
        service.kill()
    service.start()
    runs_of(service, numbers)


@pytest.mark.full
@pytest.mark.postgresql
def test_of_two_daemons_one_makes_each_run(tmp_path: Path) -> None:
    with cluster_of(2, tmp_path) as cluster:
        first, second = cluster.nodes
        body = {"recurrence": "every 1h", "job": _JOB}
        numbers = [call(first, "POST", "/schedules", body)["id"] for _ in range(40)]
        make_due(cluster.postgresql.url.render_as_string(hide_password=False))
        for service in cluster.nodes:
            # Both look now: at their next look, or when a schedule is stored.
            paused = call(service, "POST", "/schedules", body)["id"]
            assert service.call("admin", "DELETE", f"/schedules/{paused}")[0] == 204
        first.kill()
        runs_of(second, numbers)
