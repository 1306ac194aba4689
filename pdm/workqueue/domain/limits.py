"""Limits of a claim: streams per route, site, user and job; exclusions; batch size; fair queueing between users.

A stream is an agent that carries out batches one after the other. A batch takes a *slot* in the ledger when it is
claimed. It runs once it has a stream of its own, or when it takes over the stream of the batch before it on the same
agent. Listings are not counted, so that they never wait for a copy.

Batch size is adapted to the time that a batch takes, not fixed. Short batches cost more to hand out than to carry out;
long ones keep other agents idle at the end of a job, and lose more work when their agent dies. Large files need no rule
of their own: a batch is also bounded in bytes, and a file that is larger goes alone.

Users take turns by start-time fair queueing. Each user has a virtual time that advances by the work they are given,
divided by their weight; the user with the lowest virtual time is next. A user who returns after a pause starts at the
virtual time of the others, so that an idle user accumulates no credit.
"""

from __future__ import annotations

import enum
import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import NamedTuple

from attrs import define, field, frozen

from pdm.workqueue.domain.enums import JobProtocol, JobType
from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.domain.jobs import Batch, JobRecord, NewJob

#: More than there are agents.
NO_LIMIT = 2**31


class LimitKind(enum.StrEnum):
    """Kinds of keys by which streams are counted."""

    ROUTE = "route"
    INTO = "into a site"
    OUT_OF = "out of a site"
    USER = "user"
    JOB = "job"
    #: Batches that are handed over to another service, by its URL.
    SERVICE = "service"
    #: All batches that take streams of the daemon.
    OWN = "own"


LimitKey = tuple[LimitKind, Hashable]
#: All batches that are handed over.
ALL_SERVICES: LimitKey = (LimitKind.SERVICE, "")
#: All others.
OWN_STREAMS: LimitKey = (LimitKind.OWN, "")


class Route(NamedTuple):
    """Source and destination site; no destination for an operation at one site."""

    source: int
    destination: int | None

    @property
    def sites(self) -> frozenset[int]:
        return frozenset((self.source,) if self.destination is None else self)  # type: ignore[arg-type]

    def limit_keys(self) -> tuple[LimitKey, ...]:
        """The keys that a stream on it counts for; at one site only, it counts as going into that."""
        if self.destination is None:
            return ((LimitKind.ROUTE, self), (LimitKind.INTO, self.source))
        return ((LimitKind.ROUTE, self), (LimitKind.OUT_OF, self.source), (LimitKind.INTO, self.destination))


def route_of(job: JobRecord | NewJob) -> Route:
    """The route of a job's work."""
    return Route(job.src_siteid, job.dst_siteid)


def common_keys(job: JobRecord | NewJob) -> tuple[LimitKey, ...]:
    """The keys of a batch without its job: the same for all jobs that may share the batch."""
    return common_keys_of(job.user_id, route_of(job))


def common_keys_of(user_id: int, route: Route) -> tuple[LimitKey, ...]:
    """The keys of a user's batch on a route, without its job."""
    return ((LimitKind.USER, user_id), *route.limit_keys())


def batch_keys(batch: Batch) -> frozenset[LimitKey]:
    """All keys that a batch counts for."""
    return frozenset([*common_keys(batch.job), *((LimitKind.JOB, number) for number in batch.jobs)])


@frozen
class StreamQuota:
    """How many batches more may be claimed.

    Attributes:
        otherwise: for all others of a kind; kinds that are not named have no limit.
    """

    left: Mapping[LimitKey, int] = field(factory=dict)
    otherwise: Mapping[LimitKind, int] = field(factory=dict)

    def of(self, key: LimitKey) -> int:
        return self.left.get(key, self.otherwise.get(key[0], NO_LIMIT))


