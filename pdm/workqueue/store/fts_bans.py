"""Storages that operators have banned by FTS3's REST API, and the jobs that this concerns."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

import sqlalchemy as sa
from attrs import frozen
from sqlalchemy.orm import Session

from pdm.workqueue.domain.holds import WaitKind
from pdm.workqueue.domain.sites import Actor
from pdm.workqueue.store import users
from pdm.workqueue.store.records import (
    FINAL,
    IS_THERE,
    fts_bans,
    fts_jobs,
    fts_parts,
    jobs,
    matched,
    wait_elements,
    waits,
)
from pdm.workqueue.store.records import users as user_rows


@frozen
class FtsBan:
    """A banned storage; see `FtsBanRow`."""

    storage: str
    status: str
    message: str
    by: Actor
    since: datetime

    @property
    def accepts_jobs(self) -> bool:
        """Whether jobs are accepted, and wait."""
        return self.status == "WAIT_AS"


_BANS = sa.select(fts_bans, user_rows.c.subject).join(user_rows, user_rows.c.id == fts_bans.c.user_id)


def all_bans(session: Session) -> list[FtsBan]:
    """All banned storages."""
    rows = session.execute(_BANS.order_by(fts_bans.c.storage))
    return [FtsBan(row.storage, row.status, row.message, Actor(row.user_id, row.subject), row.since) for row in rows]


def ban(session: Session, new: FtsBan) -> None:
    """Ban a storage, in place of an earlier ban of it."""
    session.execute(sa.delete(fts_bans).where(fts_bans.c.storage == new.storage))
    session.execute(
        sa.insert(fts_bans).values(
            storage=new.storage, status=new.status, message=new.message, user_id=new.by.user_id, since=new.since
        )
    )
    details = f"{new.status} {new.message}".strip()
    users.record_action(session, new.by, "storage.ban", new.storage, details, new.since)


def unban(session: Session, storage: str, by: Actor, now: datetime) -> bool:
    """End the ban of a storage; returns whether there was one."""
    lifted = bool(matched(session, sa.delete(fts_bans).where(fts_bans.c.storage == storage)))
    if lifted:
        users.record_action(session, by, "storage.unban", storage, "", now)
    return lifted


_OPEN_PARTS = (
    sa.select(fts_jobs.c.fts_id, jobs.c.id)
    .join(fts_parts, fts_parts.c.fts_job == fts_jobs.c.id)
    .join(jobs, jobs.c.id == fts_parts.c.job_id)
    .where(jobs.c.status.not_in(FINAL), IS_THERE)
    .order_by(fts_jobs.c.id)
)


def open_parts(session: Session, site_ids: Collection[int] = (), user_id: int | None = None) -> list[tuple[str, int]]:
    """Ids of jobs of FTS that have not ended, each with a job that carries it out, of some sites or of one user."""
    query = _OPEN_PARTS
    if user_id is not None:
        query = query.where(jobs.c.user_id == user_id)
    else:
        query = query.where(sa.or_(jobs.c.src_siteid.in_(site_ids), jobs.c.dst_siteid.in_(site_ids)))
    return [(row.fts_id, row.id) for row in session.execute(query)]


def running_elements(session: Session) -> int:
    """How many elements run at all daemons."""
    return int(session.scalar(sa.select(sa.func.sum(jobs.c.num_running)).where(jobs.c.num_running > 0)) or 0)


_STAGED = (
    sa.select(sa.func.count())
    .select_from(wait_elements)
    .join(waits, waits.c.id == wait_elements.c.wait_id)
    .where(waits.c.kind == WaitKind.STAGE)
)


def staged_elements(session: Session) -> int:
    """How many elements wait for files that come from tape."""
    return session.scalar(_STAGED) or 0
