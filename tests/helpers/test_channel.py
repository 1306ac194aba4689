"""The pipes of a helper: order, framing, back-pressure, and the end of either process."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdm.workqueue.helpers import storage
from pdm.workqueue.wire.agent_events import AgentEvent, CancelledEvent, DoneEvent, LogEvent, StartedEvent
from pdm.workqueue.wire.agent_requests import CancelRequest, CopyItem, CopyRequest, ListRequest, MkdirRequest, PathItem
from tests.helpers.conftest import StartHelper
from tests.helpers.driver import LIMITS, HelperProcess, entries, outcomes

HANG = "dummy://x/f?hang=1"


def copy_request(request_id: int, *sources: str) -> CopyRequest:
    items = [
        CopyItem(key, source, f"dummy://y/{key}", f"dummy://y/.{key}", [], 100) for key, source in enumerate(sources)
    ]
    return CopyRequest(request_id, items, "never", "checksum", LIMITS)


@pytest.fixture
def dummy(start_helper: StartHelper) -> HelperProcess:
    return start_helper("dummy")


def test_requests_are_carried_out_one_after_the_other(dummy: HelperProcess) -> None:
    for request_id in (3, 4):
        dummy.send(copy_request(request_id, "dummy://x/a?delay=0.1", "dummy://x/b"))
    for request_id in (3, 4):
        outcome = outcomes(dummy.rest(request_id))
        assert outcome == {key: DoneEvent(request_id, key, 100, 100) for key in (0, 1)}


def test_a_cancel_ends_its_batch_and_no_other(dummy: HelperProcess) -> None:
    dummy.send(copy_request(1, "dummy://x/a", HANG, "dummy://x/c"))
    assert [type(dummy.event()) for _ in range(3)] == [StartedEvent, DoneEvent, StartedEvent]
    dummy.send(CancelRequest(77))
    dummy.send(CancelRequest(1))
    # A sign of life may come first; what counts is that each key is reported once.
    told = [event for event in dummy.rest(1) if not isinstance(event, LogEvent)]
    assert told == [CancelledEvent(1, 1), CancelledEvent(1, 2)]
    dummy.send(CancelRequest(1))
    assert outcomes(dummy.run(copy_request(2, "dummy://x/a"))) == {0: DoneEvent(2, 0, 100, 100)}


def test_some_items_are_cancelled_and_the_others_go_on(dummy: HelperProcess) -> None:
    dummy.send(copy_request(1, HANG, "dummy://x/b", "dummy://x/c?delay=0.1", HANG))
    assert dummy.event() == StartedEvent(1, 0)
    dummy.send(CancelRequest(1, [1, 77]))
    # It was not begun, and need not wait for the one that hangs.
    assert dummy.event() == CancelledEvent(1, 1)
    dummy.send(CancelRequest(1, [0]))
    seen: list[AgentEvent] = []
    while StartedEvent(1, 3) not in seen:
        event = dummy.event()
        assert event is not None
        seen.append(event)
    ended = [event for event in seen if isinstance(event, (DoneEvent, CancelledEvent))]
    assert ended == [CancelledEvent(1, 0), DoneEvent(1, 2, 100, 100)]
    # The last one is all that is left: with it the batch ends.
    dummy.send(CancelRequest(1, [3]))
    assert [event for event in dummy.rest(1) if not isinstance(event, LogEvent)] == [CancelledEvent(1, 3)]


def test_items_that_wait_are_withdrawn_and_the_one_that_runs_goes_on(dummy: HelperProcess) -> None:
    dummy.send(copy_request(1, HANG, "dummy://x/b", "dummy://x/c"))
    assert dummy.event() == StartedEvent(1, 0)
    dummy.send(copy_request(2, "dummy://x/a", "dummy://x/b"))
    dummy.send(CancelRequest(1, [0, 1, 2, 77], waiting_only=True))
    dummy.send(CancelRequest(2, [0, 1], waiting_only=True))
    assert [dummy.event(), dummy.event()] == [CancelledEvent(1, 1), CancelledEvent(1, 2)]
    # All of the other batch waited: it is over before its turn.
    assert dummy.rest(2) == [CancelledEvent(2, 0), CancelledEvent(2, 1)]
    # The one that runs is all that is left of its batch, and is not interrupted.
    dummy.send(CancelRequest(1, [0], waiting_only=True))
    dummy.send(copy_request(3, "dummy://x/a"))
    dummy.send(CancelRequest(3, [0], waiting_only=True))
    assert dummy.rest(3) == [CancelledEvent(3, 0)]
    dummy.send(CancelRequest(1))
    assert [event for event in dummy.rest(1) if not isinstance(event, LogEvent)] == [CancelledEvent(1, 0)]


def test_a_listing_is_not_withdrawn(dummy: HelperProcess) -> None:
    dummy.send(ListRequest(1, 0, "dummy://x/d?list_delay=0.3", 0, LIMITS))
    assert dummy.event() == StartedEvent(1, 0)
    dummy.send(CancelRequest(1, [0], waiting_only=True))
    assert any(isinstance(event, DoneEvent) for event in dummy.rest(1))


def test_what_waits_behind_another_batch_is_cancelled_at_once(dummy: HelperProcess) -> None:
    dummy.send(copy_request(1, HANG))
    assert dummy.event() == StartedEvent(1, 0)
    dummy.send(copy_request(2, "dummy://x/a", "dummy://x/b"))
    dummy.send(copy_request(3, "dummy://x/a", "dummy://x/b"))
    dummy.send(CancelRequest(2))
    assert dummy.rest(2) == [CancelledEvent(2, 0), CancelledEvent(2, 1)]
    dummy.send(CancelRequest(3, [1]))
    assert dummy.event() == CancelledEvent(3, 1)
    dummy.send(CancelRequest(1))
    assert [event for event in dummy.rest(1) if not isinstance(event, LogEvent)] == [CancelledEvent(1, 0)]
    assert dummy.rest(3) == [StartedEvent(3, 0), DoneEvent(3, 0, 100, 100)]


def test_a_helper_that_cannot_end_items_ends_their_batch(start_helper: StartHelper, tmp_path: Path) -> None:
    helper = start_helper("relay", {"PDM_FILE_ROOTS": json.dumps([str(tmp_path)])})
    items = [PathItem(key, f"file://{tmp_path}/d{key}", directory=True) for key in range(2)]
    helper.send(MkdirRequest(1, items, True, LIMITS))
    helper.send(CancelRequest(1, [1]))
    # Whatever was done by then: each has one outcome.
    assert set(outcomes(helper.rest(1))) == {0, 1}


def test_what_is_withdrawn_of_worker_threads_is_not_done(start_helper: StartHelper, tmp_path: Path) -> None:
    """Whether they have begun on the batch by then or not: what is reported as cancelled was not touched."""
    helper = start_helper("relay", {"PDM_FILE_ROOTS": json.dumps([str(tmp_path)])})
    keys = range(400)
    items = [PathItem(key, f"file://{tmp_path}/d{key}", directory=True) for key in keys]
    helper.send(MkdirRequest(1, items, True, LIMITS))
    helper.send(CancelRequest(1, list(keys), waiting_only=True))
    outcome = outcomes(helper.rest(1))
    made = {key for key in keys if (tmp_path / f"d{key}").exists()}
    assert outcome.keys() == set(keys)
    assert {key for key, event in outcome.items() if isinstance(event, DoneEvent)} == made
    assert {type(outcome[key]) for key in keys if key not in made} <= {CancelledEvent}


def test_the_end_of_requests_is_the_end_of_the_process(dummy: HelperProcess) -> None:
    dummy.send(copy_request(1, HANG))
    assert isinstance(dummy.event(), StartedEvent)
    assert dummy.process.stdin is not None
    dummy.process.stdin.close()
    assert dummy.process.wait(timeout=10) == 0
    assert dummy.event() is None


@contextlib.contextmanager
def with_events() -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A dummy helper, and the descriptor that its events are read from."""
    events, written = os.pipe()
    command = ["/bin/bash", "-c", f'exec 3>&{written}; exec "$0" "$@"', sys.executable, "-m"]
    with subprocess.Popen(
        [*command, "pdm.workqueue.helpers.main_dummy"], stdin=subprocess.PIPE, pass_fds=(written,)
    ) as process:
        os.close(written)
        yield process, events


