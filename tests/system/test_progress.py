"""Progress and live logs of real work: simulated transfers that take their time, in a real daemon, over TLS."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from pdm.testgrid.service import FINAL, TestService

SIZE = 1_000_000


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestService]:
    service = TestService(tmp_path_factory.mktemp("progress") / "instance")
    service.init()
    with service.running():
        yield service


def copied(service: TestService, **dummy: Any) -> int:
    """A copy of simulated files; its number."""
    places = {"src_siteid": 1, "src_filepath": "/t", "dst_siteid": 2, "dst_filepath": "/c"}
    job = service.submit("admin", "copy", **places, protocol="DUMMY", extra_opts={"dummy": dummy})
    return int(job["id"])


def watched(service: TestService, job_id: int) -> list[dict[str, Any]]:
    """The job again and again, until it has ended."""
    give_up_at = time.monotonic() + 60
    seen: list[dict[str, Any]] = []
    while not seen or seen[-1]["status"] not in FINAL:
        status, job = service.call("admin", "GET", f"/jobs/{job_id}")
        assert status == 200
        assert time.monotonic() < give_up_at, service.tail()
        seen.append(job)
        time.sleep(0.02)
    return seen


def test_bytes_go_up_to_the_total_and_never_back(service: TestService) -> None:
    seen = watched(service, copied(service, files=6, size=SIZE, delay=0.5))
    told = 0
    for job in seen:
        progress = job["progress"]
        if progress["bytes_moving"] is not None:
            assert progress["bytes_done"] + progress["bytes_moving"] >= told
            told = progress["bytes_done"] + progress["bytes_moving"]
        assert told <= 6 * SIZE
        assert progress["bytes_total"] == (None if progress["listing"] else 6 * SIZE)
        assert progress["files_done"] <= 6
    assert any(0 < (job["progress"]["bytes_moving"] or 0) < SIZE for job in seen), "a part of a file was told of"
    assert any(job["progress"]["instant"] and job["progress"]["eta"] for job in seen)
    last = seen[-1]["progress"]
    assert (last["bytes_done"], last["bytes_moving"], last["files_done"], last["files_total"]) == (6 * SIZE, 0, 6, 6)
    assert (last["instant"], last["files_per_second"], last["eta"]) == (None, None, None)
    assert last["average"] == pytest.approx(6 * SIZE / last["elapsed"])


def test_small_files_have_rates(service: TestService) -> None:
    seen = watched(service, copied(service, files=60, size=1000, delay=0.05))
    rates = [
        (job["progress"]["instant"], job["progress"]["files_per_second"])
        for job in seen
        if job["progress"]["files_per_second"]
    ]
    assert rates
    # Each file is a thousand bytes, so whatever the machine does meanwhile, the two rates go together.
    assert all(instant == pytest.approx(1000 * files, rel=0.5) for instant, files in rates)


def test_an_element_that_runs_tells_how_far_it_is(service: TestService) -> None:
    job_id = copied(service, files=1, size=SIZE, delay=1.5)
    seen: list[dict[str, Any]] = []
    while service.call("admin", "GET", f"/jobs/{job_id}")[1]["status"] not in FINAL:
        status, element = service.call("admin", "GET", f"/jobs/{job_id}/elements/1/status")
        if status == 200 and element["status"] == "RUNNING" and element["transferred"]:
            seen.append(element)
    assert seen
    assert [element["transferred"] for element in seen] == sorted(element["transferred"] for element in seen)
    assert all(element["transferred"] <= SIZE and element["average"] > 0 for element in seen)


def test_a_log_is_read_while_it_is_written(service: TestService) -> None:
    job_id = copied(service, files=1, size=SIZE, delay=1.5)
    pieces: list[dict[str, Any]] = []
    give_up_at = time.monotonic() + 60
    while not pieces or not pieces[-1]["end"]:
        assert time.monotonic() < give_up_at
        offset = pieces[-1]["offset"] if pieces else 0
        status, piece = service.call("admin", "GET", f"/jobs/{job_id}/elements/1/output/1?live=1&offset={offset}")
        if status == 200 and (piece["log"] or piece["end"]):
            pieces.append(piece)
    assert any("progress bytes=" in piece["log"] for piece in pieces if piece["status"] == "RUNNING")
    _, whole = service.call("admin", "GET", f"/jobs/{job_id}/elements/1/output/1")
    assert "".join(piece["log"] for piece in pieces) == whole["log"]
