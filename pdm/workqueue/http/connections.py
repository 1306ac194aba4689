"""Connections of the API: how many there may be, from one address and in all, and how long a request may take to come.

What is idle costs little and is kept; when there is room for no more, what has been silent the longest makes room. A
connection without a whole request yet goes first: it may be nobody's.
"""

from __future__ import annotations

import math
import resource
from collections import Counter
from collections.abc import Callable
from typing import Any

from attrs import define, field, frozen
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.http import HTTPChannel

_log = Logger()

#: Descriptors for all else: agents have four each, the database and the logs some.
_OTHER_FILES = 1024
#: New connections of an address that may come at once, in seconds of its rate.
_BURST_S = 10.0
#: At most one line about refusals in so many seconds.
_TELL_EVERY_S = 60.0


@frozen
class ConnectionLimits:
    """What clients may have.

    Attributes:
        request_s: seconds from the first byte of a request to its last; those of a new connection have to hold its
            handshake, too.
        most: connections in all.
        most_of_address: connections of one address.
        new_per_s: new connections of one address in a second, on average; 0 for no limit. Each costs a handshake.
    """

    request_s: float
    most: int
    most_of_address: int
    new_per_s: float


@define
class _Bucket:
    """How many connections an address may open by now."""

    left: float
    at: float


@define(eq=False)
class Connections:
    """All connections of a site; the reactor's thread only.

    Attributes:
        limits: for them.
        seconds: a clock that only goes forward.
    """

    limits: ConnectionLimits
    seconds: Callable[[], float]
    _of_address: Counter[str] = field(factory=Counter)
    _buckets: dict[str, _Bucket] = field(factory=dict)
    #: Since when their request has been on its way, the longest first; new ones count as such.
    _arriving: dict[ApiChannel, float] = field(factory=dict)
    #: The longest silent first.
    _idle: dict[ApiChannel, None] = field(factory=dict)
    _tell_at: float = 0.0

    @property
    def count(self) -> int:
        """How many there are."""
        return self._of_address.total()

    def admit(self, address: str) -> bool:
        """Whether an address may have one connection more; others may have to make room."""
        why = ""
        if not self._take(address):
            why = f"it opens more than {self.limits.new_per_s:g} connections a second"
        elif self._of_address[address] >= self.limits.most_of_address:
            why = f"it has {self.limits.most_of_address} connections"
        elif self.count >= self.limits.most and not self._make_room():
            why = f"all {self.limits.most} connections are at work"
        if why:
            self._tell("a connection of {address} is refused: {why}", address=address, why=why)
        return not why

    def _take(self, address: str) -> bool:
        """Whether the rate of new connections allows one."""
        rate = self.limits.new_per_s
        if not rate:
            return True
        most, now = max(rate * _BURST_S, 1.0), self.seconds()
        bucket = self._buckets.setdefault(address, _Bucket(most, now))
        bucket.left = min(bucket.left + (now - bucket.at) * rate, most)
        bucket.at = now
        if bucket.left < 1.0:
            return False
        bucket.left -= 1.0
        return True

    def _make_room(self) -> bool:
        victim = next(iter(self._arriving), None) or next(iter(self._idle), None)
        if victim is None:
            return False
        self._tell("there are {count} connections: those silent for the longest make room", count=self.count)
        victim.cut()
        return True

    def opened(self, channel: ApiChannel) -> None:
        """A connection was made; its handshake comes first."""
        self._of_address[channel.address] += 1
        self._arriving[channel] = self.seconds()

    def arriving(self, channel: ApiChannel) -> None:
        """The first bytes of a request have come."""
        self._idle.pop(channel, None)
        self._arriving.setdefault(channel, self.seconds())

    def answering(self, channel: ApiChannel) -> None:
        """A request is there, whole."""
        self._arriving.pop(channel, None)

    def idle(self, channel: ApiChannel) -> None:
        """A request is answered; the next may come."""
        self._idle[channel] = None

    def leaving(self, channel: ApiChannel) -> None:
        """A connection is being ended."""
        self._arriving.pop(channel, None)
        self._idle.pop(channel, None)

    def closed(self, channel: ApiChannel) -> None:
        """A connection is gone."""
        self.leaving(channel)
        self._of_address[channel.address] -= 1
        if self._of_address[channel.address] <= 0:
            del self._of_address[channel.address]

    def sweep(self) -> None:
        """End connections whose request does not come to its end, and forget addresses that are quiet."""
        now = self.seconds()
        for channel in [one for one, since in self._arriving.items() if since + self.limits.request_s <= now]:
            self.leaving(channel)
            channel.give_up()
        # What is full by now is as good as new.
        for address in [one for one, bucket in self._buckets.items() if bucket.at + _BURST_S <= now]:
            del self._buckets[address]

    def _tell(self, text: str, **fields: object) -> None:
        # Somebody who floods the service must not flood its log, too.
        now = self.seconds()
        if now >= self._tell_at:
            self._tell_at = now + _TELL_EVERY_S
            _log.warn(text, **fields)


class ApiChannel(HTTPChannel):
    """A connection that tells its site where it stands."""

    #: Which connections there are; set by the site.
    connections: Connections
    #: Of the other end.
    address: str
    transport: Any
    _answering = False

    def connectionMade(self) -> None:
        super().connectionMade()
        self.connections.opened(self)

    def dataReceived(self, data: bytes) -> None:
        if not self._answering:
            self.connections.arriving(self)
        super().dataReceived(data)

    def allContentReceived(self) -> None:
        self._answering = True
        self.connections.answering(self)
        super().allContentReceived()

    def requestDone(self, request: Any) -> None:
        self._answering = False
        # Before the next request, which may be here already.
        self.connections.idle(self)
        super().requestDone(request)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.connections.closed(self)
        super().connectionLost(reason)

    def give_up(self) -> None:
        """Its request does not come to its end: say so if there is a request, and close."""
        if self.requests:
            self.requests[0].refuse_slow()
        else:
            self.cut()

    def cut(self) -> None:
        """End it at once."""
        self.connections.leaving(self)
        self.transport.abortConnection()


def allowed_files(most: int) -> int:
    """Let this process have so many connections besides its files, as far as the system allows.

    Returns:
        How many it can have.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most + _OTHER_FILES
    limit = math.inf if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = int(min(wanted, limit))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return most if soft == resource.RLIM_INFINITY else max(min(most, soft - _OTHER_FILES), 1)
