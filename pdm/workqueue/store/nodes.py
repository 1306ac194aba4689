"""Nodes: the daemons that share the database, and what each says of itself.

A node is a row of ``workers``; it is alive while it has a lease. Its name is for people and need not be unique; the
worker's name is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import msgspec
import sqlalchemy as sa
from attrs import frozen
from sqlalchemy.orm import Session

from pdm.workqueue.domain.node_reports import SignalKind
from pdm.workqueue.store import signals
from pdm.workqueue.store.leases import lease_clock
from pdm.workqueue.store.locks import is_shared
from pdm.workqueue.store.records import IS_INCARNATION, columns_of, matched, workers

#: Bytes of a report as JSON, at most; all nodes read those of all others.
MOST_REPORT_BYTES = 64 * 1024
#: How often the clock of the database is asked.
_CLOCK_QUERIES = 3


@frozen(kw_only=True)
class NodeRecord:
    """A daemon that works on this database, or did.

    Attributes:
        id: of the worker's row; elements have it.
        worker: its name in the logs, unique.
        name: `[node] name`; the worker's name if the daemon is of a version without nodes.
        address: URL under which other nodes reach it; None for none.
        host: host and process id, for the operator.
        version: of its program.
        started_at: by the clock that measures leases, as the other times. None for an earlier version.
        seen_at: time of the last renewal.
        drain: why it claims nothing more, by an operator; None while it claims.
        drain_until: then it gives back what still runs; None for never.
        sick: why it claims nothing, by its own checks.
        incarnation: of its last start; empty for an early version.
        report: what it says of itself; its owner knows the keys.
        lease_until: None if its lease was taken away, or it has stopped.
        alive: whether it has a lease.
        running: elements that it runs, where they are counted.
    """

    id: int
    worker: str
    name: str
    incarnation: str
    address: str | None = None
    host: str | None = None
    version: str | None = None
    started_at: datetime | None = None
    seen_at: datetime | None = None
    lease_until: datetime | None
    drain: str | None = None
    drain_until: datetime | None = None
    sick: str | None = None
    report: Mapping[str, Any] | None = None
    alive: bool = True
    running: int = 0


#: Of `NodeRecord`.
NODE_COLUMNS = (
    *columns_of(workers, "id", "address", "host", "version", "started_at", "seen_at", "lease_until"),
    *columns_of(workers, "drain", "drain_until", "sick", "report"),
    workers.c.name.label("worker"),
    sa.func.coalesce(workers.c.node, workers.c.name).label("name"),
    sa.func.coalesce(workers.c.incarnation, "").label("incarnation"),
)
_IS_LIVE = {
    True: workers.c.lease_until > sa.func.clock_timestamp(),
    # On SQLite, a lease ends only when it is taken away.
    False: workers.c.lease_until.is_not(None),
}
_LIVE = {
    shared: sa.select(*NODE_COLUMNS).where(is_live, workers.c.incarnation.is_not(None)).order_by(workers.c.id)
    for shared, is_live in _IS_LIVE.items()
}


def live_nodes(session: Session) -> list[NodeRecord]:
    """All nodes with a lease, in the order in which their instances were first registered."""
    return [NodeRecord(**row._mapping) for row in session.execute(_LIVE[is_shared(session)])]


_WRITE_REPORT = sa.update(workers).where(IS_INCARNATION).values(report=sa.bindparam("new_report", type_=sa.JSON()))


def write_report(session: Session, incarnation: str, report: Mapping[str, Any]) -> bool:
    """Store what a node says of itself; False if the incarnation has been replaced.

    Raises:
        ValueError: it is longer than `MOST_REPORT_BYTES`.
    """
    if len(msgspec.json.encode(report)) > MOST_REPORT_BYTES:
        raise ValueError(f"a report of a node has at most {MOST_REPORT_BYTES} bytes")
    return matched(session, _WRITE_REPORT, {"of_incarnation": incarnation, "new_report": report}) > 0


def set_drain(session: Session, number: int, message: str | None, until: datetime | None = None) -> bool:
    """Drain a node, or end that (``message`` None); False if there is no such worker.

    ``number``: `NodeRecord.id`. ``until``: when it gives back what still runs, by the clock that measures leases.
    """
    drain = (
        sa.update(workers)
        .where(workers.c.id == number)
        .values(drain=message, drain_until=None if message is None else until)
    )
    return matched(session, drain) > 0


def set_sick(session: Session, incarnation: str, reason: str | None) -> bool:
    """Store why a node claims nothing, or that it is healthy (None); False if the incarnation has been replaced."""
    sick = sa.update(workers).where(IS_INCARNATION).values(sick=reason)
    for kind in (SignalKind.NODES, SignalKind.REPORT):
        signals.note(session, kind)
    return matched(session, sick, {"of_incarnation": incarnation}) > 0


_NEXT_END_S = sa.select(sa.func.extract("epoch", sa.func.min(workers.c.lease_until) - sa.func.clock_timestamp())).where(
    workers.c.incarnation != sa.bindparam("of_incarnation")
)


def seconds_to_next_end(session: Session, worker: str) -> float | None:
    """Seconds until the first lease of another incarnation ends unless it is renewed; None if none has one.

    Only for a shared database.
    """
    left_s = session.scalar(_NEXT_END_S, {"of_incarnation": worker})
    return None if left_s is None else float(left_s)


def round_trip_s(session: Session) -> float:
    """Seconds that the smallest statement takes, there and back."""
    # The first one begins the transaction.
    for _ in range(2):
        began = time.perf_counter()
        session.execute(_NOTHING)
    return time.perf_counter() - began


_NOTHING: sa.Select[tuple[int]] = sa.select(sa.literal(1))


def clock_error_s(session: Session, clock: Callable[[], datetime]) -> float:
    """Seconds by which a clock is ahead of the database's (negative: behind), at least.

    The duration of the query counts for the clock. Only for a shared database.
    """
    errors = []
    # The shortest query says most.
    for _ in range(_CLOCK_QUERIES):
        before = clock()
        there = lease_clock(session, before)
        after = clock()
        ahead_s, behind_s = (before - there).total_seconds(), (there - after).total_seconds()
        errors.append(ahead_s if ahead_s > 0 else -max(behind_s, 0.0))
    return min(errors, key=abs)
