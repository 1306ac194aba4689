"""Retention: removal of what is older than the operator wants to keep, in steps that no other writer waits for long.

One daemon at a time removes rows, under a lease; each removes the logs in its own directory. The steps adapt their
number of rows to their duration, and rest in between. After a crash the next run continues.
"""

from __future__ import annotations

import contextlib
import zlib
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import attrs
from attrs import define, field, frozen
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from pdm.workqueue.domain.retention import CREDENTIALS_KEPT, KEYS_KEPT, WORKERS_KEPT, RetentionPolicy
from pdm.workqueue.logstore.store import Place, RemovedLogs, remove_logs
from pdm.workqueue.store import expiry, idempotency, purged_jobs, unlisted_sites
from pdm.workqueue.store import retention as store
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.errors import DatabaseUnavailableError
from pdm.workqueue.store.retention import EndedJob, Step
from pdm.workqueue.telemetry.background import Periodic, ReportedError, run_in_thread

_P = ParamSpec("_P")
_R = TypeVar("_R")

_PERIOD_S = 600.0
_LEASE_S = 120.0
#: Jobs that are read, or whose logs are removed, at once.
_JOBS_AT_ONCE = 100
#: Elements of a job whose receipt is one piece.
_MOST_SMALL = 400
_LOGS_AT_ONCE = 20
_KEYS_AT_ONCE = 1000
_SITES_AT_ONCE = 20
#: Bytes of lines of a receipt in one piece, before compression; and pieces that one transaction stores.
_PIECE_BYTES = 256 * 1024
_PIECES_AT_ONCE = 8
#: Transactions of several daemons may commit in another order than that of their times.
_OVERLAP = timedelta(minutes=10)
_LONGEST_REST_S = 5.0


@frozen(kw_only=True)
class Pace:
    """How many rows the next step changes, so that it holds the write lock of the database only briefly.

    Attributes:
        fewest, most: bounds of ``rows``.
        target_s: duration of a step that is aimed at.
    """

    rows: int = 200
    fewest: int = 20
    most: int = 5000
    target_s: float = 0.02

    def after(self, rows: int, seconds: float) -> Pace:
        """The pace after a step that has changed some rows in some seconds."""
        if rows <= 0 or seconds <= 0:
            return self
        # At most half or double: one slow step may have had another reason.
        wanted = min(max(rows * self.target_s / seconds, self.rows / 2), self.rows * 2)
        if wanted > self.rows and rows < self.rows:
            # A step that has found fewer rows says nothing about more of them.
            return self
        return attrs.evolve(self, rows=min(max(round(wanted), self.fewest), self.most))


def _purged_together(ended: Sequence[EndedJob]) -> Sequence[EndedJob]:
    """The first of some jobs; a large one alone, because the pieces of its receipt are stored one after the other."""
    large = next((place for place, job in enumerate(ended) if job.num_elements > _MOST_SMALL), len(ended))
    return ended[: max(large, 1)]


class _StoppedError(Exception):
    """The service stops, or another daemon has taken over."""


