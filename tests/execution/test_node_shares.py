"""What a node does upon the reports of others: it shares limits, gives back, probes and rests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from attrs import evolve
from twisted.internet.task import Clock

from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.limits import LimitKey, LimitKind
from pdm.workqueue.domain.node_reports import AttemptTally, BrokenEndpoint, NodeReport
from pdm.workqueue.domain.shares import NodeShare, increased
from pdm.workqueue.execution.endpoint_health import SiteEndpoint, SiteHealth
from pdm.workqueue.execution.node_shares import NodeShares
from pdm.workqueue.execution.streams import StreamLimits, Streams
from pdm.workqueue.sites.registry import SiteRegistry
from pdm.workqueue.store import node_reports
from pdm.workqueue.store.node_reports import Reports
from tests.support.records import NOW

SITE: LimitKey = (LimitKind.INTO, 1)
BROKEN = BrokenEndpoint(2, JobProtocol.SSH, "sftp://host", 7)
ENDPOINT = SiteEndpoint(2, JobProtocol.SSH, "sftp://host")


class Reported:
    """A database that has nothing but reports."""

    is_shared = True

    def __init__(self) -> None:
        self.own: NodeReport | None = None
        self.others: Sequence[NodeReport] = ()
        self.written = 0
        self.round_trip_s = 0.001

    async def read(self, _name: str, function: Callable[..., Any], *_: Any) -> Any:
        return Reports(self.own, self.others) if function is node_reports.reports else []

    async def run_for_lease(self, _name: str, _function: object) -> float:
        return self.round_trip_s

    async def run(
        self, _name: str, _function: object, _by: str, report: NodeReport, busy: Any, limit_of: Any, **_: Any
    ) -> Reports:
        self.written += 1
        share = increased(report.share, [other.share for other in self.others], busy, limit_of)
        self.own = evolve(report, share=share)
        return Reports(self.own, self.others)


class Node:
    """A node among others whose reports a test sets."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.database = Reported()
        self.given_back: list[float] = []
        self.probed: list[SiteEndpoint] = []
        self.faults: list[str] = []
        self.is_idle = False
        self.lease = SimpleNamespace(is_held=True, generation=1, on_renewed=[])
        self.health = SiteHealth(probe=lambda endpoint, _user: self.probed.append(endpoint))
        self.service = SimpleNamespace(
            may_claim=True, faults=[], tally=AttemptTally(), report=lambda _part, reason, _check: self._report(reason)
        )
        limits = StreamLimits(
            total=4, route=10, route_start=4, window_s=5.0, site_in=6, site_out=1000, user=1000, job=1000
        )
        self.streams = Streams(limits=limits, sites=SiteRegistry(Path("none"), ()), clock=lambda: NOW)
        executor: Any = SimpleNamespace(
            pool=SimpleNamespace(wake_waiting=lambda: None),
            context=SimpleNamespace(board=SimpleNamespace(clock=self.clock.seconds)),
            requeue_waiting=self.given_back.append,
        )
        node = self

        class Claimer:
            on_starved: Callable[[], None] = staticmethod(lambda: None)

            @property
            def is_idle(self) -> bool:
                return node.is_idle

            def work_added(self) -> None:
                """Nothing to claim."""

        parts: Any = {
            "reactor": self.clock,
            "clock": lambda: NOW,
            "database": self.database,
            "incarnation": "a",
            "lease": self.lease,
            "streams": self.streams,
            "executor": executor,
            "health": self.health,
            "service_health": self.service,
            "claimer": Claimer(),
            "signals": SimpleNamespace(subscribe=lambda _kind, _callback: None),
        }
        self.shares = NodeShares(**parts)
        self.shares.start()

    def _report(self, reason: str) -> None:
        self.faults.append(reason)
        self.service.may_claim = False
        self.service.faults = [SimpleNamespace(part=SimpleNamespace(value="helpers"), reason=reason)]

    def hear(self, *others: NodeReport, seconds: float = 6.0) -> None:
        self.database.others = others
        for _ in range(round(seconds / 0.1)):
            self.clock.advance(0.1)


