"""Who did what: written in the transaction that does it, never changed."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pdm.workqueue.domain.catalogue import Actor, AuditRecord
from pdm.workqueue.store.tables import audit

_COLUMNS = (audit.c.id, audit.c.at, audit.c.subject, audit.c.action, audit.c.target, audit.c.details)


def note(session: Session, by: Actor, action: str, target: str, details: str, now: datetime) -> None:
    """Note an act."""
    session.execute(
        sa.insert(audit).values(
            at=now, user_id=by.user_id, subject=by.subject, action=action, target=target, details=details
        )
    )


def page(session: Session, after: int, limit: int) -> list[AuditRecord]:
    """Acts with larger numbers than ``after``, the oldest first."""
    rows = session.execute(sa.select(*_COLUMNS).where(audit.c.id > after).order_by(audit.c.id).limit(limit))
    return [AuditRecord(*row) for row in rows]
