"""Users, and the audit log.

An audit record is written in the transaction of the action that it describes, and never changed.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

import sqlalchemy as sa
from attrs import frozen
from sqlalchemy.orm import Session

from pdm.workqueue.domain.sites import Actor, AuditRecord
from pdm.workqueue.store.records import audit, users


@frozen
class UserRecord:
    """A user: the end entity's subject, the role (``user``, ``operator``), and the certificate's issuing authority."""

    id: int
    subject: str
    role: str
    registered_at: datetime
    authority: str | None = None


_USER_COLUMNS = (users.c.id, users.c.subject, users.c.role, users.c.registered_at, users.c.authority)


def register(
    session: Session, subject: str, role: str, now: datetime, authority: str | None = None, *, rebind: bool = True
) -> UserRecord:
    """Return the user of a subject; creates it at the first request, and updates the role from the configuration.

    ``role``: ``user`` or ``operator``. ``authority``: that issued the user's certificate; None if unknown. ``rebind``:
    whether the authority may differ from the recorded one. If not, the stored record is returned unchanged, and its
    `authority` shows the difference.
    """
    known = find(session, subject)
    if known is None:
        session.execute(sa.insert(users).values(subject=subject, role=role, registered_at=now, authority=authority))
    elif not rebind and None not in (known.authority, authority) and known.authority != authority:
        return known
    elif (known.role, known.authority) != (role, authority or known.authority):
        new = {"role": role, "authority": authority or known.authority}
        session.execute(sa.update(users).where(users.c.id == known.id).values(new))
    else:
        return known
    row = session.execute(sa.select(*_USER_COLUMNS).where(users.c.subject == subject)).one()
    return UserRecord(**row._mapping)


def find(session: Session, subject: str) -> UserRecord | None:
    row = session.execute(sa.select(*_USER_COLUMNS).where(users.c.subject == subject)).one_or_none()
    return None if row is None else UserRecord(**row._mapping)


def numbers(session: Session, subjects: Collection[str]) -> dict[str, int]:
    """The ids of those subjects that are registered."""
    rows = session.execute(sa.select(users.c.subject, users.c.id).where(users.c.subject.in_(subjects)))
    return {row.subject: row.id for row in rows}


def subjects(session: Session, user_ids: Collection[int]) -> dict[int, str]:
    """The subjects of some users, by id."""
    rows = session.execute(sa.select(users.c.id, users.c.subject).where(users.c.id.in_(user_ids)))
    return {row.id: row.subject for row in rows}


def fetch(session: Session, user_id: int) -> UserRecord | None:
    row = session.execute(sa.select(*_USER_COLUMNS).where(users.c.id == user_id)).one_or_none()
    return None if row is None else UserRecord(**row._mapping)


def page(session: Session, after: int, limit: int) -> list[UserRecord]:
    """Users with ids above ``after``, ascending."""
    rows = session.execute(sa.select(*_USER_COLUMNS).where(users.c.id > after).order_by(users.c.id).limit(limit))
    return [UserRecord(**row._mapping) for row in rows]


_AUDIT_COLUMNS = (audit.c.id, audit.c.at, audit.c.subject, audit.c.action, audit.c.target, audit.c.details)


def record_action(session: Session, by: Actor, action: str, target: str, details: str, now: datetime) -> None:
    """Write an audit record."""
    session.execute(
        sa.insert(audit).values(
            at=now, user_id=by.user_id, subject=by.subject, action=action, target=target, details=details
        )
    )


def page_audit(session: Session, after: int, limit: int) -> list[AuditRecord]:
    """Audit records with ids above ``after``, the oldest first."""
    rows = session.execute(sa.select(*_AUDIT_COLUMNS).where(audit.c.id > after).order_by(audit.c.id).limit(limit))
    return [AuditRecord(**row._mapping) for row in rows]


def newest_audit(session: Session, before: int, limit: int) -> list[AuditRecord]:
    """Audit records with ids below ``before``, the newest first."""
    rows = session.execute(
        sa.select(*_AUDIT_COLUMNS).where(audit.c.id < before).order_by(audit.c.id.desc()).limit(limit)
    )
    return [AuditRecord(**row._mapping) for row in rows]
