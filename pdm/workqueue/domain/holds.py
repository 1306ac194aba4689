"""What is HELD: jobs that people hold, resume or change, and elements that wait for something outside, such as tape.

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

#: Stands for a hold by a person where elements that are HELD have a `FailureCode`.
HOLD_CODE = "ON_HOLD"


class HoldBy(enum.StrEnum):
    """Who holds a job, or lets it go on."""

    OWNER = "owner"
    OPERATOR = "operator"
    #: The service: at the end of the hold, or once what was missing is there.
    SERVICE = "service"


@frozen(kw_only=True)
class JobHold:
    """A job is held by a person: nothing more of it is claimed until it is resumed.

    Attributes:
        by: its owner, or an operator, whose hold only operators end.
        subject: of that user.
        message: why, for people; empty if they did not say.
        since: UTC; so is ``until``, when it is resumed by itself; None for never.
    """

    by: HoldBy
    subject: str
    message: str
    since: datetime
    until: datetime | None = None

    @property
    def sentence(self) -> str:
        """Who holds the job, why, and until when; without a full stop."""
        who = "its owner" if self.by is HoldBy.OWNER else f"an operator ({self.subject})"
        until = "it is resumed" if self.until is None else f"{self.until:%Y-%m-%dT%H:%M:%SZ}"
        why = f": {self.message}" if self.message else ""
        return f"{who} holds it, since {self.since:%Y-%m-%dT%H:%M:%SZ} and until {until}{why}"

    @property
    def hint(self) -> str:
        """What can be done about it."""
        if self.by is HoldBy.OPERATOR:
            return "What runs ends by itself; an operator resumes the job, and its owner can cancel it."
        return "What runs ends by itself; the rest begins once the job is resumed."


class Unchanged(enum.Enum):
    """Stands for a value that stays, where None is a value."""

    UNCHANGED = enum.auto()


@frozen(kw_only=True)
class JobEdit:
    """What is changed of a job that exists; a value that is not given (`UNCHANGED`) stays.

    Attributes:
        max_active: None for no limit of its own.
    """

    priority: int | None = None
    max_active: int | Unchanged | None = Unchanged.UNCHANGED


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