def test_a_reader_that_is_gone_is_the_end_of_the_process() -> None:
    with with_events() as (process, events):
        assert os.read(events, 10_000).startswith(b'{"event":"ready"')
        os.close(events)
        assert process.stdin is not None
        process.stdin.write(b'{"op":"list","id":1,"key":0,"url":"dummy://x?files=5","depth":null,"limits":{}}\n')
        process.stdin.flush()
        assert process.wait(timeout=10) == 1


@pytest.mark.parametrize("line", [b"garbage\n", b"[]\n", b"{}\n", b'{"op":"copy","id":1}\n', b"\xff\n", b"\n"])
def test_an_unreadable_request_ends_the_process_with_a_message(dummy: HelperProcess, line: bytes) -> None:
    assert dummy.process.stdin is not None
    dummy.process.stdin.write(line)
    dummy.process.stdin.flush()
    assert dummy.event() is None
    assert dummy.process.wait(timeout=10) == 2
    assert "cannot be read" in dummy.end()


def test_a_request_may_be_longer_than_an_event(dummy: HelperProcess) -> None:
    sources = [f"dummy://x/{'n' * 4000}{number}" for number in range(1200)]
    outcome = outcomes(dummy.run(copy_request(1, *sources)))
    assert len(outcome) == 1200