@define(eq=False, kw_only=True)
class Retention:
    """Removes what is old, every ten minutes.

    Attributes:
        incarnation: of this daemon.
        logs: directory of the logs of jobs.
        receipt_of: the receipt of a job as pieces of lines; JobNotFound errors of it mean that the job is gone.
        rest: pause after each step, in multiples of its duration.
        removed: what the running or last run has removed: name of a kind → number.
        failures: what it could not remove, and why.
    """

    reactor: IReactorTime
    database: Database
    clock: Callable[[], datetime]
    policy: RetentionPolicy
    incarnation: str
    logs: Path
    receipt_of: Callable[[int], Awaitable[AsyncGenerator[bytes]]]
    rest: float = 3.0
    removed: Counter[str] = field(factory=Counter)
    failures: dict[str, str] = field(factory=dict)
    _periodic: Periodic | None = None
    _stopping: bool = False
    _renew_at: float = 0.0
    _pause: Deferred[None] | None = None
    _log: Logger = field(factory=Logger)

    def start(self) -> None:
        self._periodic = Periodic(self.reactor, "retention", _PERIOD_S, self._run)
        self._periodic.start()

    async def stop(self) -> None:
        """Begin no further step, and wait for a running one."""
        self._stopping = True
        if self._pause is not None and not self._pause.called:
            self._pause.callback(None)
        if self._periodic is not None:
            await self._periodic.stop()

    async def _run(self) -> None:
        await self.run()

    async def run(self) -> bool:
        """Remove all that is old by now; returns whether this daemon has removed rows: False if another one does.

        Raises:
            DatabaseUnavailableError, DatabaseClosedError: the rest is for the next run.
        """
        self.removed.clear()
        self.failures.clear()
        turn = False
        try:
            turn = await self._take_turn()
            if turn:
                await self._remove_rows()
            await self._guarded("logs", self._remove_logs)
        except _StoppedError:
            pass
        finally:
            if turn:
                with contextlib.suppress(ReportedError):
                    await self.database.run("end the turn of retention", store.end_turn, self.incarnation)
        if self.removed:
            words = ", ".join(f"{count} {name}" for name, count in sorted(self.removed.items()))
            self._log.info("retention has removed {words}", words=words, removed=dict(self.removed))
        return turn

    async def _remove_rows(self) -> None:
        policy, now = self.policy, self.clock()
        await self.database.run("drop an unfinished receipt", store.drop_unfinished_receipt)
        await self._guarded("rows of purged jobs", self._remove_purged)
        if policy.jobs is not None:
            await self._guarded("jobs", self._purge_jobs, now - max(policy.jobs, KEYS_KEPT))
            await self._guarded("sites of URLs", self._remove_sites, now - max(policy.jobs, KEYS_KEPT))
        for name, kept, function in (
            ("receipts", policy.receipts, purged_jobs.remove_receipts),
            ("summaries", policy.summaries, purged_jobs.remove_summaries),
            ("events", policy.events, expiry.remove_events),
            ("audit records", policy.audit, expiry.remove_audit),
        ):
            if kept is not None:
                await self._guarded(name, self._remove_all, name, function, now - kept)
        await self._guarded("idempotency keys", self._remove_keys, now - KEYS_KEPT)
        await self._guarded("credentials", self._remove_credentials, now)
        await self._guarded("dead workers", self._remove_workers, now - WORKERS_KEPT)
        await self._guarded("free pages", self._shrink)

    async def _guarded(
        self, name: str, function: Callable[_P, Awaitable[None]], *args: _P.args, **kwargs: _P.kwargs
    ) -> None:
        """Run a part; its failure is logged, and does not prevent the others."""
        try:
            await function(*args, **kwargs)
        except DatabaseUnavailableError as error:
            # The database logs it itself.
            if not error.alone:
                raise
            self.failures[name] = str(error)
        except (_StoppedError, ReportedError):
            raise
        except Exception as error:
            self.failures[name] = str(error)
            self._log.failure("{name} could not be removed; tried again in {s:g} s", name=name, s=_PERIOD_S)

    # -- steps

    async def _take_turn(self) -> bool:
        taken = await self.database.run(
            "take the turn of retention", store.take_turn, self.incarnation, _LEASE_S, self.clock()
        )
        self._renew_at = self.reactor.seconds() + _LEASE_S / 3
        return taken

    async def _step(self, name: str, function: Callable[..., _R], *args: object) -> tuple[_R, float]:
        """Run one transaction; returns its result and its duration in seconds."""
        if self._stopping:
            raise _StoppedError
        if self.reactor.seconds() >= self._renew_at and not await self._take_turn():
            raise _StoppedError
        return await self.database.run(name, store.timed, function, *args)

    async def _rest(self, seconds: float) -> None:
        """Leave the database to others, after a step of some seconds."""
        pause: Deferred[None] = Deferred()
        self._pause = pause
        timer = self.reactor.callLater(min(seconds * self.rest, _LONGEST_REST_S), pause.callback, None)
        try:
            await pause
        finally:
            if timer.active():
                timer.cancel()

    async def _remove_all(self, name: str, function: Callable[..., Step], *args: Any) -> None:
        """Repeat a step until there is no more to remove."""
        pace = Pace()
        more = True
        while more:
            step, seconds = await self._step(f"remove old {name}", function, *args, pace.rows)
            more = step.more
            if step.rows:
                self.removed[name] += step.rows
            pace = pace.after(step.rows, seconds)
            if more:
                await self._rest(seconds)

    async def _remove_purged(self) -> None:
        pace = Pace()
        while True:
            step, seconds = await self._step("remove rows of purged jobs", store.remove_rows, pace.rows)
            if not step.more:
                return
            self.removed["rows of jobs"] += step.rows
            pace = pace.after(step.rows, seconds)
            await self._rest(seconds)

    async def _purge_jobs(self, before: datetime) -> None:
        after: tuple[datetime, int] | None = None
        pace = Pace(rows=10, fewest=1, most=_JOBS_AT_ONCE)
        while found := await self.database.read("find old jobs", store.ended_jobs, before, after, pace.rows):
            ended = _purged_together(found)
            after = ended[-1].place
            pieces: list[dict[str, Any]] = []
            counts: dict[int, int] | None = None
            if self.policy.keeps_receipts:
                counts = {}
                for job in ended:
                    counts[job.id] = await self._write_receipt(job, pieces)
            purged, seconds = await self._step("purge jobs", store.purge, ended, before, self.clock(), counts, pieces)
            self.database.forget(purged)
            if purged:
                self.removed["jobs"] += len(purged)
            if counts is not None and len(purged) < len(ended):
                await self._step("drop an unfinished receipt", store.drop_unfinished_receipt)
            pace = pace.after(len(ended), seconds)
            await self._rest(seconds)
            await self._remove_purged()

    async def _write_receipt(self, job: EndedJob, pieces: list[dict[str, Any]]) -> int:
        """Add the last pieces of a job's receipt to those that are stored with its purge; returns their number in all.

        Earlier pieces of a large one are stored at once.
        """
        lines = bytearray()
        written: list[dict[str, Any]] = []
        number = 0
        begun = False

        def cut() -> None:
            nonlocal number
            written.append({"job_id": job.id, "number": number, "content": zlib.compress(bytes(lines), 6)})
            number += 1
            lines.clear()

        async with aclosing(await self.receipt_of(job.id)) as source:
            async for text in source:
                lines += text
                if len(lines) >= _PIECE_BYTES:
                    cut()
                if len(written) >= _PIECES_AT_ONCE:
                    if not begun:
                        await self._step("begin a receipt", store.begin_receipt, job.id)
                        begun = True
                    _, seconds = await self._step("store a receipt", store.store_pieces, written)
                    written = []
                    await self._rest(seconds)
        if lines:
            cut()
        pieces += written
        return number

    async def _remove_keys(self, before: datetime) -> None:
        """Remove idempotency keys of before a time."""
        after = (0, "")
        while keys := await self.database.read(
            "find expired keys", idempotency.expired_keys, before, after, _KEYS_AT_ONCE
        ):
            after = keys[-1]
            pace = Pace(rows=100)
            while keys:
                some, keys = keys[: pace.rows], keys[pace.rows :]
                _, seconds = await self._step("remove expired keys", idempotency.delete_keys, some, before)
                self.removed["idempotency keys"] += len(some)
                pace = pace.after(len(some), seconds)
                await self._rest(seconds)

    async def _remove_credentials(self, now: datetime) -> None:
        count, _ = await self._step("remove expired credentials", expiry.remove_credentials, now - CREDENTIALS_KEPT)
        if count:
            self.removed["credentials"] += count

    async def _remove_workers(self, before: datetime) -> None:
        dead = await self.database.read("find dead workers", expiry.dead_workers, before)
        if dead:
            count, _ = await self._step("remove dead workers", expiry.remove_workers, dead, before)
            self.removed["dead workers"] += count

    async def _remove_sites(self, before: datetime) -> None:
        """Remove the sites that were made of URLs and that nothing refers to, those of one user after the other."""
        newest = await self.database.read("newest job", unlisted_sites.newest_job)
        owner = 0
        while found := await self.database.read("find unused sites", unlisted_sites.unused, before, owner):
            owner, numbers = found
            for at in range(0, len(numbers), _SITES_AT_ONCE):
                some = numbers[at : at + _SITES_AT_ONCE]
                step, seconds = await self._step(
                    "remove unused sites", unlisted_sites.remove, owner, some, before, newest
                )
                self.removed["sites of URLs"] += step.rows
                await self._rest(seconds)

    async def _shrink(self) -> None:
        pace = Pace(rows=50, fewest=10, most=2000)
        while True:
            pages, seconds = await self._step("return free pages", expiry.shrink, pace.rows)
            if not pages:
                return
            self.removed["pages of the database file"] += pages
            pace = pace.after(pages, seconds)
            await self._rest(seconds)

    # -- logs

    async def _remove_logs(self) -> None:
        """Remove the logs of purged jobs, and those that are older than logs are kept."""
        done = await run_in_thread(RemovedLogs.read, self.logs)
        remove = partial(remove_logs, self.logs)
        start = datetime(1970, 1, 1, tzinfo=UTC) if done.purged is None else done.purged[0] - _OVERLAP
        place: Place = (start, 0)
        while purged := await self.database.read("find purged logs", purged_jobs.purged_logs, place, _JOBS_AT_ONCE):
            self._count_logs(await run_in_thread(remove, [one.log_uid for one in purged]))
            place = (purged[-1].purged_at, purged[-1].id)
            if done.purged is None or place > done.purged:
                done = attrs.evolve(done, purged=place)
                await run_in_thread(done.write, self.logs)
            await self._rest(0.01)
            if self._stopping:
                raise _StoppedError
        if self.policy.logs is None:
            return
        before = self.clock() - self.policy.logs
        after = None if done.ended is None else (done.ended[0] - _OVERLAP, 0)
        while ended := await self.database.read("find old logs", store.ended_jobs, before, after, _LOGS_AT_ONCE):
            await self._remove_logs_of(ended, before, remove)
            after = ended[-1].place
            if done.ended is None or after > done.ended:
                done = attrs.evolve(done, ended=after)
                await run_in_thread(done.write, self.logs)
            if self._stopping:
                raise _StoppedError

    async def _remove_logs_of(
        self, ended: Sequence[EndedJob], before: datetime, remove: Callable[[Sequence[str]], int]
    ) -> None:
        # In a transaction that keeps the jobs from being retried: a new attempt would write into these files.
        count, seconds = await self.database.run(
            "remove old logs", store.timed, store.remove_logs_of, ended, before, remove
        )
        self._count_logs(count)
        await self._rest(seconds)

    def _count_logs(self, count: int) -> None:
        if count:
            self.removed["logs"] += count
