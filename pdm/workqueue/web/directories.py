"""Content of one directory, from the listing of a LIST job: sorted as people count, and in pages."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence

from attrs import frozen

from pdm.workqueue.domain.jobs import ListedEntry
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.store import listings

#: Entries of a page.
PAGE_SIZE = 200
#: Entries of a directory that is sorted; a larger one is shown in the order of the server, a chunk of it at a time.
_MAX_SORTED = 100_000
#: Entries of all directories that are kept sorted.
_MAX_KEPT = 200_000
_NUMBER = re.compile(r"([0-9]+)")


@frozen
class DirectoryPage:
    """A part of a directory.

    Attributes:
        directory: the path below which the names are: that of the listing, or the one above if it is of a file.
        number: of the page, from 1.
        pages: how many there are.
        total: entries that are shown on all pages; None if they were not counted.
        hidden: entries that are left out because their names begin with a dot.
        is_sorted: False in the order of the server.
    """

    directory: str
    entries: Sequence[ListedEntry]
    number: int
    pages: int
    total: int | None
    hidden: int
    is_sorted: bool = True


def natural_key(name: str) -> tuple[list[str | tuple[int, str]], str]:
    """Sorts ``run9`` before ``run10``, upper and lower case together."""
    # Every second part is a number, so that numbers and texts are never compared.
    return [_digits_key(part) if at % 2 else part.casefold() for at, part in enumerate(_NUMBER.split(name))], name


def _digits_key(digits: str) -> tuple[int, str]:
    """Sorts digits by their value; int() refuses more than 4,300 of them, which a server may well send."""
    significant = digits.lstrip("0")
    return len(significant), significant


def _in_order(entries: Sequence[ListedEntry]) -> list[ListedEntry]:
    """Directories first."""
    return sorted(entries, key=lambda entry: (entry.type != "directory", natural_key(entry.path)))


def _children(entries: Sequence[ListedEntry]) -> list[ListedEntry]:
    """What is in the listed directory itself: a listing may have several levels."""
    return [entry for entry in entries if entry.path and "/" not in entry.path]


class Directories:
    """Reads the listings of LIST jobs that are DONE, and keeps the latest ones."""

    def __init__(self) -> None:
        self._kept: dict[int, Sequence[ListedEntry]] = {}

    async def page(self, api: ApiContext, job_id: int, path: str, number: int, *, hidden: bool) -> DirectoryPage:
        """One page; the last one if there are fewer."""
        found = self._kept.get(job_id)
        if found is None:
            chunks = await api.database.read("chunks of a listing", listings.chunks, job_id, 0)
            entries: list[ListedEntry] = []
            for chunk in chunks:
                entries += await api.database.read("chunk of a listing", listings.chunk, job_id, 0, chunk)
                if len(entries) > _MAX_SORTED:
                    return await self._unsorted(api, job_id, path, chunks, number, hidden=hidden)
            found = await api.in_thread(_in_order, entries)
            self._keep(job_id, found)
        if len(found) == 1 and not found[0].path and found[0].type != "directory":
            parent, name = posixpath.split(path.rstrip("/"))
            return DirectoryPage(parent or "/", [found[0]._replace(path=name)], 1, 1, 1, 0)
        children = _children(found)
        shown = children if hidden else [entry for entry in children if not entry.path.startswith(".")]
        pages = max(1, -(-len(shown) // PAGE_SIZE))
        number = min(number, pages)
        part = shown[(number - 1) * PAGE_SIZE : number * PAGE_SIZE]
        return DirectoryPage(path, part, number, pages, len(shown), len(children) - len(shown))

    def _keep(self, job_id: int, entries: Sequence[ListedEntry]) -> None:
        self._kept[job_id] = entries
        # An empty directory counts, too.
        while sum(len(kept) + 1 for kept in self._kept.values()) > _MAX_KEPT:
            del self._kept[next(iter(self._kept))]

    async def _unsorted(
        self, api: ApiContext, job_id: int, path: str, chunks: Sequence[int], number: int, *, hidden: bool
    ) -> DirectoryPage:
        number = min(number, len(chunks))
        entries = await api.database.read("chunk of a listing", listings.chunk, job_id, 0, chunks[number - 1])
        children = _children(entries)
        shown = children if hidden else [entry for entry in children if not entry.path.startswith(".")]
        left_out = len(children) - len(shown)
        return DirectoryPage(path, shown, number, len(chunks), None, left_out, is_sorted=False)
