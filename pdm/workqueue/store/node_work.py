"""Which nodes there are and were, what they run, and how operators drain them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from attrs import frozen
from sqlalchemy.orm import Session

from pdm.workqueue.domain.node_reports import SignalKind
from pdm.workqueue.domain.sites import Actor
from pdm.workqueue.store import signals, users
from pdm.workqueue.store.leases import lease_clock
from pdm.workqueue.store.nodes import NODE_COLUMNS, NodeRecord, set_drain
from pdm.workqueue.store.records import IS_INCARNATION, elements, workers
from pdm.workqueue.WorkqueueDB import IS_RUNNING

_RUNNING = (
    sa.select(elements.c.worker_id, sa.func.count().label("running"))
    .where(sa.text(IS_RUNNING))
    .group_by(elements.c.worker_id)
)
_NODES = sa.select(*NODE_COLUMNS)


def node_states(session: Session, now: datetime) -> Sequence[NodeRecord]:
    """All nodes by name, those that have a lease first."""
    running: dict[Any, int] = {row.worker_id: row.running for row in session.execute(_RUNNING)}
    found = _states(session, _NODES, now, running)
    return sorted(found, key=lambda node: (not node.alive, node.name, node.id))


def nodes_named(session: Session, name: str, now: datetime) -> Sequence[NodeRecord]:
    """Nodes with a name, or with it as the unique name of their worker; without the number of elements that they run.

    Of nodes with the same name those with a lease, or if there is none the one that was seen last.
    """
    wanted = _NODES.where(sa.or_(workers.c.name == name, workers.c.node == name))
    found = _states(session, wanted, now, {})
    exact = [node for node in found if node.worker == name]
    alive = [node for node in found if node.alive]
    dead = sorted(found, key=lambda node: (node.seen_at is not None, node.seen_at, node.id))
    return exact or alive or dead[-1:]


def _states(
    session: Session, statement: sa.Select[Any], now: datetime, running: dict[Any, int]
) -> Sequence[NodeRecord]:
    timestamp = lease_clock(session, now)
    return [
        NodeRecord(
            **row._mapping,
            alive=row.lease_until is not None and row.lease_until > timestamp,
            running=running.get(row.id, 0),
        )
        for row in session.execute(statement)
    ]


def node_name(session: Session, worker: str) -> str:
    """The name for people of a worker; its own if nothing is known of it."""
    found: str | None = session.scalar(sa.select(workers.c.node).where(workers.c.name == worker))
    return found or worker


def workers_of_job(session: Session, job_id: int) -> dict[str, str]:
    """Workers that run elements of a job, those without a lease too → their names for people."""
    ids = sa.select(elements.c.worker_id).where(sa.text(IS_RUNNING), elements.c.job_id == job_id).distinct()
    names = sa.select(workers.c.name, sa.func.coalesce(workers.c.node, workers.c.name).label("shown"))
    return {row.name: row.shown for row in session.execute(names.where(workers.c.id.in_(ids)))}


def workers_of_elements(session: Session, job_id: int, numbers: Collection[int]) -> dict[int, str]:
    """Running elements among some of a job → names of their workers."""
    found = session.execute(
        sa.select(elements.c.id, workers.c.name)
        .join_from(elements, workers, elements.c.worker_id == workers.c.id)
        .where(sa.text(IS_RUNNING), elements.c.job_id == job_id, elements.c.id.in_(numbers))
    )
    return {row.id: row.name for row in found}


def jobs_of_workers(session: Session, names: Collection[str], most: int) -> Sequence[int]:
    """Jobs of which some workers run elements; at most so many."""
    ids = sa.select(workers.c.id).where(workers.c.name.in_(names))
    found = sa.select(elements.c.job_id).where(sa.text(IS_RUNNING), elements.c.worker_id.in_(ids))
    return session.scalars(found.distinct().limit(most)).all()


def change_drain(
    session: Session, node: NodeRecord, message: str | None, until: datetime | None, by: Actor, now: datetime
) -> bool:
    """Drain a node, or end that (``message`` None), and write the audit record; False if nothing changes."""
    if (message, until) == (node.drain, node.drain_until) or not set_drain(session, node.id, message, until):
        return False
    action, details = ("node.resume", "") if message is None else ("node.drain", message)
    if until is not None:
        details += f" (until {until:%Y-%m-%dT%H:%M:%SZ})"
    signals.note(session, SignalKind.NODES)
    users.record_action(session, by, action, f"node {node.name} ({node.worker})", details, now)
    return True


@frozen
class DrainOrder:
    """How a node is drained.

    Attributes:
        left_s: seconds until it gives back what runs; None for never.
    """

    message: str
    left_s: float | None


def drain_of(session: Session, incarnation: str, now: datetime) -> DrainOrder | None:
    """How a node is drained; None if it is not."""
    found = session.execute(
        sa.select(workers.c.drain, workers.c.drain_until).where(IS_INCARNATION, workers.c.drain.is_not(None)),
        {"of_incarnation": incarnation},
    ).one_or_none()
    if found is None:
        return None
    left = None if found.drain_until is None else (found.drain_until - lease_clock(session, now)).total_seconds()
    return DrainOrder(found.drain, left)
