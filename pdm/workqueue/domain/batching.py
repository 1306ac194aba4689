"""How many elements go to an agent at once: by the seconds that their work takes, never by a fixed number.

A batch that is over at once costs more to hand out than to carry out; one that takes long lets other agents wait at the
end of a job, and loses more when its agent dies. Large files need no rule of their own here: a batch is also bounded
in bytes, and one larger file goes alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from pdm.workqueue.domain.enums import JobProtocol, JobType
from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.domain.jobs import JobRecord

#: Elements of the first batch of its kind.
FIRST_SIZE = 64
#: Seconds that a batch shall take.
WANTED_S = 2.0
#: The least share of a batch: what is left of a job is not split finer than this between agents.
LEAST_SHARE = 16
#: From this attempt on, an element whose last one crashed is handed out alone: what happens is then its own doing.
_ALONE_FROM = 3


class WorkKind(NamedTuple):
    """Work of which one element takes about as long as another of its size."""

    protocol: JobProtocol
    type: JobType
    src_siteid: int
    dst_siteid: int | None


def kind_of(job: JobRecord) -> WorkKind:
    """The kind of a job's work."""
    return WorkKind(job.protocol, job.type, job.src_siteid, job.dst_siteid)


def next_size(size: int, elements: int, seconds: float, most: int) -> int:
    """How many elements the next batch of a kind may have.

    Args:
        size: how many this one might have had.
        elements: how many it had.
        seconds: how long it took.
        most: never more than this.

    Returns:
        Twice as many if a whole batch would have ended in less than half of `WANTED_S`; as many as are done in that
        time if this one took longer; else as many as before.
    """
    if seconds > WANTED_S:
        return min(max(int(elements * WANTED_S / seconds), 1), most)
    # Too few elements say little about many: most of their time may be the way there and back.
    says_something = elements * 4 >= size
    if says_something and seconds * size / elements < WANTED_S / 2:
        return min(size * 2, most)
    return min(size, most)


def fair_share(waiting: int, batches: int) -> int:
    """How many of some waiting elements one batch may take, so that there is something for all agents to the end.

    Args:
        waiting: elements that could go into it.
        batches: how many there may be at once.
    """
    return max(math.ceil(waiting / max(batches, 1)), LEAST_SHARE)


def goes_alone(attempts: int, last_code: str | None) -> bool:
    """Whether an element is kept away from others, because agents die with it.

    Args:
        attempts: begun so far.
        last_code: why the last one failed.
    """
    return attempts + 1 >= _ALONE_FROM and last_code == FailureCode.CRASHED.value
