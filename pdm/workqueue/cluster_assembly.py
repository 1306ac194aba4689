"""Third part of the composition root: this daemon as a node among those that share its database."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

from pdm.workqueue import __version__
from pdm.workqueue.config.settings import Settings
from pdm.workqueue.domain.signals import SignalKind
from pdm.workqueue.execution.signals import SignalListener
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


def subscribe(signals: SignalListener, parts: Assembly) -> None:
    """Have the parts act at once on what other nodes change, and tell the others of work that this one leaves."""

    def cancelled(job_id: int | None) -> None:
        if job_id is None:
            parts.lease.find_cancelled()
        else:
            parts.executor.cancelled_elsewhere(job_id)

    signals.subscribe(SignalKind.WORK, lambda _: parts.claimer.offered())
    signals.subscribe(SignalKind.CANCEL, cancelled)
    signals.subscribe(SignalKind.SITES, lambda _: parts.site_directory.changed_elsewhere())
    signals.subscribe(SignalKind.EVENTS, lambda _: parts.feed.written_elsewhere())
    parts.claimer.offer = lambda: signals.send([(SignalKind.WORK, None)])
