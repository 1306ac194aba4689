"""Protocol × job type × fault against real servers; ``PDM_MATRIX=FILE`` keeps what script/protocol-table prints."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.failures import AttemptFailure
from pdm.workqueue.movers import MOVERS
from pdm.workqueue.wire import agent_messages as wire
from tests.agents.helpers.driver import LIMITS, HelperProcess, outcomes
from tests.protocols.places import Places, owner

PROTOCOLS = ["ssh", "https", "xroot"]
#: fault → job type → scope and code expected.
FAULTS: dict[str, dict[str, str]] = {
    "none": dict.fromkeys(("LIST", "COPY", "REMOVE", "RENAME", "MKDIR"), "DONE"),
    "missing source": {
        "LIST": "source NOT_FOUND",
        "COPY": "source NOT_FOUND",
        "REMOVE": "source NOT_FOUND",
        "RENAME": "source NOT_FOUND",
        "MKDIR": "destination NOT_FOUND",
    },
    "exists": {"COPY": "destination EXISTS", "RENAME": "destination EXISTS", "MKDIR": "destination EXISTS"},
    "permission denied": {
        "LIST": "source PERMISSION_DENIED",
        "COPY": "destination PERMISSION_DENIED",
        "REMOVE": "source PERMISSION_DENIED",
        "RENAME": "destination PERMISSION_DENIED",
        "MKDIR": "destination PERMISSION_DENIED",
    },
    "unreachable": {
        "LIST": "source CONNECTION",
        "COPY": "destination CONNECTION",
        "REMOVE": "source CONNECTION",
        "RENAME": "source CONNECTION",
        "MKDIR": "destination CONNECTION",
    },
    "disk full": {"COPY": "destination NO_SPACE"},
}
CASES = [
    (protocol, job, fault, expected)
    for protocol in PROTOCOLS
    for fault, jobs in FAULTS.items()
    for job, expected in jobs.items()
]


@pytest.fixture(scope="module")
def seen() -> Iterator[list[list[str]]]:
    rows: list[list[str]] = []
    yield rows
    if file := os.environ.get("PDM_MATRIX"):
        Path(file).write_text(json.dumps(rows), encoding="utf-8")


@pytest.mark.parametrize(("protocol", "job", "fault", "expected"), CASES)
def test_cell(
    protocol: str,
    job: str,
    fault: str,
    expected: str,
    own: HelperProcess,
    places: Places,
    seen: list[list[str]],
) -> None:
    if fault in ("permission denied", "disk full") and not owner():
        pytest.skip("needs root")
    folder = places.b / "folder"
    folder.mkdir()
    file = places.put(places.a / "file", b"x" * 3_000_000)
    here = places.put(folder / "here")
    undo = _arrange(fault, protocol, places, folder)
    try:
        event = own.run(_request(job, fault, protocol, places, file, here, own.new_id()))[-1]
    finally:
        undo()
    if isinstance(event, wire.Failed):
        failure: AttemptFailure = MOVERS[JobProtocol.parse(protocol)].judge(event.fault)
        found = f"{failure.scope} {failure.code}"
        retryable = "yes" if failure.retryable else "no"
        row = [failure.code.value, failure.scope.value, retryable, failure.hint]
    else:
        found, row = "DONE", ["DONE", "", "", ""]
    assert found == expected, event
    assert outcomes([event])
    assert places.left() == []
    seen.append([protocol.upper(), job, fault, *row])


def _arrange(fault: str, protocol: str, places: Places, folder: Path) -> Callable[[], object]:
    if fault == "permission denied":
        os.chown(folder, 0, 0)
        folder.chmod(0o700)
        return lambda: folder.chmod(0o755)
    if fault == "unreachable":
        server = places.storages.server(protocol, "B")
        server.stop()
        return server.start
    if fault == "disk full":
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], capture_output=True, check=False
        )
        if mounted.returncode:
            pytest.skip("no file system can be mounted here")
        places.storages.give(folder)
        return lambda: subprocess.run(["umount", "--lazy", str(folder)], check=True)
    return lambda: None


def _request(job: str, fault: str, protocol: str, places: Places, file: Path, here: Path, number: int) -> wire.Work:
    def url(path: Path) -> str:
        return places.url(protocol, path)

    absent, new = here.parent / "absent", here.parent / "new"
    if job == "LIST":
        return wire.ListRequest(number, 1, url(absent if fault == "missing source" else here.parent), None, LIMITS)
    if job == "COPY":
        source = places.a / "absent" if fault == "missing source" else file
        item = places.item(protocol, source, here if fault == "exists" else new)
        return wire.CopyRequest(number, [item], "never", "checksum", LIMITS)
    if job == "REMOVE":
        return wire.RemoveRequest(
            number, [wire.PathItem(1, url(absent if fault == "missing source" else here))], LIMITS
        )
    if job == "RENAME":
        # What cannot be written to can be read, so that the fault is the one meant.
        if fault == "permission denied":
            here.parent.chmod(0o755)
        old = absent if fault == "missing source" else here
        other = places.put(here.parent / "other") if fault == "exists" else new
        return wire.RenameRequest(number, [wire.RenameItem(1, url(old), url(other))], "never", LIMITS)
    made = absent / "new" if fault == "missing source" else here.parent / ("here" if fault == "exists" else "made")
    return wire.MakeRequest(number, [wire.PathItem(1, url(made), directory=True)], False, LIMITS)
