"""Reports of nodes: shares that are published one after the other never exceed a limit."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from attrs import evolve

from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.limits import LimitKey, LimitKind
from pdm.workqueue.domain.node_reports import BrokenEndpoint, NodeReport, decode_report
from pdm.workqueue.domain.shares import NodeShare
from pdm.workqueue.store import leases, node_reports, nodes
from pdm.workqueue.store.leases import WorkerIdentity
from tests.store.stores import Store

SITE: LimitKey = (LimitKind.INTO, 1)
LEASE_S = 15.0

pytestmark = pytest.mark.parametrize(
    "database_kind", [pytest.param("postgresql", marks=pytest.mark.postgresql)], indirect=True
)


def register(store: Store, *names: str) -> None:
    for name in names:
        store.run(leases.register_worker, WorkerIdentity(name, name, node=name, version="1"), store.now, LEASE_S)


def publish(store: Store, name: str, report: NodeReport, *, is_first: bool = False) -> node_reports.Reports:
    busy = report.share.wanted.keys()
    return store.run(node_reports.publish, name, report, busy, lambda key: 2, is_first=is_first)


def expire(store: Store, name: str) -> None:
    store.run(lambda session: session.execute(
        sa.text("UPDATE workers SET lease_until = clock_timestamp() WHERE incarnation = :name"), {"name": name}
    ))  # fmt: skip


def test_nodes_share_what_is_left(store: Store) -> None:
    register(store, "a", "b")
    new = NodeReport(share=NodeShare(most=4, wanted={SITE: 2}))
    alone = publish(store, "a", new, is_first=True).own
    assert alone is not None
    # The other one has published nothing yet: each has one part of two.
    assert alone.share.allowance(SITE, 2) == 2
    second = publish(store, "b", new, is_first=True).own
    assert second is not None
    assert second.share.allowance(SITE, 2) == 0
    assert store.run(node_reports.reports, "b").others == [alone]


def test_a_node_whose_lease_has_ended_loses_its_share(store: Store) -> None:
    register(store, "a", "b")
    first = publish(store, "a", NodeReport(share=NodeShare(most=4)), is_first=True).own
    assert first is not None
    expire(store, "a")
    second = publish(store, "b", NodeReport(share=NodeShare(most=4)), is_first=True).own
    assert second is not None
    assert second.share.allowance(SITE, 2) == 2
    # It is suspended, and renews its lease when it goes on.
    store.run(leases.renew, "a", store.now, LEASE_S)
    assert publish(store, "a", first).own is None
    again = publish(store, "a", NodeReport(share=NodeShare(most=4)), is_first=True).own
    assert again is not None
    assert again.share.allowance(SITE, 2) == 0


def test_a_daemon_of_an_earlier_version_takes_no_part(store: Store) -> None:
    store.run(leases.register_worker, WorkerIdentity("old", "old"), store.now, LEASE_S)
    register(store, "a")
    own = publish(store, "a", NodeReport(share=NodeShare(most=4)), is_first=True).own
    assert own is not None
    assert own.share.parts == 1
    assert not store.run(node_reports.reports, "a").others


def test_a_report_is_read_as_it_was_written(store: Store) -> None:
    register(store, "a")
    broken = BrokenEndpoint(3, JobProtocol.SSH, "sftp://host", 7)
    report = NodeReport(share=NodeShare(most=4, parts=1), idle=True, worked=5, failed=1, broken=frozenset({broken}))
    publish(store, "a", report, is_first=True)
    (node,) = store.run(nodes.live_nodes)
    assert decode_report(node.report) == report
    assert decode_report(None) == NodeReport(share=NodeShare(most=0), claims=False)
    publish(store, "a", evolve(report, idle=False))
    assert store.run(node_reports.reports, "a").own == evolve(report, idle=False)
