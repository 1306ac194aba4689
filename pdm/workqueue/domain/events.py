"""Events: what happened to jobs and sites, for those that listen."""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

from attrs import frozen


class EventKind(enum.StrEnum):
    """Kinds of events; the values are shown by the API."""

    #: The status of a job has changed.
    JOB = "job"
    #: The first failure of a job with some code, then the 10th, the 100th ...
    FAILURE = "failure"
    #: Elements of a job are HELD, of which none was before.
    HELD = "held"
    #: No element of a job is HELD any more.
    RESUMED = "resumed"
    #: An endpoint of a site does not work, or works again.
    SITE = "site"
    #: Bytes and files of a running job. Never stored, so it has no id and is not repeated.
    PROGRESS = "progress"

    @classmethod
    def parse(cls, text: str) -> EventKind:
        """The kind with this name.

        Raises:
            ValueError: there is none.
        """
        try:
            return cls(text.lower())
        except ValueError:
            raise ValueError(f"{text[:40]!r} is no kind of event: {', '.join(cls)}") from None


#: What the database has.
STORED_KINDS = frozenset(EventKind) - {EventKind.PROGRESS}


@frozen(eq=False, kw_only=True)
class Event:
    """Something that has happened.

    Attributes:
        id: null for progress, which is not stored.
        job: null for an event of a site; so is ``owner``, the user of the job.
        data: by kind; JSON values.
        order: position among all stored events. They are read in this order, which is that of their ids as long as one
            daemon writes them.
    """

    id: int | None
    at: datetime
    kind: EventKind
    job: int | None
    owner: int | None
    data: Mapping[str, Any]
    order: tuple[int, int] = (0, 0)


@frozen(kw_only=True)
class EventFilter:
    """Which events; None stands for all.

    Attributes:
        owner: only those of this user's jobs, so none of sites.
    """

    owner: int | None = None
    job: int | None = None
    kinds: Collection[EventKind] | None = None

    def matches(self, event: Event) -> bool:
        """Whether it is one of these."""
        return (
            (self.owner is None or self.owner == event.owner)
            and (self.job is None or self.job == event.job)
            and (self.kinds is None or event.kind in self.kinds)
        )


def is_milestone(before: int, after: int) -> bool:
    """Whether an event is written when a count goes from one value to another: at 1, 10, 100, 1000 ..."""
    return after > before and (before == 0 or len(str(after)) > len(str(before)))
