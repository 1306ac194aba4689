"""Work beside a long history against work in an empty database: the store's own functions on two databases.

The history is copies of one job, made in the database by INSERT ... SELECT. Each cycle times, in both databases in
turn: submissions, claims, settlements, what pages and commands ask for, and the purge of one job of the history. SQLite
files by default; two databases of a PostgreSQL server with ``--server URL``, of one of its own with ``--server own``.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from attrs import define, field
from figures import BenchmarkError, ratios, spread
from meter import memory_mib
from postgresql import postgresql
from rig import directory_for_all, file_system, options_of, report, run
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobProtocol, JobStatus, JobType
from pdm.workqueue.domain.jobs import Batch, NewElement, NewJob, Verdict
from pdm.workqueue.store import (
    activity,
    claim_limits,
    claiming,
    events,
    jobs,
    leases,
    outcomes,
    queue,
    results,
    retention,
    schema_revisions,
    users,
)
from pdm.workqueue.store.engines import create_sqlite_file, make_engines
from pdm.workqueue.store.jobs import ElementFilter, JobFilter
from pdm.workqueue.WorkqueueDB import UtcDateTime

_WORKER = "benchmark"
_IDENTITY = leases.WorkerIdentity(_WORKER, _WORKER)
_LEASE_S = 86_400.0
_KEPT = timedelta(days=30)
_ROWS_AT_ONCE = 500
_SUBMISSIONS = 20
#: How often each question is asked in a cycle.
_ASKED = 5
_LISTINGS = frozenset({JobType.LIST})
_WORK = frozenset(JobType) - _LISTINGS


def _now() -> datetime:
    return datetime.now(UTC)


@define
class Stock:
    """A database, and how long each kind of work took in it.

    Attributes:
        template: a job that has ended; the history consists of copies of it.
        seconds: kind of work → duration of each time, in this round.
        fastest: kind of work → shortest duration of all rounds: on a busy machine the least disturbed one.
    """

    engine: sa.Engine
    user: int = 0
    template: int = 0
    last: int = 0
    seconds: dict[str, list[float]] = field(factory=dict)
    fastest: dict[str, float] = field(factory=dict)

    @classmethod
    def make(cls, engine: sa.Engine, elements: int) -> Stock:
        """A database with one job that has ended, of so many elements."""
        stock = cls(engine)
        create_sqlite_file(engine)
        stock.transact(lambda session: schema_revisions.migrate(session.connection()))
        stock.user = stock.transact(lambda session: users.register(session, "/DC=bench/CN=user", "user", _now())).id
        stock.transact(lambda session: leases.register_worker(session, _IDENTITY, _now(), _LEASE_S))
        stock.template = stock.last = stock.copied(elements)
        return stock

    def transact(self, function: Callable[[Session], Any]) -> Any:
        with Session(self.engine, autoflush=False, expire_on_commit=False) as session, session.begin():
            result = function(session)
            events.write_noted(session)
            return result

    def timed(self, kind: str, function: Callable[[Session], Any]) -> Any:
        """Run a transaction; its duration counts, unless the kind is empty."""
        began = time.perf_counter()
        result = self.transact(function)
        if kind:
            self.seconds.setdefault(kind, []).append(time.perf_counter() - began)
        return result

    def copied(self, elements: int) -> int:
        """Submit a copy and carry it out; its number."""
        job: int = self.transact(lambda session: jobs.submit(session, _new_job(self.user), None, _now())).id
        (listing,) = self.claim(_LISTINGS, "")
        token = listing.token(listing.elements[0])
        new = [
            NewElement(JobType.COPY, f"/src/directory/f{number:07d}", f"/dst/directory/f{number:07d}", size=1024)
            for number in range(elements)
        ]
        self.transact(lambda session: results.add_elements(session, _WORKER, token, new))
        self.settle([listing], "")
        while batches := self.claim(_WORK, "claim"):
            self.settle(batches, "settle")
        return job

    def claim(self, types: frozenset[JobType], kind: str) -> list[Batch]:
        limits = claim_limits.ClaimLimits(elements=200, batches=4, batch_elements=50, batch_bytes=2**40, types=types)
        claimed: list[Batch] = self.timed(kind, lambda session: claiming.claim(session, _WORKER, limits, _now()))
        return claimed

    def settle(self, batches: list[Batch], kind: str) -> None:
        now = _now()
        verdicts = [
            Verdict(batch.token(element), JobStatus.DONE, now, now) for batch in batches for element in batch.elements
        ]
        if self.timed(kind, lambda session: results.settle(session, _WORKER, verdicts, now)).lost:
            raise BenchmarkError("claims were lost")

    def add_history(self, count: int) -> None:
        """Add copies of the template that ended long ago, each a second after the one before."""
        table = sa.inspect(self.engine)
        copied = {
            name: [column["name"] for column in table.get_columns(name)]
            for name in ("jobs", "job_elements", "listing_chunks", "events")
        }
        first = self.transact(lambda session: session.scalar(sa.text("SELECT MAX(id) FROM jobs"))) + 1
        ended = _now() - timedelta(days=365)
        for number in range(first, first + count):
            at = ended + timedelta(seconds=number)
            values = {"job": number, "template": self.template, "at": at}
            self.transact(partial(_copy_job, columns=copied, values=values))
        self.last = first + count - 1
        if self.engine.dialect.name == "postgresql":
            self.transact(
                lambda session: session.execute(
                    sa.text("SELECT setval(pg_get_serial_sequence('jobs', 'id'), :last)"), {"last": self.last}
                )
            )

    def cycle(self, elements: int) -> None:
        """One round of all kinds of work."""
        for _ in range(_SUBMISSIONS):
            self.timed("submit", lambda session: jobs.submit(session, _new_job(self.user, JobType.MKDIR), None, _now()))
        while batches := self.claim(_WORK, "claim"):
            self.settle(batches, "settle")
        job = self.copied(elements)
        for (kind, question), _ in itertools.product(self.questions(job).items(), range(_ASKED)):
            self.timed(kind, question)
        self.purge()

    def questions(self, job: int) -> dict[str, Callable[[Session], Any]]:
        """What pages and commands ask for."""
        now = _now()
        buckets = activity.TimeBuckets.until(now, timedelta(hours=1), 60)
        return {
            "status": lambda session: jobs.fetch(session, job, self.user),
            "elements": lambda session: jobs.page_elements(session, job, ElementFilter(limit=100)),
            "failures": lambda session: outcomes.failure_groups(session, job),
            "newest jobs": lambda session: jobs.page(session, JobFilter(limit=50, newest_first=True)),
            "newest of user": lambda session: jobs.page(
                session, JobFilter(owner_id=self.user, limit=50, newest_first=True)
            ),
            "running of user": lambda session: jobs.page(
                session, JobFilter(owner_id=self.user, statuses={JobStatus.RUNNING, JobStatus.SUBMITTED}, limit=50)
            ),
            "queue": queue.queue_shares,
            "activity": lambda session: activity.route_activity(session, buckets),
            "events": lambda session: events.events_after(session, 0, 50, newest_first=True),
        }

    def purge(self) -> None:
        """Purge the oldest job, and remove its rows."""
        before = _now() - _KEPT
        began = time.perf_counter()
        ended = self.transact(lambda session: retention.ended_jobs(session, before, None, 1))
        if self.transact(lambda session: retention.purge(session, ended, before, _now())) == []:
            raise BenchmarkError("no job was purged")
        while self.transact(lambda session: retention.remove_rows(session, _ROWS_AT_ONCE)).more:
            pass
        self.seconds.setdefault("purge", []).append(time.perf_counter() - began)


def _copy_job(session: Session, columns: dict[str, list[str]], values: dict[str, Any]) -> None:
    changed = {
        "jobs": {"id": ":job", "finished_at": ":at", "timestamp": ":at", "started_at": ":at"},
        "events": {"id": "", "job_id": ":job", "at": ":at"},
    }
    for table, names in columns.items():
        key = "id" if table == "jobs" else "job_id"
        replaced = changed.get(table, {"job_id": ":job"})
        used = [name for name in names if replaced.get(name, name)]
        statement = sa.text(
            f"INSERT INTO {table} ({', '.join(used)})"
            f" SELECT {', '.join(replaced.get(name, name) for name in used)} FROM {table} WHERE {key} = :template"
        )
        bound = {name: values[name] for name in values if f":{name}" in statement.text}
        typed = [sa.bindparam("at", type_=UtcDateTime())] if "at" in bound else []
        session.execute(statement.bindparams(*typed), bound)


def _new_job(user: int, type_: JobType = JobType.COPY) -> NewJob:
    copies = type_ is JobType.COPY
    return NewJob(
        user_id=user, type=type_, protocol=JobProtocol.DUMMY, src_siteid=1, src_filepath="/src",
        dst_siteid=2 if copies else None, dst_filepath="/dst" if copies else None, options={}, priority=5, max_tries=2,
        label=None, log_uid="0" * 32, first=NewElement(JobType.LIST if copies else type_, "/src"),
    )  # fmt: skip


def _engines(server: str, directory: Path) -> list[sa.Engine]:
    names = ("many", "few")
    if not server:
        return [make_engines(f"sqlite:///{directory}/{name}.sqlite", 4).writer for name in names]
    url = sa.make_url(server)
    maintenance = sa.create_engine(url.set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    with maintenance.connect() as connection:
        for name in names:
            connection.exec_driver_sql(f"DROP DATABASE IF EXISTS history_{name}")
            connection.exec_driver_sql(f"CREATE DATABASE history_{name}")
    maintenance.dispose()
    urls = [url.set(database=f"history_{name}").render_as_string(hide_password=False) for name in names]
    return [make_engines(made, 4).writer for made in urls]


def main() -> None:
    options = options_of(
        __doc__ or "", jobs=(5_000, 50), elements=(2_000, 500), cycles=(8, 3), rounds=(3, 2), server=("", "")
    )
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(directory_for_all("pdm-bench-"))
        server = options.server
        if server == "own":
            server = stack.enter_context(postgresql(directory / "server")).url("postgres")
        many, few = (Stock.make(engine, options.elements) for engine in _engines(server, directory))
        began = time.perf_counter()
        many.add_history(options.jobs)
        filled_s = time.perf_counter() - began
        print(f"  . {options.jobs * options.elements} elements in {filled_s:.1f} s", file=sys.stderr)
        if options.server:
            with many.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.exec_driver_sql("VACUUM ANALYZE")
        few.add_history(options.rounds * options.cycles + 1)
        for stock in (many, few):
            stock.cycle(options.elements)
            stock.seconds.clear()
        rates: dict[str, tuple[list[float], list[float]]] = {}
        for _ in range(options.rounds):
            for _, stock in itertools.product(range(options.cycles), (many, few)):
                stock.cycle(options.elements)
            for kind in many.seconds:
                pair = rates.setdefault(kind, ([], []))
                for into, stock in zip(pair, (many, few), strict=True):
                    into.append(1 / statistics.median(stock.seconds[kind]))
            for stock in (many, few):
                for kind, took in stock.seconds.items():
                    stock.fastest[kind] = min(*took, stock.fastest.get(kind, math.inf))
                stock.seconds.clear()
        by_kind = {kind: ratios(*pair) for kind, pair in rates.items()}
        worst = min(by_kind, key=lambda kind: by_kind[kind]["median"])
        figures: dict[str, Any] = {
            "unit": f"{worst}/s",
            "ratio": by_kind[worst],
            "ours": spread(rates[worst][0]),
            "bare": spread(rates[worst][1]),
            "bare is": "the same in an empty database",
            "ratio of": {kind: found["median"] for kind, found in sorted(by_kind.items())},
            "ratio of the fastest": {kind: few.fastest[kind] / many.fastest[kind] for kind in sorted(by_kind)},
            "per second": {kind: statistics.median(pair[0]) for kind, pair in sorted(rates.items())},
            "elements of history": options.jobs * options.elements,
            "elements purged/s": statistics.median(rates["purge"][0]) * options.elements,
            "database": "PostgreSQL" if options.server else f"SQLite on {file_system(directory)}",
            "database (MiB)": sum(file.stat().st_size for file in directory.glob("many*")) / 1024**2,
            "peak MiB": {"client": memory_mib(os.getpid(), "VmHWM")},
        }
        for stock in (many, few):
            stock.engine.dispose()
    report(options, figures)


if __name__ == "__main__":
    run(main)
