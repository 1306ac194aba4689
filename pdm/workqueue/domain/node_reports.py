"""What the nodes of a cluster tell each other: signals at once, and reports of limits, idleness and endpoints."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, NamedTuple

from attrs import define, field, frozen

from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.shares import NodeShare, key_of, key_text


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


#: Endpoints that a report names at most.
_MOST_BROKEN = 100


class BrokenEndpoint(NamedTuple):
    """An endpoint that a node cannot reach, and the user with whose credential it has tried."""

    site_id: int
    protocol: JobProtocol
    url: str
    user_id: int


@frozen(kw_only=True)
class NodeReport:
    """A report.

    Attributes:
        idle: whether it could run more, and nothing is due.
        slow: whether its connection to the database is slow, as it measures it.
        claims: whether it is neither drained nor sick; read from its row, not published.
        worked, failed: attempts of the last minute that succeeded, and those that failed by a fault of the node itself.
    """

    share: NodeShare
    idle: bool = False
    slow: bool = False
    claims: bool = True
    worked: int = 0
    failed: int = 0
    broken: frozenset[BrokenEndpoint] = field(factory=frozenset)

    def encode(self) -> dict[str, Any]:
        """As JSON."""
        share = self.share
        return {
            "most": share.most,
            "parts": share.parts,
            "held": {key_text(key): count for key, count in share.held.items()},
            "wanted": {key_text(key): count for key, count in share.wanted.items()},
            "idle": self.idle,
            "slow": self.slow,
            "worked": self.worked,
            "failed": self.failed,
            "broken": [
                [one.site_id, one.protocol.name, one.url, one.user_id] for one in sorted(self.broken)[:_MOST_BROKEN]
            ],
        }


def decode_report(report: Mapping[str, Any] | None, *, claims: bool = True) -> NodeReport:
    """The report of a node; of one that has published none yet, that it has no share."""
    if not report:
        return NodeReport(share=NodeShare(most=0), claims=False)
    share = NodeShare(
        most=report["most"],
        parts=report["parts"],
        held={key_of(text): count for text, count in report["held"].items()},
        wanted={key_of(text): count for text, count in report["wanted"].items()},
    )
    broken = frozenset(
        BrokenEndpoint(site_id, JobProtocol[protocol], url, user_id)
        for site_id, protocol, url, user_id in report["broken"]
    )
    return NodeReport(
        share=share,
        idle=report["idle"],
        # A node of an earlier version does not say.
        slow=report.get("slow", False),
        claims=claims,
        worked=report["worked"],
        failed=report["failed"],
        broken=broken,
    )


#: Attempts are counted for one to two such spans.
_SPAN_S = 30.0


@define(eq=False)
class AttemptTally:
    """Recent attempts here: how many worked, and how many failed by a fault of this service, not of a site."""

    _began_s: float = 0.0
    _before: tuple[int, int] = (0, 0)
    _now: tuple[int, int] = (0, 0)

    def add(self, now_s: float, *, worked: int = 0, failed: int = 0) -> None:
        self._advance(now_s)
        self._now = self._now[0] + worked, self._now[1] + failed

    def counts(self, now_s: float) -> tuple[int, int]:
        """Attempts that worked, and that failed."""
        self._advance(now_s)
        return self._before[0] + self._now[0], self._before[1] + self._now[1]

    def clear(self) -> None:
        self._before = self._now = (0, 0)

    def _advance(self, now_s: float) -> None:
        age_s = now_s - self._began_s
        if age_s >= _SPAN_S:
            self._before = self._now if age_s < 2 * _SPAN_S else (0, 0)
            self._now, self._began_s = (0, 0), now_s
