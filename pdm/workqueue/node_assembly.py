"""Third part of the composition root: what this daemon and the other nodes of the service are to each other."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from attrs import frozen

from pdm.workqueue import __version__
from pdm.workqueue.certificates.nodes import NodeTls
from pdm.workqueue.certificates.pem import CertificateFilesError
from pdm.workqueue.config.reader import ConfigError
from pdm.workqueue.config.settings import Settings
from pdm.workqueue.domain.node_reports import SignalKind
from pdm.workqueue.execution.batch_verdicts import Ending
from pdm.workqueue.execution.cluster import ClusterLogs, ClusterProgress
from pdm.workqueue.execution.draining import Drain
from pdm.workqueue.execution.node_shares import NodeShares
from pdm.workqueue.execution.peers import Peers
from pdm.workqueue.execution.sick_node import SickNode
from pdm.workqueue.execution.signals import SignalListener
from pdm.workqueue.http.endpoints import ROOT
from pdm.workqueue.store.leases import WorkerIdentity

if TYPE_CHECKING:
    from pdm.workqueue.assembly import Assembly


def worker_identity(settings: Settings, name: str, incarnation: str) -> WorkerIdentity:
    """This daemon among those that share its database."""
    host = socket.gethostname()
    return WorkerIdentity(
        name=name,
        incarnation=incarnation,
        host=f"{host}, pid {os.getpid()}",
        node=settings.node.name or host,
        address=settings.node.address,
        version=__version__,
    )


@frozen(kw_only=True)
class NodeParts:
    """The parts of a daemon that concern the other nodes of the service, and its drain."""

    tls: NodeTls
    peers: Peers
    progress: ClusterProgress
    logs: ClusterLogs
    drain: Drain

    async def is_node(self, transport: Any) -> bool:
        """Whether the peer of a connection is a node, by its certificate."""
        hosts = self.tls.hosts_of(transport)
        return bool(hosts) and await self.peers.is_node(hosts)

    def wait_reasons(self) -> list[str]:
        """Why nothing is started at all, a sentence; only where no other node could start it."""
        message = None if self.peers.database.is_shared else self.drain.message
        return [] if message is None else [f"an operator has drained the service: {message}"]

    def nodes_changed(self, _job: int | None = None) -> None:
        """A node has come or gone, or is drained."""
        self.peers.forget_nodes()
        self.drain.look_soon()


def node_parts(parts: Assembly, *, reactor: Any, settings: Settings, clock: Callable[[], datetime]) -> NodeParts:
    """What this daemon needs of other nodes: their progress and logs, and their signals.

    Raises:
        ConfigError: the authorities of nodes cannot be used.
    """
    worker, database = parts.lease.worker, parts.database
    try:
        node_tls = NodeTls(parts.tls, settings.node.peers_trust, settings.tls.signing_policy)
    except CertificateFilesError as error:
        raise ConfigError(f"{settings.source}: {error}") from error

    # These are called when the executor and the claimer exist.
    def requeue_not_begun() -> None:
        parts.executor.requeue_not_begun()

    async def requeue_all() -> None:
        await parts.claimer.claims_over()
        await parts.executor.end_all(Ending.DRAINED)

    def resumed() -> None:
        parts.claimer.work_added()

    peers = Peers(reactor=reactor, database=database, incarnation=worker.incarnation, policy=node_tls.policy, root=ROOT)
    most = settings.logs.head_bytes + settings.logs.tail_bytes
    nodes = NodeParts(
        tls=node_tls,
        peers=peers,
        progress=ClusterProgress(board=parts.board, peers=peers),
        logs=ClusterLogs(store=parts.logs, peers=peers, worker=worker.name, most=most),
        drain=Drain(
            reactor=reactor,
            database=database,
            clock=clock,
            incarnation=worker.incarnation,
            requeue_not_begun=requeue_not_begun,
            requeue_all=requeue_all,
            on_resume=resumed,
        ),
    )
    parts.signals.subscribe(SignalKind.NODES, nodes.nodes_changed)
    return nodes


def sick_node(parts: Assembly, *, reactor: Any) -> SickNode:
    """What this daemon says to the other nodes when it is sick."""
    return SickNode(
        reactor=reactor,
        database=parts.database,
        incarnation=parts.lease.worker.incarnation,
        lease=parts.lease,
        service_health=parts.service_health,
        executor=parts.executor,
    )


def node_shares(parts: Assembly, *, reactor: Any, clock: Callable[[], datetime]) -> NodeShares:
    """This daemon's shares of limits that all nodes have together."""
    return NodeShares(
        reactor=reactor,
        clock=clock,
        database=parts.database,
        incarnation=parts.lease.worker.incarnation,
        lease=parts.lease,
        streams=parts.streams,
        executor=parts.executor,
        health=parts.site_directory.health,
        service_health=parts.service_health,
        claimer=parts.claimer,
        signals=parts.signals,
    )


def connect_lease(parts: Assembly) -> None:
    """Have the lease compare the claims of this daemon with the database, and the parts act on what it finds."""
    parts.lease.connect(
        known=lambda: parts.executor.attempts() | parts.settler.attempts(),
        claims_over=parts.claimer.claims_over,
        on_lost=partial(parts.executor.end_all, Ending.LOST),
        on_cancelled=parts.executor.cancel,
        on_work=parts.claimer.wake,
        on_counted=parts.settler.add_up,
    )
    parts.lease.on_renewed.append(parts.pool.hold_lease)


def subscribe(signals: SignalListener, parts: Assembly) -> None:
    """Have the parts act at once on what other nodes change, and tell the others of work that this one leaves."""

    def cancelled(job_id: int | None) -> None:
        if job_id is None:
            parts.lease.find_cancelled()
        else:
            parts.executor.cancelled_elsewhere(job_id)

    signals.subscribe(SignalKind.WORK, lambda _: parts.claimer.offered())
    signals.subscribe(SignalKind.CANCEL, cancelled)
    signals.subscribe(SignalKind.HOLD, parts.executor.held_elsewhere)
    signals.subscribe(SignalKind.SITES, lambda _: parts.site_directory.changed_elsewhere())
    signals.subscribe(SignalKind.EVENTS, lambda _: parts.feed.written_elsewhere())
    parts.claimer.offer = lambda: signals.send([(SignalKind.WORK, None)])
