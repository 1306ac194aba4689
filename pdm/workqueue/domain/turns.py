"""Whose turn it is: weighted turns between users, measured in the work that each was given.

Start-time fair queueing. Each user has a time of their own, which goes on by the work that they are given, divided by
their weight; who is behind comes next. Who comes back after a pause begins where the others are: nobody saves up turns,
and nobody pays for the time when there was nobody else.
"""

from __future__ import annotations

from collections.abc import Mapping

from attrs import define, field

#: Users that are remembered; the ones behind all others lose nothing when they are forgotten.
_MOST_REMEMBERED = 10_000


def work_in(elements: int, size: int, total_bytes: int, batch_bytes: int) -> float:
    """How much work a batch is; a full one is 1, a large file more.

    Args:
        elements: of the batch.
        size: how many elements of its kind make a full one.
        total_bytes: of all its elements.
        batch_bytes: how many make a full one.
    """
    return max(elements / max(size, 1), total_bytes / max(batch_bytes, 1))


@define
class Turns:
    """Who was given how much.

    Attributes:
        weights: user → share compared to others; 1 for those who are not named.
    """

    weights: Mapping[int, float] = field(factory=dict)
    _times: dict[int, float] = field(factory=dict)
    _now: float = 0.0

    def weight(self, user: int) -> float:
        return self.weights.get(user, 1.0)

    def time_of(self, user: int) -> float:
        """Who has the least comes next."""
        return max(self._times.get(user, 0.0), self._now)

    def give(self, user: int, work: float) -> None:
        """Count work that a user is given."""
        self._now = self.time_of(user)
        self._times[user] = self._now + work / self.weight(user)
        if len(self._times) > _MOST_REMEMBERED:
            self._times = {other: time for other, time in self._times.items() if time > self._now}

    def copy(self) -> Turns:
        """The same, to be tried out."""
        return Turns(self.weights, dict(self._times), self._now)
