"""Results of LIST elements, in pieces, as JSON text; and notes on what could not be read or is not carried out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.jobs import Entry, Token
from pdm.workqueue.store.tables import elements, listing_chunks, listing_notes


def begin(session: Session, token: Token) -> bool:
    """Drop what earlier attempts have found; False if the claim is lost."""
    if not _is_live(session, token):
        return False
    for table in (listing_chunks, listing_notes):
        session.execute(sa.delete(table).where(table.c.job_id == token.job_id, table.c.element_id == token.element_id))
    return True


def add(session: Session, token: Token, sequence: int, entries: Sequence[Entry]) -> bool:
    """Keep a piece of a listing.

    Args:
        session: of the database.
        token: of the LIST attempt.
        sequence: 0 for the first piece.
        entries: in the order of the server.

    Returns:
        False if the claim is lost; then nothing was kept.
    """
    if not _is_live(session, token):
        return False
    # ASCII: half surrogates and NUL stay what they are, and no database minds them.
    text = json.dumps(
        [[one.path, one.type, one.size, one.mode, one.mtime, one.target, one.target_is_file] for one in entries],
        separators=(",", ":"),
    )
    session.execute(
        sa.insert(listing_chunks).values(
            job_id=token.job_id, element_id=token.element_id, sequence=sequence, entries=text
        )
    )
    return True


def add_notes(session: Session, token: Token, notes: Sequence[Mapping[str, str]]) -> bool:
    """Keep notes, each ``{path, reason}``; False if the claim is lost."""
    if not _is_live(session, token):
        return False
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
            content=json.dumps([dict(note) for note in notes], separators=(",", ":")),
        )
    )
    return True


def chunks(session: Session, job_id: int, element_id: int) -> list[int]:
    """The numbers of the pieces, ascending."""
    return list(
        session.scalars(
            sa.select(listing_chunks.c.sequence)
            .where(listing_chunks.c.job_id == job_id, listing_chunks.c.element_id == element_id)
            .order_by(listing_chunks.c.sequence)
        )
    )


def chunk(session: Session, job_id: int, element_id: int, sequence: int) -> list[Entry]:
    """One piece; empty if there is none of that number."""
    text = session.scalar(
        sa.select(listing_chunks.c.entries).where(
            listing_chunks.c.job_id == job_id,
            listing_chunks.c.element_id == element_id,
            listing_chunks.c.sequence == sequence,
        )
    )
    return [] if text is None else [Entry(*values) for values in json.loads(text)]


def notes(session: Session, job_id: int, element_id: int) -> list[dict[str, str]]:
    """All notes, in the order in which they were made."""
    texts = session.scalars(
        sa.select(listing_notes.c.content)
        .where(listing_notes.c.job_id == job_id, listing_notes.c.element_id == element_id)
        .order_by(listing_notes.c.sequence)
    )
    return [note for text in texts for note in json.loads(text)]


def _is_live(session: Session, token: Token) -> bool:
    """Whether the attempt still runs; while this transaction lasts, nobody else can begin another."""
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
