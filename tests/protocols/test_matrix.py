"""Protocol × fault × job type against real servers, and that docs/protocols.rst shows what was seen.

Each test is a row of the page: a fault at a protocol, met by all five types of jobs. ``PDM_MATRIX=FILE`` keeps what
script/protocol-table writes into the page.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pdm.testgrid import TestGrid
from pdm.testgrid.storage_servers import ServerProcess
from pdm.testgrid.storages import TestStorages
from pdm.workqueue.domain.enums import JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope, Remedy, hint_for
from pdm.workqueue.wire.agent_events import AgentEvent, DoneEvent, FailedEvent
from pdm.workqueue.wire.agent_requests import MkdirRequest, PathItem, WorkRequest
from tests.helpers.driver import HelperProcess
from tests.protocols.places import mover_named, owner
from tests.protocols.renewals import LIFETIME_S, PROTOCOLS, RENEWED, SOON_S, renewals
from tests.protocols.stands import LIMITS, STANDS, Ground, Stand, freeze, unread, wait_for_unread
from tests.support.variants import usual

# All of it, so that it stays in its order: some of it asks for the grid by name.
pytestmark = [pytest.mark.grid, pytest.mark.timeout(180)]
JOBS = ("LIST", "COPY", "REMOVE", "RENAME", "MKDIR")
#: Larger than any machine copies before a test can say stop.
HUGE = 64 * 1024**3
#: Where a fault lies that is of no file, by type of job; of copies, with both servers at fault.
AT = dict(zip(JOBS, ("source", "destination", "source", "source", "destination"), strict=True))


def all_with(code: str) -> dict[str, str]:
    return {job: f"{code} / {scope}" for job, scope in AT.items()}


_GONE = {**all_with("CONNECTION"), "COPY": "CONNECTION / source or destination"}
#: Fault → type of job → what becomes of it; what is missing there is no fault of that type.
EXPECTED: Mapping[str, Mapping[str, str]] = {
    "none": dict.fromkeys(JOBS, "DONE"),
    "missing source": {**dict.fromkeys(JOBS, "NOT_FOUND / source"), "MKDIR": "NOT_FOUND / destination"},
    "exists": dict.fromkeys(("COPY", "RENAME", "MKDIR"), "EXISTS / destination"),
    "permission denied": {
        **all_with("PERMISSION_DENIED"),
        "COPY": "PERMISSION_DENIED / source or destination",
        "RENAME": "PERMISSION_DENIED / destination",
    },
    "unreachable": _GONE,
    "server killed": _GONE,
    "disk full": dict.fromkeys(("COPY", "MKDIR"), "NO_SPACE / destination"),
}
#: What is wrong with a credential, as only the server knows → what becomes of all types.
BAD: Mapping[str, Mapping[str, str]] = {
    "proxy expired": dict.fromkeys(JOBS, "CREDENTIAL_EXPIRED / service"),
    "proxy not mapped": all_with("CREDENTIAL_REFUSED"),
    "proxy not accepted": all_with("CREDENTIAL_REFUSED"),
    "key not accepted": all_with("CREDENTIAL_REFUSED"),
    "token expired": all_with("PERMISSION_DENIED"),
    "token not accepted": all_with("PERMISSION_DENIED"),
}
#: The row of credentials that have ended as the service knows; what becomes of all jobs then.
KNOWN = "credential ended, as the service knows"
HELD = dict.fromkeys(PROTOCOLS, "HELD: CREDENTIAL_EXPIRED / service")
HELD["ssh"] = "HELD: CREDENTIAL_MISSING / service"
#: The rows in the order of the page.
ROWS = (*list(EXPECTED)[:4], KNOWN, *BAD, *list(EXPECTED)[4:])
NOTES = {
    "a": "There is neither a server nor a credential: the helper works on the disk.",
    "b": "It puts nothing anywhere, so nothing can be in its way.",
    "c": "It needs no room.",
    "d": "SSH keys have no end: this one was removed. Jobs go on with the next, others with a new proxy or token.",
    "e": "XRootD says of a token that it does not take what it says of one that is for another directory. Of a macaroon"
    " or a JWT the service knows the end, and holds the job before.",
}
_NOTE_OF_ROW = {("SSH", KNOWN): "d", ("HTTPS", "token expired"): "e", ("HTTPS", "token not accepted"): "e"}


# -- what is seen


class Seen:
    """The cells of the run: protocol, fault and type of job → what became of it."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str, str], str] = {}
        self.codes: dict[str, AttemptFailure] = {}

    def outcome(self, protocol: str, event: AgentEvent) -> str:
        """The code and hint that users see; the code is noted for the other table."""
        if not isinstance(event, FailedEvent):
            assert isinstance(event, DoneEvent), event
            return "DONE"
        failure = mover_named(protocol).classify(event.fault)
        self.note(failure)
        return f"{failure.code} / {failure.scope}"

    def note(self, failure: AttemptFailure) -> None:
        self.codes[failure.code.value] = failure

    def row(self, protocol: str, fault: str, cells: Mapping[str, str]) -> None:
        for job, cell in cells.items():
            self.cells[protocol, fault, job] = cell


