"""Listings as JSON, in pieces: ``{directory: [names]}`` from entries that come in any order, with bounded memory.

A directory may be written once only, but its entries may be spread over the listing. So the pages are read twice:
the first time to learn on which page each directory is seen last, the second time to write it after that page. What
is kept is one number for each directory, and the names of those that are not complete.
"""

from __future__ import annotations

import posixpath
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence

import msgspec
from msgspec import UNSET

from pdm.workqueue.domain.jobs import Entry
from pdm.workqueue.domain.paths import joined
from pdm.workqueue.wire.responses import EntryView

#: Reads the pages of a listing from the first one on; each call begins anew.
Pages = Callable[[], AsyncGenerator[Sequence[Entry]]]

#: Listings of so few pages are read once only.
_PAGES_IN_MEMORY = 4


class ListingJson:
    """One listing.

    Args:
        pages: reads it.
        root: the listed path, as the user gave it.
        depth: how deep was listed; None for all levels.
    """

    def __init__(self, pages: Pages, root: str, depth: int | None) -> None:
        self._read = pages
        self._root = root
        self._depth = depth
        self._last: dict[str, int] | None = None
        self._kept: list[Sequence[Entry]] | None = []

    async def names(self) -> AsyncGenerator[bytes]:
        """Pieces of ``{directory: [names]}``."""
        async for piece in self._directories(lambda name, _entry: msgspec.json.encode(name)):
            yield piece

    async def details(self) -> AsyncGenerator[bytes]:
        """Pieces of ``{directory: [entries]}``."""
        async for piece in self._directories(lambda name, entry: msgspec.json.encode(_entry_view(name, entry))):
            yield piece

    async def _pages(self) -> AsyncGenerator[Sequence[Entry]]:
        if self._last is not None and self._kept is not None:
            for page in self._kept:
                yield page
            return
        async for page in self._read():
            yield page

    async def _survey(self) -> dict[str, int]:
        last: dict[str, int] = {}
        number = -1
        async for page in self._pages():
            number += 1
            if self._kept is not None:
                self._kept.append(page)
                if len(self._kept) > _PAGES_IN_MEMORY:
                    self._kept = None
            for entry in page:
                for directory, _ in self._places(entry):
                    last[directory] = number
        return last

    async def _directories(self, render: Callable[[str, Entry], bytes]) -> AsyncGenerator[bytes]:
        if self._last is None:
            self._last = await self._survey()
        open_: dict[str, list[bytes]] = {}
        separator = b"{"
        number = -1
        async for page in self._pages():
            number += 1
            touched: dict[str, None] = {}
            for entry in page:
                for directory, name in self._places(entry):
                    touched[directory] = None
                    names = open_.setdefault(directory, [])
                    if name is not None:
                        names.append(render(name, entry))
            for directory in touched:
                if self._last.get(directory) == number:
                    yield separator + _member(directory, open_.pop(directory))
                    separator = b","
        if not self._last:
            open_[self._root] = []
        for directory, names in open_.items():
            yield separator + _member(directory, names)
            separator = b","
        yield b"}"

    def _places(self, entry: Entry) -> Iterator[tuple[str, str | None]]:
        """The directories that an entry says something about; with its name, where it is in one."""
        is_directory = entry.type == "directory"
        if entry.path:
            yield joined(self._root, posixpath.dirname(entry.path)), posixpath.basename(entry.path)
            # What is at the deepest level is named, but was not looked into.
            if is_directory and (self._depth is None or entry.path.count("/") + 1 < self._depth):
                yield joined(self._root, entry.path), None
        elif is_directory and self._depth != 0:
            yield self._root, None
        else:
            plain = self._root.rstrip("/")
            folder = posixpath.dirname(plain) or ("/" if plain.startswith("/") or not plain else ".")
            yield folder, posixpath.basename(plain) or "/"


def _member(directory: str, rendered: list[bytes]) -> bytes:
    return msgspec.json.encode(directory) + b":[" + b",".join(rendered) + b"]"


def _entry_view(name: str, entry: Entry) -> EntryView:
    return EntryView(
        name=name,
        type=entry.type,
        size=entry.size,
        mode=entry.mode,
        mtime=entry.mtime,
        target=UNSET if entry.target is None else entry.target,
    )
