"""Claims due work when there is capacity: woken by events, and by a timer as a fallback."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, TypeVar

from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger

from pdm.workqueue.domain.enums import JobType
from pdm.workqueue.domain.jobs import Batch, JobRecord, NewJob
from pdm.workqueue.domain.limits import OWN_STREAMS, FairQueue, LimitKind, StreamQuota, common_keys
from pdm.workqueue.execution.executor import Executor
from pdm.workqueue.execution.lease import Lease
from pdm.workqueue.execution.service_health import ServiceHealth, ServicePart
from pdm.workqueue.execution.transfer_services import TransferServices
from pdm.workqueue.store import claim_queries, claiming, users
from pdm.workqueue.store.claim_limits import ClaimLimits
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.errors import DatabaseClosedError, DatabaseUnavailableError
from pdm.workqueue.store.first_claims import FirstClaim
from pdm.workqueue.telemetry.background import Periodic, ReportedError, following, start_background

_PAUSE_AFTER_ERROR_S = 1.0
#: A step of the clock is noticed within this time.
_NOTICED_WITHIN = timedelta(seconds=5)
#: Interval of the search for users with weights, who may have registered since.
_WEIGH_EVERY_S = 20.0
#: First pause before due work that could not be claimed is tried again; doubles up to ``poll_s``.
_FIRST_PAUSE_S = 0.05
#: Rest after an empty claim: this multiple of its duration, limited to some seconds.
_REST_FACTOR, _LONGEST_REST_S = 5, 0.2
#: Seconds until the next claim while the claimed batches are enough for the streams: then it can claim more at once.
_SUPPLIED_S = 0.05
#: Elements per transaction, so that other writers can interleave.
_MOST_AT_ONCE = 1000

_R = TypeVar("_R")


@define(eq=False, kw_only=True)
class Claimer:
    """The loop that claims.

    Attributes:
        service_health: while a required part of the service is faulty, nothing is claimed.
        poll_s: maximum seconds between two claims (other daemons add work, too).
        weights: subject → share of the work, if not 1.
        is_drained: whether an operator has this daemon claim nothing.
        offer: called when there may be due work that this daemon leaves to others.
        on_starved: called when work is due that may not be claimed, although there is capacity.
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
    is_drained: Callable[[], bool] = lambda: False
    offer: Callable[[], None] = lambda: None
    on_starved: Callable[[], None] = lambda: None
    _fair_queues: dict[frozenset[JobType], FairQueue] = field(factory=dict)
    _empty_claims: int = 0
    _running: bool = False
    _asleep: Deferred[None] | None = None
    _resting: Deferred[None] | None = None
    _woken: bool = False
    _capacity_freed: bool = False
    _over: Deferred[None] | None = None
    _claiming: Deferred[None] | None = None
    #: An element is being claimed in the transaction that adds it.
    _adding: Deferred[None] | None = None
    #: Whether the last claim has found that nothing is due, and nothing was added since.
    _nothing_due: bool = False
    _soon: IDelayedCall | None = None
    _weigher: Periodic | None = None
    _log: Logger = field(factory=Logger)

    async def start(self) -> None:
        self._fair_queues = {types: FairQueue() for types in (_LISTINGS, _OTHERS)}
        await self._weigh()
        self._weigher = Periodic(self.reactor, "find users with weights", _WEIGH_EVERY_S, self._weigh)
        self._weigher.start()
        self._running = True
        self._over = Deferred()
        start_background("claim", self._loop())

    @property
    def is_idle(self) -> bool:
        """Whether more could run, and nothing is due."""
        is_waiting = self._asleep is not None and self._nothing_due and self.lease.is_held
        return is_waiting and self.service_health.may_claim and self.executor.streams.free > 0

    @property
    def _services(self) -> TransferServices:
        return self.executor.preparation.services

    @property
    def _is_alone(self) -> bool:
        """Whether no other daemon adds work."""
        shares = self.executor.streams.shares
        return not self.database.is_shared if shares is None else shares.members == 1

    async def stop(self) -> None:
        self._running = False
        self.work_added()
        if self._soon is not None and self._soon.active():
            self._soon.cancel()
        if self._over is not None:
            await self._over
        if self._adding is not None:
            await following(self._adding)
        if self._weigher is not None:
            await self._weigher.stop()

    def wake(self) -> None:
        """Claim soon: there may be work, or capacity for it."""
        self._woken = True
        self._nothing_due = False
        if self._asleep is not None:
            asleep, self._asleep = self._asleep, None
            asleep.callback(None)

    def offered(self) -> None:
        """Another daemon leaves work."""
        if self._running and any(free > 0 for free in self.executor.capacity()):
            self.wake()

    def work_added(self) -> None:
        """Claim now: there is work that a claim has not seen."""
        self._capacity_freed = True
        self.wake()
        self._end_rest()

    def capacity_freed(self) -> None:
        """Claim now if work waits for capacity; a little later while batches wait for a stream."""
        # Other daemons may have added work to a shared database.
        if self._asleep is None or not self._nothing_due or not self._is_alone:
            if self.executor.streams.has_supply:
                self._claim_soon()
            else:
                self.work_added()

    def settled(self, *, has_waiting: bool) -> None:
        """Results are stored of jobs of which elements wait, or do not."""
        if not has_waiting:
            self.capacity_freed()
        elif self.executor.streams.has_supply:
            self._claim_soon()
        else:
            self.wake()

    def _claim_soon(self) -> None:
        if self._running and (self._soon is None or not self._soon.active()):
            self._soon = self.reactor.callLater(_SUPPLIED_S, self.wake)

    async def add_element(
        self,
        to: NewJob | JobRecord | None,
        type_: JobType,
        name: str,
        function: Callable[..., tuple[_R, Batch | None]],
        *args: Any,
        begin: Callable[[Batch], None] | None = None,
    ) -> _R:
        """Run a transaction that adds an element to a job, and begin the element at once if nothing else is due.

        The element is then claimed in the same transaction: an idle daemon needs neither a second commit nor a query of
        the queue.

        Args:
            to: the job; None to claim nothing at once.
            function: gets the session, ``args`` and a `FirstClaim` or None; returns its result and the claimed batch.
            begin: begins that batch; without it the executor does.
        """
        claim = None if to is None else self._first_claim(to, type_)
        if claim is None:
            result, _ = await self.database.run(name, function, *args, None)
            self.wake()
            return result
        self._adding = Deferred()
        try:
            result, batch = await self.database.run(name, function, *args, claim)
            if batch is None:
                self.wake()
            else:
                self._fair_queues[_lane(type_)].charge(batch.job.user_id, 1.0)
                (begin or self.executor.begin)(batch)
        except Exception:
            # The transaction may have succeeded nevertheless.
            self.lease.reconcile_soon()
            self.wake()
            raise
        finally:
            adding, self._adding = self._adding, None
            adding.callback(None)
        return result

    def _first_claim(self, to: NewJob | JobRecord, type_: JobType) -> FirstClaim | None:
        """Permission to claim an element as it is added: nothing else is due, and all limits allow it."""
        if self._asleep is None or not self._nothing_due or self._adding is not None or not self._is_alone:
            return None
        if type_ is not JobType.LIST and isinstance(to, JobRecord) and self._services.service_of(to) is not None:
            # Of what is handed over, much goes together.
            return None
        if self.is_drained() or not (self._running and self.service_health.may_claim and self.lease.is_held):
            return None
        batches, listings = self.executor.capacity()
        now = self.clock()
        exclusions = self.executor.exclusions(now)
        if (
            (listings if type_ is JobType.LIST else batches) < 1
            or to.user_id in exclusions.banned
            or exclusions.excludes(to.protocol, to.sites)
            # Of a site that is being probed, one element may run at a time.
            or any((site, to.protocol) in exclusions.probed for site in to.sites)
        ):
            return None
        if type_ is not JobType.LIST:
            keys = [*common_keys(to)]
            if isinstance(to, JobRecord):
                keys.append((LimitKind.JOB, to.id))
            quota = self.executor.streams.quota()
            if any(quota.of(key) < 1 for key in keys):
                return None
        return FirstClaim(self.lease.worker.incarnation, now)

    def clock_was_set(self, step: timedelta) -> None:
        """After the clock was set back, make due what was postponed to a time of the old clock."""
        if step < timedelta(0) and self._running:
            start_background("bring forward postponed elements", self._bring_forward(-step))
        self.wake()

    async def _bring_forward(self, step: timedelta) -> None:
        now = self.clock()
        # The step is noticed with a delay.
        since = max(now, now + step - _NOTICED_WITHIN)
        await self.database.run("bring forward postponed elements", claim_queries.bring_forward, since, now)
        self.wake()

    async def _loop(self) -> None:
        try:
            while self._running:
                self._woken = self._capacity_freed = False
                began = self.reactor.seconds()
                if self.is_drained() or not self.service_health.may_claim:
                    # Claimed batches could not be started, or should not be.
                    self.offer()
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
                if begun and self.executor.streams.has_supply:
                    due_at = self.clock() + timedelta(seconds=_SUPPLIED_S)
                elif begun:
                    continue
                if not self._woken and self._running:
                    await self._sleep(due_at)
        finally:
            if self._over is not None:
                self._over.callback(None)

    def _answered(self) -> None:
        if self._claiming is not None:
            claiming, self._claiming = self._claiming, None
            claiming.callback(None)

    async def claims_over(self) -> None:
        """Wait until the current claims, if any, are answered and their batches have begun."""
        for running in (self._claiming, self._adding):
            if running is not None:
                await following(running)

    async def _claim(self) -> tuple[int, datetime | None]:
        """Claim and begin; returns the number of batches, and the time of the next useful claim."""
        if not self.lease.is_held:
            # The renewal of the lease wakes this loop.
            self.offer()
            return 0, None
        if self._adding is not None:
            # `before_claims` would forget a cancellation that arrives meanwhile.
            await following(self._adding)
        now = self.clock()
        self.executor.before_claims()
        batches, listings = self.executor.capacity()
        begun = 0
        for batch in await self._claim_of({_LISTINGS: listings, _OTHERS: batches}, self._services.capacity):
            if begun:
                # One per reactor iteration: other events need not wait for all of them.
                await deferLater(self.reactor, 0)
            self.executor.begin(batch)
            begun += 1
        if min(self.executor.capacity()) < 1:
            self.offer()
        if begun:
            self._empty_claims = 0
            return begun, None
        due_at = await self.database.read("find the next due time", claim_queries.next_due, now)
        if due_at is not None and due_at <= now:
            # It was due before: a limit excluded it, or another daemon had locked it. The end of a batch wakes this
            # loop; continuous polling would only cost.
            if not self._empty_claims:
                self.offer()
            if batches > 0:
                self.on_starved()
            due_at = now + timedelta(seconds=min(_FIRST_PAUSE_S * 2**self._empty_claims, self.poll_s))
            self._empty_claims = min(self._empty_claims + 1, 10)
        else:
            self._empty_claims = 0
            self._nothing_due = not self._woken
        return begun, due_at

    async def _claim_of(self, capacities: Mapping[frozenset[JobType], int], handed: int) -> Sequence[Batch]:
        """Claim in one transaction.

        ``capacities``: types → number of batches that take streams. ``handed``: of those that are handed over.
        """
        now = self.clock()
        hand_overs, quota = self._services.hand_overs(), self.executor.streams.quota()
        left = {**quota.left, **hand_overs.left, OWN_STREAMS: capacities[_OTHERS]}
        capacities = {**capacities, _OTHERS: capacities[_OTHERS] + handed}
        several = [
            ClaimLimits(
                elements=min(capacity * self.batch_elements, _MOST_AT_ONCE),
                batches=capacity,
                batch_elements=self.batch_elements,
                batch_bytes=self.batch_bytes,
                types=types,
                batch_sizes=dict(self.executor.batch_sizes.by_kind),
                sharers=2 * self.executor.streams.total_of_all,
                quota=StreamQuota(left, quota.otherwise),
                exclusions=self.executor.exclusions(now),
                fair_queue=self._fair_queues[types].copy(),
                hand_overs=hand_overs,
            )
            for types, capacity in capacities.items()
            if capacity > 0
        ]
        if not several:
            return []
        claimed = await self.database.run("claim", claiming.claim_each, self.lease.worker.incarnation, several, now)
        for limits, batches in zip(several, claimed, strict=True):
            limits.note(self._fair_queues[limits.types], batches)
        return [batch for batches in claimed for batch in batches]

    async def _weigh(self) -> None:
        """Resolve the subjects of users with weights to ids."""
        if self.weights:
            numbers = await self.database.read("find users with weights", users.numbers, list(self.weights))
            weights = {number: self.weights[subject] for subject, number in numbers.items()}
            for fair_queue in self._fair_queues.values():
                fair_queue.weights = weights

    async def _rest(self, took_s: float) -> None:
        """Wait a little, or until there is capacity.

        Each submitted job wakes the loop: without a rest, scanning work that may not run would keep the database busy.
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


def _lane(type_: JobType) -> frozenset[JobType]:
    return _LISTINGS if type_ is JobType.LIST else _OTHERS
