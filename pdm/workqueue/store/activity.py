"""What ended when: the rate of a job, and attempts by route over time; from the rows of elements and attempts.

The cost is bounded, whatever the size of the queue. Elements are not indexed by time: they are read by number, all
where they are few, else blocks of neighbours at equal distances, found by the primary key. Sums of
samples are scaled up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from attrs import define, frozen
from sqlalchemy import bindparam
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.sql.compiler import SQLCompiler

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.domain.limits import Route
from pdm.workqueue.store.records import attempts, columns_of, elements, jobs
from pdm.workqueue.WorkqueueDB import HAS_RUNNING, UtcDateTime

#: Elements that are read for one picture, about, and neighbours that are read together.
MOST_ELEMENTS, _BLOCK = 20_000, 32
#: Jobs that are read for one picture; of more, those at equal distances are.
MOST_JOBS = 2000
#: Jobs from before a time of which attempts may have ended in it: the newest, and those that run.
_MOST_OLDER = 500
_BLOCKS_A_STATEMENT = 400


class _Seconds(sa.sql.functions.GenericFunction[float]):
    """Seconds from the second argument, a time, to the first one."""

    type = sa.Float()
    inherit_cache = True
    name = "seconds_from"


@compiles(_Seconds, "sqlite")
def _seconds_of_sqlite(function: _Seconds, compiler: SQLCompiler, **options: Any) -> str:
    later, earlier = (compiler.process(clause, **options) for clause in function.clauses)
    return f"((julianday({later}) - julianday({earlier})) * 86400.0)"


@compiles(_Seconds, "postgresql")
def _seconds_of_postgresql(function: _Seconds, compiler: SQLCompiler, **options: Any) -> str:
    later, earlier = (compiler.process(clause, **options) for clause in function.clauses)
    return f"EXTRACT(EPOCH FROM ({later} - CAST({earlier} AS TIMESTAMP WITH TIME ZONE)))"


class _Floor(sa.sql.functions.GenericFunction[int]):
    """The integer part of a number that is not negative; casts to integers truncate or round, by the database."""

    type = sa.Integer()
    inherit_cache = True
    name = "integer_part"


@compiles(_Floor, "sqlite")
def _floor_of_sqlite(function: _Floor, compiler: SQLCompiler, **options: Any) -> str:
    return f"CAST({compiler.process(function.clauses, **options)} AS INTEGER)"


@compiles(_Floor, "postgresql")
def _floor_of_postgresql(function: _Floor, compiler: SQLCompiler, **options: Any) -> str:
    return f"CAST(FLOOR({compiler.process(function.clauses, **options)}) AS INTEGER)"


@frozen(kw_only=True)
class TimeBuckets:
    """A time in parts of equal length."""

    since: datetime
    width_s: float
    count: int

    @classmethod
    def until(cls, now: datetime, length: timedelta, count: int) -> TimeBuckets:
        return cls(since=now - length, width_s=length.total_seconds() / count, count=count)

    @property
    def end(self) -> datetime:
        return self.since + timedelta(seconds=self.width_s * self.count)


@define
class Ended:
    """Attempts that ended in one bucket; ``bytes`` were transferred by those that succeeded."""

    done: float = 0
    failed: float = 0
    bytes: float = 0


@frozen(kw_only=True)
class JobRate:
    """What a job has done over time.

    Attributes:
        sampled: whether the numbers are estimated from a part of its elements.
    """

    buckets: TimeBuckets
    ended: Sequence[Ended]
    sampled: bool


@frozen(kw_only=True)
class RouteActivity:
    """What ended on all routes over time.

    Attributes:
        failures: (scope, code) → number of failed attempts.
        sampled: whether the numbers are estimated from a part of jobs or elements.
    """

    buckets: TimeBuckets
    routes: dict[Route, list[Ended]]
    failures: dict[tuple[str, str], float]
    sampled: bool


@frozen(kw_only=True)
class _SampledJob:
    """A job whose elements are read.

    Attributes:
        weight: number of jobs for which it stands.
    """

    id: int
    route: Route
    elements: int
    weight: float = 1.0


@frozen
class _Block:
    job_id: int
    first: int
    end: int


@frozen
class _Sample:
    """Which elements of some jobs are read.

    Attributes:
        weights: job → number of elements for which each one read stands.
    """

    blocks: Sequence[_Block]
    weights: dict[int, float]

    @classmethod
    def of(cls, sampled: Sequence[_SampledJob]) -> _Sample:
        total = sum(job.elements for job in sampled)
        distance = max(_BLOCK, -(-total * _BLOCK // MOST_ELEMENTS)) if total > MOST_ELEMENTS else _BLOCK
        blocks, weights = [], {}
        for job in sampled:
            length = min(_BLOCK, distance)
            own = [
                _Block(job.id, first, min(first + length, job.elements)) for first in range(0, job.elements, distance)
            ]
            read = sum(block.end - block.first for block in own)
            blocks += own
            weights[job.id] = job.weight * job.elements / read if read else job.weight
        return cls(blocks, weights)

    @property
    def is_partial(self) -> bool:
        return any(weight > 1 for weight in self.weights.values())


def _statements(blocks: Sequence[_Block], *, listings: bool) -> tuple[sa.Select[Any], sa.Select[Any]]:
    """Attempts in some blocks by job and bucket: those that succeeded, and those that failed."""
    read = (
        sa.values(
            sa.column("job_id", sa.BigInteger),
            sa.column("first_id", sa.BigInteger),
            sa.column("end_id", sa.BigInteger),
            name="read_values",
        )
        .data([(block.job_id, block.first, block.end) for block in blocks])
        .cte("blocks")
    )
    since = bindparam("since", type_=UtcDateTime())
    width, length = bindparam("width_s", type_=sa.Float()), bindparam("length_s", type_=sa.Float())
    end = _Seconds(elements.c.started_at, since) + elements.c.elapsed_s
    bucket = _Floor(end / width).label("bucket")
    done = (
        sa.select(
            elements.c.job_id,
            bucket,
            sa.func.count().label("number"),
            sa.func.sum(sa.case((elements.c.already_there, 0), else_=elements.c.transferred)).label("bytes"),
        )
        .select_from(read)
        .join(
            elements,
            sa.and_(
                elements.c.job_id == read.c.job_id,
                elements.c.id >= read.c.first_id,
                elements.c.id < read.c.end_id,
            ),
        )
        .where(elements.c.started_at.is_not(None), end >= 0, end < length)
        .group_by(elements.c.job_id, bucket)
    )
    if not listings:
        done = done.where(elements.c.type != JobType.LIST)
    ended = _Seconds(attempts.c.ended_at, since)
    bucket = _Floor(ended / width).label("bucket")
    failed = (
        sa.select(
            attempts.c.job_id,
            bucket,
            attempts.c.failure_scope,
            attempts.c.failure_code,
            sa.func.count().label("number"),
        )
        .select_from(read)
        .join(
            attempts,
            sa.and_(
                attempts.c.job_id == read.c.job_id,
                attempts.c.element_id >= read.c.first_id,
                attempts.c.element_id < read.c.end_id,
            ),
        )
        .where(attempts.c.status == JobStatus.FAILED, ended >= 0, ended < length)
        .group_by(attempts.c.job_id, bucket, attempts.c.failure_scope, attempts.c.failure_code)
    )
    return done, failed


def _rows(
    session: Session, sample: _Sample, buckets: TimeBuckets, *, listings: bool
) -> Iterator[tuple[sa.Row[Any], bool]]:
    """Sums by job and bucket, each with whether its attempts failed."""
    parameters = {
        "since": buckets.since,
        "width_s": buckets.width_s,
        "length_s": buckets.width_s * buckets.count,
    }
    for start in range(0, len(sample.blocks), _BLOCKS_A_STATEMENT):
        blocks = sample.blocks[start : start + _BLOCKS_A_STATEMENT]
        done, failed = _statements(blocks, listings=listings)
        for row in session.execute(done, parameters):
            yield row, False
        for row in session.execute(failed, parameters):
            yield row, True


def job_rate(session: Session, job: JobRecord, now: datetime, count: int) -> JobRate | None:
    """What a job has done since its start, without its listing, in ``count`` buckets; None before its start."""
    if job.started_at is None:
        return None
    end = max(job.finished_at or now, job.started_at + timedelta(seconds=1))
    # The last attempt ends in the last bucket, not at its end.
    length = end - job.started_at + timedelta(milliseconds=1)
    buckets = TimeBuckets.until(job.started_at + length, length, count)
    sample = _Sample.of([_SampledJob(id=job.id, route=_route(job), elements=job.counters.elements)])
    found = [Ended() for _ in range(count)]
    for row, failed in _rows(session, sample, buckets, listings=False):
        _add(found[min(row.bucket, count - 1)], row, sample.weights[job.id], failed=failed)
    if sample.is_partial:
        _scale(found, job)
    return JobRate(buckets=buckets, ended=found, sampled=sample.is_partial)


def _scale(found: Sequence[Ended], job: JobRecord) -> None:
    """Scale an estimate such that its bytes sum up to those that the job has transferred."""
    seen = sum(each.bytes for each in found)
    factor = (job.bytes_done - job.bytes_already_there) / seen if seen else 1.0
    for each in found:
        each.bytes *= factor


def _route(job: Any) -> Route:
    return Route(job.src_siteid, job.dst_siteid)


def _add(ended: Ended, row: Any, weight: float, *, failed: bool) -> None:
    if failed:
        ended.failed += row.number * weight
    else:
        ended.done += row.number * weight
        ended.bytes += int(row.bytes or 0) * weight


def route_activity(session: Session, buckets: TimeBuckets) -> RouteActivity:
    """Attempts that ended on all routes over time, listings included."""
    sampled = _jobs_of(session, buckets.since)
    sample = _Sample.of(sampled)
    routes = {job.id: job.route for job in sampled}
    found: dict[Route, list[Ended]] = {}
    failures: dict[tuple[str, str], float] = {}
    for row, failed in _rows(session, sample, buckets, listings=True):
        weight, route = sample.weights[row.job_id], routes[row.job_id]
        ended = found.setdefault(route, [Ended() for _ in range(buckets.count)])
        _add(ended[min(row.bucket, buckets.count - 1)], row, weight, failed=failed)
        if failed:
            key = (row.failure_scope or "", row.failure_code or "")
            failures[key] = failures.get(key, 0) + row.number * weight
    return RouteActivity(buckets=buckets, routes=found, failures=failures, sampled=sample.is_partial)


_COLUMNS = columns_of(jobs, "id", "src_siteid", "dst_siteid", "num_elements", "finished_at")
_LAST = sa.select(sa.func.max(jobs.c.id))
_FIRST_FROM = sa.select(sa.func.min(jobs.c.id)).where(jobs.c.id >= bindparam("number"))
_REGISTERED = sa.select(jobs.c.timestamp).where(jobs.c.id >= bindparam("number")).order_by(jobs.c.id).limit(1)
_NUMBERED = sa.select(*_COLUMNS).where(jobs.c.id.in_(bindparam("numbers", expanding=True)))
_OLDER = sa.select(*_COLUMNS).where(jobs.c.id >= bindparam("first"), jobs.c.id < bindparam("end"))
_RUNNING = sa.select(*_COLUMNS).where(sa.text(HAS_RUNNING), jobs.c.id < bindparam("end")).limit(_MOST_OLDER)


def _jobs_of(session: Session, since: datetime) -> list[_SampledJob]:
    """Jobs of which attempts may have ended since a time."""
    last = session.scalar(_LAST)
    if last is None:
        return []
    first = _first_since(session, since, last)
    numbers = range(first, last + 1)
    distance = max(1, -(-len(numbers) // MOST_JOBS))
    rows: dict[int, tuple[sa.Row[Any], float]] = {}
    for row in session.execute(_NUMBERED, {"numbers": numbers[::distance]}):
        rows[row.id] = (row, distance)
    older = {"first": max(first - _MOST_OLDER, 0), "end": first}
    for row in (*session.execute(_OLDER, older), *session.execute(_RUNNING, {"end": first})):
        rows[row.id] = (row, 1)
    return [
        _SampledJob(id=row.id, route=_route(row), elements=row.num_elements, weight=weight)
        for row, weight in rows.values()
        if row.num_elements and (row.finished_at is None or row.finished_at >= since)
    ]


def _first_since(session: Session, since: datetime, last: int) -> int:
    """The number of the first job that was registered after a time; beyond the last one if none was.

    Numbers and times ascend together, so it is found by bisection: jobs are not indexed by time.
    """
    low, high = 0, last + 1
    while low < high:
        middle = (low + high) // 2
        registered = session.scalar(_REGISTERED, {"number": middle})
        if registered is None or registered >= since:
            high = middle
        else:
            low = middle + 1
    # Numbers before it may be missing.
    first: int | None = session.scalar(_FIRST_FROM, {"number": low})
    return last + 1 if first is None else first
