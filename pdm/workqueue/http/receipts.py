"""Receipts of jobs, written page by page in bounded memory.

The elements come in the order of their numbers, each as it is when its page is read; the last line counts the lines
that were written. So a receipt of a running job is no consistent snapshot, which ``final`` shows.
"""

from __future__ import annotations

import csv
import hashlib
import io
import zlib
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from typing import Protocol

import msgspec
from attrs import define, field
from msgspec import UNSET

from pdm.workqueue import __version__
from pdm.workqueue.domain.enums import JobStatus, JobType, PlannedAction
from pdm.workqueue.domain.jobs import ElementRecord, JobRecord
from pdm.workqueue.domain.planning import SKIP_REASONS, SkipCode, Skipped
from pdm.workqueue.domain.retention import PurgedJob
from pdm.workqueue.http import transactions
from pdm.workqueue.http.problems import JobPurgedError
from pdm.workqueue.http.transactions import PAGE_SIZE, ReceiptPage
from pdm.workqueue.http.views import failure_view, job_view
from pdm.workqueue.sites.registry import SiteRegistry
from pdm.workqueue.store import jobs, listings, purged_jobs
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.planned_elements import is_moved
from pdm.workqueue.wire.receipts import (
    ALREADY_THERE,
    CSV,
    DONE,
    NDJSON,
    RECEIPT_VERSION,
    SIGNATURE_MEMBER,
    ReceiptElement,
    ReceiptEnd,
    ReceiptEntry,
    ReceiptJob,
    ReceiptLine,
    ReceiptService,
    ReceiptSite,
)

_OUTCOMES: Mapping[JobStatus, str] = {
    JobStatus.DONE: DONE,
    JobStatus.FAILED: "failed",
    JobStatus.CANCELLED: "cancelled",
    JobStatus.HELD: "held",
    JobStatus.RUNNING: "running",
    JobStatus.SUBMITTED: "waiting",
    JobStatus.NEW: "waiting",
}


#: Of the elements of a dry run, which does nothing.
_PLANNED_OUTCOMES: Mapping[PlannedAction, str] = {
    PlannedAction.COPY: "would copy",
    PlannedAction.OVERWRITE: "would overwrite",
    PlannedAction.SAME: "same",
    PlannedAction.DELETE: "would delete",
    PlannedAction.MOVED: "would remove",
}


class ReceiptSource(Protocol):
    """What receipts are made of."""

    @property
    def database(self) -> Database: ...
    @property
    def sites(self) -> SiteRegistry: ...
    @property
    def clock(self) -> Callable[[], datetime]: ...
    @property
    def service_name(self) -> Callable[[], str]: ...
    @property
    def sign(self) -> Callable[[bytes], Awaitable[str]]: ...


class _Format(Protocol):
    """How lines become bytes."""

    def encode(self, lines: Sequence[ReceiptLine]) -> bytes: ...

    async def end(self, api: ReceiptSource, end: ReceiptEnd) -> bytes:
        """The last line."""
        ...


class _JsonLines:
    """One JSON object a line; the last one is signed."""

    def __init__(self) -> None:
        self._encoder = msgspec.json.Encoder()

    def encode(self, lines: Sequence[ReceiptLine]) -> bytes:
        return self._encoder.encode_lines(lines)

    async def end(self, api: ReceiptSource, end: ReceiptEnd) -> bytes:
        signed = self._encoder.encode(end)
        signature = await api.sign(signed)
        return signed[:-1] + SIGNATURE_MEMBER + signature.encode("ascii") + b'"}\n'


_COLUMNS = (
    *("line", "number", "type", "source", "destination", "size", "checksum", "planned", "outcome", "attempts"),
    *("not_preserved", "source_kept", "start", "end"),
    *("code", "scope", "count", "message", "hint"),
)
#: A cell that begins with one of these is a formula for spreadsheets.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class _CsvLines:
    """A table for spreadsheets; it is not signed."""

    def __init__(self) -> None:
        self._header: tuple[str, ...] | None = _COLUMNS

    def encode(self, lines: Sequence[ReceiptLine]) -> bytes:
        text = io.StringIO()
        rows = csv.writer(text)
        if self._header is not None:
            rows.writerow(self._header)
            self._header = None
        rows.writerows([_cell(row.get(column)) for column in _COLUMNS] for row in map(_csv_row, lines))
        return text.getvalue().encode()

    async def end(self, api: ReceiptSource, end: ReceiptEnd) -> bytes:
        return self.encode([end])


