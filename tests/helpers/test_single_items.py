"""An item that nothing can be done with fails alone, whatever is wrong with it, in every operation."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from pdm.workqueue.domain.failures import FailureScope
from pdm.workqueue.helpers.storage import StorageError
from pdm.workqueue.wire.agent_events import FailedEvent, Fault
from pdm.workqueue.wire.agent_requests import (
    CheckItem,
    CheckRequest,
    CopyRequest,
    DiscardRequest,
    MkdirRequest,
    PathItem,
    RemoveRequest,
    RenameItem,
    RenameRequest,
    TimeLimits,
    WorkRequest,
)
from tests.helpers.driver import HelperProcess, copy_item, outcomes, put

#: URLs that the daemon would not make: what a helper does with them must still be about one item.
ODD = [
    "nonsense",
    "file:",
    "file://" + "/x" * 100_000,
    "https://[/x",
    "https://localhost:port/x",
    "sftp://-oProxyCommand=x/y",
    "root://localhost/%ff",
    "ftp://localhost/x",
]


@pytest.mark.parametrize("op", ["copy", "copy from", "remove", "rename", "mkdir", "discard", "check"])
def test_odd_urls(file_helper: HelperProcess, site: Path, op: str) -> None:
    good = [put(site / f"f{number}") for number in range(20)]
    urls = [f"file://{path}" for path in good]
    for place, odd in enumerate(ODD):
        urls.insert(2 * place, odd)
    bad = {key for key, url in enumerate(urls) if url in ODD}
    new = [f"file://{site}/new/{key}" for key in range(len(urls))]
    request: WorkRequest
    if op == "copy":
        items = [
            copy_item(key, f"file://{good[0]}", url if key in bad else new[key], 7) for key, url in enumerate(urls)
        ]
        request = CopyRequest(1, items, "never", "checksum", TimeLimits())
    elif op == "copy from":
        items = [copy_item(key, url, new[key], 7) for key, url in enumerate(urls)]
        request = CopyRequest(1, items, "never", "checksum", TimeLimits())
    elif op == "rename":
        (site / "new").mkdir()
        renames = [RenameItem(key, url, new[key]) for key, url in enumerate(urls)]
        request = RenameRequest(1, renames, "never", TimeLimits())
    elif op == "check":
        checks = [CheckItem(key, url, 7) for key, url in enumerate(urls)]
        request = CheckRequest(1, checks, FailureScope.SOURCE, TimeLimits())
    elif op == "mkdir":
        made = [PathItem(key, url if key in bad else new[key], directory=True) for key, url in enumerate(urls)]
        request = MkdirRequest(1, made, True, TimeLimits())
    else:
        paths = [PathItem(key, url) for key, url in enumerate(urls)]
        request = (RemoveRequest if op == "remove" else DiscardRequest)(1, paths, TimeLimits())
    ended = outcomes(file_helper.run(request))
    assert {key for key, event in ended.items() if isinstance(event, FailedEvent)} == bad
    assert file_helper.process.poll() is None


def test_a_message_with_half_surrogates_can_be_read() -> None:
    """Python has them for bytes that are not UTF-8; no JSON reader takes them, and the helper would be killed."""
    fault = StorageError("no file \udce9").fault()
    assert msgspec.json.decode(msgspec.json.encode(fault), type=Fault).message == "no file \\udce9"
