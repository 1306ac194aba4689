"""Removal of sites that were made of URLs, once nothing refers to them."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import MoverKind
from pdm.workqueue.store.records import credentials, jobs, matched, oidc_logins, restrictions, schedules, sites, waits
from pdm.workqueue.store.retention import Step
from pdm.workqueue.store.sites import begin_change

#: A transaction may commit later than others that have got later numbers of jobs.
_NUMBERS_APART = 1000
#: What somebody has set by hand keeps a site.
_IS_PLAIN = sa.and_(
    sites.c.unlisted,
    sa.not_(sites.c.public),
    sites.c.created_at < bindparam("before"),
    sites.c.limit_in.is_(None),
    sites.c.limit_out.is_(None),
    sites.c.authorities == "",
    sites.c.myproxy.is_(None),
    sites.c.tape.is_(None),
    sites.c.fts.is_(None),
    sites.c.oidc.is_(None),
    sites.c.mover == MoverKind.NATIVE.value,
    *(
        sa.not_(sa.exists().where(table.c.site_id == sites.c.id).correlate(sites))
        for table in (credentials, oidc_logins, waits)
    ),
    sa.not_(sa.exists().where(restrictions.c.kind == "site", restrictions.c.number == sites.c.id).correlate(sites)),
)
_NEXT_OWNER = sa.select(sa.func.min(sites.c.owner_id)).where(_IS_PLAIN, sites.c.owner_id > bindparam("after"))
_OF_OWNER = sa.select(sites.c.id).where(_IS_PLAIN, sites.c.owner_id == bindparam("owner"))
#: By the index of the jobs of a user: other users cannot use the sites.
_ENDS = (jobs.c.src_siteid, jobs.c.dst_siteid)
_OF_JOBS = sa.union(*(sa.select(column).where(jobs.c.user_id == bindparam("owner")) for column in _ENDS))
_OF_SCHEDULES = sa.select(schedules.c.submission).where(schedules.c.user_id == bindparam("owner"))


def unused(session: Session, before: datetime, after: int) -> tuple[int, list[int]] | None:
    """The next user with sites made of URLs before a time, and those that nothing refers to; None if there is none.

    Only reads: run it in a reader.

    Args:
        before: of their creation.
        after: number of the user before.
    """
    owner = session.scalar(_NEXT_OWNER, {"before": before, "after": after})
    if owner is None:
        return None
    used: set[int | None] = set(session.scalars(_OF_JOBS, {"owner": owner}))
    for submission in session.scalars(_OF_SCHEDULES, {"owner": owner}):
        used |= {submission.get("src_siteid"), submission.get("dst_siteid")}
    found = session.scalars(_OF_OWNER, {"before": before, "owner": owner})
    return owner, [number for number in found if number not in used]


_LOCKED = (
    sa.select(sites.c.id)
    .where(sites.c.id.in_(bindparam("numbers", expanding=True)), _IS_PLAIN)
    .order_by(sites.c.id)
    .with_for_update()
)
_SINCE = sa.union(
    *(
        sa.select(column).where(jobs.c.user_id == bindparam("owner"), jobs.c.id > bindparam("newest"))
        for column in _ENDS
    )
)


def newest_job(session: Session) -> int:
    """The number of the newest job."""
    return session.scalar(sa.select(sa.func.max(jobs.c.id))) or 0


def remove(session: Session, owner: int, numbers: Collection[int], before: datetime, newest: int) -> Step:
    """Remove sites of a user that were `unused`.

    Args:
        owner: number of the user.
        numbers: of the sites.
        before: as there.
        newest: `newest_job` before that.
    """
    begin_change(session)
    # FOR UPDATE conflicts with the lock of a job that is being registered.
    locked = session.scalars(_LOCKED, {"numbers": list(numbers), "before": before}).all()
    used = set(session.scalars(_SINCE, {"owner": owner, "newest": newest - _NUMBERS_APART}))
    gone = [number for number in locked if number not in used]
    if gone:
        matched(session, sa.delete(sites).where(sites.c.id.in_(gone)))
    return Step(len(gone), more=False)