def _cell(value: object) -> object:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, str) and value.startswith(_FORMULA):
        # Spreadsheets take what follows an apostrophe for text.
        return "'" + value
    return value


def _csv_row(line: ReceiptLine) -> dict[str, object]:
    if isinstance(line, ReceiptJob):
        job = line.job
        return {
            "line": "job",
            "number": job.id,
            "type": job.type,
            "source": job.src_filepath,
            "destination": None if job.dst_filepath is UNSET else job.dst_filepath,
            "size": job.bytes_total,
            "outcome": job.status,
            "start": job.timestamp,
            "end": job.finished_at,
            "count": job.num_elements,
            "message": f"of {line.user}, at {line.service.name}",
        }
    if isinstance(line, ReceiptElement):
        row = {name: getattr(line, name) for name in ("type", "source", "destination", "size")}
        row |= {
            name: getattr(line, name) for name in ("checksum", "planned", "not_preserved", "source_kept", "outcome")
        }
        row |= {"line": "element", "number": line.element, "attempts": line.attempts}
        row |= {"start": line.start, "end": line.end}
        if line.failure is not None:
            row |= {name: getattr(line.failure, name) for name in ("code", "scope", "message", "hint")}
        return row
    if isinstance(line, ReceiptEntry):
        row = {name: getattr(line, name) for name in ("type", "outcome", "code", "count", "message")}
        return row | {"line": "skipped", "source": line.path}
    counts = ", ".join(f"{count} {word}" for word, count in line.outcomes.items())
    row = {"line": "end", "count": line.lines, "size": line.bytes, "end": line.signed_at}
    return row | {"outcome": "final" if line.final else "not final", "message": f"{counts}; {line.skipped} skipped"}


@define(eq=False)
class _Tally:
    """Counts the lines that were written."""

    lines: int = 0
    elements: int = 0
    outcomes: Counter[str] = field(factory=Counter)
    skipped: int = 0
    size: int = 0
    digest: hashlib._Hash = field(factory=hashlib.sha256)

    def add(self, lines: Sequence[ReceiptLine], encoded: bytes) -> bytes:
        """Count lines of one kind; gives back their bytes."""
        self.lines += len(lines)
        for line in lines:
            if isinstance(line, ReceiptElement):
                self.elements += 1
                self.outcomes[line.outcome] += 1
                if line.outcome in (DONE, ALREADY_THERE):
                    self.size += line.size or 0
            elif isinstance(line, ReceiptEntry):
                self.skipped += line.count
        self.digest.update(encoded)
        return encoded


async def receipt_pieces(api: ReceiptSource, page: ReceiptPage, media_type: str) -> AsyncGenerator[bytes]:
    """The receipt of a job, from its first page of elements on."""
    job, tally = page.job, _Tally()
    form: _Format = _CsvLines() if media_type == CSV else _JsonLines()

    def written(lines: Sequence[ReceiptLine]) -> bytes:
        return tally.add(lines, form.encode(lines))

    yield written([first_line(api, page)])
    while page.elements:
        yield written([element_line(page, element) for element in page.elements])
        if len(page.elements) < PAGE_SIZE:
            break
        page = await api.database.read(
            "page of a receipt", transactions.receipt_page, job.id, None, page.elements[-1].id
        )
    after = 0
    while notes := await api.database.read("notes on a listing", listings.notes, job.id, 0, after, PAGE_SIZE):
        after = notes[-1].number
        yield written([_entry_line(note.skipped) for note in notes])
    now = await api.database.read("a job", jobs.fetch, job.id, None)
    end = ReceiptEnd(
        lines=tally.lines,
        elements=tally.elements,
        outcomes=dict(sorted(tally.outcomes.items())),
        skipped=tally.skipped,
        bytes=tally.size,
        final=job.status.is_final and job == now,
        sha256=tally.digest.hexdigest(),
        signed_at=api.clock().replace(microsecond=0),
    )
    yield await form.end(api, end)


