"""Files of any size over our own control connections: parts, names and servers that ask for more than the usual."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator

import pytest

from pdm.testgrid import TestGrid
from pdm.testgrid.storage_servers import descendants
from pdm.workqueue.wire.agent_events import DoneEvent, LogEvent, UnreadableEvent
from pdm.workqueue.wire.agent_requests import CopyRequest, PathItem, TimeLimits
from tests.grid.agent_sites import Sites, judged
from tests.helpers.driver import ODD_NAMES, HelperProcess, entries, outcomes

MIB = 1024 * 1024
#: Seconds between two markers of a server.
MARKERS_S = 5.0
#: A helper that sees servers as such without MLSC.
WITHOUT_MLSC = """
from pdm.workqueue.helpers import main_gridftp
from pdm.workqueue.helpers.gridftp import control
read = control.ControlChannel._read_features
def read_features(self, reply):
    read(self, reply)
    self.features.pop("MLSC", None)
control.ControlChannel._read_features = read_features
main_gridftp.main()
"""


@pytest.mark.full
def test_a_transfer_resumes_after_its_source_was_lost(own: HelperProcess, sites: Sites) -> None:
    source = sites.put(sites.a / "large", os.urandom(MIB) * 400)
    item = sites.item(source, sites.b / "copy")
    request = CopyRequest(own.new_id(), [item], "never", "size", TimeLimits())
    own.send(request)
    give_up_at = time.monotonic() + 30
    while not sites.arriving():
        assert time.monotonic() < give_up_at, "no byte arrives"
        time.sleep(0.001)
    server = sites.grid.sites["A"].server
    assert server.pid is not None
    sessions = descendants(server.pid)
    for pid in sessions:
        os.kill(pid, signal.SIGSTOP)
    (arriving,) = sites.b.glob(".pdm-*")
    inode = arriving.stat().st_ino
    if arriving.stat().st_size > 390 * MIB:
        pytest.skip("it was copied before it could be stopped")
    # The destination tells what it has.
    time.sleep(MARKERS_S + 1.5)
    for pid in sessions:
        os.kill(pid, signal.SIGKILL)
    events = own.rest(request.id)
    done = outcomes(events)[1]
    assert isinstance(done, DoneEvent), done
    (line,) = [event.text for event in events if isinstance(event, LogEvent) and "resumes" in event.text]
    (found,) = re.findall(r"the transfer resumes at byte (\d+): (\d+) bytes are at the destination$", line)
    offset, kept = map(int, found)
    assert 0 <= offset <= kept < source.stat().st_size
    assert kept > 0
    assert (sites.b / "copy").read_bytes() == source.read_bytes()
    assert (sites.b / "copy").stat().st_ino == inode, "it was sent anew"
    assert [path.name for path in sites.b.iterdir()] == ["copy"]


@pytest.fixture
def old(grid: TestGrid) -> Iterator[HelperProcess]:
    with HelperProcess(["-c", WITHOUT_MLSC], grid.environment()) as running:
        yield running


def test_servers_without_listings_on_the_control_connection_are_listed_over_data(
    old: HelperProcess, sites: Sites
) -> None:
    for name in ODD_NAMES:
        sites.put(sites.a / "names" / os.fsdecode(name))
    for number in range(3000):
        (sites.a / "names" / f"file{number}").touch()
    (sites.a / "link").symlink_to("names")
    shut = sites.a / "shut"
    shut.mkdir()
    shut.chmod(0)
    sites.grid.give(sites.a)
    events = old.list(sites.url(sites.a))
    shut.chmod(0o700)
    found = entries(events)
    assert sum(path.startswith("names/") for path in found) == len(ODD_NAMES) + 3000
    assert found["link"].type == "link"
    unreadable = [event for event in events if isinstance(event, UnreadableEvent)]
    assert [(event.path, event.fault.errno) for event in unreadable] == [("shut", 13)]
    assert judged(old.list(sites.url(sites.a / "gone"))[-1]) == "source NOT_FOUND"


def test_a_name_of_which_servers_see_only_the_beginning_is_refused(shared: HelperProcess, sites: Sites) -> None:
    """Servers take what stands before CR LF for the whole path: that is another file."""
    other = sites.put(sites.a / "c")
    long = sites.url(sites.a) + "/c%0D%0Ad"
    assert judged(shared.remove(PathItem(1, long))[1]) == "source INVALID_NAME"
    assert judged(shared.rename(long, sites.url(sites.a / "new"))) == "source INVALID_NAME"
    assert judged(shared.rename(sites.url(sites.put(sites.a / "f")), long, "always")) == "destination INVALID_NAME"
    assert other.read_bytes() == b"content"
    item = sites.item(sites.a / "f", sites.b / "x\r\ny")
    assert judged(shared.copy([item])[1]) == "destination INVALID_NAME"
    assert list(sites.b.iterdir()) == []
