"""This node's share of the limits of all nodes, and what follows from the reports of the others.

A node reads all reports when one is announced, and regularly. It publishes its own when that changes: not for a batch,
but when the number of nodes changes, when it wants more of a limit than its share, or others do, when it becomes idle
or busy for a while, when its connection becomes slow, and when an endpoint breaks. See `pdm.workqueue.domain.shares`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime

from attrs import define, evolve, field
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from pdm.workqueue.domain.limits import LimitKey, LimitKind, common_keys_of
from pdm.workqueue.domain.node_reports import AttemptTally, BrokenEndpoint, NodeReport, SignalKind
from pdm.workqueue.domain.shares import NodeShare, increased, reduced
from pdm.workqueue.execution.claimer import Claimer
from pdm.workqueue.execution.endpoint_health import SiteEndpoint, SiteHealth
from pdm.workqueue.execution.executor import Executor
from pdm.workqueue.execution.lease import Lease
from pdm.workqueue.execution.round_trips import RoundTrips
from pdm.workqueue.execution.service_health import PartFaultyError, ServiceHealth, ServicePart
from pdm.workqueue.execution.signals import SignalListener
from pdm.workqueue.execution.streams import Streams
from pdm.workqueue.store import claim_queries, node_reports
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.errors import DatabaseClosedError, DatabaseUnavailableError
from pdm.workqueue.store.node_reports import PublishingElsewhereError, Reports
from pdm.workqueue.telemetry.background import DueTimer

#: Seconds between two looks at the reports: alone; with other nodes.
_ALONE_S, _TOGETHER_S = 5.0, 1.0
#: Seconds between two looks at the state of this node itself.
_LOOK_EVERY_S = 0.2
#: Seconds after which a report is tried again, because another node publishes.
_TAKEN_S = 0.03
#: Seconds for which the keys of work that waits for a share are remembered; also between two searches for them.
_STARVED_S, _SEARCH_EVERY_S = 2.0, 0.25
#: Due work in which such keys are looked for.
_MOST_SEARCHED = 2000
#: Seconds for which a node must be idle, or busy, before it says so.
_IDLE_AFTER_S, _BUSY_AFTER_S = 0.2, 1.0
#: Seconds between two reports of how many attempts worked.
_COUNTED_EVERY_S = 10.0
#: A node claims nothing for a while if so many attempts failed by its own fault, and more than worked; and not more
#: than one in so many at another node.
_MANY_FAILED, _FEW_FAILED = 5, 10
#: Seconds for which it claims nothing: at first, and at most.
_FIRST_REST_S, _LONGEST_REST_S = 30.0, 600.0
#: Seconds for which a claimed batch waits before an idle node gets it.
_WAITED_S = 0.5


class NodeRestsError(PartFaultyError):
    """This node claims nothing for a while."""


@define(eq=False, kw_only=True)
class NodeShares:
    """The share of this node; does nothing on SQLite, where it has all."""

    reactor: IReactorTime
    clock: Callable[[], datetime]
    database: Database
    incarnation: str
    lease: Lease
    streams: Streams
    executor: Executor
    health: SiteHealth
    service_health: ServiceHealth
    claimer: Claimer
    signals: SignalListener
    round_trips: RoundTrips = field(init=False)
    _timer: DueTimer = field(init=False)
    _own: NodeShare = field(init=False)
    #: How many streams a key should have of which more run.
    _goals: Mapping[LimitKey, int] = field(factory=dict)
    #: `Lease.generation` to which the share belongs; 0 for none.
    _generation: int = 0
    _others: Sequence[NodeReport] = ()
    #: As it stands in the database; None if unknown.
    _published: NodeReport | None = None
    #: Keys of due work that may not run here for want of a share → streams that could run.
    _starved: dict[LimitKey, int] = field(factory=dict)
    _starved_at: float = 0.0
    _is_starved: bool = False
    #: Whether this node is idle, and since when it is or is not.
    _idle: bool = False
    _idle_since: float = 0.0
    #: When the reports were read last, and whether they must be read now.
    _read_at: float = 0.0
    _must_read: bool = True
    _counted_at: float = 0.0
    _rest_s: float = _FIRST_REST_S
    _rests_until: float = 0.0
    _log: Logger = field(factory=Logger)

    def __attrs_post_init__(self) -> None:
        self._own = NodeShare(most=self.streams.total)
        self.round_trips = RoundTrips(
            reactor=self.reactor,
            database=self.database,
            service_health=self.service_health,
            others=lambda: self._others,
        )
        self._timer = DueTimer(self.reactor, "share limits with other nodes", _ALONE_S, self._attend)

    def start(self) -> None:
        if self.database.is_shared:
            self.streams.shares = self
            self.claimer.on_starved = self._work_waits
            for kind in (SignalKind.NODES, SignalKind.REPORT):
                self.signals.subscribe(kind, lambda _job: self._wake())
            self.lease.on_renewed.append(self._renewed)
            self._timer.start()
            self.round_trips.start()

    async def stop(self) -> None:
        await self.round_trips.stop()
        await self._timer.stop()

    def _wake(self) -> None:
        """Look at the reports now: one has changed, or this node's own would."""
        self._must_read = True
        self._timer.wake()

    def _renewed(self, _ends_at: float) -> None:
        if self.lease.generation != self._generation:
            self._wake()

    def _work_waits(self) -> None:
        """Work is due that this node may not claim, although it has free streams."""
        if self._others:
            self._is_starved = True
            if self.reactor.seconds() - self._starved_at > _SEARCH_EVERY_S:
                self._wake()

    # -- for streams

    @property
    def members(self) -> int:
        """The number of nodes."""
        return 1 + len(self._others)

    @property
    def streams_of_all(self) -> int:
        """Streams that all nodes can run at once."""
        return self.streams.total + sum(other.share.most for other in self._others)

    @property
    def idle_elsewhere(self) -> int:
        """Streams of the nodes that say that they are idle."""
        return sum(other.share.most for other in self._others if other.idle)

    def allowance(self, key: LimitKey, limit: int) -> int:
        """Streams of a key that may run here; ``limit``: of all nodes."""
        if self._generation != self.lease.generation:
            # Others may have had this share since.
            return 0
        allowed = self._own.allowance(key, limit)
        return min(allowed, self._goals.get(key, allowed))

    def part(self, limit: int) -> int:
        """The same of a key that has no share of its own."""
        return self._own.part(limit) if self._generation == self.lease.generation else 0

    def named(self) -> Collection[LimitKey]:
        """Keys with a share of their own."""
        return self._own.held.keys()

    def note_running(self, key: LimitKey) -> None:
        """The number of streams of a key has changed."""
        if key in self._goals:
            self._wake()

    # -- exchange

    async def _attend(self) -> float:
        """Exchange reports if it is time; returns the seconds until it should be looked again."""
        now = self.reactor.seconds()
        if not (self._must_read or self._has_changed() or now - self._read_at >= self._period_s):
            return _LOOK_EVERY_S
        try:
            await self._exchange()
        except PublishingElsewhereError:
            self._must_read = True
            return _TAKEN_S
        except (DatabaseUnavailableError, DatabaseClosedError):
            # `ServiceHealth` reports it; the share lasts as long as the lease.
            return _TOGETHER_S
        return _LOOK_EVERY_S if self._others else _ALONE_S

    @property
    def _period_s(self) -> float:
        return _TOGETHER_S if self._others else _ALONE_S

    def _has_changed(self) -> bool:
        """Whether this node has become idle or busy, or its connection slow or fast."""
        said = self._published
        return said is None or self._says_idle() != said.idle or self.round_trips.is_slow != said.slow

    async def _exchange(self) -> None:
        if not self.lease.is_held:
            return
        self._must_read, self._read_at = False, self.reactor.seconds()
        generation = self.lease.generation
        found = await self.database.read("read the reports of nodes", node_reports.reports, self.incarnation)
        if generation != self._generation or (self._published is not None and found.own is None):
            self._reset(generation)
        self._compare(found.others)
        await self._search(found.others)
        before = self._own
        report, busy = self._next_report(found)
        expected = increased(report.share, [other.share for other in found.others], busy, self.streams.limit_of_all)
        if evolve(report, share=expected) != found.own or self._published is None:
            published = await self.database.run(
                "publish the report of this node",
                node_reports.publish,
                self.incarnation,
                report,
                busy,
                self.streams.limit_of_all,
                is_first=self._published is None,
            )
            if generation != self.lease.generation or published.own is None:
                self._reset(self.lease.generation)
                self._wake()
                return
            self._learn(published.others)
            self._published = published.own
            self._own = published.own.share
        if self.idle_elsewhere:
            self.executor.requeue_waiting(_WAITED_S)
        if self._own != before:
            self.executor.pool.wake_waiting()
            self.claimer.work_added()

    def _reset(self, generation: int) -> None:
        """Begin without a share: another node may have had the former one."""
        self._own, self._goals = NodeShare(most=self.streams.total), {}
        self._generation, self._published = generation, None

    def _next_report(self, found: Reports) -> tuple[NodeReport, Collection[LimitKey]]:
        """The report to publish, and the keys that are in use. What it gives back is in force when this returns."""
        self._learn(found.others)
        usage = self.streams.usage()
        demand = dict(usage.demand)
        for key, count in self._starved.items():
            demand[key] = max(demand.get(key, 0), count)
        others = [other.share for other in found.others]
        own, self._goals = reduced(self._own, others, usage.running, demand, self.streams.limit_of_all)
        wanted = {}
        if others and self.service_health.may_claim:
            for key, count in demand.items():
                limit = self.streams.limit_of_all(key)
                if min(count, limit, own.most) > own.allowance(key, limit):
                    wanted[key] = min(count, own.most)
        self._own = own
        worked, failed = self._counts() if others else (0, 0)
        share = evolve(own, wanted=wanted)
        report = NodeReport(
            share=share,
            idle=self._says_idle(),
            slow=self.round_trips.is_slow,
            worked=worked,
            failed=failed,
            broken=self._broken(),
        )
        return report, demand.keys() | usage.claimed

    def _says_idle(self) -> bool:
        """Whether this node is idle, once it has been so for a while."""
        now, idle = self.reactor.seconds(), self.claimer.is_idle
        if idle != self._idle:
            self._idle, self._idle_since = idle, now
        said = self._published is not None and self._published.idle
        if idle == said:
            return said
        return idle if now - self._idle_since >= (_IDLE_AFTER_S if idle else _BUSY_AFTER_S) else said

    def _counts(self) -> tuple[int, int]:
        """Attempts that worked and failed, as of some seconds ago: a report is not written for each."""
        said = self._published
        if said is not None and self.reactor.seconds() - self._counted_at < _COUNTED_EVERY_S:
            return said.worked, said.failed
        self._counted_at = self.reactor.seconds()
        return self._tally.counts(self._tally_s)

    @property
    def _tally(self) -> AttemptTally:
        return self.service_health.tally

    @property
    def _tally_s(self) -> float:
        return self.executor.context.board.clock()

    def _compare(self, others: Sequence[NodeReport]) -> None:
        """Claim nothing for a while if attempts fail here, by faults of this node, that work elsewhere."""
        worked, failed = self._tally.counts(self._tally_s)
        work_elsewhere = any(other.worked >= max(other.failed * _FEW_FAILED, _MANY_FAILED) for other in others)
        if failed < _MANY_FAILED or failed <= worked or not work_elsewhere or not self.service_health.may_claim:
            return
        now = self.reactor.seconds()
        self._rest_s = _FIRST_REST_S if now > self._rests_until + _LONGEST_REST_S else self._rest_s * 2
        self._rest_s = min(self._rest_s, _LONGEST_REST_S)
        self._rests_until = now + self._rest_s

        async def check() -> None:
            if self.reactor.seconds() < self._rests_until:
                raise NodeRestsError(f"attempts failed here that work at other nodes: {failed} failed, {worked} worked")

        self._tally.clear()
        reason = f"{failed} attempts failed by faults of this node, {worked} worked; other nodes have no such faults"
        self.service_health.report(ServicePart.HELPERS, reason, check)

    async def _search(self, others: Sequence[NodeReport]) -> None:
        """Look for the keys of due work that has no share here."""
        now = self.reactor.seconds()
        if not self._is_starved or not others:
            if now - self._starved_at > _STARVED_S:
                self._starved = {}
            return
        if now - self._starved_at <= _SEARCH_EVERY_S:
            return
        self._is_starved, self._starved_at = False, now
        free, _ = self.executor.capacity()
        timestamp = self.clock()
        exclusions = self.executor.exclusions(timestamp)
        waiting = await self.database.read(
            "find work without a share", claim_queries.waiting_work, timestamp, _MOST_SEARCHED
        )
        self._starved = {}
        for work in waiting:
            if work.user_id in exclusions.banned or exclusions.excludes(work.protocol, work.route.sites):
                continue
            for key in (*common_keys_of(work.user_id, work.route), (LimitKind.JOB, work.job_id)):
                self._starved[key] = self.streams.running(key) + min(free, work.elements)

    # -- endpoints

    def _broken(self) -> frozenset[BrokenEndpoint]:
        return frozenset(
            BrokenEndpoint(endpoint.site_id, endpoint.protocol, endpoint.url, user_id)
            for endpoint, user_id in self.health.broken().items()
        )

    def _learn(self, others: Sequence[NodeReport]) -> None:
        """Probe what others cannot reach, before it is paused here; and what one of them reaches again."""
        # Counted: while others still pause it, the first to reach an endpoint again is enough.
        before, now = _broken_at(self._others), _broken_at(others)
        for one in now - before:
            self.health.suspect(SiteEndpoint(one.site_id, one.protocol, one.url), one.user_id, is_broken=True)
        for one in before - now:
            self.health.suspect(SiteEndpoint(one.site_id, one.protocol, one.url), one.user_id, is_broken=False)
        self._others = others


def _broken_at(others: Sequence[NodeReport]) -> Counter[BrokenEndpoint]:
    """How many nodes cannot reach each endpoint."""
    return Counter(one for other in others for one in other.broken)