async def whole_receipt(api: ReceiptSource, job_id: int) -> AsyncGenerator[bytes]:
    """The receipt of a job of any user, as lines of JSON.

    Raises:
        JobNotFoundError: the job does not exist.
        JobPurgedError: it was removed by its age.
    """
    first = await api.database.read("page of a receipt", transactions.receipt_page, job_id, None, None)
    return receipt_pieces(api, first, NDJSON)


_DECODER = msgspec.json.Decoder(ReceiptLine)


async def kept_receipt_pieces(database: Database, job: PurgedJob, media_type: str) -> AsyncGenerator[bytes]:
    """The receipt of a purged job, as it was written before.

    Raises:
        JobPurgedError: the receipt is being removed, too.
    """
    form = _CsvLines() if media_type == CSV else None
    for number in range(job.receipt_pieces):
        content = await database.read("piece of a receipt", purged_jobs.receipt_piece, job.id, number)
        if content is None:
            raise JobPurgedError(job)
        lines = zlib.decompress(content)
        yield lines if form is None else form.encode([_DECODER.decode(line) for line in lines.splitlines()])


def first_line(api: ReceiptSource, page: ReceiptPage) -> ReceiptJob:
    """What was asked, by whom and when."""
    job = page.job
    return ReceiptJob(
        receipt=RECEIPT_VERSION,
        final=job.status.is_final,
        written_at=api.clock().replace(microsecond=0),
        service=ReceiptService(name=api.service_name(), version=__version__),
        user=page.owner,
        source=_site(api, job, job.src_siteid),
        destination=None if job.dst_siteid is None else _site(api, job, job.dst_siteid),
        job=job_view(job),
    )


def _site(api: ReceiptSource, job: JobRecord, number: int) -> ReceiptSite:
    """A site as it is now; one that was removed has no name any more."""
    site = api.sites.by_id(number)
    if site is None:
        return ReceiptSite(id=number, name=None, url=None)
    # Of a copy between unlike protocols, the other end has another one.
    url = site.endpoints.get(job.protocol) or next(iter(site.endpoints.values()), None)
    return ReceiptSite(id=number, name=site.name, url=url)


def _entry_line(entry: Skipped) -> ReceiptEntry:
    return ReceiptEntry(
        path=entry.path, type=entry.type, outcome="skip", code=entry.code, message=entry.reason, count=entry.count
    )


def element_line(page: ReceiptPage, element: ElementRecord) -> ReceiptElement:
    """What has become of an element of the page."""
    start, end = page.times.get(element.id, (None, None))
    failure = None if element.status is JobStatus.DONE else element.failure
    planned = element.planned
    if planned is not None and page.job.options.get("dry_run"):
        outcome = _PLANNED_OUTCOMES[planned]
    else:
        outcome = ALREADY_THERE if element.already_there else _OUTCOMES[element.status]
    is_kept = (
        page.job.moves
        and element.type is JobType.COPY
        and element.status is JobStatus.DONE
        and not is_moved(
            page.job, already_there=element.already_there, attempt=element.attempts, planned=element.planned
        )
    )
    return ReceiptElement(
        element=element.id,
        type=element.type.name,
        source=element.src_filepath,
        destination=element.dst_filepath,
        size=element.size if element.type is JobType.COPY else None,
        checksum=element.checksum if element.status is JobStatus.DONE else None,
        planned=None if planned is None else planned.value,
        not_preserved=element.not_preserved,
        outcome=outcome,
        attempts=element.attempts,
        source_kept=SKIP_REASONS[SkipCode.KEPT] if is_kept else None,
        start=start,
        end=end,
        failure=None if failure is None else failure_view(failure, page.job.type),
    )
