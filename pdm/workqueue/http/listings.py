"""What a LIST element found, as it stands in elements and outputs."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

import msgspec

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.jobs import ElementRecord, Entry, JobRecord
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.json_pieces import array, joined
from pdm.workqueue.http.listing_json import ListingJson
from pdm.workqueue.http.lookups import PAGE
from pdm.workqueue.http.views import skipped_view
from pdm.workqueue.store import jobs, listings
from pdm.workqueue.store.jobs import ElementFilter
from pdm.workqueue.wire.responses import NoteView

#: What follows from a listing, where the listing itself is not kept.
_PLANNED = frozenset({JobType.COPY, JobType.REMOVE, JobType.MKDIR})


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
    async for piece in array(_notes(api, job, element)):
        yield piece
    yield b"}"


async def _notes(api: ApiContext, job: JobRecord, element: ElementRecord) -> AsyncGenerator[bytes]:
    # Of a listing the paths are those of its entries, below the listed one.
    root = job.src_filepath.rstrip("/") + "/" if job.type is JobType.LIST else ""
    after = 0
    while page := await api.database.read("notes on a listing", listings.notes, job.id, element.id, after, PAGE):
        after = page[-1].number
        yield joined([NoteView(path=note.skipped.path.removeprefix(root), reason=note.skipped.reason) for note in page])


async def skipped_entries(api: ApiContext, job_id: int, after: int, limit: int | None) -> AsyncGenerator[bytes]:
    """Pages of the array of what is left out of a job."""
    while limit is None or limit > 0:
        size = PAGE if limit is None else min(PAGE, limit)
        page = await api.database.read("notes on a listing", listings.notes, job_id, 0, after, size)
        if page:
            yield joined([skipped_view(job_id, note) for note in page])
        if len(page) < size:
            return
        after = page[-1].number
        limit = None if limit is None else limit - len(page)


async def _pages(api: ApiContext, job: JobRecord, element: ElementRecord) -> AsyncGenerator[Sequence[Entry]]:
    if job.type is JobType.LIST:
        numbers = await api.database.read("chunks of a listing", listings.chunks, job.id, element.id)
        for number in numbers:
            yield await api.database.read("chunk of a listing", listings.chunk, job.id, element.id, number)
        return
    async for page in _planned_pages(api, job, element.id):
        yield page


async def _planned_pages(api: ApiContext, job: JobRecord, listed: int) -> AsyncGenerator[Sequence[Entry]]:
    """The listing of a job whose elements are what was found; folders come from the paths of what is in them."""
    root = job.src_filepath.rstrip("/") + "/"
    folders: set[str] = set()
    after = listed
    while True:
        wanted = ElementFilter(types=_PLANNED, limit=PAGE, after=after)
        elements = await api.database.read("page of elements", jobs.page_elements, job.id, wanted)
        entries: list[Entry] = []
        for element in elements:
            path = element.src_filepath.removeprefix(root) if element.src_filepath != job.src_filepath else ""
            _add_folders(path, folders, entries)
            if not element.is_directory:
                entries.append(Entry(path, "file", element.size))
            elif path not in folders:
                folders.add(path)
                entries.append(Entry(path, "directory"))
        yield entries
        if len(elements) < PAGE:
            return
        after = elements[-1].id


def _add_folders(path: str, known: set[str], entries: list[Entry]) -> None:
    """Add the folders above a path that were not seen before, the highest first."""
    end = path.find("/")
    while end >= 0:
        if path[:end] not in known:
            known.add(path[:end])
            entries.append(Entry(path[:end], "directory"))
        end = path.find("/", end + 1)
