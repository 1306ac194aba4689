"""Servers that take connections and say nothing, and sites with a second endpoint: real servers, no attempt burnt."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from pdm.testgrid import TestGrid
from pdm.testgrid.service import TestService
from pdm.workqueue.wire.agent_events import DoneEvent
from tests.grid.agent_sites import Sites, helper_as, judged
from tests.helpers.driver import HelperProcess

FILES = 40
#: More than is copied pipelined.
_LARGE = 65 * 1024 * 1024


@pytest.fixture
def fresh(grid: TestGrid) -> Iterator[HelperProcess]:
    """A helper that is not logged in anywhere."""
    with helper_as(grid) as helper:
        yield helper


@pytest.mark.parametrize(
    ("site", "scope", "size"),
    [
        ("A", "source", _LARGE),
        ("B", "destination", 7),
        pytest.param("A", "source", 7, marks=pytest.mark.full),
        pytest.param("B", "destination", _LARGE, marks=pytest.mark.full),
    ],
)
@pytest.mark.full
def test_a_login_that_hangs_is_the_servers_fault(
    fresh: HelperProcess, sites: Sites, site: str, scope: str, size: int
) -> None:
    sources = [sites.put(sites.a / f"f{key}", b"x" * size) for key in range(2)]
    items = [sites.item(source, sites.b / source.name, key) for key, source in enumerate(sources)]
    server = sites.grid.sites[site].server
    server.freeze()
    try:
        # Long enough for the login to the other server, on a busy machine too.
        events = fresh.copy(items, stall_s=3.0)
    finally:
        server.thaw()
    if scope == "source" or size < _LARGE:
        assert {judged(event) for event in events.values()} == {f"{scope} CONNECTION"}
    else:
        # The first look at the destination tells as much of whose fault it is.
        assert {judged(event) for event in events.values()} <= {f"{scope} CONNECTION", f"{scope} STALLED"}
    assert {type(event) for event in fresh.copy(items).values()} == {DoneEvent}


def test_other_work_knows_of_hanging_logins_too(fresh: HelperProcess, sites: Sites) -> None:
    server = sites.grid.sites["A"].server
    server.freeze()
    try:
        listed = fresh.list(sites.url(sites.a), stall_s=1.0)
    finally:
        server.thaw()
    assert judged(listed[-1]) == "source CONNECTION"


# -- two endpoints of one storage


@pytest.fixture
def service(grid: TestGrid, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestService]:
    service = TestService(tmp_path_factory.mktemp("doors") / "instance", grid.description(), grid.directory)
    service.init(queue={"first_pause": "200ms", "longest_pause": "500ms", "stall": "2s", "total": "30s"})
    with service.running():
        service.delegate("alice")
        yield service
    assert "Traceback" not in service.log_path.read_text()


def doors(service: TestService, number: int) -> dict[str, str]:
    return {each["url"]: each["state"] for each in service.call("alice", "GET", f"/sites/{number}")[1]["health"]}


def copied(service: TestService, number: int, source: Any, target: Any) -> dict[str, Any]:
    job = service.submit(
        *("alice", "copy"),
        src_siteid=1,
        src_filepath=str(source),
        dst_siteid=number,
        dst_filepath=str(target),
        max_tries=1,
    )
    ended = service.wait_for("alice", job["id"])
    assert (ended["status"], ended["num_failed"]) == ("DONE", 0), service.tail()
    return job


@pytest.mark.full
@pytest.mark.parametrize("frozen", [False, pytest.param(True, marks=pytest.mark.full)])
def test_the_other_endpoint_is_used(service: TestService, grid: TestGrid, grid_directories: Any, frozen: bool) -> None:
    """Both servers of the grid serve all directories: one of them is away, and no element is the worse for it."""
    tree = grid_directories.a / "tree"
    tree.mkdir()
    for number in range(FILES):
        (tree / f"file{number}").write_bytes(b"x" * 1000)
    grid_directories.give()
    # The one that is away is the preferred one.
    away, works = (
        grid.sites[name].url(grid_directories.b).removesuffix(str(grid_directories.b)) for name in ("B", "A")
    )
    status, site = service.call(
        "alice", "POST", "/sites", {"name": "DOORS", "endpoints": {"GRIDFTP": [away, works]}, "default_folder": "/tmp"}
    )
    assert status == 201, site
    server = grid.sites["B"].server
    server.freeze() if frozen else server.stop()
    job = copied(service, site["id"], tree, grid_directories.b / "one")
    assert len(list((grid_directories.b / "one").iterdir())) == FILES
    seen = doors(service, site["id"])
    assert seen[works] == "closed"
    assert seen[away] in ("open", "half-open")
    # One endpoint is enough for a site to be there.
    assert service.call("alice", "GET", f"/sites/{site['id']}")[1]["state"] == "ok"
    elements = service.call("alice", "GET", f"/jobs/{job['id']}/elements")[1]
    assert all(each["status"] == "DONE" for each in elements)
    server.thaw() if frozen else server.start()
    give_up_at, count = time.monotonic() + 30, 0
    while doors(service, site["id"])[away] != "closed":
        # The next work finds out that it is back.
        assert time.monotonic() < give_up_at
        count += 1
        copied(service, site["id"], tree, grid_directories.b / f"more{count}")
