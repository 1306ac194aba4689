"""Keeps the executor busy: claims what is due when there is capacity, woken by events and, for safety, by time."""

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
from pdm.workqueue.domain.limits import FairQueue
from pdm.workqueue.execution.executor import Executor
from pdm.workqueue.execution.lease import Lease
from pdm.workqueue.execution.monitoring import ServiceHealth, ServicePart
from pdm.workqueue.store import claim_queries, claiming, users
from pdm.workqueue.store.claim_limits import ClaimLimits
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.errors import DatabaseClosedError, DatabaseUnavailableError
from pdm.workqueue.telemetry.background import Periodic, ReportedError, following, start_background

_PAUSE_AFTER_ERROR_S = 1.0
#: A step of the time of day is noticed so soon.
_NOTICED_WITHIN = timedelta(seconds=5)
#: Users with weights may come; they are looked for so often.
_WEIGH_EVERY_S = 20.0
#: Before it is tried again to claim what is due and was not to be had; doubles while nothing happens.
_FIRST_PAUSE_S = 0.05
#: After a claim in vain there is no other for so many times as long as it took, and at most for so many seconds.
_REST_FACTOR, _LONGEST_REST_S = 5, 0.2
#: Elements of one transaction: others who write get their turn.
_MOST_AT_ONCE = 1000


