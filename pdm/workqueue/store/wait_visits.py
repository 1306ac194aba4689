"""Visits of waits (`pdm.workqueue.domain.holds`): which daemon makes them, and what it writes of them.

A daemon leases a wait and increases its ``turn``. If it dies, another one takes the wait, and what an old turn writes
matches no row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any

import sqlalchemy as sa
from attrs import frozen
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus, PlannedAction
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode
from pdm.workqueue.domain.holds import HOLDS, MOST_IN_WAIT, Wait, WaitingElement, WaitKind, WaitPhase
from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.domain.node_reports import SignalKind
from pdm.workqueue.store import signals
from pdm.workqueue.store.events import note_failures
from pdm.workqueue.store.leases import is_free, lease_clock
from pdm.workqueue.store.locks import LockedJob, lock_job, save_jobs
from pdm.workqueue.store.planned_elements import add_source_removals, is_moved
from pdm.workqueue.store.records import (
    UPDATE_ELEMENT,
    columns_of,
    elements,
    failure_columns,
    jobs,
    matched,
    predecessors,
    wait_elements,
    waits,
)
from pdm.workqueue.store.row_statements import RowStatement
from pdm.workqueue.store.waits import JOIN
from pdm.workqueue.WorkqueueDB import AT_ONCE

#: Pause of a wait whose job still waits for other jobs.
_CHAIN_PAUSE = timedelta(seconds=10)
#: Due waits that are considered at once.
_CANDIDATES = 200

_COLUMNS = (
    *columns_of(waits, "id", "job_id"),
    jobs.c.user_id,
    *columns_of(waits, "kind", "phase", "site_id", "request", "deadline", "turn", "polls", "errors"),
)
_DUE = (
    sa.select(waits.c.id, waits.c.site_id)
    .where(waits.c.due_at <= bindparam("now"), waits.c.site_id.not_in(bindparam("excluded", expanding=True)))
    .order_by(waits.c.due_at)
    .limit(_CANDIDATES)
)
_NEXT = sa.select(sa.func.min(waits.c.due_at)).where(waits.c.site_id.not_in(bindparam("excluded", expanding=True)))
_TAKEN = sa.select(*_COLUMNS).join_from(waits, jobs, jobs.c.id == waits.c.job_id)


def next_due(session: Session, excluded: Collection[int], now: datetime) -> datetime | None:
    """When the next wait is due that no daemon visits, without those of some sites; None if there is none."""
    statement = _NEXT.where(is_free(waits, lease_clock(session, now)))
    due_at: datetime | None = session.scalar(statement, {"excluded": list(excluded)})
    return due_at


def take_due(
    session: Session,
    incarnation: str,
    allowance: Mapping[int, int],
    usual: int,
    most: int,
    lease_s: float,
    now: datetime,
) -> list[Wait]:
    """Lease waits that are due, for a daemon, which visits them.

    ``allowance``: site → waits that may be taken of it, ``usual`` of any other one. ``most``: of all.
    """
    timestamp = lease_clock(session, now)
    free = is_free(waits, timestamp)
    left = dict(allowance)
    excluded = [site for site, count in allowance.items() if count < 1]
    taken: list[int] = []
    for row in session.execute(_DUE.where(free), {"now": now, "excluded": excluded}).all():
        count = left.get(row.site_id, usual)
        if count < 1 or len(taken) == most:
            continue
        lease = sa.update(waits).where(waits.c.id == row.id, free, waits.c.due_at <= now)
        until = timestamp + timedelta(seconds=lease_s)
        values = {"leased_by": incarnation, "leased_until": until, "turn": waits.c.turn + 1}
        if matched(session, lease.values(values)):
            left[row.site_id] = count - 1
            taken.append(row.id)
    return [_wait(row) for row in session.execute(_TAKEN.where(waits.c.id.in_(taken)))] if taken else []


def _wait(row: sa.Row[Any]) -> Wait:
    return Wait(**{**row._mapping, "kind": WaitKind(row.kind), "phase": WaitPhase(row.phase)})


_MEMBERS = (
    sa.select(
        elements.c.id,
        elements.c.status,
        elements.c.failure_code,
        elements.c.src_filepath,
        elements.c.dst_filepath,
        wait_elements.c.ready,
    )
    .join_from(wait_elements, elements, elements.c.id == wait_elements.c.element_id)
    .where(wait_elements.c.wait_id == bindparam("of_wait"), elements.c.job_id == bindparam("of_job"))
    .order_by(wait_elements.c.element_id)
)


def members(session: Session, wait: Wait) -> list[WaitingElement]:
    """The elements of a wait, by ascending number."""
    return [
        WaitingElement(
            row.id,
            row.status,
            None if row.failure_code is None else FailureCode(row.failure_code),
            row.src_filepath if wait.kind is WaitKind.STAGE else row.dst_filepath,
            row.ready,
        )
        for row in session.execute(_MEMBERS, {"of_wait": wait.id, "of_job": wait.job_id})
    ]


_MINE = sa.update(waits).where(waits.c.id == bindparam("number"), waits.c.turn == bindparam("of_turn"))
_FIRST_MEMBERS = (
    sa.select(wait_elements.c.element_id)
    .where(wait_elements.c.wait_id == bindparam("of_wait"))
    .order_by(wait_elements.c.element_id)
    .limit(MOST_IN_WAIT)
)
_MOVE_MEMBERS = (
    sa.update(wait_elements)
    .where(wait_elements.c.wait_id == bindparam("of_wait"), wait_elements.c.element_id <= bindparam("last"))
    .values(wait_id=bindparam("new"))
)
_DELETE_WAIT = sa.delete(waits).where(waits.c.id == bindparam("number"))
_IS_CHAINED = sa.select(sa.exists().where(predecessors.c.job_id == bindparam("waiting")))


def split(session: Session, gatherer: Wait, deadline: datetime, now: datetime) -> bool:
    """Split what a job has gathered into waits of at most `MOST_IN_WAIT` elements, and delete the gatherer.

    Returns:
        Whether it was: not while the job itself waits for others, or if the turn is over.
    """
    job = lock_job(session, gatherer.job_id)
    mine = {"number": gatherer.id, "of_turn": gatherer.turn}
    end = {"due_at": now + _CHAIN_PAUSE, "leased_by": None, "leased_until": None}
    if job is None or not matched(session, _MINE.values(end), mine):
        return False
    if session.scalar(_IS_CHAINED, {"waiting": job.id}):
        return False
    phase = WaitPhase.LOOK if gatherer.kind is WaitKind.STAGE else WaitPhase.POLL
    while numbers := session.scalars(_FIRST_MEMBERS, {"of_wait": gatherer.id}).all():
        values = _new_wait(gatherer, phase, deadline, now)
        new = session.execute(sa.insert(waits).returning(waits.c.id), values).scalar_one()
        session.execute(_MOVE_MEMBERS, {"of_wait": gatherer.id, "last": numbers[-1], "new": new})
    session.execute(_DELETE_WAIT, {"number": gatherer.id})
    return True


def _new_wait(origin: Wait, phase: WaitPhase, deadline: datetime, now: datetime) -> dict[str, Any]:
    return {
        "job_id": origin.job_id,
        "kind": origin.kind.value,
        "phase": phase.value,
        "site_id": origin.site_id,
        "began_at": now,
        "deadline": deadline,
        "due_at": now,
    }


def begin_request(session: Session, wait: Wait) -> bool:
    """Store that a request is about to be sent; False if the turn is over: then it must not be."""
    mine = {"number": wait.id, "of_turn": wait.turn}
    return bool(matched(session, _MINE.values(phase=WaitPhase.UNSURE.value), mine))


# -- the result of a visit


@frozen(kw_only=True)
class WaitVisit:
    """What a visit has found.

    Attributes:
        wait: as it was taken; with the phase and the request that it has from now on.
        due_at: of the next visit.
        resumed: elements whose files are on disk: they go into the queue.
        ready: those of them that the request keeps on disk until they are released; the others leave the wait.
        done: elements that are on tape.
        failed: elements that never will be, and why.
        left: elements that have ended, and that the site knows of no more.
        dropped: elements that the request is not about: they become a wait of their own.
        polls_of_dropped: visits without a change that this counts as.
        message: why there was no answer.
    """

    wait: Wait
    due_at: datetime
    resumed: Collection[int] = ()
    ready: Collection[int] = ()
    done: Collection[int] = ()
    failed: Mapping[int, AttemptFailure] = MappingProxyType({})
    left: Collection[int] = ()
    dropped: Collection[int] = ()
    polls_of_dropped: int = 0
    message: str | None = None


_RESUME = RowStatement(
    """
    WITH those (number) AS (VALUES {rows})
    UPDATE job_elements SET status = 'SUBMITTED', failure_scope = NULL, failure_code = NULL, failure_message = NULL,
        due_at = ?
    FROM those WHERE job_elements.job_id = ? AND job_elements.id = those.number
    """,
    columns_of(elements, "id"),
    columns_of(elements, "due_at", "job_id"),
)
_DONE = RowStatement(
    """
    WITH those (number) AS (VALUES {rows})
    UPDATE job_elements SET status = 'DONE', failure_scope = NULL, failure_code = NULL, failure_message = NULL
    FROM those WHERE job_elements.job_id = ? AND job_elements.id = those.number
    """,
    columns_of(elements, "id"),
    columns_of(elements, "job_id"),
)
_READY = RowStatement(
    """
    WITH those (number) AS (VALUES {rows})
    UPDATE wait_elements SET ready = TRUE FROM those
    WHERE wait_elements.wait_id = ? AND wait_elements.element_id = those.number
    """,
    columns_of(wait_elements, "element_id"),
    columns_of(wait_elements, "wait_id"),
)
_LEAVE = RowStatement(
    """
    WITH those (number) AS (VALUES {rows})
    DELETE FROM wait_elements WHERE wait_id = ? AND element_id IN (SELECT number FROM those)
    """,
    columns_of(wait_elements, "element_id"),
    columns_of(wait_elements, "wait_id"),
)
#: Of the elements of a wait, those that are still HELD for it.
_STILL_HELD = (
    sa.select(*columns_of(elements, "id", "attempts", "transferred", "already_there", "planned"))
    .join_from(wait_elements, elements, elements.c.id == wait_elements.c.element_id)
    .where(
        wait_elements.c.wait_id == bindparam("of_wait"),
        elements.c.job_id == bindparam("of_job"),
        elements.c.status == JobStatus.HELD,
        elements.c.failure_code == bindparam("of_code"),
    )
)
_HAS_MEMBERS = sa.select(sa.exists().where(wait_elements.c.wait_id == bindparam("of_wait")))


def settle_visit(session: Session, visit: WaitVisit, now: datetime) -> JobRecord | None:
    """Write what a visit has found, unless its turn is over.

    Returns:
        The job, if it has become final.
    """
    wait = visit.wait
    job = lock_job(session, wait.job_id)
    values = {
        "phase": wait.phase.value,
        "request": wait.request,
        "due_at": visit.due_at,
        "polls": wait.polls,
        "errors": wait.errors,
        "message": visit.message,
        "leased_by": None,
        "leased_until": None,
    }
    if job is None or not matched(session, _MINE.values(values), {"number": wait.id, "of_turn": wait.turn}):
        return None
    finished = _change_elements(session, job, visit, now)
    left = {*visit.left, *visit.done, *(number for number in visit.resumed if number not in visit.ready)}
    if visit.ready:
        _READY.execute(session, [(number,) for number in visit.ready], wait.id)
    if left:
        _LEAVE.execute(session, [(number,) for number in left], wait.id)
    if visit.dropped:
        values = _new_wait(wait, WaitPhase.LOOK, wait.deadline, now)
        values |= {"polls": visit.polls_of_dropped, "due_at": visit.due_at}
        new = session.execute(sa.insert(waits).returning(waits.c.id), values).scalar_one()
        _LEAVE.execute(session, [(number,) for number in visit.dropped], wait.id)
        JOIN.execute(session, [(number,) for number in visit.dropped], new)
    if not session.scalar(_HAS_MEMBERS, {"of_wait": wait.id}):
        session.execute(_DELETE_WAIT, {"number": wait.id})
    return finished


def _change_elements(session: Session, job: LockedJob, visit: WaitVisit, now: datetime) -> JobRecord | None:
    if not (visit.resumed or visit.done or visit.failed):
        return None
    wait = visit.wait
    code = HOLDS[wait.kind].code.value
    rows = session.execute(_STILL_HELD, {"of_wait": wait.id, "of_job": job.id, "of_code": code})
    held = {row.id: row for row in rows}
    resumed = [(number,) for number in visit.resumed if number in held]
    if resumed:
        _RESUME.execute(session, resumed, AT_ONCE, job.id)
        job.move(JobStatus.HELD, JobStatus.SUBMITTED, len(resumed))
        job.schedule_work()
        signals.note(session, SignalKind.WORK)
    done = [held[number] for number in visit.done if number in held]
    if done:
        _DONE.execute(session, [(row.id,) for row in done], job.id)
        job.move(JobStatus.HELD, JobStatus.DONE, len(done))
        moved = []
        for row in done:
            job.count_arrived(row.transferred or 0, already_there=row.already_there)
            planned = None if row.planned is None else PlannedAction(row.planned)
            if is_moved(job.record, already_there=row.already_there, attempt=row.attempts, planned=planned):
                moved.append(row.id)
        if moved:
            add_source_removals(session, job, moved, now)
    failed = {number: failure for number, failure in visit.failed.items() if number in held}
    if failed:
        session.execute(
            UPDATE_ELEMENT,
            [
                {"of_job": job.id, "number": number, "status": JobStatus.FAILED, **failure_columns(failure)}
                for number, failure in failed.items()
            ],
        )
        job.move(JobStatus.HELD, JobStatus.FAILED, len(failed))
        groups: dict[tuple[int, FailureCode], list[tuple[int, AttemptFailure]]] = {}
        for number, failure in failed.items():
            groups.setdefault((job.id, failure.code), []).append((number, failure))
        note_failures(session, groups, {job.id: job.record}, now)
    if job.record.has_phases:
        # A phase may be complete: let a claim check whether the next one may begin.
        job.schedule_work()
    is_final = job.roll_up(now)
    save_jobs(session, [job])
    return job.record if is_final else None


# -- for people


@frozen
class WaitSummary:
    """The waits of a job of one kind.

    Attributes:
        requests: that a site has accepted.
        next_due: of the next visit.
        message: why the last visit of one of them got no answer; None if all did.
    """

    kind: WaitKind
    requests: int
    next_due: datetime
    message: str | None


_SUMMARIES = (
    sa.select(waits.c.kind, sa.func.count(waits.c.request), sa.func.min(waits.c.due_at), sa.func.max(waits.c.message))
    .where(waits.c.job_id == bindparam("of_job"))
    .group_by(waits.c.kind)
    .order_by(waits.c.kind)
)


def summaries(session: Session, job_id: int) -> list[WaitSummary]:
    """The waits of a job, by kind."""
    rows = session.execute(_SUMMARIES, {"of_job": job_id})
    return [WaitSummary(WaitKind(kind), requests, due, message) for kind, requests, due, message in rows]
