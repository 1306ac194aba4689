"""Jobs by the tools, through the daemon: a site's key, a job's option, and the log while they move."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pdm.testgrid import TestGrid
from pdm.testgrid.service import TestService, set_keys
from tests.grid.agent_sites import Sites
from tests.helpers.driver import ODD_NAMES, tree
from tests.support.attempt_logs import attempt_lines

pytestmark = [pytest.mark.grid, pytest.mark.timeout(300)]
TOOLS = {"mover": "tools"}


@pytest.fixture(scope="module")
def service(grid: TestGrid, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestService]:
    """A daemon whose site A is moved by the tools."""
    service = TestService(tmp_path_factory.mktemp("tools") / "instance", grid.description(), grid.directory)
    service.init(queue={"first_pause": "100ms", "longest_pause": "300ms", "stall": "30s", "total": "120s"})
    set_keys(service.directory / "sites.d" / "sites.conf", {"A": {"mover": "tools"}})
    with service.running():
        service.delegate("alice")
        yield service
    assert "Traceback" not in service.log_path.read_text()


def run(service: TestService, type_: str, site: int, path: Path, **more: Any) -> dict[str, Any]:
    job = service.submit("alice", type_, src_siteid=site, src_filepath=str(path), **more)
    return service.wait_for("alice", job["id"], timeout_s=200.0)


def log_of(service: TestService, job: dict[str, Any], element: int = 0) -> str:
    _, output = service.call("alice", "GET", f"/jobs/{job['id']}/elements/{element}/output")
    text: str = output["log"]
    return text


def wait_for(condition: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    give_up_at = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < give_up_at
        time.sleep(0.02)
    return found


def tools_running(service: TestService) -> set[int]:
    """Processes of globus-url-copy that a daemon has started: other tests may run the tool beside this one."""
    found = set()
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            is_tool = (directory / "cmdline").read_bytes().split(b"\0")[0].endswith(b"globus-url-copy")
            if is_tool and os.fsencode(service.directory) in (directory / "environ").read_bytes():
                found.add(int(directory.name))
    return found


@pytest.mark.full
def test_all_five_types_at_a_tree_of_200_files(
    service: TestService, sites: Sites, record_property: Callable[[str, object], None]
) -> None:
    source = sites.a / "tree"
    for number in range(200 - len(ODD_NAMES)):
        sites_file = source / f"directory {number % 3}" / f"näme {number}"
        sites_file.parent.mkdir(parents=True, exist_ok=True)
        sites_file.write_bytes(bytes([number]) * number * 50)
    for name in ODD_NAMES:
        (source / os.fsdecode(name)).write_bytes(name)
    (source / "empty").mkdir()
    sites.grid.give(sites.a)

    listed = run(service, "list", 1, source)
    assert listed["status"] == "DONE"
    assert "$ gfal-ls -al --time-style full-iso gsiftp://" in log_of(service, listed)
    began = time.monotonic()
    copied = run(service, "copy", 1, source, dst_siteid=2, dst_filepath=str(sites.b / "new"))
    seconds = time.monotonic() - began
    assert copied["status"] == "DONE", service.call("alice", "GET", f"/jobs/{copied['id']}/elements")
    record_property("seconds for 200 files", round(seconds, 1))
    assert tree(sites.b / "new") == tree(source)
    assert (sites.b / "new" / "empty").is_dir()
    logs = [log_of(service, copied, element) for element in range(1, copied["num_elements"])]
    assert sum("Source: gsiftp://" in log for log in logs) == 200
    # Lists: far fewer processes than files.
    assert 0 < sum("$ globus-url-copy -c -fast -vb -f" in log for log in logs) <= 25
    moved = run(service, "rename", 2, sites.b / "new", dst_filepath=str(sites.b / "newer"), extra_opts=TOOLS)
    assert moved["status"] == "DONE" and "$ gfal-rename " in log_of(service, moved)
    removed = run(service, "remove", 2, sites.b / "newer", extra_opts={"recursive": True, **TOOLS})
    assert removed["status"] == "DONE", service.call("alice", "GET", f"/jobs/{removed['id']}/elements")
    assert list(sites.b.iterdir()) == []
    made = run(service, "mkdir", 2, sites.b / "made", extra_opts=TOOLS)
    assert made["status"] == "DONE" and "$ gfal-mkdir " in log_of(service, made)
    # A site says it, a job may say otherwise.
    native = run(service, "list", 1, source, extra_opts={"mover": "native"})
    assert native["status"] == "DONE" and "gfal" not in log_of(service, native)


def test_the_log_grows_while_the_tool_moves_and_both_its_death_and_a_cancel_are_seen(
    service: TestService, sites: Sites, record_property: Callable[[str, object], None]
) -> None:
    huge = sites.huge()
    before = tools_running(service)
    job = service.submit(
        "alice", "copy", src_siteid=1, src_filepath=str(huge), dst_siteid=2, dst_filepath=str(sites.b / "huge")
    )

    logs = service.directory / "var" / "logs"

    def logged(attempt: int) -> str:
        # What `tail -F` shows.
        found = attempt_lines(logs / job["log_uid"][:2] / job["log_uid"] / "log")
        return "\n".join(found.get((1, attempt), []))

    wait_for(lambda: " bytes " in logged(1) and "MB/sec inst" in logged(1))
    _, element = service.call("alice", "GET", f"/jobs/{job['id']}/elements/1/status")
    assert element["status"] == "RUNNING" and element["transferred"] > 0 and element["average"] > 0

    # Not before: tools that listed the source may have run until then.
    pid = wait_for(lambda: tools_running(service) - before).pop()
    os.kill(pid, signal.SIGKILL)

    def first_log() -> str:
        # A process of the second attempt may be seen before the end of the first is in the database.
        _, output = service.call("alice", "GET", f"/jobs/{job['id']}/elements/1/output/1")
        return str(output.get("log", ""))

    assert "globus-url-copy was ended by signal 9" in wait_for(lambda: "code=CRASHED" in first_log() and first_log())

    wait_for(lambda: "Source: gsiftp://" in logged(2))
    again = wait_for(lambda: tools_running(service) - before - {pid}).pop()
    asked_at = time.monotonic()
    status, _ = service.call("alice", "DELETE", f"/jobs/{job['id']}")
    assert status == 200
    wait_for(lambda: again not in tools_running(service), 5.0)
    took = time.monotonic() - asked_at
    record_property("seconds from cancel to the end of the tool", round(took, 2))
    assert took < 1.5
    assert service.wait_for("alice", job["id"])["status"] == "CANCELLED"
    wait_for(lambda: list(sites.b.iterdir()) == [])


@pytest.mark.full
def test_four_gibibytes_with_progress(
    service: TestService, sites: Sites, record_property: Callable[[str, object], None]
) -> None:
    size = 4 * 1024**3
    if shutil.disk_usage(sites.b).free < 2 * size:
        pytest.skip("not enough room")
    source = sites.put(sites.a / "large", b"")
    with source.open("r+b") as file:
        for place in range(0, size, 256 * 1024**2):
            file.seek(place)
            file.write(os.urandom(1024**2))
        file.truncate(size)
    job = service.submit(
        "alice", "copy", src_siteid=1, src_filepath=str(source), dst_siteid=2, dst_filepath=str(sites.b / "large")
    )
    seen: list[int] = []
    began = time.monotonic()
    while service.call("alice", "GET", f"/jobs/{job['id']}")[1]["status"] not in ("DONE", "FAILED"):
        code, element = service.call("alice", "GET", f"/jobs/{job['id']}/elements/1/status")
        if code == 200 and element["status"] == "RUNNING" and element["transferred"]:
            seen.append(element["transferred"])
        assert time.monotonic() - began < 250
        time.sleep(0.2)
    seconds = time.monotonic() - began
    assert service.wait_for("alice", job["id"])["status"] == "DONE"
    steps = sorted(set(seen))
    record_property("seconds for 4 GiB", round(seconds, 1))
    record_property("progress of 4 GiB, times", len(steps))
    # How often the tool tells its progress: on a fast machine it has ended by then.
    assert steps == list(dict.fromkeys(seen))
    assert (sites.b / "large").stat().st_size == size
    log = log_of(service, job, 1)
    assert log.count("MB/sec inst") == len([line for line in log.splitlines() if "MB/sec inst" in line]) >= 1
    assert "ADLER32:" in log


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"protocol": "SSH", "extra_opts": TOOLS}, "$.extra_opts.mover"),
        ({"extra_opts": {"mover": "fts"}}, "$.extra_opts.mover"),
        ({"extra_opts": {"mover": None}}, None),
    ],
)
def test_what_a_job_may_ask_for(
    service: TestService, sites: Sites, fields: dict[str, Any], pointer: str | None
) -> None:
    status, answer = service.call("alice", "POST", "/list", {"src_siteid": 1, "src_filepath": str(sites.a), **fields})
    assert (status, answer.get("pointer")) == ((200, None) if pointer is None else (400, pointer))


@pytest.mark.full
def test_the_commands(service: TestService, sites: Sites) -> None:
    sites.put(sites.a / "file")
    done = service.pdm("alice", "cp", "--mover", "tools", f"2:{sites.b}/", f"1:{sites.a}/from-b")
    assert done.returncode == 0, done.stderr
    done = service.pdm("alice", "ls", "--mover", "tools", f"2:{sites.b}")
    assert done.returncode == 0, done.stderr
    shown = service.pdm("alice", "site", "show", "1").stdout
    assert "mover     tools: globus-url-copy and gfal carry out its jobs" in shown
    assert service.call("alice", "GET", "/sites/1")[1]["mover"] == "tools"
    added = service.pdm(
        "alice", "site", "add", "MINE", "--gridftp", "gsiftp://far.example.org:2811", "--mover", "tools", "-F", "json"
    )
    assert '"mover": "tools"' in added.stdout or '"mover":"tools"' in added.stdout, added
    changed = service.pdm("alice", "site", "change", "MINE", "--mover", "native", "-F", "json").stdout
    assert "tools" not in changed
    checked = service.pdm("alice", "site", "check", "1")
    assert checked.returncode == 0, checked.stderr + checked.stdout
