"""Modification times and permission bits of copies between GridFTP servers."""

from __future__ import annotations

import os
from typing import Literal

import pytest

from pdm.workqueue.wire.agent_events import DoneEvent
from pdm.workqueue.wire.agent_requests import CopyRequest
from tests.grid.agent_sites import Sites
from tests.helpers.driver import LIMITS, HelperProcess, outcomes

OLD = 1_700_000_000


@pytest.mark.parametrize("verify", ["checksum", "size"])
def test_times_and_modes_arrive(shared: HelperProcess, sites: Sites, verify: Literal["checksum", "size"]) -> None:
    """Pipelined, and of files that are there already by the fallback; one from before 1970 is copied, too."""
    files = [sites.put(sites.a / "sub" / f"f {number}", bytes([number]) * 1000) for number in range(20)]
    for number, file in enumerate(files):
        os.utime(file, (OLD, OLD + number))
        file.chmod(0o4740 if number == 1 else 0o604)
    os.utime(files[7], (-1000, -1000))
    items = [sites.item(file, sites.b / "new" / file.name, key) for key, file in enumerate(files)]
    overwrites: list[Literal["never", "different"]] = ["never", "different"]
    for overwrite in overwrites:
        request = CopyRequest(
            shared.new_id(),
            items,
            overwrite,
            verify,
            LIMITS,
            preserve=("mtime", "mode"),
        )
        ended = outcomes(shared.run(request))
        for number, file in enumerate(files):
            done, path = ended[number], sites.b / "new" / file.name
            assert isinstance(done, DoneEvent), done
            assert done.already_there == (overwrite == "different")
            assert done.not_preserved == (("mtime",) if number == 7 else ())
            assert path.stat().st_mode & 0o7777 == (0o740 if number == 1 else 0o604)
            if number != 7:
                assert path.stat().st_mtime == OLD + number
            os.utime(path)
    assert not list(sites.b.rglob(".pdm-*"))
