"""What operators have restricted: sites that are drained, users who are banned."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pdm.workqueue.domain.catalogue import Actor, Restricted, Restriction
from pdm.workqueue.store import audit
from pdm.workqueue.store.changes import begin_change
from pdm.workqueue.store.tables import matched, restrictions

_COLUMNS = tuple(restrictions.c[name] for name in ("kind", "number", "message", "subject", "since"))
#: kind → what the audit log calls it to restrict it, and to end that.
_ACTIONS = {Restricted.SITE: ("site.drain", "site.resume"), Restricted.USER: ("user.ban", "user.unban")}


def everything(session: Session) -> Iterator[Restriction]:
    """All restrictions."""
    for row in session.execute(sa.select(*_COLUMNS)):
        yield Restriction(Restricted(row.kind), *row[1:])


def restrict(session: Session, kind: Restricted, number: int, message: str, by: Actor, now: datetime) -> Restriction:
    """Restrict a site or a user; a message that is there is replaced."""
    begin_change(session)
    session.execute(sa.delete(restrictions).where(*_of(kind, number)))
    session.execute(
        sa.insert(restrictions).values(kind=kind.value, number=number, message=message, subject=by.subject, since=now)
    )
    audit.note(session, by, _ACTIONS[kind][0], f"{kind.value} {number}", message, now)
    return Restriction(kind, number, message, by.subject, now)


def lift(session: Session, kind: Restricted, number: int, by: Actor, now: datetime) -> bool:
    """End a restriction; says whether there was one."""
    begin_change(session)
    lifted = bool(matched(session, sa.delete(restrictions).where(*_of(kind, number))))
    if lifted:
        audit.note(session, by, _ACTIONS[kind][1], f"{kind.value} {number}", "", now)
    return lifted


def _of(kind: Restricted, number: int) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
    return restrictions.c.kind == kind.value, restrictions.c.number == number