def test_a_pipe_that_is_not_read_blocks_the_helper_and_loses_nothing() -> None:
    with with_events() as (process, events):
        assert process.stdin is not None
        process.stdin.write(b'{"op":"list","id":1,"key":0,"url":"dummy://x?files=200000","depth":null,"limits":{}}\n')
        process.stdin.flush()
        _until_blocked(process.pid)
        with os.fdopen(events, "rb") as lines:
            count = 0
            for line in lines:
                count += line.count(b'"file"')
                if b'"finished"' in line:
                    break
        assert count == 200_000
        process.stdin.close()


def _until_blocked(pid: int) -> None:
    """Wait until no thread of a process runs."""
    deadline = time.monotonic() + 20
    quiet = 0
    while quiet < 3:
        assert time.monotonic() < deadline
        before = _cpu_ticks(pid)
        time.sleep(0.05)
        quiet = quiet + 1 if _cpu_ticks(pid) == before else 0


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_noise_does_not_become_an_event(start_helper: StartHelper, tmp_path: Path) -> None:
    # A site customisation prints at the start of the interpreter, as a C library might at any time.
    (tmp_path / "sitecustomize.py").write_text('print(\'{"event":"finished","id":1}\', flush=True)\n')
    helper = start_helper("dummy", {"PYTHONPATH": f"{tmp_path}:{Path.cwd()}"})
    assert outcomes(helper.run(copy_request(1, "dummy://x/a"))) == {0: DoneEvent(1, 0, 100, 100)}
    assert "finished" in helper.end()


@pytest.mark.parametrize("name", ["dummy", "relay", "gridftp"])
def test_a_helper_starts_by_its_path_too(name: str) -> None:
    path = Path(storage.__file__).with_name(f"main_{name}.py")
    with HelperProcess([str(path)], {"PYTHONPATH": ""}) as helper:
        assert helper.tools


def test_a_dummy_listing(dummy: HelperProcess) -> None:
    found = entries(dummy.list("dummy://x/d?files=2500&size=7"))
    assert sum(entry.type == "file" and entry.size == 7 for entry in found.values()) == 2500
    assert sum(entry.type == "directory" for entry in found.values()) == 3
    assert {path: entry.type for path, entry in entries(dummy.list("dummy://x/f?size=7")).items()} == {"": "file"}


def test_dummies_fail_and_crash_as_asked_for(dummy: HelperProcess) -> None:
    sources = [f"dummy://x/f?fail=NO_SPACE&fail_times=2&attempt={attempt}" for attempt in (1, 2, 3)]
    outcome = outcomes(dummy.run(copy_request(1, *sources)))
    assert [isinstance(outcome[key], DoneEvent) for key in range(3)] == [False, False, True]
    assert outcome[0].fault.code == "NO_SPACE"  # type: ignore[union-attr]
    assert isinstance(outcomes(dummy.run(copy_request(2, "dummy://x/f?crash=1&attempt=2")))[0], DoneEvent)
    dummy.send(copy_request(3, "dummy://x/f?crash=1&attempt=1"))
    assert isinstance(dummy.event(), StartedEvent)
    assert dummy.event() is None
    assert dummy.process.wait(timeout=10) == -9
