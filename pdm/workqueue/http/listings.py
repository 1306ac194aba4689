"""Stream listings and skipped entries as JSON, in bounded memory.

A listing is ``{directory: [names]}``, made from entries in any order. Each directory is a key that must be written
once, but its entries may be spread over the listing. So the pages are read twice: first to find the last page of each
directory, then to write each directory after that page. Memory holds one page number for each directory, and the names
of the directories that are incomplete.
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

#: Reads all pages of a listing; each call starts again with the first.
Pages = Callable[[], AsyncGenerator[Sequence[ListedEntry]]]

#: Listings of up to this number of pages are kept in memory and read once.
_MAX_PAGES_IN_MEMORY = 4


class ListingJson:
    """Encodes one listing of the path `root`, to a depth (None for all levels)."""

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
        """The directories to which an entry contributes, with the name to add, or None for the directory itself."""
        is_directory = entry.type == "directory"
        if entry.path:
            yield joined(self._root, posixpath.dirname(entry.path)), posixpath.basename(entry.path)
            # Directories at the deepest level were not listed themselves.
            if is_directory and (self._depth is None or entry.path.count("/") + 1 < self._depth):
                yield joined(self._root, entry.path), None
        elif is_directory and self._depth != 0:
            yield self._root, None
        else:
            plain = self._root.rstrip("/")
            parent = posixpath.dirname(plain) or ("/" if plain.startswith("/") or not plain else ".")
            yield parent, posixpath.basename(plain) or "/"


def _json_member(directory: str, rendered: list[bytes]) -> bytes:
    return msgspec.json.encode(directory) + b":[" + b",".join(rendered) + b"]"


def _entry_view(name: str, entry: ListedEntry) -> EntryView:
    return EntryView(
        name=name,
        type=entry.type,
        size=entry.size,
        mode=entry.mode,
        mtime=entry.mtime,
        owner=UNSET if entry.owner is None else entry.owner,
        group=UNSET if entry.group is None else entry.group,
        target=UNSET if entry.target is None else entry.target,
    )


#: Job type → types of the elements that stand for what was listed; removals of a COPY are of what these copy, or of
#: the destination.
_LISTED_TYPES = {JobType.COPY: frozenset({JobType.COPY, JobType.MKDIR}), JobType.REMOVE: frozenset({JobType.REMOVE})}


def has_listing(element: ElementRecord) -> bool:
    """Whether an element has a complete listing."""
    return element.type is JobType.LIST and element.status is JobStatus.DONE


async def with_listing(
    api: ApiContext, job: JobRecord, element: ElementRecord, head: msgspec.Struct, *, in_list: bool
) -> AsyncGenerator[bytes]:
    """Pieces of the object `head` with the ``listing``, ``entries`` and notes of a LIST element that is DONE.

    With `in_list` the listing is wrapped in an array, as the reference has it for elements (but not for outputs).
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
    # Notes of a LIST job have paths relative to the listed path.
    root = job.src_filepath.rstrip("/") + "/" if job.type is JobType.LIST else ""
    after = 0
    while page := await api.database.read("notes on a listing", listings.notes, job.id, element.id, after, PAGE_SIZE):
        after = page[-1].number
        yield json_items(
            [NoteView(path=note.skipped.path.removeprefix(root), reason=note.skipped.reason) for note in page]
        )


async def skipped_entries(api: ApiContext, job_id: int, after: int, limit: int | None) -> AsyncGenerator[bytes]:
    """Encoded items of the array of a job's skipped entries."""
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
    """The listing of a job, rebuilt from its elements; parent directories are derived from their paths."""
    root = job.src_filepath.rstrip("/") + "/"
    directories: set[str] = set()
    after = listed
    while True:
        wanted = ElementFilter(types=_LISTED_TYPES[job.type], limit=PAGE_SIZE, after=after)
        elements = await api.database.read("page of elements", jobs.page_elements, job.id, wanted)
        entries: list[ListedEntry] = []
        for element in elements:
            path = element.src_filepath.removeprefix(root) if element.src_filepath != job.src_filepath else ""
            _add_parent_directories(path, directories, entries)
            if not element.is_directory:
                entries.append(ListedEntry(path, "file", element.size))
            elif path not in directories:
                directories.add(path)
                entries.append(ListedEntry(path, "directory"))
        yield entries
        if len(elements) < PAGE_SIZE:
            return
        after = elements[-1].id


def _add_parent_directories(path: str, known: set[str], entries: list[ListedEntry]) -> None:
    """Add the parents of a path that are not known yet, from the top down."""
    end = path.find("/")
    while end >= 0:
        if path[:end] not in known:
            known.add(path[:end])
            entries.append(ListedEntry(path[:end], "directory"))
        end = path.find("/", end + 1)
