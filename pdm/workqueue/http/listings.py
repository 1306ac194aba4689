"""Stream listings and skipped entries as JSON, in bounded memory.

A listing is ``{directory: [names]}``, made from entries that come in any order. A directory may be written once only,
but its entries may be spread over the listing. So the pages are read twice: the first time to learn on which page each
directory is seen last, the second time to write it after that page. What is kept is one number for each directory, and
the names of those that are not complete.
"""

from __future__ import annotations

import posixpath
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence

import msgspec
from msgspec import UNSET

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.jobs import ElementRecord, JobRecord, ListedEntry
from pdm.workqueue.domain.paths import joined
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.endpoint import json_array, json_items
from pdm.workqueue.http.transactions import PAGE_SIZE
from pdm.workqueue.http.views import skipped_view
from pdm.workqueue.store import jobs, listings
from pdm.workqueue.store.jobs import ElementFilter
from pdm.workqueue.wire.responses import EntryView, NoteView

#: Reads the pages of a listing from the first one on; each call begins anew.
Pages = Callable[[], AsyncGenerator[Sequence[ListedEntry]]]

#: Listings of so few pages are read once only.
_MAX_PAGES_IN_MEMORY = 4


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
        self._kept: list[Sequence[ListedEntry]] | None = []

    async def names(self) -> AsyncGenerator[bytes]:
        """Pieces of ``{directory: [names]}``."""
        async for piece in self._directories(lambda name, _entry: msgspec.json.encode(name)):
            yield piece

    async def details(self) -> AsyncGenerator[bytes]:
        """Pieces of ``{directory: [entries]}``."""
        async for piece in self._directories(lambda name, entry: msgspec.json.encode(_entry_view(name, entry))):
            yield piece

    async def _pages(self) -> AsyncGenerator[Sequence[ListedEntry]]:
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
                if len(self._kept) > _MAX_PAGES_IN_MEMORY:
                    self._kept = None
            for entry in page:
                for directory, _ in self._places(entry):
                    last[directory] = number
        return last

    async def _directories(self, render: Callable[[str, ListedEntry], bytes]) -> AsyncGenerator[bytes]:
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
                    yield separator + _json_member(directory, open_.pop(directory))
                    separator = b","
        if not self._last:
            open_[self._root] = []
        for directory, names in open_.items():
            yield separator + _json_member(directory, names)
            separator = b","
        yield b"}"

    def _places(self, entry: ListedEntry) -> Iterator[tuple[str, str | None]]:
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


def _json_member(directory: str, rendered: list[bytes]) -> bytes:
    return msgspec.json.encode(directory) + b":[" + b",".join(rendered) + b"]"


def _entry_view(name: str, entry: ListedEntry) -> EntryView:
    return EntryView(
        name=name,
        type=entry.type,
        size=entry.size,
        mode=entry.mode,
        mtime=entry.mtime,
        target=UNSET if entry.target is None else entry.target,
    )


#: What follows from a listing, where the listing itself is not kept.
_PLANNED_TYPES = frozenset({JobType.COPY, JobType.REMOVE, JobType.MKDIR})


def has_listing(element: ElementRecord) -> bool:
    """Whether there is a listing to give out."""
    return element.type is JobType.LIST and element.status is JobStatus.DONE


async def with_listing(
    api: ApiContext, job: JobRecord, element: ElementRecord, head: msgspec.Struct, *, in_list: bool
) -> AsyncGenerator[bytes]:
    """Pieces of an object with its ``listing``, ``entries`` and notes.

    Args:
        api: where they are read.
        job: of the element.
        element: a LIST element that is done.
        head: the object without them.
        in_list: whether the listing stands in a list, as in elements.
    """
    listing = ListingJson(lambda: _pages(api, job, element), job.src_filepath, job.options.get("depth"))
    keys = msgspec.to_builtins(head)
    keys.pop("listing", None)
    yield msgspec.json.encode(keys)[:-1] + (b',"listing":[' if in_list else b',"listing":')
    async for piece in listing.names():
        yield piece
    yield b'],"entries":' if in_list else b',"entries":'
    async for piece in listing.details():
        yield piece
    name = b"unreadable" if job.type is JobType.LIST else b"skipped"
    yield b',"' + name + b'":'
    async for piece in json_array(_notes(api, job, element)):
        yield piece
    yield b"}"


async def _notes(api: ApiContext, job: JobRecord, element: ElementRecord) -> AsyncGenerator[bytes]:
    # Of a listing the paths are those of its entries, below the listed one.
    root = job.src_filepath.rstrip("/") + "/" if job.type is JobType.LIST else ""
    after = 0
    while page := await api.database.read("notes on a listing", listings.notes, job.id, element.id, after, PAGE_SIZE):
        after = page[-1].number
        yield json_items(
            [NoteView(path=note.skipped.path.removeprefix(root), reason=note.skipped.reason) for note in page]
        )


async def skipped_entries(api: ApiContext, job_id: int, after: int, limit: int | None) -> AsyncGenerator[bytes]:
    """Pages of the array of what is left out of a job."""
    while limit is None or limit > 0:
        size = PAGE_SIZE if limit is None else min(PAGE_SIZE, limit)
        page = await api.database.read("notes on a listing", listings.notes, job_id, 0, after, size)
        if page:
            yield json_items([skipped_view(job_id, note) for note in page])
        if len(page) < size:
            return
        after = page[-1].number
        limit = None if limit is None else limit - len(page)


async def _pages(api: ApiContext, job: JobRecord, element: ElementRecord) -> AsyncGenerator[Sequence[ListedEntry]]:
    if job.type is JobType.LIST:
        numbers = await api.database.read("chunks of a listing", listings.chunks, job.id, element.id)
        for number in numbers:
            yield await api.database.read("chunk of a listing", listings.chunk, job.id, element.id, number)
        return
    async for page in _planned_pages(api, job, element.id):
        yield page


async def _planned_pages(api: ApiContext, job: JobRecord, listed: int) -> AsyncGenerator[Sequence[ListedEntry]]:
    """The listing of a job whose elements are what was found; folders come from the paths of what is in them."""
    root = job.src_filepath.rstrip("/") + "/"
    folders: set[str] = set()
    after = listed
    while True:
        wanted = ElementFilter(types=_PLANNED_TYPES, limit=PAGE_SIZE, after=after)
        elements = await api.database.read("page of elements", jobs.page_elements, job.id, wanted)
        entries: list[ListedEntry] = []
        for element in elements:
            path = element.src_filepath.removeprefix(root) if element.src_filepath != job.src_filepath else ""
            _add_parent_directories(path, folders, entries)
            if not element.is_directory:
                entries.append(ListedEntry(path, "file", element.size))
            elif path not in folders:
                folders.add(path)
                entries.append(ListedEntry(path, "directory"))
        yield entries
        if len(elements) < PAGE_SIZE:
            return
        after = elements[-1].id


def _add_parent_directories(path: str, known: set[str], entries: list[ListedEntry]) -> None:
    """Add the folders above a path that were not seen before, the highest first."""
    end = path.find("/")
    while end >= 0:
        if path[:end] not in known:
            known.add(path[:end])
            entries.append(ListedEntry(path[:end], "directory"))
        end = path.find("/", end + 1)
