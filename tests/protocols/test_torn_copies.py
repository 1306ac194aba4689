"""A source that is written to while it is copied: no copy of two states ever counts."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from pdm.workqueue.wire.agent_events import DoneEvent, FailedEvent
from pdm.workqueue.wire.agent_requests import CopyRequest, PathItem, TimeLimits
from tests.helpers.driver import HelperProcess, fault, outcomes
from tests.protocols.places import Places
from tests.protocols.stands import freeze
from tests.support.variants import usual

SIZE = 64 * 1024 * 1024
EDGE = 1024 * 1024
OLD = 1_700_000_000
#: The machine may be too busy to stop a copy in its middle.
_MOST_TRIES = 10
#: The protocols of both ends. Between two servers of one kind the bytes pass the service by, but for SSH.
_PAIRS = [
    *((source, "file") for source in ("file", "ssh", "https", "xroot")),
    *(("file", destination) for destination in ("ssh", "https", "xroot")),
    *((source, source) for source in ("ssh", "https", "xroot")),
    *(("ssh", "https"), ("https", "xroot"), ("xroot", "ssh")),
]
_CASES = [(pair, verify, age) for pair in _PAIRS for verify in ("checksum", "size") for age in ("old", "new")]


def arriving(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.glob(".pdm-*"))


def rewrite(path: Path, letter: bytes) -> None:
    """Write head and tail of a file anew, in place: it keeps its size and its name."""
    with path.open("r+b") as file:
        file.write(letter * EDGE)
        file.seek(-EDGE, os.SEEK_END)
        file.write(letter * EDGE)


@pytest.mark.parametrize(
    ("route", "verify", "age"),
    usual(_CASES, [(("ssh", "file"), "checksum", "new")]),
)
def test_a_source_that_is_rewritten_in_place_while_it_is_copied(
    own: HelperProcess, places: Places, route: tuple[str, str], verify: str, age: str
) -> None:
    """Head and tail of one size: of the first the old is copied, of the other the new."""
    for number in range(_MOST_TRIES):
        source = places.put(places.a / f"source{number}", b"o" * SIZE)
        if age == "old":
            os.utime(source, (OLD, OLD))
        destination = places.b / f"copy{number}"
        item = places.item(route[0], source, destination, to=route[1])
        request = CopyRequest(own.new_id(), [item], "never", verify, TimeLimits(stall_s=60.0))  # type: ignore[arg-type]
        own.send(request)
        give_up_at = time.monotonic() + 60
        while not arriving(places.b) and not destination.exists():
            assert time.monotonic() < give_up_at, "no byte arrives"
            time.sleep(0.001)
        own.process.send_signal(signal.SIGSTOP)
        for daemon in places.storages.daemons:
            freeze(daemon)
        in_time = not destination.exists() and arriving(places.b) < SIZE - EDGE
        if in_time:
            rewrite(source, b"n")
        for daemon in places.storages.daemons:
            daemon.thaw()
        own.process.send_signal(signal.SIGCONT)
        outcome = outcomes(own.rest(request.id))[1]
        if in_time:
            break
        assert isinstance(outcome, DoneEvent), outcome
        destination.unlink()
    else:
        pytest.fail("it was always copied before it could be rewritten")
    # Of a file that is younger than a tick of the server's clock, only its bytes may tell.
    told = [("source", "SIZE_CHANGED"), *([("transfer", "CHECKSUM_MISMATCH")] if age == "new" else [])]
    assert fault(outcome) in told, outcome
    assert not destination.exists()
    assert places.left() == []


@pytest.mark.parametrize("protocol", ["ssh", "https", "xroot"])
def test_what_was_written_after_it_was_listed_is_not_removed(
    relay: HelperProcess, places: Places, protocol: str
) -> None:
    """By an attempt that follows one that was lost: it may have removed the file that was listed."""
    old, new = places.put(places.b / "old"), places.put(places.b / "new")
    os.utime(old, (OLD, OLD))
    items = [
        PathItem(key, places.url(protocol, path), again=True, listed_at=OLD + 100)
        for key, path in enumerate((old, new, places.b / "gone"))
    ]
    ended = relay.remove(*items)
    assert [type(ended[key]) for key in range(3)] == [DoneEvent, FailedEvent, DoneEvent]
    assert fault(ended[1]) == ("source", "CHANGED")
    assert [path.name for path in places.b.iterdir()] == ["new"]
