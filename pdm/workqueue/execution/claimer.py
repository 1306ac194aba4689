"""Keeps the executor busy: claims what is due when there is room, woken by events and, for safety, by time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta

from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger

from pdm.workqueue.domain.enums import JobType
from pdm.workqueue.domain.jobs import Batch
from pdm.workqueue.domain.turns import Turns
from pdm.workqueue.execution.batch import Ending
from pdm.workqueue.execution.condition import Part, ServiceCondition
from pdm.workqueue.execution.executor import Executor
from pdm.workqueue.store import claims, users
from pdm.workqueue.store.claims import ClaimLimits
from pdm.workqueue.store.database import Database, DatabaseUnavailableError
from pdm.workqueue.telemetry.background import Periodic, start_background

_PAUSE_AFTER_ERROR_S = 1.0
#: Before it is tried again to claim what is due and was not to be had; doubles while nothing happens.
_FIRST_PAUSE_S = 0.05
#: After a claim in vain there is no other for so many times as long as it took, and at most for so many seconds.
_REST_AFTER_VAIN, _LONGEST_REST_S = 5, 0.2
#: Elements of one transaction: others who write get their turn.
_MOST_AT_ONCE = 1000


@define(eq=False)
class Claimer:
    """The loop that claims, and the lease under which it does.

    Attributes:
        condition: of the service: nothing is claimed that it could not carry out.
        poll_s: seconds after which it looks without being woken (other daemons add work, too).
        lease_s: seconds for which claims hold without being renewed.
        weights: subject → share of the work, where it is not 1.
    """

    reactor: IReactorTime
    database: Database
    executor: Executor
    worker: str
    clock: Callable[[], datetime]
    condition: ServiceCondition
    batch_elements: int
    batch_bytes: int
    poll_s: float
    lease_s: float
    weights: Mapping[str, float] = field(factory=dict)
    _turns: dict[frozenset[JobType], Turns] = field(factory=dict)
    _in_vain: int = 0
    _running: bool = False
    _asleep: Deferred[None] | None = None
    _resting: Deferred[None] | None = None
    _woken: bool = False
    _room_made: bool = False
    _over: Deferred[None] | None = None
    _renewer: Periodic | None = None
    _log: Logger = field(factory=Logger)

    async def start(self) -> None:
        back = await self.database.run(
            "register a worker", claims.register_worker, self.worker, self.clock(), self.lease_s
        )
        if back:
            self._log.info("{count} elements of the last run go back to the queue", count=back)
        self._turns = {types: Turns() for types in (_LISTINGS, _OTHERS)}
        await self._weigh()
        self._renewer = Periodic(self.reactor, "renew the lease", self.lease_s / 3, self._renew)
        self._renewer.start()
        self._running = True
        self._over = Deferred()
        start_background("claim", self._loop())

    async def stop(self) -> None:
        """Claim no more."""
        self._running = False
        self.wake_for_room()
        if self._over is not None:
            await self._over
        if self._renewer is not None:
            await self._renewer.stop()

    def wake(self) -> None:
        """There may be work, or room for it."""
        self._woken = True
        if self._asleep is not None:
            asleep, self._asleep = self._asleep, None
            asleep.callback(None)

    def wake_for_room(self) -> None:
        """There is room for work that may have waited for it."""
        self._room_made = True
        self.wake()
        self._end_rest()

    async def _loop(self) -> None:
        try:
            while self._running:
                self._woken = self._room_made = False
                began = self.reactor.seconds()
                if not self.condition.may_claim:
                    # What would be claimed could not be carried out.
                    await self._sleep(None)
                    continue
                try:
                    begun, due = await self._claim()
                except DatabaseUnavailableError as error:
                    if error.alone:
                        await deferLater(self.reactor, _PAUSE_AFTER_ERROR_S)
                    else:
                        self.condition.report(Part.DATABASE, str(error))
                    continue
                except Exception:
                    self._log.failure("claiming failed; trying again")
                    await deferLater(self.reactor, _PAUSE_AFTER_ERROR_S)
                    continue
                if self._in_vain and not self._room_made and self._running:
                    await self._rest(self.reactor.seconds() - began)
                if not begun and not self._woken and self._running:
                    await self._sleep(due)
        finally:
            if self._over is not None:
                self._over.callback(None)

    async def _claim(self) -> tuple[int, datetime | None]:
        """Claim and begin; returns how many batches began, and when it is worth claiming again."""
        now = self.clock()
        batches, listings = self.executor.room()
        wanted = [(types, room) for types, room in ((_LISTINGS, listings), (_OTHERS, batches)) if room > 0]
        # Both at once: they share a commit where there is one writer.
        claims_ = [Deferred.fromCoroutine(self._claim_of(types, room)) for types, room in wanted]
        begun = 0
        error: Exception | None = None
        for claim in claims_:
            try:
                claimed = await claim
            except Exception as failed:
                # What the other one took must be begun all the same.
                error = error or failed
                continue
            for batch in claimed:
                if begun:
                    # One in a turn of the reactor: others need not wait for all of them.
                    await deferLater(self.reactor, 0)
                self.executor.begin(batch)
                begun += 1
        if error is not None:
            raise error
        if begun:
            self._in_vain = 0
            return begun, None
        due = await self.database.read("when is work due", claims.next_due, now)
        if due is not None and due <= now:
            # It was due already: a limit kept it out, or another daemon had its hands on it. Who ends something wakes
            # this loop; asking all the time would only cost.
            due = now + timedelta(seconds=min(_FIRST_PAUSE_S * 2**self._in_vain, self.poll_s))
            self._in_vain = min(self._in_vain + 1, 10)
        else:
            self._in_vain = 0
        return begun, due

    async def _claim_of(self, types: frozenset[JobType], room: int) -> Sequence[Batch]:
        now = self.clock()
        limits = ClaimLimits(
            elements=min(room * self.batch_elements, _MOST_AT_ONCE),
            batches=room,
            batch_elements=self.batch_elements,
            batch_bytes=self.batch_bytes,
            types=types,
            batch_sizes=dict(self.executor.batch_sizes),
            sharers=2 * self.executor.limits.batches,
            openings=self.executor.streams.openings(),
            bounds=self.executor.bounds(now),
            turns=self._turns[types].copy(),
        )
        batches = await self.database.run("claim", claims.claim, self.worker, limits, now)
        limits.note(self._turns[types], batches)
        return batches

    async def _weigh(self) -> None:
        """Find out who the users are that have weights; some may have come since."""
        if self.weights:
            numbers = await self.database.read("who has a weight", users.numbers, list(self.weights))
            weights = {number: self.weights[subject] for subject, number in numbers.items()}
            for turns in self._turns.values():
                turns.weights = weights

    async def _rest(self, took_s: float) -> None:
        """Wait a little, or until there is room.

        Each job that is submitted wakes the loop. While what waits may not run, looking through it must not be all that
        the database does.
        """
        self._resting = Deferred()
        timer = self.reactor.callLater(min(took_s * _REST_AFTER_VAIN, _LONGEST_REST_S), self._end_rest)
        await self._resting
        if timer.active():
            timer.cancel()

    def _end_rest(self) -> None:
        if self._resting is not None:
            resting, self._resting = self._resting, None
            resting.callback(None)

    async def _sleep(self, due: datetime | None) -> None:
        now = self.clock()
        pause = self.poll_s
        for moment in (due, self.executor.bounds(now).next_change):
            if moment is not None:
                pause = min(max((moment - now).total_seconds(), 0.05), pause)
        timer: IDelayedCall = self.reactor.callLater(pause, self.wake)
        self._asleep = Deferred()
        await self._asleep
        if timer.active():
            timer.cancel()

    async def _renew(self) -> None:
        now = self.clock()
        renewal = await self.database.run("renew the lease", claims.renew, self.worker, now, self.lease_s)
        if renewal.lost:
            self._log.error("the lease of {worker} ran out; what it ran is given up", worker=self.worker)
            await self.executor.end_all(Ending.LOST)
            await self.database.run(
                "register a worker", claims.register_worker, self.worker, self.clock(), self.lease_s
            )
        for job_id in renewal.cancelled_jobs:
            self.executor.cancel(job_id)
        released = await self.database.run("release expired claims", claims.release_expired, now)
        if released:
            self._log.warn("{count} elements of a daemon that is gone go back to the queue", count=released)
            self.wake()
        await self._weigh()


_LISTINGS = frozenset({JobType.LIST})
_OTHERS = frozenset(JobType) - _LISTINGS
