"""Jobs of FTS3's clients: which jobs carry them out, and what the clients have said of each file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import msgspec
import sqlalchemy as sa
from attrs import evolve, frozen
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.jobs import ElementRecord, JobRecord, NewJob, Predecessors
from pdm.workqueue.store import job_changes
from pdm.workqueue.store.locks import lock_jobs, save_jobs
from pdm.workqueue.store.outcomes import attempt_times
from pdm.workqueue.store.records import (
    ELEMENT_COLUMNS,
    FINAL,
    IS_THERE,
    JOB_COLUMNS,
    columns_of,
    element_record,
    elements,
    fts_files,
    fts_jobs,
    fts_parts,
    job_record,
    jobs,
    users,
)
from pdm.workqueue.store.row_statements import RowStatement


class DuplicateFtsJobError(Exception):
    """The user has submitted a job with this id before."""


# The garbage collector does not track them: a job has up to a hundred thousand.
class NewFtsFile(msgspec.Struct, frozen=True, gc=False):
    """What a client says of the file of an element; see `FtsFileRow`."""

    file_index: int
    source_surl: str
    dest_surl: str
    details: Mapping[str, Any]


@frozen
class NewFtsPart:
    """A job to be registered, and the files of its elements, in their order.

    Attributes:
        is_alternative: whether it begins only if the part before it fails.
    """

    job: NewJob
    files: Sequence[NewFtsFile]
    is_alternative: bool = False


@frozen
class NewFtsJob:
    """A job of FTS3 to be registered; see `FtsJobRow`."""

    fts_id: str
    user_id: int
    vo_name: str
    details: Mapping[str, Any]
    parts: Sequence[NewFtsPart]


@frozen
class FtsJob:
    """A job of FTS3, and the jobs that carry it out.

    Attributes:
        number: its place in the order of all.
        user_dn: subject of its owner.
    """

    number: int
    fts_id: str
    user_id: int
    user_dn: str
    vo_name: str
    submitted_at: datetime
    details: Mapping[str, Any]
    parts: Sequence[JobRecord]


class FtsFile(NamedTuple):
    """A file of a job of FTS3, its element, and when its first attempt began and the last one ended."""

    job: JobRecord
    element: ElementRecord
    file: NewFtsFile
    began: datetime | None
    ended: datetime | None


_FIND_ID = sa.select(fts_jobs.c.id).where(
    fts_jobs.c.fts_id == bindparam("of_id"), fts_jobs.c.user_id == bindparam("of_user")
)
_INSERT = sa.insert(fts_jobs).returning(fts_jobs.c.id)


class _EncodedJson(sa.types.UserDefinedType[str]):
    """JSON that is text already."""

    cache_ok = True

    def get_col_spec(self, **_: object) -> str:
        return "JSON"


_INSERT_FILES = RowStatement(
    """
    WITH new (element_id, file_index, source_surl, dest_surl, details) AS (VALUES {rows})
    INSERT INTO fts_files (job_id, element_id, file_index, source_surl, dest_surl, details)
    SELECT ?, element_id, file_index, source_surl, dest_surl, details FROM new
    """,
    (
        *columns_of(fts_files, "element_id", "file_index", "source_surl", "dest_surl"),
        sa.Column("details", _EncodedJson()),
    ),
    columns_of(fts_files, "job_id"),
)


def submit(
    session: Session, new: NewFtsJob, register: Callable[[Session, NewJob], JobRecord], now: datetime
) -> list[JobRecord]:
    """Register a job of FTS3 and the jobs that carry it out.

    Args:
        register: registers one of these.

    Raises:
        DuplicateFtsJobError: the user has one of this id.
    """
    if session.scalar(_FIND_ID, {"of_id": new.fts_id, "of_user": new.user_id}) is not None:
        raise DuplicateFtsJobError
    # Of two that insert at once, the second one fails, is run again, and finds the first.
    number = session.execute(
        _INSERT,
        {
            "fts_id": new.fts_id,
            "user_id": new.user_id,
            "vo_name": new.vo_name,
            "submitted_at": now,
            "details": dict(new.details),
        },
    ).scalar_one()
    registered: list[JobRecord] = []
    for position, part in enumerate(new.parts):
        job = part.job
        if part.is_alternative:
            job = evolve(job, after=Predecessors((registered[-1].id,), on_failure=True))
        record = register(session, job)
        registered.append(record)
        session.execute(sa.insert(fts_parts).values(job_id=record.id, fts_job=number, position=position))
        _INSERT_FILES.execute(
            session,
            (
                (element, file.file_index, file.source_surl, file.dest_surl, msgspec.json.encode(file.details).decode())
                for element, file in enumerate(part.files)
            ),
            record.id,
        )
    return registered


_COLUMNS = (
    *(fts_jobs.c.id, fts_jobs.c.fts_id, fts_jobs.c.user_id, users.c.subject),
    *(fts_jobs.c.vo_name, fts_jobs.c.submitted_at, fts_jobs.c.details),
)
_JOBS = sa.select(*_COLUMNS).join(users, users.c.id == fts_jobs.c.user_id)
_BY_IDS = _JOBS.where(fts_jobs.c.fts_id.in_(bindparam("ids", expanding=True))).order_by(fts_jobs.c.id)
_PARTS = (
    sa.select(*JOB_COLUMNS, fts_parts.c.fts_job)
    .join(fts_parts, fts_parts.c.job_id == jobs.c.id)
    .where(fts_parts.c.fts_job.in_(bindparam("numbers", expanding=True)), IS_THERE)
    .order_by(fts_parts.c.fts_job, fts_parts.c.position)
)


def find(session: Session, ids: Collection[str]) -> list[FtsJob]:
    """The jobs with some ids, of all users; the older ones first."""
    return _with_parts(session, session.execute(_BY_IDS, {"ids": list(ids)}).all())


def _with_parts(session: Session, rows: Sequence[Any]) -> list[FtsJob]:
    parts: dict[int, list[JobRecord]] = {}
    for row in session.execute(_PARTS, {"numbers": [row.id for row in rows]}):
        parts.setdefault(row.fts_job, []).append(job_record(row))
    # One without parts is being removed by its age.
    return [FtsJob(**found, parts=parts[found["number"]]) for found in map(_values, rows) if found["number"] in parts]


def _values(row: Any) -> dict[str, Any]:
    names = ("number", "fts_id", "user_id", "user_dn", "vo_name", "submitted_at", "details")
    return dict(zip(names, row, strict=True))


@frozen
class FtsFilter:
    """Which jobs of FTS3; None stands for all.

    Attributes:
        ended_since: ended at that time or later, or not yet.
        is_open: only those of which something has not ended.
        before: only numbers below.
    """

    owner_id: int | None
    vo_name: str | None = None
    ended_since: datetime | None = None
    is_open: bool = False
    before: int | None = None


def page(session: Session, wanted: FtsFilter, limit: int) -> list[FtsJob]:
    """Some jobs, the newest first."""
    query = _JOBS.order_by(fts_jobs.c.id.desc()).limit(limit)
    part = sa.select(fts_parts.c.fts_job).join(jobs, jobs.c.id == fts_parts.c.job_id)
    if wanted.owner_id is not None:
        query = query.where(fts_jobs.c.user_id == wanted.owner_id)
        part = part.where(jobs.c.user_id == wanted.owner_id)
    if wanted.vo_name is not None:
        query = query.where(fts_jobs.c.vo_name == wanted.vo_name)
    if wanted.is_open:
        query = query.where(fts_jobs.c.id.in_(part.where(jobs.c.status.not_in(FINAL), IS_THERE)))
    elif wanted.ended_since is not None:
        recent = sa.or_(jobs.c.finished_at.is_(None), jobs.c.finished_at >= wanted.ended_since)
        query = query.where(fts_jobs.c.id.in_(part.where(recent, IS_THERE)))
    if wanted.before is not None:
        query = query.where(fts_jobs.c.id < wanted.before)
    return _with_parts(session, session.execute(query).all())


_FILES = (
    sa.select(*ELEMENT_COLUMNS, *(fts_files.c[name] for name in NewFtsFile.__struct_fields__))
    .join(fts_files, sa.and_(fts_files.c.job_id == elements.c.job_id, fts_files.c.element_id == elements.c.id))
    .where(elements.c.job_id == bindparam("of_job"), elements.c.id > bindparam("after"))
    .order_by(elements.c.id)
    .limit(bindparam("most"))
)


def files(session: Session, job: JobRecord, after: int, most: int, *, with_times: bool = True) -> list[FtsFile]:
    """Files of one of the jobs, those of the elements after a number."""
    rows = session.execute(_FILES, {"of_job": job.id, "after": after, "most": most}).all()
    if not rows:
        return []
    count = len(ELEMENT_COLUMNS)
    found = [(element_record(row[:count]), NewFtsFile(*row[count:])) for row in rows]
    times = attempt_times(session, job.id, found[0][0].id, found[-1][0].id) if with_times else {}
    return [FtsFile(job, element, file, *times.get(element.id, (None, None))) for element, file in found]


_SET_PRIORITY = sa.update(jobs).where(jobs.c.id.in_(bindparam("numbers", expanding=True)))


def set_priority(session: Session, numbers: Collection[int], priority: int) -> None:
    """Change the priority of those of some jobs that have not ended."""
    locked = [job for job in lock_jobs(session, numbers) if not job.record.status.is_final]
    if locked:
        session.execute(_SET_PRIORITY.values(priority=priority), {"numbers": [job.id for job in locked]})
    for job in locked:
        job.record = evolve(job.record, priority=priority)
    save_jobs(session, locked)


def cancel(session: Session, numbers: Collection[int], now: datetime) -> list[JobRecord]:
    """Cancel some jobs, as `job_changes.cancel` does each."""
    return [job_changes.cancel(session, number, now) for number in sorted(numbers)]


_STATUSES = sa.select(elements.c.id, elements.c.status).where(
    elements.c.job_id == bindparam("of_job"), elements.c.id.in_(bindparam("numbers", expanding=True))
)


def statuses(session: Session, chosen: Mapping[int, Collection[int]]) -> dict[tuple[int, int], JobStatus]:
    """The status of elements by job and number; ``chosen``: their numbers by job."""
    return {
        (job_id, row.id): row.status
        for job_id, numbers in chosen.items()
        for row in session.execute(_STATUSES, {"of_job": job_id, "numbers": list(numbers)})
    }


def cancel_elements(
    session: Session, chosen: Mapping[int, Collection[int]], now: datetime
) -> tuple[list[JobRecord], dict[tuple[int, int], JobStatus]]:
    """Cancel elements that wait; those that run, or have ended, stay as they are.

    Args:
        chosen: numbers of elements by job.

    Returns:
        The jobs, and the status of each element by job and number.
    """
    statuses: dict[tuple[int, int], JobStatus] = {}
    locked = lock_jobs(session, chosen)
    for job in locked:
        waiting: dict[JobStatus, list[int]] = {JobStatus.SUBMITTED: [], JobStatus.HELD: []}
        for row in session.execute(_STATUSES, {"of_job": job.id, "numbers": list(chosen[job.id])}):
            statuses[job.id, row.id] = row.status
            if row.status in waiting:
                waiting[row.status].append(row.id)
                statuses[job.id, row.id] = JobStatus.CANCELLED
        for status, numbers in waiting.items():
            job_changes.move_elements(session, job_changes.CANCEL_ELEMENT, job, numbers, status, JobStatus.CANCELLED)
        job.roll_up(now)
    save_jobs(session, locked)
    return [job.record for job in locked], statuses