class StreamLedger:
    """Counts streams and the batches that wait for one.

    Args:
        limit_of: how many streams there may be at once; may change at any time.
        on_running: called with each key whose number of streams has changed, and the number.
    """

    def __init__(self, limit_of: Callable[[LimitKey], int], on_running: Callable[[LimitKey, int], None]) -> None:
        self._limit_of = limit_of
        self._on_running = on_running
        self._running: Counter[LimitKey] = Counter()
        self._claimed: Counter[LimitKey] = Counter()
        self._slots: set[StreamSlot] = set()

    def slot(self, keys: Iterable[LimitKey]) -> StreamSlot:
        """The slot of a batch that was claimed."""
        slot = StreamSlot(self, frozenset(keys))
        self._slots.add(slot)
        self._claimed.update(slot.keys)
        return slot

    @property
    def streams(self) -> int:
        """Number of streams."""
        return sum(1 for slot in self._slots if slot.has_stream)

    @property
    def waiting(self) -> int:
        """Number of batches without a stream of their own."""
        return len(self._slots) - self.streams

    def running(self, key: LimitKey) -> int:
        return self._running[key]

    def left(self, key: LimitKey, ahead: int) -> int:
        """How many batches more may be claimed; ``ahead``: as many as that for each stream."""
        return max(self._limit_of(key) * ahead - self._claimed[key], 0)

    def claimed(self) -> Iterable[LimitKey]:
        """The keys of all claimed batches."""
        return self._claimed.keys()

    def all_running(self) -> Mapping[LimitKey, int]:
        """Streams of all keys."""
        return self._running

    def awaited(self) -> Iterator[frozenset[LimitKey]]:
        """For each batch without a stream of its own: the keys for which it is not counted."""
        return (slot.keys - slot.held for slot in self._slots if not slot.has_stream)

    # -- for slots

    def is_open(self, keys: Iterable[LimitKey], shared: Iterable[LimitKey] = ()) -> bool:
        """Whether ``keys`` allow one more stream, and ``shared``, which are taken over, are within their limits."""
        return all(self._running[key] < self._limit_of(key) for key in keys) and all(
            self._running[key] <= self._limit_of(key) for key in shared
        )

    def count(self, keys: Iterable[LimitKey], by: int) -> None:
        for key in keys:
            _adjust(self._running, key, by)
            self._on_running(key, self._running[key])

    def forget(self, slot: StreamSlot) -> None:
        if slot in self._slots:
            self._slots.remove(slot)
            for key in slot.keys:
                _adjust(self._claimed, key, -1)


def _adjust(counter: Counter[LimitKey], key: LimitKey, by: int) -> None:
    counter[key] += by
    if not counter[key]:
        del counter[key]


@define(eq=False)
class StreamSlot:
    """The stream of a batch, or its place in the queue for one; call `leave` at its end, in any case."""

    _ledger: StreamLedger
    keys: frozenset[LimitKey]
    has_stream: bool = False
    #: Keys for which it is counted.
    held: frozenset[LimitKey] = frozenset()
    _leader: StreamSlot | None = None
    _follower: StreamSlot | None = None

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

    def follow(self, leader: StreamSlot) -> bool:
        """Take over the stream of a batch once that leaves, if no limit speaks against it; says whether it does."""
        if self.has_stream:
            return True
        if leader._follower is not None:
            return False
        shared = self.keys & leader.held
        if not self._ledger.is_open(self.keys - shared, shared):
            return False
        self._leader, leader._follower = leader, self
        self._hold(self.keys - shared)
        return True

    def leave(self) -> None:
        """Its batch is over."""
        follower, self._follower = self._follower, None
        passed: frozenset[LimitKey] = frozenset()
        if follower is not None:
            passed = self.held & (follower.keys - follower.held)
            follower._leader, follower.has_stream, follower.held = None, True, follower.held | passed
        if self._leader is not None:
            self._leader._follower, self._leader = None, None
        gone, self.held, self.has_stream = self.held - passed, frozenset(), False
        self._ledger.count(gone, -1)
        self._ledger.forget(self)

    def _hold(self, keys: frozenset[LimitKey]) -> None:
        self.held |= keys
        self._ledger.count(keys, 1)


@frozen
class ClaimExclusions:
    """What claims exclude, listings included.

    Attributes:
        probed: sites that may be back, by a protocol: of what has to do with one by that, a single element may run at
            once.
        next_change: when that changes without an event; None if never.
    """

    paused: frozenset[tuple[int, JobProtocol]] = frozenset()
    probed: frozenset[tuple[int, JobProtocol]] = frozenset()
    drained: frozenset[int] = frozenset()
    banned: frozenset[int] = frozenset()
    next_change: datetime | None = None

    def excludes(self, protocol: JobProtocol, sites: frozenset[int]) -> bool:
        """Whether no work at these sites by a protocol may begin."""
        return not self.drained.isdisjoint(sites) or any((site, protocol) in self.paused for site in sites)