@define(eq=False)
class Claimer:
    """The loop that claims.

    Attributes:
        service_health: of the service: nothing is claimed that it could not carry out.
        poll_s: seconds after which it looks without being woken (other daemons add work, too).
        lease: under which it claims.
        weights: subject → share of the work, where it is not 1.
    """

    reactor: IReactorTime
    database: Database
    executor: Executor
    clock: Callable[[], datetime]
    service_health: ServiceHealth
    batch_elements: int
    batch_bytes: int
    poll_s: float
    lease: Lease
    weights: Mapping[str, float] = field(factory=dict)
    _fair_queues: dict[frozenset[JobType], FairQueue] = field(factory=dict)
    _empty_claims: int = 0
    _running: bool = False
    _asleep: Deferred[None] | None = None
    _resting: Deferred[None] | None = None
    _woken: bool = False
    _capacity_freed: bool = False
    _over: Deferred[None] | None = None
    _claiming: Deferred[None] | None = None
    _weigher: Periodic | None = None
    _log: Logger = field(factory=Logger)

    async def start(self) -> None:
        self._fair_queues = {types: FairQueue() for types in (_LISTINGS, _OTHERS)}
        await self._weigh()
        self._weigher = Periodic(self.reactor, "look for users with weights", _WEIGH_EVERY_S, self._weigh)
        self._weigher.start()
        self._running = True
        self._over = Deferred()
        start_background("claim", self._loop())

    async def stop(self) -> None:
        """Claim no more."""
        self._running = False
        self.capacity_freed()
        if self._over is not None:
            await self._over
        if self._weigher is not None:
            await self._weigher.stop()

    def wake(self) -> None:
        """There may be work, or room for it."""
        self._woken = True
        if self._asleep is not None:
            asleep, self._asleep = self._asleep, None
            asleep.callback(None)

    def capacity_freed(self) -> None:
        """There is room for work that may have waited for it."""
        self._capacity_freed = True
        self.wake()
        self._end_rest()

    def clock_was_set(self, step: timedelta) -> None:
        """The time of day was moved; back, what was put off until a moment of the old time would wait too long."""
        if step < timedelta(0) and self._running:
            start_background("bring forward what was put off", self._bring_forward(-step))
        self.wake()

    async def _bring_forward(self, step: timedelta) -> None:
        now = self.clock()
        # The step was noticed a little after it was made.
        since = max(now, now + step - _NOTICED_WITHIN)
        await self.database.run("bring forward what was put off", claim_queries.bring_forward, since, now)
        self.wake()

    async def _loop(self) -> None:
        try:
            while self._running:
                self._woken = self._capacity_freed = False
                began = self.reactor.seconds()
                if not self.service_health.may_claim:
                    # What would be claimed could not be carried out.
                    await self._sleep(None)
                    continue
                self._claiming = Deferred()
                try:
                    begun, due_at = await self._claim()
                except DatabaseClosedError:
                    return
                except Exception as error:
                    if not isinstance(error, ReportedError):
                        self._log.failure("claiming failed; trying again")
                    self.lease.reconcile_soon()
                    self._answered()
                    if isinstance(error, DatabaseUnavailableError) and not error.alone:
                        self.service_health.report(ServicePart.DATABASE, str(error))
                        continue
                    await deferLater(self.reactor, _PAUSE_AFTER_ERROR_S)
                    continue
                finally:
                    self._answered()
                if self._empty_claims and not self._capacity_freed and self._running:
                    await self._rest(self.reactor.seconds() - began)
                if not begun and not self._woken and self._running:
                    await self._sleep(due_at)
        finally:
            if self._over is not None:
                self._over.callback(None)

    def _answered(self) -> None:
        if self._claiming is not None:
            claiming, self._claiming = self._claiming, None
            claiming.callback(None)

    async def claims_over(self) -> None:
        """Wait until the claim that is under way now, if one is, is answered and all that it brought has begun."""
        if self._claiming is not None:
            await following(self._claiming)

    async def _claim(self) -> tuple[int, datetime | None]:
        """Claim and begin; returns how many batches began, and when it is worth claiming again."""
        if not self.lease.is_held:
            # It is being renewed, or taken again; then this loop is woken.
            return 0, None
        now = self.clock()
        self.executor.before_claims()
        batches, listings = self.executor.capacity()
        wanted = [(types, capacity) for types, capacity in ((_LISTINGS, listings), (_OTHERS, batches)) if capacity > 0]
        # Both at once: they share a commit where there is one writer.
        claims = [Deferred.fromCoroutine(self._claim_of(types, capacity)) for types, capacity in wanted]
        begun = 0
        error: Exception | None = None
        for claim in claims:
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
            self._empty_claims = 0
            return begun, None
        due_at = await self.database.read("when is work due", claim_queries.next_due, now)
        if due_at is not None and due_at <= now:
            # It was due already: a limit kept it out, or another daemon had its hands on it. Who ends something wakes
            # this loop; asking all the time would only cost.
            due_at = now + timedelta(seconds=min(_FIRST_PAUSE_S * 2**self._empty_claims, self.poll_s))
            self._empty_claims = min(self._empty_claims + 1, 10)
        else:
            self._empty_claims = 0
        return begun, due_at

    async def _claim_of(self, types: frozenset[JobType], capacity: int) -> Sequence[Batch]:
        now = self.clock()
        limits = ClaimLimits(
            elements=min(capacity * self.batch_elements, _MOST_AT_ONCE),
            batches=capacity,
            batch_elements=self.batch_elements,
            batch_bytes=self.batch_bytes,
            types=types,
            batch_sizes=dict(self.executor.batch_sizes),
            sharers=2 * self.executor.limits.batches,
            quota=self.executor.streams.quota(),
            exclusions=self.executor.exclusions(now),
            fair_queue=self._fair_queues[types].copy(),
        )
        batches = await self.database.run("claim", claiming.claim, self.lease.worker.incarnation, limits, now)
        limits.note(self._fair_queues[types], batches)
        return batches

    async def _weigh(self) -> None:
        """Find out who the users are that have weights; some may have come since."""
        if self.weights:
            numbers = await self.database.read("who has a weight", users.numbers, list(self.weights))
            weights = {number: self.weights[subject] for subject, number in numbers.items()}
            for fair_queue in self._fair_queues.values():
                fair_queue.weights = weights

    async def _rest(self, took_s: float) -> None:
        """Wait a little, or until there is room.

        Each job that is submitted wakes the loop. While what waits may not run, looking through it must not be all that
        the database does.
        """
        self._resting = Deferred()
        timer = self.reactor.callLater(min(took_s * _REST_FACTOR, _LONGEST_REST_S), self._end_rest)
        await self._resting
        if timer.active():
            timer.cancel()

    def _end_rest(self) -> None:
        if self._resting is not None:
            resting, self._resting = self._resting, None
            resting.callback(None)

    async def _sleep(self, due_at: datetime | None) -> None:
        now = self.clock()
        pause = self.poll_s
        for time in (due_at, self.executor.exclusions(now).next_change):
            if time is not None:
                pause = min(max((time - now).total_seconds(), 0.05), pause)
        timer: IDelayedCall = self.reactor.callLater(pause, self.wake)
        self._asleep = Deferred()
        await self._asleep
        if timer.active():
            timer.cancel()


_LISTINGS = frozenset({JobType.LIST})
_OTHERS = frozenset(JobType) - _LISTINGS
