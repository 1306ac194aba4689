"""Results of LIST elements, in chunks of JSON text; and notes on entries that could not be read or are skipped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence

import sqlalchemy as sa
from attrs import frozen
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.jobs import ClaimToken, ListedEntry
from pdm.workqueue.domain.planning import Skipped
from pdm.workqueue.store.records import elements, listing_chunks, listing_notes

#: Note numbers per row of the table; no row has more notes.
_NUMBERS_A_ROW = 1_000_000
_LARGEST_NUMBER = _NUMBERS_A_ROW * (2**31 - 1)
#: Stands among the codes of a row without notes; its count are the bytes that are free at the destination.
_FREE_BYTES = "FREE_BYTES"
#: Code of notes from before notes had codes.
_NO_CODE = "UNKNOWN"


@frozen
class ListingNote:
    """A note about an entry; ``number`` increases with each note of a job, not by one."""

    number: int
    skipped: Skipped


def begin(session: Session, token: ClaimToken) -> bool:
    """Delete the results of earlier attempts; False if the claim is lost."""
    if not _is_live(session, token):
        return False
    for table in (listing_chunks, listing_notes):
        session.execute(sa.delete(table).where(table.c.job_id == token.job_id, table.c.element_id == token.element_id))
    return True


def add(session: Session, token: ClaimToken, sequence: int, entries: Sequence[ListedEntry]) -> bool:
    """Store a chunk of a listing.

    ``sequence``: 0 for the first chunk. ``entries``: in the order of the server.

    Returns:
        False if the claim is lost; then nothing was stored.
    """
    if not _is_live(session, token):
        return False
    # ASCII escapes: lone surrogates and NUL survive in every database.
    text = json.dumps(
        [
            [
                one.path,
                one.type,
                one.size,
                one.mode,
                one.mtime,
                one.target,
                one.target_is_file,
                one.target_is_directory,
                one.owner,
                one.group,
            ]
            for one in entries
        ],
        separators=(",", ":"),
    )
    session.execute(
        sa.insert(listing_chunks).values(
            job_id=token.job_id, element_id=token.element_id, sequence=sequence, entries=text
        )
    )
    return True


def add_notes(session: Session, token: ClaimToken, notes: Sequence[Skipped]) -> bool:
    """Store at most a thousand notes; False if the claim is lost."""
    if not _is_live(session, token):
        return False
    counts: Counter[str] = Counter()
    for note in notes:
        counts[note.code] += note.count
    content = [
        {"path": note.path, "reason": note.reason, "type": note.type, "code": note.code}
        | ({} if note.count == 1 else {"count": note.count})
        for note in notes
    ]
    _insert_notes(session, token, content, counts)
    return True


def add_free_bytes(session: Session, token: ClaimToken, free_bytes: int) -> bool:
    """Store how many bytes are free at the destination of a copy; False if the claim is lost."""
    if not _is_live(session, token):
        return False
    _insert_notes(session, token, [], {_FREE_BYTES: free_bytes})
    return True


def _insert_notes(
    session: Session, token: ClaimToken, content: Sequence[Mapping[str, str | int]], counts: Mapping[str, int]
) -> None:
    last = session.scalar(
        sa.select(sa.func.max(listing_notes.c.sequence)).where(
            listing_notes.c.job_id == token.job_id, listing_notes.c.element_id == token.element_id
        )
    )
    session.execute(
        sa.insert(listing_notes).values(
            job_id=token.job_id,
            element_id=token.element_id,
            sequence=0 if last is None else last + 1,
            content=json.dumps(content, separators=(",", ":")),
            counts=json.dumps(counts, separators=(",", ":")),
        )
    )


def chunks(session: Session, job_id: int, element_id: int) -> list[int]:
    """The numbers of the chunks, ascending."""
    return list(
        session.scalars(
            sa.select(listing_chunks.c.sequence)
            .where(listing_chunks.c.job_id == job_id, listing_chunks.c.element_id == element_id)
            .order_by(listing_chunks.c.sequence)
        )
    )


def chunk(session: Session, job_id: int, element_id: int, sequence: int) -> list[ListedEntry]:
    """One chunk; empty if there is none of that number."""
    text = session.scalar(
        sa.select(listing_chunks.c.entries).where(
            listing_chunks.c.job_id == job_id,
            listing_chunks.c.element_id == element_id,
            listing_chunks.c.sequence == sequence,
        )
    )
    return [] if text is None else [ListedEntry(*values) for values in json.loads(text)]


def notes(session: Session, job_id: int, element_id: int, after: int, limit: int) -> list[ListingNote]:
    """At most ``limit`` notes with numbers above ``after``, in ascending order."""
    first, skip = divmod(min(after, _LARGEST_NUMBER), _NUMBERS_A_ROW)
    statement = (
        sa.select(listing_notes.c.sequence, listing_notes.c.content)
        .where(
            listing_notes.c.job_id == job_id,
            listing_notes.c.element_id == element_id,
            listing_notes.c.sequence >= bindparam("first"),
        )
        .order_by(listing_notes.c.sequence)
        .limit(1)
    )
    found: list[ListingNote] = []
    while len(found) < limit:
        row = session.execute(statement, {"first": first}).one_or_none()
        if row is None:
            break
        kept = json.loads(row.content)
        numbers = range(skip if row.sequence == first else 0, len(kept))
        found += [ListingNote(row.sequence * _NUMBERS_A_ROW + at + 1, _skipped(kept[at])) for at in numbers]
        first, skip = row.sequence + 1, 0
    return found[:limit]


def _skipped(kept: dict[str, str | int]) -> Skipped:
    return Skipped(
        str(kept["path"]),
        str(kept.get("type", "unknown")),
        str(kept.get("code", _NO_CODE)),
        str(kept["reason"]),
        int(kept.get("count", 1)),
    )


def count_notes(session: Session, job_id: int) -> dict[str, int]:
    """The number of skipped entries of a job's source, by code."""
    return {code: count for code, count in _counts(session, job_id).items() if code != _FREE_BYTES}


def free_bytes(session: Session, job_id: int) -> int | None:
    """Bytes that were free at the destination of a copy when it was listed; None if not known."""
    return _counts(session, job_id).get(_FREE_BYTES)


def _counts(session: Session, job_id: int) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for row in session.execute(
        sa.select(
            listing_notes.c.counts,
            sa.case((listing_notes.c.counts.is_(None), listing_notes.c.content)).label("content"),
        ).where(listing_notes.c.job_id == job_id)
    ):
        counts.update({_NO_CODE: len(json.loads(row.content))} if row.counts is None else json.loads(row.counts))
    return dict(sorted(counts.items()))


def _is_live(session: Session, token: ClaimToken) -> bool:
    """Whether the attempt still runs; no other attempt can begin before this transaction ends."""
    found = session.scalar(
        sa.select(elements.c.id)
        .where(
            elements.c.job_id == token.job_id,
            elements.c.id == token.element_id,
            elements.c.attempts == token.attempt,
            elements.c.status == JobStatus.RUNNING,
        )
        .with_for_update(read=True)
    )
    return found is not None
