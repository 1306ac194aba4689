"""The daemon's lease in its helpers: once it is over a helper does nothing more, and is gone."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from pdm.workqueue.wire.agent_events import DoneEvent, FailedEvent, StartedEvent
from pdm.workqueue.wire.agent_requests import (
    LEASE_OVER_STATUS,
    CopyRequest,
    LeaseRequest,
    PathItem,
    RemoveRequest,
    TimeLimits,
)
from tests.helpers.conftest import StartHelper
from tests.helpers.driver import HelperProcess, copy_item, put

_WAIT_S = 30.0
#: Of the helper.
_THREADS = 4


def now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def ended_alone(helper: HelperProcess) -> bool:
    """Whether it ends by itself as one does whose lease is over."""
    return helper.process.wait(_WAIT_S) == LEASE_OVER_STATUS


def file_url(path: Path) -> str:
    return f"file://{path}"


def started(helper: HelperProcess) -> None:
    """Wait until work has begun."""
    while not isinstance(event := helper.event(), StartedEvent):
        assert event is not None


@pytest.mark.parametrize("name", ["relay", "gridftp", "dummy"])
def test_a_helper_without_work_outlives_no_lease(start_helper: StartHelper, name: str) -> None:
    helper = start_helper(name)
    helper.send(LeaseRequest(now() + 1.0))
    for _ in range(3):
        time.sleep(0.5)
        helper.send(LeaseRequest(now() + 1.0))
    assert helper.process.poll() is None, "it ended though its lease was renewed"
    assert ended_alone(helper)


def test_no_work_is_begun_after_the_end(file_helper: HelperProcess, site: Path) -> None:
    file = put(site / "file")
    file_helper.send(LeaseRequest(now() - 1.0))
    with contextlib.suppress(BrokenPipeError):
        file_helper.send(RemoveRequest(1, [PathItem(1, file_url(file))], TimeLimits()))
    assert ended_alone(file_helper)
    assert file.exists()


def test_a_removal_that_was_suspended_beyond_the_lease_removes_nothing_more(
    file_helper: HelperProcess, site: Path
) -> None:
    files = [put(site / f"f{number}") for number in range(20_000)]
    items = [PathItem(key, file_url(file)) for key, file in enumerate(files)]
    file_helper.send(LeaseRequest(now() + 2.0))
    file_helper.send(RemoveRequest(1, items, TimeLimits()))
    give_up_at = time.monotonic() + _WAIT_S
    while files[0].exists():
        assert time.monotonic() < give_up_at
    file_helper.process.send_signal(signal.SIGSTOP)
    gone = [file for file in files if not file.exists()]
    assert 0 < len(gone) < len(files), "it was not suspended in the middle"
    # The same names with other content, made after another daemon's removal.
    for file in gone:
        file.write_bytes(b"new")
    left = {path.name for path in site.iterdir()}
    time.sleep(2.2)
    file_helper.process.send_signal(signal.SIGCONT)
    assert ended_alone(file_helper)
    # Each thread may have been in the middle of one removal as it was suspended.
    lost = left - {path.name for path in site.iterdir()}
    assert len(lost) <= _THREADS and lost.isdisjoint(file.name for file in gone)


def test_a_copy_that_runs_ends_with_the_lease(file_helper: HelperProcess, site: Path) -> None:
    source = put(site / "source", b"")
    os.truncate(source, 1 << 40)
    item = copy_item(1, file_url(source), file_url(site / "copy"), 1 << 40)
    file_helper.send(LeaseRequest(now() + 1.5))
    file_helper.send(CopyRequest(1, [item], "never", "checksum", TimeLimits()))
    started(file_helper)
    assert ended_alone(file_helper)
    assert not (site / "copy").exists()
    # No clean-up either: that, too, would be something done after the end.
    assert list(site.glob(".pdm-*"))


def test_what_was_written_after_it_was_listed_is_not_removed(file_helper: HelperProcess, site: Path) -> None:
    listed_at = time.time() - 100
    old, new, unknown = put(site / "old"), put(site / "new"), put(site / "unknown")
    os.utime(old, (listed_at - 50, listed_at - 50))
    items = [
        PathItem(1, file_url(old), again=True, listed_at=listed_at),
        PathItem(2, file_url(new), again=True, listed_at=listed_at),
        # Listed a long time ago, and never tried: the queue stood still.
        PathItem(3, file_url(unknown), listed_at=listed_at - 10_000),
        PathItem(4, file_url(site / "gone"), again=True, listed_at=listed_at),
    ]
    ended = file_helper.remove(*items)
    assert isinstance(ended[1], DoneEvent)
    assert isinstance(ended[4], DoneEvent)
    for key in (2, 3):
        outcome = ended[key]
        assert isinstance(outcome, FailedEvent)
        assert outcome.fault.code == "CHANGED"
    assert {path.name for path in site.iterdir()} == {"new", "unknown"}
