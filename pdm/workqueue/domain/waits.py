"""Elements that are HELD while something outside is on its way, which the service polls: files of a tape system.

A *wait* is a group of at most `MOST_IN_WAIT` elements of one job that are asked about together. One row of the database
has it; one daemon at a time visits it, at its ``due_at``.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType

from attrs import frozen

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope

#: Elements of one wait, and so paths of one request.
MOST_IN_WAIT = 1000


class WaitKind(enum.StrEnum):
    """What elements wait for."""

    #: The source is brought from tape to disk.
    STAGE = "STAGE"
    #: What was written to the destination is brought to tape.
    ARCHIVE = "ARCHIVE"


class WaitPhase(enum.StrEnum):
    """How far a wait is. Each change is stored before the next request is sent."""

    #: Collects elements of its job, and is split into waits that are asked about.
    GATHER = "GATHER"
    #: Where the files are is not known yet.
    LOOK = "LOOK"
    #: The files are to be requested.
    ASK = "ASK"
    #: The request may have been sent; its answer is not known.
    UNSURE = "UNSURE"
    #: The request is accepted, or there is nothing to request.
    POLL = "POLL"


#: What an element is HELD with while it is part of a wait.
HOLDS: Mapping[WaitKind, AttemptFailure] = MappingProxyType(
    {
        WaitKind.STAGE: AttemptFailure(
            FailureScope.SOURCE, FailureCode.STAGING, "it waits until the source site has it on disk"
        ),
        WaitKind.ARCHIVE: AttemptFailure(
            FailureScope.DESTINATION,
            FailureCode.ARCHIVING,
            "it is copied, and waits until the destination has it on tape",
        ),
    }
)
#: Codes of elements that a poll puts back into the queue, not a new credential.
POLLED_CODES = frozenset(hold.code for hold in HOLDS.values())


@frozen
class Wait:
    """A wait as the database knows it.

    Attributes:
        site_id: the site that is asked.
        request: what the site calls the request; None where there is none.
        deadline: when elements that still wait fail.
        turn: number of this visit; a later visit has another one, and this one writes nothing then.
        polls: visits since something has changed.
        errors: visits in a row that got no answer.
    """

    id: int
    job_id: int
    user_id: int
    kind: WaitKind
    phase: WaitPhase
    site_id: int
    request: str | None
    deadline: datetime
    turn: int
    polls: int
    errors: int


@frozen
class WaitingElement:
    """An element of a wait.

    Attributes:
        path: at the site that is asked.
        ready: whether the request has brought its file to disk.
    """

    id: int
    status: JobStatus
    code: FailureCode | None
    path: str
    ready: bool

    def waits_for(self, kind: WaitKind) -> bool:
        """Whether it is HELD for this kind of wait."""
        return self.status is JobStatus.HELD and self.code is HOLDS[kind].code


@frozen(kw_only=True)
class WaitPolicy:
    """Times of waits, in seconds.

    Attributes:
        poll_s: until the first poll; each poll without a change lengthens it by half.
        longest_poll_s: upper bound of that.
        stage_timeout_s: for staging, where a job says nothing else.
        archive_timeout_s: for archiving, likewise.
        lifetime_s: for which staged files are to stay on disk, likewise.
    """

    poll_s: float = 10.0
    longest_poll_s: float = 300.0
    stage_timeout_s: float = 2 * 86400.0
    archive_timeout_s: float = 2 * 86400.0
    lifetime_s: float = 86400.0

    def pause_s(self, polls: int) -> float:
        """Seconds until the next poll after so many without a change."""
        return min(self.poll_s * 1.5 ** min(polls, 60), self.longest_poll_s)
