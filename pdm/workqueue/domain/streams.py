"""What is limited: streams of work at once, by route, by site in and out, by user and by job.

A stream is an agent that carries out batches one after the other. A batch takes its *place* in the ledger when it is
claimed; it runs once it has a stream of its own, or when it takes over the stream of the batch before it on the same
agent. Listings are not counted: they wait for no copy.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import NamedTuple

from attrs import define, field, frozen

from pdm.workqueue.domain.jobs import Batch, JobRecord

#: More than there are agents.
NO_LIMIT = 2**31


class Limited(enum.StrEnum):
    """By what streams are counted."""

    ROUTE = "route"
    INTO = "into a site"
    OUT_OF = "out of a site"
    USER = "user"
    JOB = "job"


Key = tuple[Limited, Hashable]


class Route(NamedTuple):
    """From where to where; without a destination, the one place where something is changed."""

    source: int
    destination: int | None

    def limited_by(self) -> tuple[Key, ...]:
        """What a stream on it counts for; where there is one site only, it counts as going into that."""
        if self.destination is None:
            return ((Limited.ROUTE, self), (Limited.INTO, self.source))
        return ((Limited.ROUTE, self), (Limited.OUT_OF, self.source), (Limited.INTO, self.destination))


def route_of(job: JobRecord) -> Route:
    """The route of a job's work."""
    return Route(job.src_siteid, job.dst_siteid)


def common_keys(job: JobRecord) -> tuple[Key, ...]:
    """What a batch of a job counts for, beside the job: the same for all jobs that may share it."""
    return ((Limited.USER, job.user_id), *route_of(job).limited_by())


def batch_keys(batch: Batch) -> frozenset[Key]:
    """All that a batch counts for."""
    return frozenset([*common_keys(batch.job), *((Limited.JOB, number) for number in batch.jobs)])


@frozen
class Openings:
    """How many batches more may be claimed.

    Attributes:
        left: for what is named here.
        otherwise: for all others of a kind; kinds that are not named have no limit.
    """

    left: Mapping[Key, int] = field(factory=dict)
    otherwise: Mapping[Limited, int] = field(factory=dict)

    def of(self, key: Key) -> int:
        return self.left.get(key, self.otherwise.get(key[0], NO_LIMIT))


class Ledger:
    """Counts streams and the batches that wait for one.

    Args:
        limit_of: how many streams there may be at once; may change at any time.
        on_running: called with each key whose number of streams has changed, and the number.
    """

    def __init__(self, limit_of: Callable[[Key], int], on_running: Callable[[Key, int], None]) -> None:
        self._limit_of = limit_of
        self._on_running = on_running
        self._running: Counter[Key] = Counter()
        self._claimed: Counter[Key] = Counter()
        self._places: set[Place] = set()

    def place(self, keys: Iterable[Key]) -> Place:
        """The place of a batch that was claimed."""
        place = Place(self, frozenset(keys))
        self._places.add(place)
        self._claimed.update(place.keys)
        return place

    @property
    def streams(self) -> int:
        """How many there are."""
        return sum(1 for place in self._places if place.has_stream)

    @property
    def waiting(self) -> int:
        """How many batches have none of their own yet."""
        return len(self._places) - self.streams

    def running(self, key: Key) -> int:
        return self._running[key]

    def left(self, key: Key, ahead: int) -> int:
        """How many batches more may be claimed; ``ahead``: as many as that for each stream."""
        return max(self._limit_of(key) * ahead - self._claimed[key], 0)

    def claimed(self) -> Iterable[Key]:
        """What some claimed batch counts for."""
        return self._claimed.keys()

    # -- for places

    def is_open(self, keys: Iterable[Key], shared: Iterable[Key] = ()) -> bool:
        """Whether there may be one stream more for keys, and as many as there are for those that are taken over."""
        return all(self._running[key] < self._limit_of(key) for key in keys) and all(
            self._running[key] <= self._limit_of(key) for key in shared
        )

    def count(self, keys: Iterable[Key], by: int) -> None:
        for key in keys:
            _add(self._running, key, by)
            self._on_running(key, self._running[key])

    def forget(self, place: Place) -> None:
        if place in self._places:
            self._places.remove(place)
            for key in place.keys:
                _add(self._claimed, key, -1)


def _add(counter: Counter[Key], key: Key, by: int) -> None:
    counter[key] += by
    if not counter[key]:
        del counter[key]


@define(eq=False)
class Place:
    """Where a batch stands; `leave` in the end, whatever became of it.

    Attributes:
        keys: what it counts for.
        has_stream: whether it has one of its own.
    """

    _ledger: Ledger
    keys: frozenset[Key]
    has_stream: bool = False
    # Keys that are counted for it.
    _held: frozenset[Key] = frozenset()
    _leader: Place | None = None
    _follower: Place | None = None

    @property
    def is_open(self) -> bool:
        """Whether it has a stream, or there is room for one more."""
        return self.has_stream or self._ledger.is_open(self.keys)

    def start(self) -> bool:
        """Take a stream of its own if there is room for it; says whether it has one."""
        if not self.is_open:
            return False
        if not self.has_stream:
            self.has_stream = True
            self._hold(self.keys)
        return True

    def follow(self, leader: Place) -> bool:
        """Take over the stream of a batch once that leaves, if no limit speaks against it; says whether it does."""
        if self.has_stream:
            return True
        if leader._follower is not None:
            return False
        shared = self.keys & leader._held
        if not self._ledger.is_open(self.keys - shared, shared):
            return False
        self._leader, leader._follower = leader, self
        self._hold(self.keys - shared)
        return True

    def leave(self) -> None:
        """Its batch is over."""
        follower, self._follower = self._follower, None
        passed: frozenset[Key] = frozenset()
        if follower is not None:
            passed = self._held & (follower.keys - follower._held)
            follower._leader, follower.has_stream, follower._held = None, True, follower._held | passed
        if self._leader is not None:
            self._leader._follower, self._leader = None, None
        gone, self._held, self.has_stream = self._held - passed, frozenset(), False
        self._ledger.count(gone, -1)
        self._ledger.forget(self)

    def _hold(self, keys: frozenset[Key]) -> None:
        self._held |= keys
        self._ledger.count(keys, 1)