#: The daemon holds what has no credential before it asks any mover, so the tools have no row of that.
_TITLES = {"tools": "GRIDFTP with mover = tools"}


@pytest.fixture(scope="module")
def seen() -> Iterator[Seen]:
    seen = Seen()
    yield seen
    if file := os.environ.get("PDM_MATRIX"):
        _keep(seen, Path(file))


def _keep(seen: Seen, file: Path) -> None:
    """What script/protocol-table reads."""
    protocols = {
        _TITLES.get(protocol, protocol.upper()): [
            [
                _label(protocol.upper(), fault),
                *(seen.cells.get((protocol, fault, job)) or _none(fault) for job in JOBS),
            ]
            for fault in ROWS
            if fault in EXPECTED or (fault == KNOWN and protocol != "tools") or (protocol, fault, "LIST") in seen.cells
        ]
        for protocol in STANDS
    }
    codes = [
        [code, "yes" if failure.retryable else "no", _DOES[failure.remedy], hint_for(failure.code, JobType.COPY)]
        for code, failure in sorted(seen.codes.items())
    ]
    told = {"jobs": JOBS, "protocols": protocols, "notes": NOTES, "codes": codes}
    file.write_text(json.dumps(told), encoding="utf-8")


_DOES = {Remedy.GIVE_UP: "gives up", Remedy.RETRY: "tries again", Remedy.HOLD: "holds it"}


def _label(protocol: str, fault: str) -> str:
    letter = _NOTE_OF_ROW.get((protocol, fault))
    return f"{fault} ({letter})" if letter else fault


def _none(fault: str) -> str:
    """Why a cell has no outcome."""
    return {"exists": "– (b)", "disk full": "– (c)"}.get(fault, "– (a)")


def either(*outcomes: str) -> str:
    """What became of a copy of which the one end, and then the other, was at fault."""
    codes = list(dict.fromkeys(outcome.partition(" / ")[0] for outcome in outcomes))
    if len(codes) > 1 or codes == ["DONE"]:
        return "; ".join(dict.fromkeys(outcomes))
    scopes = list(dict.fromkeys(outcome.partition(" / ")[2] for outcome in outcomes))
    return f"{codes[0]} / {' or '.join(scopes)}"


# -- stands and helpers, one for all cells of a protocol


