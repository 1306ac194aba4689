"""What the nodes of a cluster tell each other at once, beside the database."""

from __future__ import annotations

import enum

from attrs import frozen


class SignalKind(enum.StrEnum):
    """What has changed in the database."""

    #: There may be work that its sender leaves to others.
    WORK = "work"
    #: A job was cancelled; without a job, several.
    CANCEL = "cancel"
    #: A job is held; without a job, several.
    HOLD = "hold"
    #: Sites or restrictions.
    SITES = "sites"
    #: There are new events.
    EVENTS = "events"
    #: A node has come or gone, or is drained.
    NODES = "nodes"
    #: A node has written a report.
    REPORT = "report"


@frozen
class Signal:
    """A change, as other nodes hear of it.

    Signals may be lost and may come late; nodes that miss one find the change when they next look at the database.

    Attributes:
        by: incarnation of the node that has made the change.
        job: the job that is concerned, if it is one.
    """

    kind: SignalKind
    by: str
    job: int | None = None