def other(parts: int | None = 2, **changes: Any) -> NodeReport:
    return NodeReport(share=NodeShare(most=4, parts=parts), **changes)


@pytest.fixture
def node() -> Node:
    return Node()


def test_a_node_alone_has_all_and_writes_nothing_more(node: Node) -> None:
    assert node.shares.allowance(SITE, 6) == 4
    written = node.database.written
    node.hear(seconds=60)
    assert node.database.written == written


def test_limits_are_divided_once_another_comes(node: Node) -> None:
    node.hear(other(None))
    assert node.shares.allowance(SITE, 6) == 3
    assert node.shares.members == 2
    assert node.streams.total_of_all == 8


def test_nothing_may_run_after_the_lease_has_ended(node: Node) -> None:
    node.lease.generation = 2
    assert node.shares.allowance(SITE, 6) == 0
    assert node.shares.part(6) == 0
    for renewed in node.lease.on_renewed:
        renewed(0.0)
    assert node.shares.allowance(SITE, 6) == 4


def test_what_waits_is_given_back_to_an_idle_node(node: Node) -> None:
    node.hear(other())
    assert not node.given_back
    node.hear(other(idle=True))
    assert node.shares.idle_elsewhere == 4
    assert set(node.given_back) == {0.5}


def test_idleness_is_said_after_a_while(node: Node) -> None:
    node.hear(other())
    node.is_idle = True
    node.hear(other(), seconds=0.1)
    assert node.database.own is not None
    assert not node.database.own.idle
    node.hear(other(), seconds=0.9)
    assert node.database.own.idle
    node.is_idle = False
    node.hear(other(), seconds=0.5)
    assert node.database.own.idle
    node.hear(other(), seconds=1.5)
    assert not node.database.own.idle


def test_what_another_cannot_reach_is_probed_and_not_paused(node: Node) -> None:
    node.hear(other(broken=frozenset({BROKEN})))
    assert node.probed == [ENDPOINT]
    assert node.health.paused(NOW) == frozenset()
    # This node reaches it: it has nothing to try when the other one does again.
    node.hear(other())
    assert node.probed == [ENDPOINT]


def test_a_node_probes_what_another_reaches_again(node: Node) -> None:
    node.hear(other(broken=frozenset({BROKEN})))
    (failure,) = [SimpleNamespace(code="CONNECTION", message="refused")]
    node.health.probe_ended(ENDPOINT, failure, reachable=False, now=NOW)  # type: ignore[arg-type]
    node.hear(other(broken=frozenset({BROKEN})))
    assert node.database.own is not None
    assert node.database.own.broken == {BROKEN}
    node.hear(other())
    assert node.probed == [ENDPOINT, ENDPOINT]


def test_a_node_rests_whose_attempts_fail_where_others_work(node: Node) -> None:
    node.hear(other(worked=3), seconds=2)
    node.service.tally.add(node.clock.seconds(), failed=6, worked=2)
    node.hear(other(worked=3), seconds=2)
    # The other one has done too little to tell.
    assert not node.faults
    node.hear(other(worked=50), seconds=2)
    assert len(node.faults) == 1


def test_all_nodes_fail_alike_and_none_rests(node: Node) -> None:
    node.service.tally.add(node.clock.seconds(), failed=20)
    node.hear(other(worked=1, failed=20), seconds=5)
    assert not node.faults


def test_a_node_with_a_slow_connection_claims_nothing_while_others_have_fast_ones(node: Node) -> None:
    node.database.round_trip_s = 0.5
    node.hear(other(slow=True))
    assert node.faults == []
    # Of no use: it claims nothing itself.
    node.hear(other(slow=True), other(claims=False))
    assert node.faults == []
    assert node.database.own is not None and node.database.own.slow
    node.hear(other(slow=True), other())
    assert set(node.faults) == {"a round trip takes 0.50 s, and other nodes have faster ones"}
    node.database.round_trip_s = 0.15
    node.hear(other(), seconds=10)
    assert node.database.own.slow, "neither slow nor fast"
    node.database.round_trip_s = 0.01
    node.hear(other(), seconds=10)
    assert not node.database.own.slow
