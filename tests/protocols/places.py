"""Directories at two sites, and the URLs of them by each protocol."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote_from_bytes

import pytest

from pdm.testgrid.processes import missing_of
from pdm.testgrid.storages import TestStorages
from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.movers import MOVERS, TOOL_MOVERS
from pdm.workqueue.movers.mover import Mover
from pdm.workqueue.wire.agent_events import AgentEvent, FailedEvent
from pdm.workqueue.wire.agent_requests import CopyItem
from tests.helpers.driver import copy_item, put


class Places:
    """A directory at each of two sites.

    Attributes:
        a: where copies come from.
        b: where they go to.
    """

    def __init__(self, storages: TestStorages, name: str) -> None:
        self.storages = storages
        self.a, self.b = (self._directory(site, name) for site in ("A", "B"))

    def _directory(self, site: str, name: str) -> Path:
        directory = self.storages.root(site) / name
        directory.mkdir()
        return self.storages.give(directory)

    def url(self, protocol: str, path: Path) -> str:
        site = "A" if path.is_relative_to(self.a) else "B"
        return self.storages.url(protocol, site, path)

    def put(self, path: Path, content: bytes = b"content") -> Path:
        put(path, content)
        for directory in (self.a, self.b):
            self.storages.give(directory)
        return path

    def put_tree(self) -> Path:
        """A directory in `a` with six files, two of them empty, names that URLs quote, and an empty directory."""
        source = self.a / "tree"
        for number in range(5):
            self.put(source / "d 1" / f"n\u00e4me; {number}&%41", bytes([number]) * 300_000 * number)
        self.put(source / "none", b"")
        (source / "d 2").mkdir()
        self.storages.give(self.a)
        return source

    def item(self, protocol: str, source: Path, destination: Path, key: int = 1, to: str | None = None) -> CopyItem:
        size = source.stat().st_size if source.exists() else 7
        return copy_item(key, self.url(protocol, source), self.url(to or protocol, destination), size)

    def left(self) -> list[str]:
        """Temporary files that should not be there."""
        return [str(path) for path in self.b.rglob(".pdm-*")]


def endpoint_of(storages: TestStorages, protocol: str, letter: str) -> str:
    """The URL of a site for a protocol, as it stands in the site's definition."""
    if protocol == "file":
        return "file:///"
    return storages.xrootd[letter].root_url if protocol == "xroot" else storages.server(protocol, letter).url


def mover_named(protocol: str) -> Mover:
    """The mover of a protocol; ``tools`` is that of GRIDFTP by the field's own commands."""
    return TOOL_MOVERS[JobProtocol.GRIDFTP] if protocol == "tools" else MOVERS[JobProtocol.parse(protocol)]


def require_tools() -> None:
    """Skip a test where the field's own commands are not installed."""
    missing = missing_of("globus-url-copy", "gfal-copy")
    if missing:
        text = f"THE TESTS OF THE TOOLS CANNOT RUN: {', '.join(missing)} not found: run script/bootstrap as root"
        if os.environ.get("CI") == "true":
            pytest.fail(text, pytrace=False)
        pytest.skip(text)


def judged(protocol: str, event: AgentEvent | None) -> str:
    assert isinstance(event, FailedEvent), event
    failure = mover_named(protocol).classify(event.fault)
    return f"{failure.scope} {failure.code}"


def encoded(path: bytes) -> str:
    return quote_from_bytes(path)


def owner() -> bool:
    """Whether the tests run as root, so that the permissions of the servers' account are real."""
    return os.geteuid() == 0