@pytest.fixture(
    scope="module",
    # The tools are a second client of the same servers; tests/tools has them in every run. XROOT is relayed as
    # others are; tests/protocols/test_operations.py has it in every run.
    params=usual(STANDS, [name for name in STANDS if name not in ("tools", "xroot")]),
)
def stand(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    with _stand(request.param, request, tmp_path_factory.mktemp(request.param)) as made:
        yield made


@contextmanager
def _stand(protocol: str, request: pytest.FixtureRequest, scratch: Path) -> Iterator[Stand]:
    with STANDS[protocol](request, scratch) as made:
        yield made


@pytest.fixture(scope="module")
def helper(stand: Stand) -> Iterator[HelperProcess]:
    with stand.helper() as running:
        yield running


def run(helper: HelperProcess, ground: Ground, request: WorkRequest) -> AgentEvent:
    event = helper.run(request)[-1]
    assert ground.left() == []
    return event


@contextmanager
def small_disk(directory: Path, stand: Stand, options: str) -> Iterator[Path]:
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "none", str(directory)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        stand.give(directory)
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


# -- the faults


def none(stand: Stand, helper: HelperProcess, job: str, ground: Ground) -> list[AgentEvent]:
    return [run(helper, ground, ground.request(job, helper.new_id()))]


def missing(stand: Stand, helper: HelperProcess, job: str, ground: Ground) -> list[AgentEvent]:
    return [run(helper, ground, ground.request(job, helper.new_id(), missing=True))]


def exists(stand: Stand, helper: HelperProcess, job: str, ground: Ground) -> list[AgentEvent]:
    return [run(helper, ground, ground.request(job, helper.new_id(), taken=True))]


def denied(stand: Stand, helper: HelperProcess, job: str, ground: Ground) -> list[AgentEvent]:
    events = []
    if job == "COPY":
        os.chown(ground.file, 0, 0)
        ground.file.chmod(0o600)
        events.append(run(helper, ground, ground.request(job, helper.new_id())))
        ground.file.chmod(0o644)
    os.chown(ground.directory, 0, 0)
    # What cannot be written to can be read, so that the fault is the one meant.
    ground.directory.chmod(0o700 if job == "LIST" else 0o755)
    return [*events, run(helper, ground, ground.request(job, helper.new_id()))]


def full(stand: Stand, helper: HelperProcess, job: str, ground: Ground) -> list[AgentEvent]:
    # Room for one more file, but not for its bytes; or for no directory more.
    options = "size=1m" if job == "COPY" else "size=1m,nr_inodes=1"
    with small_disk(ground.directory / "small", stand, options) as directory:
        ground.new = directory / "new"
        if job == "COPY":
            for _ in range(_MOST_TRIES_FULL):
                ended = run(helper, ground, ground.request(job, helper.new_id()))
                # Of two GridFTP servers the source may be heard first: its data connection was cut. It is tried again.
                if not isinstance(ended, FailedEvent) or ended.fault.scope != "transfer":
                    break
            return [ended]
        item = PathItem(1, stand.url(directory / "made"), directory=True)
        return [run(helper, ground, MkdirRequest(helper.new_id(), [item], False, LIMITS))]


def ends_of(job: str) -> str:
    """The sites at which a type of job can meet a fault of the server."""
    return "AB" if job == "COPY" else "B"


def away(stand: Stand, helper: HelperProcess, job: str, ground: Ground) -> list[AgentEvent]:
    events = []
    for site in ends_of(job):
        stand.servers[site].stop()
        try:
            events.append(run(helper, ground, ground.request(job, helper.new_id())))
        finally:
            stand.servers[site].start()
    return events


def killed(stand: Stand, helper: HelperProcess, job: str, ground: Ground) -> list[AgentEvent]:
    return [_killed(stand, job, ground, site) for site in ends_of(job)]


def _killed(stand: Stand, job: str, ground: Ground, site: str) -> AgentEvent:
    """Kill a server while bytes arrive; or else after the request has reached it, and before it can answer."""
    server = stand.servers[site]
    # One of its own: what it remembers of a server that was gone is not for the next cell.
    with stand.helper() as helper:
        # Logged in: what is sent next is the request.
        first = Ground(stand, f"{ground.directory.name} {site} first")
        assert isinstance(run(helper, first, first.request(job, helper.new_id())), DoneEvent)
        number = helper.new_id()
        try:
            if job == "COPY":
                os.truncate(ground.file, HUGE)
                ground.new = ground.directory / f"killed {site}"
                helper.send(ground.request(job, number))
                wait_for_bytes(ground)
            else:
                request = ground.request(job, number)
                freeze(server)
                before = unread(stand.url(stand.b))
                helper.send(request)
                wait_for_unread(stand.url(stand.b), before)
            server.kill()
            event = helper.rest(number)[-1]
        finally:
            server.kill()
            server.start()
        for path in ground.left():
            # It must have said so.
            assert isinstance(event, FailedEvent)
            assert event.leftover
            path.unlink()
    return event


def wait_for_bytes(ground: Ground) -> None:
    give_up_at = time.monotonic() + 30
    while not any(path.stat().st_blocks > 2000 for path in ground.directory.rglob("*") if path.is_file()):
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


Fault = Callable[[Stand, HelperProcess, str, Ground], list[AgentEvent]]
FAULTS: Mapping[str, Fault] = {
    "none": none,
    "missing source": missing,
    "exists": exists,
    "permission denied": denied,
    "disk full": full,
    "unreachable": away,
    "server killed": killed,
}


def expected(stand: Stand, fault: str) -> Mapping[str, str]:
    return {} if fault in _OF_SERVERS and not stand.servers else EXPECTED[fault]


_MOST_TRIES_FULL = 5
_BY_ROOT = ("permission denied", "disk full")
_OF_SERVERS = ("unreachable", "server killed")


def test_credentials_that_only_the_server_refuses(stand: Stand, seen: Seen) -> None:
    for fault, changes in stand.bad.items():
        with stand.helper(changes) as helper:
            cells = {}
            for job in JOBS:
                ground = Ground(stand, f"{fault} {job}")
                cells[job] = seen.outcome(stand.protocol, run(helper, ground, ground.request(job, helper.new_id())))
        seen.row(stand.protocol, fault, cells)
        assert cells == BAD[fault], fault


@pytest.mark.full
def test_credentials_that_end_before_a_job_begins(
    request: pytest.FixtureRequest, tmp_path: Path, storages: TestStorages, grid: TestGrid, seen: Seen
) -> None:
    """Where the service knows it, elements are held; they go on by themselves, and with one try in all."""
    with ExitStack() as stack:
        daemon = stack.enter_context(renewals(tmp_path, storages, grid))
        stands = [stack.enter_context(_stand(name, request, tmp_path)) for name in PROTOCOLS]
        with daemon.nothing_begins():
            daemon.give(LIFETIME_S)
            jobs = {(stand.protocol, job): daemon.submit(stand, job) for stand in stands for job in JOBS}
            daemon.end()
        rows: dict[str, dict[str, str]] = {}
        for (protocol, job), number in jobs.items():
            held = daemon.service.wait_for("alice", number, until=["HELD"], timeout_s=SOON_S)
            code = FailureCode(held["hold"]["code"])
            seen.note(AttemptFailure(FailureScope.SERVICE, code, held["hold"]["reason"]))
            rows.setdefault(protocol, {})[job] = f"HELD: {code} / service"
            assert held["held"] == 1
        for protocol, cells in rows.items():
            seen.row(protocol, KNOWN, cells)
        assert rows == {protocol: dict.fromkeys(JOBS, expected) for protocol, expected in HELD.items()}
        log = daemon.service.log_path.read_text()
        assert log.count("it is held") == len(jobs)
        for protocol, command in (("gridftp", "pdm delegate"), ("ssh", "pdm ssh-key"), ("https", "pdm token")):
            shown = daemon.service.pdm("alice", "status", str(jobs[protocol, "COPY"])).stdout
            assert "HELD" in shown
            assert command in shown
        daemon.give(3600)
        for (protocol, job), number in jobs.items():
            if protocol not in RENEWED:
                continue
            ended = daemon.service.wait_for("alice", number, timeout_s=SOON_S)
            element = daemon.call("GET", f"/jobs/{number}/elements/0")
            assert (ended["status"], ended["max_tries"]) == ("DONE", 1), (protocol, job, element)


@pytest.mark.parametrize(
    "fault",
    # Of servers that are away or killed test_faults.py and tests/grid/test_gridftp_agent.py show enough.
    [pytest.param(fault, marks=pytest.mark.full) if fault in _OF_SERVERS else fault for fault in FAULTS],
)
def test_a_row(stand: Stand, fault: str, helper: HelperProcess, seen: Seen) -> None:
    if fault in _BY_ROOT and not owner():
        pytest.skip("needs root")
    for server in stand.servers.values():
        if isinstance(server, ServerProcess):
            server.revive()
    cells = {}
    for job in expected(stand, fault):
        events = FAULTS[fault](stand, helper, job, Ground(stand, f"{fault} {job}"))
        cells[job] = either(*(seen.outcome(stand.protocol, event) for event in events))
    seen.row(stand.protocol, fault, cells)
    assert cells == expected(stand, fault)


@pytest.mark.full
def test_the_page_shows_what_was_seen(seen: Seen, tmp_path: Path) -> None:
    """Last in this file: it needs what the others have seen."""
    wanted = {(protocol, fault) for protocol in STANDS for fault in EXPECTED if protocol != "file"}
    wanted |= {(protocol, KNOWN) for protocol in HELD}
    if not wanted <= {(protocol, fault) for protocol, fault, _ in seen.cells}:
        pytest.skip("not all of the matrix was run")
    _keep(seen, tmp_path / "matrix.json")
    script = Path(__file__).resolve().parents[2] / "script" / "protocol-table"
    done = subprocess.run(
        [sys.executable, script, "--check", tmp_path / "matrix.json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stderr}\nrun {script.name} as its page says"