@frozen(kw_only=True)
class HandOvers:
    """What a claim may hand over to other services.

    Attributes:
        service_of: the URL of the service that copies the files of a job; None for none.
        sites: service → sites that name it, each with the user whose jobs it is for; None for all.
        sizes: service → elements of a batch.
        left: batches that may be handed over: to each service, and `ALL_SERVICES`.
    """

    service_of: Callable[[JobRecord], str | None] = lambda job: None
    sites: Mapping[str, Collection[tuple[int, int | None]]] = field(factory=dict)
    sizes: Mapping[str, int] = field(factory=dict)
    left: Mapping[LimitKey, int] = field(factory=dict)


NO_HAND_OVERS = HandOvers()

#: Elements of the first batch of its kind.
FIRST_BATCH_SIZE = 64
#: Seconds that a batch shall take.
BATCH_TIME_S = 2.0
#: Of the field's own commands, whose start and logins take seconds, however many files they are given.
TOOLS_BATCH_TIME_S = 20.0
#: The least share of a batch: what is left of a job is not split finer than this between agents.
MIN_SHARE = 16
#: Nor finer than this part of the elements that take as long as a batch shall: each batch costs transactions.
_MIN_PART = 8
#: From this attempt on, an element whose last one crashed gets a batch of its own: a further crash concerns no other.
_ALONE_FROM = 3


class WorkKind(NamedTuple):
    """Elements that take about the same time for the same size."""

    protocol: JobProtocol
    type: JobType
    src_siteid: int
    dst_siteid: int | None


def work_kind(job: JobRecord) -> WorkKind:
    """The kind of a job's work."""
    return WorkKind(job.protocol, job.type, job.src_siteid, job.dst_siteid)


def next_batch_size(size: int, elements: int, seconds: float, most: int, batch_time_s: float = BATCH_TIME_S) -> int:
    """How many elements of a kind take as long as a batch shall, after a batch of it.

    Args:
        size: what it was before.
        elements, seconds: of the batch.
        most: elements of a batch. The result may be larger, so that a part of it can be a batch: see `fair_share`.

    Returns:
        Twice as many if they would have ended in less than half of that time; as many as are done in that time if they
        would have taken longer; else as many as before.
    """
    # Too few elements say little about many: most of their time may be the round trip.
    says_something = elements * 4 >= min(size, most)
    whole_s = seconds * max(size / elements, 1)
    if seconds > batch_time_s or (says_something and whole_s > 2 * batch_time_s):
        return max(int(elements * batch_time_s / seconds), 1)
    if says_something and whole_s < batch_time_s / 2:
        return min(size * 2, most * _MIN_PART)
    return size


def fair_share(waiting: int, batches: int, size: int = FIRST_BATCH_SIZE) -> int:
    """How many waiting elements one batch may take, so that all agents have work until the end.

    ``size``: elements that take as long as a batch shall.
    """
    return max(math.ceil(waiting / max(batches, 1)), MIN_SHARE, size // _MIN_PART)


def runs_alone(attempts: int, last_code: str | None) -> bool:
    """Whether an element gets a batch of its own, because agents crash with it."""
    return attempts + 1 >= _ALONE_FROM and last_code == FailureCode.CRASHED.value


#: Users that are remembered; the users with the least virtual time lose nothing when they are dropped.
_MOST_REMEMBERED = 10_000


def batch_work(elements: int, size: int, total_bytes: int, batch_bytes: int) -> float:
    """How much work a batch is; a full one is 1, a large file more.

    Args:
        size: how many elements of its kind make a full one.
    """
    return max(elements / max(size, 1), total_bytes / max(batch_bytes, 1))


@define
class FairQueue:
    """Fair queue: the virtual time of each user.

    Attributes:
        weights: user → share relative to others; 1 by default.
    """

    weights: Mapping[int, float] = field(factory=dict)
    _times: dict[int, float] = field(factory=dict)
    _now: float = 0.0

    def weight(self, user: int) -> float:
        return self.weights.get(user, 1.0)

    def virtual_time(self, user: int) -> float:
        """The user with the least virtual time."""
        return max(self._times.get(user, 0.0), self._now)

    def charge(self, user: int, work: float) -> None:
        """Count work that a user is given."""
        self._now = self.virtual_time(user)
        self._times[user] = self._now + work / self.weight(user)
        if len(self._times) > _MOST_REMEMBERED:
            self._times = {other: time for other, time in self._times.items() if time > self._now}

    def copy(self) -> FairQueue:
        """A copy, for simulation."""
        return FairQueue(self.weights, dict(self._times), self._now)
