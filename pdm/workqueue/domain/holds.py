"""What people change of a job that exists: hold it, resume it, its priority, how much of it may run at once."""

from __future__ import annotations

import enum
from datetime import datetime

from attrs import frozen

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
