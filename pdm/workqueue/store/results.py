"""Results of claimed elements, many in one transaction; elements added by a running listing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import sqlalchemy as sa
from attrs import evolve, frozen
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode
from pdm.workqueue.domain.holds import HOLDS, WaitKind
from pdm.workqueue.domain.jobs import AttemptRecord, ClaimToken, JobRecord, NewElement, Verdict
from pdm.workqueue.domain.lifecycle import settled_status
from pdm.workqueue.domain.node_reports import SignalKind
from pdm.workqueue.store import job_counts
from pdm.workqueue.store.counted_apart import worker_and_jobs_apart
from pdm.workqueue.store.credentials import last_stored
from pdm.workqueue.store.errors import ChangedMeanwhileError
from pdm.workqueue.store.events import note_failures
from pdm.workqueue.store.job_changes import cancel_later_phases
from pdm.workqueue.store.jobs import fetch_attempt
from pdm.workqueue.store.locks import LockedJob, is_shared, lock_job, lock_jobs, save_jobs
from pdm.workqueue.store.planned_elements import add_source_removals, is_moved
from pdm.workqueue.store.records import (
    INSERT_ATTEMPTS,
    IS_INCARNATION,
    UPDATE_ELEMENT,
    WORKER_ID,
    attempt_row,
    columns_of,
    elements,
    failure_columns,
    insert_elements,
    workers,
)
from pdm.workqueue.store.row_statements import RowStatement
from pdm.workqueue.store.signals import note
from pdm.workqueue.store.waits import hold_new, join
from pdm.workqueue.WorkqueueDB import AT_ONCE, CLOCK_SKEW, MAX_BYTES


@frozen
class SettleOutcome:
    """Result of `settle`.

    Attributes:
        lost: attempts whose claim was lost: nothing was written.
        repeated: those of them that an earlier transaction has written, whose commit was not acknowledged.
        finished: jobs that became final.
        passed_over: nothing was written, because another session has locked their jobs.
        counted_apart: jobs to whose counters `counted_apart.add_up` must add some.
        has_waiting: whether any of the jobs has SUBMITTED elements.
    """

    lost: tuple[ClaimToken, ...]
    finished: tuple[JobRecord, ...]
    repeated: frozenset[ClaimToken] = frozenset()
    passed_over: tuple[Verdict, ...] = ()
    has_waiting: bool = False
    counted_apart: frozenset[int] = frozenset()


#: Delay before a retry with a credential that was stored during the attempt; avoids a busy loop if it fails, too.
_RENEWED_PAUSE = timedelta(seconds=1)


#: A successful attempt is stored in its element's row, and so costs no row of its own.
_SETTLE_DONE = RowStatement(
    """
    WITH done (job_id, id, lost, transferred, elapsed_s, checksum, residue, already_there,
        not_preserved, started_at, log_offset, log_length, attempt) AS (VALUES {rows})
    UPDATE job_elements SET status = 'DONE', lost = done.lost, transferred = done.transferred,
        elapsed_s = done.elapsed_s, checksum = done.checksum, residue = done.residue,
        already_there = done.already_there, not_preserved = done.not_preserved,
        claimed_at = NULL, started_at = done.started_at,
        log_offset = CAST(done.log_offset AS BIGINT), log_length = CAST(done.log_length AS BIGINT),
        failure_scope = NULL, failure_code = NULL, failure_message = NULL
    FROM done WHERE job_elements.job_id = done.job_id AND job_elements.id = done.id
        AND job_elements.attempts = done.attempt AND job_elements.status = 'RUNNING'
    """,
    [
        *columns_of(
            elements, "job_id", "id", "lost", "transferred", "elapsed_s", "checksum", "residue", "already_there"
        ),
        *columns_of(elements, "not_preserved", "started_at", "log_offset", "log_length", "attempts"),
    ],
)


def settle(
    session: Session,
    worker: str,
    verdicts: Sequence[Verdict],
    now: datetime,
    *,
    skip_locked: bool = False,
    may_count_apart: bool = False,
) -> SettleOutcome:
    """Write the results of claimed attempts.

    A verdict whose element does not run any more under this worker and attempt writes nothing. If the job is cancelled,
    an element that would be SUBMITTED again becomes CANCELLED.

    ``worker``: the incarnation that claimed them. ``verdicts``: in any order; at most one per attempt. ``skip_locked``:
    skip verdicts whose jobs another session has locked, instead of waiting. ``may_count_apart``: whether jobs need not
    be locked to count elements that are DONE; then the caller sees to it that `counted_apart.add_up` is called.

    Raises:
        ChangedMeanwhileError: another transaction has changed an element; a repetition finds that.
    """
    by_number: dict[int, list[Verdict]] = {}
    for verdict in verdicts:
        by_number.setdefault(verdict.token.job_id, []).append(verdict)
    worker_id, apart = worker_and_jobs_apart(session, worker, by_number, may_count_apart=may_count_apart)
    locked = {job.id: job for job in lock_jobs(session, by_number.keys() - apart.keys(), skip_locked=skip_locked)}
    found = locked | apart
    passed_over: tuple[Verdict, ...] = ()
    if skip_locked and len(found) < len(by_number):
        passed_over = tuple(verdict for verdict in verdicts if verdict.token.job_id not in found)
        verdicts = [verdict for verdict in verdicts if verdict.token.job_id in found]
    running = _running(session, worker_id, [verdict.token for verdict in verdicts])
    lost: list[ClaimToken] = []
    repeated: set[ClaimToken] = set()
    done: list[tuple[Any, ...]] = []
    #: Sizes that were not known before.
    measured: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    ended: list[dict[str, Any]] = []
    moved: dict[int, list[int]] = {}
    archiving = {job.id for job in found.values() if job.record.archives}
    archived: dict[int, list[int]] = {}
    renewed: dict[int, datetime] = {}
    failed: dict[tuple[int, FailureCode], list[tuple[int, AttemptFailure]]] = {}
    for given in verdicts:
        token = given.token
        row = running.get((token.job_id, token.element_id))
        if row is None or row.attempt != token.attempt:
            lost.append(token)
            if _is_written(session, worker, given):
                repeated.add(token)
            continue
        del running[token.job_id, token.element_id]
        job = found[token.job_id]
        verdict = given
        if given.status is JobStatus.HELD:
            if job.id not in renewed:
                renewed[job.id] = last_stored(session, job.record.user_id, job.record.sites) or AT_ONCE
            if renewed[job.id] >= row.claimed_at - CLOCK_SKEW:
                # The new credential was stored before this element was HELD, so it did not resume it.
                verdict = given._replace(status=JobStatus.SUBMITTED, not_before=now + _RENEWED_PAUSE)
        status = settled_status(verdict.status, cancel_requested=job.record.cancel_requested)
        outcome = _outcome(verdict)
        if status is JobStatus.DONE and outcome is JobStatus.DONE:
            if archiving and job.id in archiving and row.type is JobType.COPY:
                # It is proven, and DONE only once it is on tape.
                status = settled_status(JobStatus.HELD, cancel_requested=job.record.cancel_requested)
                archived.setdefault(job.id, []).append(row.element_id)
                others.append(_archived_change(verdict, status, row))
                ended.append(_attempt_row(verdict, JobStatus.DONE, row))
                job.hold = job.hold or HOLDS[WaitKind.ARCHIVE]
            else:
                done.append(_done_change(verdict, row))
            if not row.size and verdict.transferred and job.record.has_items:
                job.grow_bytes(_clamped(verdict.transferred))
                measured.append({"of_job": job.id, "number": token.element_id, "size": _clamped(verdict.transferred)})
            if (
                status is JobStatus.DONE
                and row.type is JobType.COPY
                and is_moved(job.record, already_there=verdict.already_there, attempt=row.attempt, planned=row.planned)
            ):
                moved.setdefault(job.id, []).append(row.element_id)
        else:
            others.append(_element_change(verdict, status, row))
            ended.append(_attempt_row(verdict, outcome, row))
            if status is JobStatus.HELD:
                job.hold = job.hold or verdict.failure
            elif verdict.failure is not None:
                failed.setdefault((job.id, verdict.failure.code), []).append((token.element_id, verdict.failure))
        _count(job, verdict, status, row.type)
        if row.type is JobType.LIST and status.is_final and status is not JobStatus.DONE:
            cancel_later_phases(session, job)
    if not done and not others:
        # What is stored already may be counted apart.
        return SettleOutcome(
            tuple(lost), (), frozenset(repeated), passed_over, counted_apart=frozenset(found if repeated else ())
        )
    if done and _SETTLE_DONE.matched(session, done) < len(done) and is_shared(session):
        raise ChangedMeanwhileError("an element was changed while its result was being stored")
    if measured:
        session.execute(UPDATE_ELEMENT, measured)
    if others:
        session.execute(UPDATE_ELEMENT, others)
        session.execute(INSERT_ATTEMPTS, ended)
    for job_id, copied in archived.items():
        if not locked[job_id].record.cancel_requested:
            join(session, locked[job_id].record, WaitKind.ARCHIVE, copied, now)
    for job_id, copied in moved.items():
        add_source_removals(session, locked[job_id], copied, now)
    for job in locked.values():
        if job.record.has_phases or job.record.max_active is not None:
            # A phase may be complete, or there is room for more: let a claim check whether something may begin.
            job.schedule_work()
    finished = tuple(job.record for job in locked.values() if job.roll_up(now))
    if failed:
        note_failures(session, failed, {job.id: job.record for job in locked.values()}, now)
    save_jobs(session, locked.values())
    job_counts.append(session, [counts for job in apart.values() if any((counts := job.counted_done())[1:])])
    has_waiting = any(job.counters.submitted for job in found.values())
    if any(change["status"] is JobStatus.SUBMITTED and change["due_at"] <= now for change in others):
        # Given back: another node may begin it at once.
        note(session, SignalKind.WORK)
    return SettleOutcome(tuple(lost), finished, frozenset(repeated), passed_over, has_waiting, frozenset(apart))


def _outcome(verdict: Verdict) -> JobStatus:
    """The status of the attempt; CANCELLED if the element is SUBMITTED again without a failure."""
    outcome = verdict.status if verdict.failure is None else JobStatus.FAILED
    return outcome if outcome.is_final else JobStatus.CANCELLED


_WORKER_NAME = sa.select(workers.c.name).where(IS_INCARNATION)


def _is_written(session: Session, worker: str, verdict: Verdict) -> bool:
    """Whether an earlier transaction has written a verdict, whose commit was not acknowledged."""
    token = verdict.token
    written = fetch_attempt(session, token.job_id, token.element_id, token.attempt)
    return (
        written is not None
        and written.worker == session.scalar(_WORKER_NAME, {"of_incarnation": worker})
        and (written.status, written.started_at) == (_outcome(verdict), verdict.started_at)
        and _seconds(written) == _seconds(verdict)
    )


class _ClaimedElement(NamedTuple):
    """What a verdict needs of an element that runs."""

    job_id: int
    element_id: int
    attempt: int
    lost: int
    type: JobType
    residue: bool
    worker_id: int
    claimed_at: datetime
    size: int
    checksum: str | None
    planned: str | None


_RUNNING = RowStatement(
    """
    WITH asked (of_job, number) AS (VALUES {rows})
    SELECT job_id, id, attempts, lost, type, residue, worker_id, claimed_at, size, checksum, planned
    FROM asked, job_elements
    WHERE job_id = of_job AND id = number AND status = 'RUNNING' AND worker_id = ?
    """,
    columns_of(elements, "job_id", "id"),
    columns_of(elements, "worker_id"),
    [
        *columns_of(elements, "job_id", "id", "attempts", "lost", "type", "residue", "worker_id", "claimed_at"),
        *columns_of(elements, "size", "checksum", "planned"),
    ],
)


def _running(
    session: Session, worker_id: int | None, tokens: Sequence[ClaimToken]
) -> dict[tuple[int, int], _ClaimedElement]:
    """Those of some elements that a worker runs."""
    rows = _RUNNING.execute(session, {(token.job_id, token.element_id) for token in tokens}, worker_id)
    return {row[:2]: _ClaimedElement._make(row) for row in rows}


def _done_change(verdict: Verdict, row: _ClaimedElement) -> tuple[Any, ...]:
    log = verdict.log
    return (
        row.job_id,
        row.element_id,
        row.lost + (not verdict.counts),
        _clamped(verdict.transferred),
        _seconds(verdict),
        verdict.checksum,
        verdict.leftover,
        verdict.already_there,
        verdict.not_preserved,
        verdict.started_at,
        None if log is None else log.offset,
        None if log is None else log.length,
        row.attempt,
    )


def _seconds(ended: Verdict | AttemptRecord) -> float:
    return max((ended.ended_at - ended.started_at).total_seconds(), 0.0)


def _attempt_row(verdict: Verdict, outcome: JobStatus, row: _ClaimedElement) -> dict[str, Any]:
    return attempt_row(
        verdict.token,
        outcome,
        verdict.started_at,
        verdict.ended_at,
        row.worker_id,
        _clamped(verdict.transferred),
        verdict.failure,
        verdict.log,
    )


def _element_change(verdict: Verdict, status: JobStatus, row: _ClaimedElement) -> dict[str, Any]:
    done = status is JobStatus.DONE
    return {
        "of_job": verdict.token.job_id,
        "number": verdict.token.element_id,
        "status": status,
        "lost": row.lost + (not verdict.counts),
        "due_at": verdict.not_before or AT_ONCE,
        "worker_id": None,
        "transferred": _clamped(verdict.transferred),
        "elapsed_s": _seconds(verdict),
        # One that was given with the element stays for the next attempt.
        "checksum": verdict.checksum or row.checksum,
        # A successful attempt has first removed the files of earlier ones.
        "residue": verdict.leftover or (row.residue and not done),
        "already_there": done and verdict.already_there,
        "not_preserved": verdict.not_preserved,
        **failure_columns(None if done else verdict.failure),
    }


def _archived_change(verdict: Verdict, status: JobStatus, row: _ClaimedElement) -> dict[str, Any]:
    """The change of a copy that is proven and not on tape yet: it is not transferred again."""
    hold = HOLDS[WaitKind.ARCHIVE]
    return {
        **_element_change(verdict, status, row),
        "residue": verdict.leftover,
        "already_there": verdict.already_there,
        **failure_columns(hold if status is JobStatus.HELD else None),
    }


def _count(job: LockedJob, verdict: Verdict, status: JobStatus, type_: JobType) -> None:
    job.move(JobStatus.RUNNING, status)
    if status is JobStatus.SUBMITTED:
        due_at = verdict.not_before or AT_ONCE
        if type_ is JobType.LIST:
            job.schedule_listing(due_at)
        else:
            job.schedule_work(due_at)
    if status is JobStatus.DONE:
        job.count_arrived(_clamped(verdict.transferred), already_there=verdict.already_there)
    if type_ is JobType.LIST:
        job.record = evolve(job.record, skipped=verdict.skipped)


def _clamped(size: int) -> int:
    return min(max(size, 0), MAX_BYTES)


def add_elements(session: Session, worker: str, token: ClaimToken, new: Sequence[NewElement]) -> bool:
    """Add elements to a job while its listing runs.

    ``worker``: incarnation that runs the listing. ``new``: numbered in this order.

    Returns:
        False if the claim is lost or the job is cancelled; then nothing was added.
    """
    job = extend_job(session, worker, token, new)
    if job is not None and new:
        save_jobs(session, [job])
    return job is not None


def extend_job(session: Session, worker: str, token: ClaimToken, new: Sequence[NewElement]) -> LockedJob | None:
    """Like `add_elements`, but the caller saves the job; None if nothing was added."""
    job = lock_job(session, token.job_id)
    if job is None or job.record.cancel_requested:
        return None
    worker_id = session.scalar(WORKER_ID, {"of_incarnation": worker})
    listing = _running(session, worker_id, [token]).get((token.job_id, token.element_id))
    if listing is None or listing.attempt != token.attempt:
        return None
    if new:
        first = job.counters.elements
        insert_elements(session, job.id, first, new, job.record.max_tries, listing.claimed_at)
        job.grow(new)
        hold_new(session, job, first, new, listing.claimed_at)
        job.schedule_work()
        job.roll_up(listing.claimed_at)
    return job


def known_paths(session: Session, job_id: int) -> set[bytes]:
    """`path_hash` of the elements that listings of a job have planned; a million of them take under 100 MiB."""
    statement = sa.select(elements.c.type, elements.c.src_filepath).where(
        elements.c.job_id == job_id, elements.c.id > 0
    )
    rows = session.execute(statement.execution_options(yield_per=1000))
    return {path_hash(row.type, row.src_filepath) for row in rows}


def path_hash(type_: JobType, path: str) -> bytes:
    """Short identifier of an element's type and path; 96 bits make collisions negligible."""
    return hashlib.blake2b(f"{type_.name}:{path}".encode("utf-8", "surrogatepass"), digest_size=12).digest()
