"""Modification times and permission bits of copies: set where the protocol can, else reported."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from pdm.workqueue.wire.agent_events import AgentEvent, DoneEvent
from pdm.workqueue.wire.agent_requests import CopyItem, CopyRequest, PreservedAttribute
from tests.helpers.driver import LIMITS, HelperProcess, copy_item, outcomes
from tests.protocols.places import Places, owner

PROTOCOLS = ("ssh", "https", "xroot", "file")
OLD = 1_700_000_000
BOTH: tuple[PreservedAttribute, ...] = ("mtime", "mode")
#: What a source does not show, and what a destination cannot set.
HIDDEN: dict[str, tuple[str, ...]] = {"https": ("mode",), "xroot": ("mode",)}
FIXED: dict[str, tuple[str, ...]] = {"https": ("mtime", "mode"), "xroot": ("mtime",)}


def copied(helper: HelperProcess, items: list[CopyItem], overwrite: str = "never") -> dict[int, AgentEvent]:
    request = CopyRequest(helper.new_id(), items, overwrite, "checksum", LIMITS, preserve=BOTH)  # type: ignore[arg-type]
    return outcomes(helper.run(request))


def sources(places: Places) -> list[Path]:
    """Small files, which may be copied in a group, and a larger one; each with a time and a mode of its own."""
    files = [places.put(places.a / f"f{number}", bytes([number]) * size) for number, size in enumerate((0, 7, 500_000))]
    for number, file in enumerate(files):
        file.chmod(0o4751 if number == 1 else 0o640)
        os.utime(file, (OLD, OLD + number))
    return files


@pytest.mark.parametrize(
    "route",
    [
        *((protocol, protocol) for protocol in PROTOCOLS),
        ("file", "ssh"),
        ("file", "xroot"),
        *(
            pytest.param(pair, marks=pytest.mark.full)
            for pair in itertools.product(PROTOCOLS, repeat=2)
            if len(set(pair)) > 1 and pair not in (("file", "ssh"), ("file", "xroot"))
        ),
    ],
    ids="-".join,
)
def test_times_and_modes_arrive_or_are_reported(relay: HelperProcess, places: Places, route: tuple[str, str]) -> None:
    source, destination = route
    files = sources(places)
    if owner():
        # The servers' account need not be root.
        places.storages.give(places.a)
    items = [places.item(source, file, places.b / file.name, key, to=destination) for key, file in enumerate(files)]
    lacking = tuple(name for name in BOTH if name in (*HIDDEN.get(source, ()), *FIXED.get(destination, ())))
    for overwrite, is_there in (("never", False), ("different", True)):
        ended = copied(relay, items, overwrite)
        for number, file in enumerate(files):
            done, copy = ended[number], (places.b / file.name).stat()
            assert isinstance(done, DoneEvent), done
            assert (done.already_there, done.not_preserved) == (is_there, lacking)
            if "mtime" not in lacking:
                assert copy.st_mtime == OLD + number
            if "mode" not in lacking:
                # Never setuid.
                assert copy.st_mode & 0o7777 == (0o751 if number == 1 else 0o640)
            # A copy that is there already gets them, too.
            if destination in ("file", "ssh"):
                os.utime(places.b / file.name, (OLD - 9, OLD - 9))
    assert places.left() == []


def test_a_file_with_the_time_of_a_later_year_than_sftp_has_is_copied_nevertheless(
    relay: HelperProcess, places: Places
) -> None:
    source = places.put(places.a / "f")
    os.utime(source, (2**33, 2**33))
    done = copied(relay, [places.item("file", source, places.b / "f", to="ssh")])[1]
    assert isinstance(done, DoneEvent) and done.not_preserved == ("mtime",)
    assert (places.b / "f").read_bytes() == b"content"


def test_what_a_link_leads_to_is_asked_and_a_link_that_is_there_is_left_alone(
    relay: HelperProcess, places: Places
) -> None:
    source, link = places.put(places.a / "f"), places.a / "link"
    source.chmod(0o600)
    os.utime(source, (OLD, OLD))
    link.symlink_to("f")
    item = copy_item(1, places.url("file", link), places.url("file", places.b / "g"), 7)
    done = copied(relay, [item])[1]
    assert isinstance(done, DoneEvent) and done.not_preserved == ()
    copy = places.b / "g"
    assert (copy.stat().st_mode & 0o777, copy.stat().st_mtime) == (0o600, OLD)
    other = places.put(places.b / "other")
    before = other.stat().st_mtime
    copy.unlink()
    copy.symlink_to("other")
    done = copied(relay, [item])[1]
    assert isinstance(done, DoneEvent) and done.already_there and done.not_preserved == BOTH
    assert other.stat().st_mtime == before
