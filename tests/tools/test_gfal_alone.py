"""Where the service has no client of its own: gfal acts, and gfal-stat, gfal-sum and gfal-ls are the proof."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdm.testgrid import TestGrid
from pdm.testgrid.ports import reserve_port
from pdm.testgrid.storages import TestStorages
from pdm.workqueue.wire.agent_events import DoneEvent
from pdm.workqueue.wire.agent_requests import CopyRequest, PathItem, TimeLimits
from tests.helpers.driver import HelperProcess, copy_item, entries, put, tree
from tests.protocols.places import owner
from tests.tools.conftest import MODULE, helper_as, judged, log_of

pytestmark = pytest.mark.grid


@pytest.fixture(scope="module")
def anonymous(grid: TestGrid, open_directory: Path) -> Iterator[tuple[str, Path]]:
    """A GridFTP server without security: of ``ftp://`` only gfal and globus-url-copy know."""
    if not owner():
        pytest.skip("only root can start an anonymous server as another account")
    port, directory = reserve_port(), open_directory / "anonymous"
    directory.mkdir()
    grid.give(directory)
    account = grid.users["alice"].account
    assert account is not None
    command = ["globus-gridftp-server", "-c", "/dev/null", "-S", "-p", str(port), "-control-interface", "127.0.0.1"]
    command += ["-data-interface", "127.0.0.1", "-aa", "-anonymous-user", account, "-d", "ERROR"]
    pid_file = open_directory / "anonymous.pid"
    subprocess.run([*command, "-pidfile", str(pid_file)], check=True, capture_output=True)
    give_up_at = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            assert time.monotonic() < give_up_at
            time.sleep(0.05)
    yield f"ftp://localhost:{port}{directory}", directory
    os.kill(int(pid_file.read_text()), 15)
    shutil.rmtree(directory)


@pytest.mark.full
def test_all_that_a_job_needs(grid: TestGrid, anonymous: tuple[str, Path]) -> None:
    url, directory = anonymous
    put(directory / "from" / "a b", b"content")
    put(directory / "from" / "sub" / "p%41", b"more")
    grid.give(directory)
    with helper_as(grid) as helper:
        events = helper.list(f"{url}/from")
        found = {path: (entry.type, entry.size) for path, entry in entries(events).items() if entry.type == "file"}
        assert found == {"a%20b": ("file", 7), "sub/p%2541": ("file", 4)}
        items = [
            copy_item(1, f"{url}/from/a%20b", f"{url}/to/x/a%20b", 7),
            copy_item(2, f"{url}/from/sub/p%2541", f"{url}/to/x/p%2541", 4),
            copy_item(3, f"{url}/from/none", f"{url}/to/x/none", 4),
        ]
        copied = helper.copy(items)
        assert isinstance(copied[1], DoneEvent) and copied[1].checksum == "ADLER32:0bcb02fc"
        assert isinstance(copied[2], DoneEvent)
        assert judged(copied[3]) == "source NOT_FOUND"
        assert tree(directory / "to") == {"x/a b": b"content", "x/p%41": b"more"}
        assert isinstance(helper.rename(f"{url}/to/x/a%20b", f"{url}/to/x/new"), DoneEvent)
        assert judged(helper.rename(f"{url}/to/x/new", f"{url}/to/x/p%2541")) == "destination EXISTS"
        assert judged(helper.remove(PathItem(1, f"{url}/to/x", directory=True))[1]) == "source NOT_EMPTY"
        removals = [PathItem(key, f"{url}/to/x/{name}") for key, name in enumerate(("new", "p%2541"))]
        assert all(isinstance(event, DoneEvent) for event in helper.remove(*removals).values())
        assert isinstance(helper.remove(PathItem(1, f"{url}/to/x", directory=True))[1], DoneEvent)
        assert isinstance(helper.make(f"{url}/to/made")[0], DoneEvent)
        assert judged(helper.make(f"{url}/to/made")[0]) == "destination EXISTS"
        assert [path.name for path in (directory / "to").iterdir()] == ["made"]
        put(directory / "latin" / os.fsdecode(b"\xe9"))
        grid.give(directory)
        assert judged(helper.list(f"{url}/latin")[-1]) == "source INVALID_NAME"


@pytest.mark.full
def test_webdav_and_xrootd(open_directory: Path) -> None:
    """gfal-copy within and between them; our own clients are the proof."""
    with TestStorages(open_directory / "tools-storages") as storages:
        source = put(storages.root("A") / "file", b"x" * 3_000_000)
        for site in "AB":
            storages.give(storages.root(site))
        with HelperProcess(["-m", MODULE], storages.environment()) as helper:
            for one, other in (("https", "https"), ("xroot", "xroot"), ("https", "xroot"), ("xroot", "https")):
                new = storages.root("B") / f"{one} {other}"
                item = copy_item(1, storages.url(one, "A", source), storages.url(other, "B", new), 3_000_000)
                events = helper.run(CopyRequest(helper.new_id(), [item], "never", "checksum", TimeLimits(60.0, 120.0)))
                assert isinstance(events[-1], DoneEvent), (one, other, events[-3:])
                assert new.read_bytes() == source.read_bytes()
                assert any(line.startswith("$ gfal-copy -v --just-copy") for line in log_of(events, 1))
            assert len(list(storages.root("B").iterdir())) == 4
