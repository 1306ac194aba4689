"""Which protocol reaches which end of a copy: a job names one, the destination may have another."""

from __future__ import annotations

from collections.abc import Collection

from pdm.workqueue.domain.enums import JobProtocol


def protocol_at(
    offered: Collection[JobProtocol], asked: JobProtocol, relays_to: Collection[JobProtocol]
) -> JobProtocol | None:
    """The protocol for the destination of a copy.

    Args:
        offered: by the destination.
        asked: the job's, by which the source is read.
        relays_to: where the job's mover can write to besides.

    Returns:
        The job's own where it is offered; else the one of lowest number that is offered and can be written to; None
        if there is none.
    """
    if asked in offered:
        return asked
    return min((protocol for protocol in offered if protocol in relays_to), default=None)
