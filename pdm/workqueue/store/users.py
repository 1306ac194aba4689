"""Who may call the service."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

import sqlalchemy as sa
from attrs import frozen
from sqlalchemy.orm import Session

from pdm.workqueue.store.tables import users


@frozen
class UserRecord:
    """A user: number, end entity's subject, role (``user``, ``operator``), first sight."""

    id: int
    subject: str
    role: str
    registered_at: datetime


_COLUMNS = (users.c.id, users.c.subject, users.c.role, users.c.registered_at)


def register(session: Session, subject: str, role: str, now: datetime) -> UserRecord:
    """The user of a subject, made at first sight; with the role that the configuration gives today."""
    known = find(session, subject)
    if known is None:
        session.execute(sa.insert(users).values(subject=subject, role=role, registered_at=now))
    elif known.role != role:
        session.execute(sa.update(users).where(users.c.id == known.id).values(role=role))
    else:
        return known
    return UserRecord(*session.execute(sa.select(*_COLUMNS).where(users.c.subject == subject)).one())


def find(session: Session, subject: str) -> UserRecord | None:
    """The user of a subject."""
    row = session.execute(sa.select(*_COLUMNS).where(users.c.subject == subject)).one_or_none()
    return None if row is None else UserRecord(*row)


def numbers(session: Session, subjects: Collection[str]) -> dict[str, int]:
    """The numbers of those subjects that are users."""
    rows = session.execute(sa.select(users.c.subject, users.c.id).where(users.c.subject.in_(subjects)))
    return {row.subject: row.id for row in rows}


def subjects(session: Session, user_ids: Collection[int]) -> dict[int, str]:
    """The subjects of some users, by number."""
    rows = session.execute(sa.select(users.c.id, users.c.subject).where(users.c.id.in_(user_ids)))
    return {row.id: row.subject for row in rows}


def fetch(session: Session, user_id: int) -> UserRecord | None:
    """The user of a number."""
    row = session.execute(sa.select(*_COLUMNS).where(users.c.id == user_id)).one_or_none()
    return None if row is None else UserRecord(*row)


def page(session: Session, after: int, limit: int) -> list[UserRecord]:
    """Users with larger numbers than ``after``, in their order."""
    rows = session.execute(sa.select(*_COLUMNS).where(users.c.id > after).order_by(users.c.id).limit(limit))
    return [UserRecord(*row) for row in rows]
