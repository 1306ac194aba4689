"""Progress and live logs of real work: simulated transfers that take their time, in a real daemon, over TLS."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
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


def until(service: TestService, path: str, wanted: Callable[[Any], object]) -> Any:
    """What a path answers, once it is as wanted."""
    give_up_at = time.monotonic() + 60
    while True:
        status, answer = service.call("admin", "GET", path)
        if status == 200 and wanted(answer):
            return answer
        assert time.monotonic() < give_up_at, f"{answer}\n{service.tail()}"
        time.sleep(0.02)


def test_bytes_go_up_to_the_total_and_never_back(service: TestService) -> None:
    told = [0]

    def has_ended(job: dict[str, Any]) -> bool:
        progress = job["progress"]
        if progress["bytes_moving"] is not None:
            now = progress["bytes_done"] + progress["bytes_moving"]
            assert told[-1] <= now <= 6 * SIZE
            told.append(now)
        assert progress["bytes_total"] == (None if progress["listing"] else 6 * SIZE)
        assert progress["files_done"] <= 6
        return job["status"] in FINAL

    job_id = copied(service, files=6, size=SIZE, delay=0.5)
    last = until(service, f"/jobs/{job_id}", has_ended)["progress"]
    assert (last["bytes_done"], last["bytes_moving"], last["files_done"], last["files_total"]) == (6 * SIZE, 0, 6, 6)
    assert (last["instant"], last["files_per_second"], last["eta"]) == (None, None, None)
    assert last["average"] == pytest.approx(6 * SIZE / last["elapsed"])


def test_a_long_transfer_is_followed(service: TestService) -> None:
    job_id = copied(service, files=1, size=SIZE, delay=300)
    job = until(service, f"/jobs/{job_id}", lambda job: job["progress"]["eta"])["progress"]
    assert (job["bytes_done"], job["files_done"], job["files_total"], job["listing"]) == (0, 0, 1, False)
    assert 0 < job["bytes_moving"] < SIZE
    assert 0 < job["average"] < SIZE
    assert job["eta"] == pytest.approx((SIZE - job["bytes_moving"]) / job["instant"])
    assert until(service, f"/jobs/{job_id}/status", lambda _: True)["progress"]["bytes_moving"] >= job["bytes_moving"]

    element = until(service, f"/jobs/{job_id}/elements/1/status", lambda element: element["transferred"])
    assert job["bytes_moving"] <= element["transferred"] < SIZE
    assert element["instant"] > 0

    path = f"/jobs/{job_id}/elements/1/output"
    first = until(service, f"{path}/1?live=1", lambda output: "progress bytes=" in output["log"])
    assert (first["status"], first["end"]) == ("RUNNING", False)
    more = until(service, f"{path}?live=1&offset={first['offset']}", lambda output: output["log"])
    assert service.call("admin", "GET", f"{path}/1")[0] == 400, "as the reference says"
    service.call("admin", "DELETE", f"/jobs/{job_id}")
    rest = until(service, f"{path}/1?live=1&offset={more['offset']}", lambda output: output["end"])
    assert rest["status"] == "CANCELLED"
    whole = service.call("admin", "GET", f"{path}/1")[1]["log"]
    assert first["log"] + more["log"] + rest["log"] == whole


def test_small_files_have_rates_though_they_never_report(service: TestService) -> None:
    job_id = copied(service, files=3000, size=1000, delay=0.02)
    job = until(service, f"/jobs/{job_id}", lambda job: job["progress"]["eta"])["progress"]
    # Each file is a thousand bytes, so whatever the machine does meanwhile, the two rates go together.
    assert job["instant"] == pytest.approx(1000 * job["files_per_second"], rel=0.5)
    assert job["eta"] > 0
    service.call("admin", "DELETE", f"/jobs/{job_id}")
