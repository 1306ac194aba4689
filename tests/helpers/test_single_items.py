"""An item that nothing can be done with fails alone, whatever is wrong with it, in every operation."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from pdm.workqueue.domain.failures import FailureScope
from pdm.workqueue.helpers.storage import StorageError
from pdm.workqueue.wire import agent_messages as wire
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
    request: wire.WorkRequest
    if op == "copy":
        items = [
            copy_item(key, f"file://{good[0]}", url if key in bad else new[key], 7) for key, url in enumerate(urls)
        ]
        request = wire.CopyRequest(1, items, "never", "checksum", wire.TimeLimits())
    elif op == "copy from":
        items = [copy_item(key, url, new[key], 7) for key, url in enumerate(urls)]
        request = wire.CopyRequest(1, items, "never", "checksum", wire.TimeLimits())
    elif op == "rename":
        (site / "new").mkdir()
        renames = [wire.RenameItem(key, url, new[key]) for key, url in enumerate(urls)]
        request = wire.RenameRequest(1, renames, "never", wire.TimeLimits())
    elif op == "check":
        checks = [wire.CheckItem(key, url, 7) for key, url in enumerate(urls)]
        request = wire.CheckRequest(1, checks, FailureScope.SOURCE, wire.TimeLimits())
    elif op == "mkdir":
        made = [wire.PathItem(key, url if key in bad else new[key], directory=True) for key, url in enumerate(urls)]
        request = wire.MkdirRequest(1, made, True, wire.TimeLimits())
    else:
        paths = [wire.PathItem(key, url) for key, url in enumerate(urls)]
        request = (wire.RemoveRequest if op == "remove" else wire.DiscardRequest)(1, paths, wire.TimeLimits())
    ended = outcomes(file_helper.run(request))
    assert {key for key, event in ended.items() if isinstance(event, wire.FailedEvent)} == bad
    assert file_helper.process.poll() is None


def test_a_message_with_half_surrogates_can_be_read() -> None:
    """Python has them for bytes that are not UTF-8; no JSON reader takes them, and the helper would be killed."""
    fault = StorageError("no file \udce9").fault()
    assert msgspec.json.decode(msgspec.json.encode(fault), type=wire.Fault).message == "no file \\udce9"
