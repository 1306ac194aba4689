"""How long a copy will take, from the speed of earlier copies of its route; and what may stop it before its end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from attrs import frozen

from pdm.workqueue.domain.progress import time_left


@frozen
class FinishedCopy:
    """What one copy has moved: bytes, elements, and the seconds that it took."""

    bytes_moved: int
    elements: int
    seconds: float


@frozen
class RouteSpeed:
    """Speed of earlier copies of a route.

    Attributes:
        jobs: number of copies that it was taken from.
        bytes_per_second: half of all bytes were moved at least so fast.
        files_per_second: half of all elements ended at least so fast.
    """

    jobs: int
    bytes_per_second: float | None
    files_per_second: float | None

    def seconds(self, size: int, files: int) -> float | None:
        """Seconds for so many bytes and files: the slower of both decides; None if that is not known."""
        return time_left(size, self.bytes_per_second, files, self.files_per_second)


def route_speed(copies: Sequence[FinishedCopy]) -> RouteSpeed | None:
    """The speed of some copies of one route; None if there are none.

    Each copy has an average rate of bytes and one of elements, and only one of them was its limit: a copy of large
    files says nothing about files per second. So a copy counts with the bytes, or the elements, that it has moved.
    """
    timed = [copy for copy in copies if copy.seconds > 0]
    if not timed:
        return None
    return RouteSpeed(
        len(timed),
        _weighted_median((copy.bytes_moved / copy.seconds, copy.bytes_moved) for copy in timed),
        _weighted_median((copy.elements / copy.seconds, copy.elements) for copy in timed),
    )


def _weighted_median(rates: Iterable[tuple[float, int]]) -> float | None:
    """The rate that at least half of the weight reaches; None if there is no weight."""
    fastest_first = sorted(((rate, weight) for rate, weight in rates if weight > 0), reverse=True)
    total = sum(weight for _, weight in fastest_first)
    reached = 0
    for rate, weight in fastest_first:
        reached += weight
        if 2 * reached >= total:
            return rate
    return None
