"""The tables behind the models, for statements that load no objects."""

from __future__ import annotations

from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pdm.workqueue.WorkqueueDB import (
    Attempt,
    Audit,
    Base,
    Catalogue,
    Credential,
    IdempotentRequest,
    Job,
    JobElement,
    KeyCheck,
    ListingChunk,
    ListingNotes,
    PendingDelegation,
    Restriction,
    Site,
    User,
    Worker,
)


def _table(model: type[Base]) -> sa.Table:
    return cast(sa.Table, model.__table__)


jobs = _table(Job)
elements = _table(JobElement)
attempts = _table(Attempt)
users = _table(User)
workers = _table(Worker)
key_checks = _table(KeyCheck)
listing_chunks = _table(ListingChunk)
listing_notes = _table(ListingNotes)
credentials = _table(Credential)
pending_delegations = _table(PendingDelegation)
idempotent_requests = _table(IdempotentRequest)
sites = _table(Site)
restrictions = _table(Restriction)
audit = _table(Audit)
catalogue = _table(Catalogue)


def matched(session: Session, statement: sa.Update | sa.Delete) -> int:
    """Run a change; the number of rows that it met."""
    return cast(sa.CursorResult[Any], session.execute(statement)).rowcount
