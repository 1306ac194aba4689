"""The reports of nodes: read by all, and published one at a time, so that shares of limits never overlap."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import sqlalchemy as sa
from attrs import evolve, frozen
from sqlalchemy.orm import Session

from pdm.workqueue.domain.limits import LimitKey
from pdm.workqueue.domain.node_reports import NodeReport, SignalKind, decode_report
from pdm.workqueue.domain.shares import LimitOf, increased
from pdm.workqueue.store import nodes, signals
from pdm.workqueue.store.records import workers

#: Advisory lock of a node that publishes a report. Any constant number.
_PUBLISH_LOCK = 7_236_914_250_118_403
_TRY_LOCK = sa.select(sa.func.pg_try_advisory_xact_lock(_PUBLISH_LOCK))


@frozen
class Reports:
    """Reports of the nodes.

    Attributes:
        own: of the asking node; None without a lease, or if its report was dropped.
        others: of all others that take part in shares.
    """

    own: NodeReport | None
    others: Sequence[NodeReport]


def reports(session: Session, incarnation: str) -> Reports:
    """All reports. Daemons of a version without nodes publish none, and keep the limits for themselves."""
    found = [node for node in nodes.live_nodes(session) if node.version is not None]
    own = next((node.report for node in found if node.incarnation == incarnation), None)
    others = [_report_of(node) for node in found if node.incarnation != incarnation]
    return Reports(decode_report(own) if own else None, others)


def _report_of(node: nodes.NodeRecord) -> NodeReport:
    return decode_report(node.report, claims=node.sick is None and node.drain is None)


class PublishingElsewhereError(Exception):
    """Another node publishes its report at the same time."""


def publish(
    session: Session,
    incarnation: str,
    report: NodeReport,
    busy: Collection[LimitKey],
    limit_of: LimitOf,
    *,
    is_first: bool,
) -> Reports:
    """Publish a report, with as much of the limits as others leave of what the node wants.

    ``busy``: keys of which the node has claimed something. ``is_first``: whether the node has no share yet.
    Otherwise its former report must still be there: others drop it once its lease has ended.

    Returns:
        What is published now; without an own report, the node has no share.

    Raises:
        PublishingElsewhereError: nothing was done; try again.
    """
    if not session.scalar(_TRY_LOCK):
        raise PublishingElsewhereError
    live = nodes.live_nodes(session)
    own = next((node for node in live if node.incarnation == incarnation), None)
    others = [_report_of(node) for node in live if node.version is not None and node is not own]
    if own is None or (own.report is None and not is_first):
        return Reports(None, others)
    # A node whose lease ended may be suspended, and come back: it must notice that others have its share.
    session.execute(_DROP, {"live": [node.id for node in live]})
    share = increased(report.share, [other.share for other in others], busy, limit_of)
    published = evolve(report, share=share)
    nodes.write_report(session, incarnation, published.encode())
    signals.note(session, SignalKind.REPORT)
    return Reports(published, others)


_DROP = (
    sa.update(workers)
    .where(workers.c.report.is_not(None), workers.c.id.not_in(sa.bindparam("live", expanding=True)))
    .values(report=sa.null())
)
