"""Nodes: what each daemon says of itself, as all others read it; both databases."""

from __future__ import annotations

from datetime import timedelta

import pytest
from attrs import evolve

from pdm.workqueue.store import leases, nodes
from pdm.workqueue.store.leases import WorkerIdentity
from tests.store.stores import Store

LEASE_S = 15.0
_NODE = WorkerIdentity("w1", "first", "directory", "host 1, pid 1", "one", "https://one:8443", "1.2")


def test_a_node_is_a_daemon_with_a_live_lease(store: Store) -> None:
    store.run(leases.register_worker, _NODE, store.now, LEASE_S)
    # As the version before it registers.
    store.run(leases.register_worker, WorkerIdentity("w2", "second"), store.now, LEASE_S)
    one, two = store.run(nodes.live_nodes)
    assert (one.worker, one.name, one.address, one.version) == ("w1", "one", "https://one:8443", "1.2")
    assert (two.worker, two.name, two.address, two.version) == ("w2", "w2", None, None)
    assert one.lease_until is not None
    assert one.started_at == one.seen_at == one.lease_until - timedelta(seconds=LEASE_S)
    store.run(leases.give_up_lease, "second")
    assert [each.name for each in store.run(nodes.live_nodes)] == ["one"]


def test_a_renewal_is_seen(store: Store) -> None:
    store.run(leases.register_worker, _NODE, store.now, LEASE_S)
    (before,) = store.run(nodes.live_nodes)
    store.now += timedelta(seconds=5)
    store.run(leases.renew, "first", store.now, LEASE_S)
    (after,) = store.run(nodes.live_nodes)
    assert before.seen_at is not None
    assert after.seen_at is not None
    assert after.seen_at > before.seen_at == after.started_at


def test_what_a_node_says_of_itself_ends_with_its_run_and_a_drain_does_not(store: Store) -> None:
    store.run(leases.register_worker, _NODE, store.now, LEASE_S)
    (node,) = store.run(nodes.live_nodes)
    until = store.now + timedelta(hours=1)
    assert store.run(nodes.write_report, "first", {"running": {"7": 2}})
    assert store.run(nodes.set_sick, "first", "no helper starts")
    assert store.run(nodes.set_drain, node.id, "new kernel", until)
    (node,) = store.run(nodes.live_nodes)
    assert (node.report, node.sick) == ({"running": {"7": 2}}, "no helper starts")
    assert (node.drain, node.drain_until) == ("new kernel", until)
    store.run(leases.register_worker, evolve(_NODE, incarnation="again"), store.now, LEASE_S)
    (node,) = store.run(nodes.live_nodes)
    assert (node.report, node.sick, node.drain) == (None, None, "new kernel")
    assert not store.run(nodes.write_report, "first", {})
    assert not store.run(nodes.set_sick, "first", None)
    assert store.run(nodes.set_drain, node.id, None, until)
    (node,) = store.run(nodes.live_nodes)
    assert (node.drain, node.drain_until) == (None, None)
    assert not store.run(nodes.set_drain, node.id + 1, "no such node")


def test_a_report_is_bounded(store: Store) -> None:
    store.run(leases.register_worker, _NODE, store.now, LEASE_S)
    with pytest.raises(ValueError, match="at most 65536 bytes"):
        store.run(nodes.write_report, "first", {"text": "x" * 65536})
