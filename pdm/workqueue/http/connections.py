"""Connections of the API: how many there may be, how long a request may take to come, and how much each may buffer.

What is idle costs little and is kept; when there is room for no more, what has been silent the longest makes room. A
connection without a whole request yet goes first: it may be nobody's.

What one connection can make the service keep is bounded in every state: `twisted.web` bounds the headers of a request
and its trailers, `ApiRequest` its body; `ApiChannel` stops reading while a request is carried out or answers are not
read, begins no request before the earlier answers are sent, and drops what comes after the connection is being closed.
Connections without a client certificate are few, so that what all of them make the service keep is bounded, too.
"""

from __future__ import annotations

import math
import random
import resource
from collections import Counter
from collections.abc import Callable
from typing import Any

from attrs import define, field, frozen
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.http import HTTPChannel

from pdm.workqueue.http.problems import InvalidInputError, raw_problem_response

_log = Logger()

#: Descriptors for all else: agents have four each, the database and the logs some.
_RESERVED_FILES = 1024
#: New connections of an address that may come at once, in seconds of its rate.
_BURST_S = 10.0
#: Seconds without any progress after which a connection is cut whose client does not read its answers.
_UNREAD_TIMEOUT_S = 120.0
#: How long a client that is refused may go on sending, in seconds, so that it can read why.
_LINGER_TIMEOUT_S = 5.0
#: At most one line about refusals in so many seconds.
_WARN_INTERVAL_S = 60.0


@frozen
class ConnectionLimits:
    """What clients may have.

    Attributes:
        request_s: seconds from the first byte of a request to its last; those of a new connection have to hold its
            handshake, too.
        most: connections in all.
        most_of_address: connections of one address.
        new_per_s: new connections of one address in a second, on average; 0 for no limit. Each costs a handshake.
        most_anonymous: connections without a client certificate, after their handshake.
    """

    request_s: float
    most: int
    most_of_address: int
    new_per_s: float
    most_anonymous: int


@define
class _TokenBucket:
    """How many connections an address may open by now."""

    left: float
    at: float


@define(eq=False)
class ConnectionLimiter:
    """All connections of a site; the reactor's thread only.

    Attributes:
        limits: for them.
        seconds: a clock that only goes forward.
    """

    limits: ConnectionLimits
    seconds: Callable[[], float]
    _of_address: Counter[str] = field(factory=Counter)
    _buckets: dict[str, _TokenBucket] = field(factory=dict)
    #: Since when their request has been on its way, the longest first; new ones count as such.
    _arriving: dict[ApiChannel, float] = field(factory=dict)
    #: The longest silent first.
    _idle: dict[ApiChannel, None] = field(factory=dict)
    #: Those without a client certificate, the oldest first.
    _anonymous: dict[ApiChannel, None] = field(factory=dict)
    #: Since when their client reads nothing.
    _unread: dict[ApiChannel, float] = field(factory=dict)
    _next_warning_at: float = 0.0

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
            self._warn("a connection of {address} is refused: {why}", address=address, why=why)
        return not why

    def _take(self, address: str) -> bool:
        """Whether the rate of new connections allows one."""
        rate = self.limits.new_per_s
        if not rate:
            return True
        most, now = max(rate * _BURST_S, 1.0), self.seconds()
        bucket = self._buckets.setdefault(address, _TokenBucket(most, now))
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
        self._warn("there are {count} connections: those silent for the longest make room", count=self.count)
        victim.cut()
        return True

    def opened(self, channel: ApiChannel) -> None:
        """A connection was made; its handshake comes first."""
        self._of_address[channel.address] += 1
        self._arriving[channel] = self.seconds()

    def anonymous(self, channel: ApiChannel) -> None:
        """A handshake has ended without a client certificate; the oldest such connection may have to make room."""
        self._anonymous[channel] = None
        if len(self._anonymous) > self.limits.most_anonymous:
            self._warn(
                "there are {count} connections without a client certificate: the oldest make room",
                count=len(self._anonymous),
            )
            next(iter(self._anonymous)).cut()

    def unread(self, channel: ApiChannel) -> None:
        """The client does not read what it is sent."""
        self._unread.setdefault(channel, self.seconds())

    def reading(self, channel: ApiChannel) -> None:
        """The client reads again."""
        self._unread.pop(channel, None)

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
        self._anonymous.pop(channel, None)

    def closed(self, channel: ApiChannel) -> None:
        """A connection is gone."""
        self.leaving(channel)
        self._unread.pop(channel, None)
        self._of_address[channel.address] -= 1
        if self._of_address[channel.address] <= 0:
            del self._of_address[channel.address]

    def sweep(self) -> None:
        """End connections whose request does not come to its end, and forget addresses that are quiet."""
        now = self.seconds()
        for channel in [one for one, since in self._arriving.items() if since + self.limits.request_s <= now]:
            self.leaving(channel)
            channel.give_up()
        for channel in [one for one, since in self._unread.items() if since + _UNREAD_TIMEOUT_S <= now]:
            channel.cut()
        # What is full by now is as good as new.
        for address in [one for one, bucket in self._buckets.items() if bucket.at + _BURST_S <= now]:
            del self._buckets[address]

    def _warn(self, text: str, **fields: object) -> None:
        # Somebody who floods the service must not flood its log, too.
        now = self.seconds()
        if now >= self._next_warning_at:
            self._next_warning_at = now + _WARN_INTERVAL_S
            _log.warn(text, **fields)


class ApiChannel(HTTPChannel):
    """A connection that tells its site where it stands."""

    #: Which connections there are; set by the site.
    connections: ConnectionLimiter
    #: Of the other end.
    address: str
    transport: Any
    #: Whether it has a client certificate; None before the end of the handshake.
    identified: bool | None = None
    _answering = False
    _closing: IDelayedCall | None = None
    _waiting_request: Callable[[], None] | None = None

    def connectionMade(self) -> None:
        super().connectionMade()
        self.connections.opened(self)

    def dataReceived(self, data: bytes) -> None:
        if self._closing is not None:
            # Kept, it would only be thrown away later; not read, it would keep the answer from the client.
            return
        if self.identified is None:
            # Without TLS there is no such method.
            certificate = getattr(self.transport, "getPeerCertificate", lambda: None)
            self.identified = certificate() is not None
            if not self.identified:
                self.connections.anonymous(self)
        if not self._answering:
            self.connections.arriving(self)
        super().dataReceived(data)

    def lineReceived(self, line: bytes) -> None:
        if self._closing is None:
            super().lineReceived(line)

    def rawDataReceived(self, data: bytes) -> None:
        if self._closing is not None:
            return
        super().rawDataReceived(data)
        if self._handlingRequest and sum(map(len, self._dataBuffer)) > self._optimisticEagerReadSize:
            # HTTPChannel does not stop reading here while an answer is not read, and would keep whatever comes.
            self._networkProducer.pauseProducing()

    def allContentReceived(self) -> None:
        self._answering = True
        self.connections.answering(self)
        super().allContentReceived()

    def when_read(self, begin: Callable[[], None]) -> None:
        """Begin a request now, or as soon as the client has read enough of the earlier answers."""
        if self._waitingForTransport:
            self._waiting_request = begin
        else:
            begin()

    def pauseProducing(self) -> None:
        super().pauseProducing()
        self.connections.unread(self)

    def resumeProducing(self) -> None:
        super().resumeProducing()
        self.connections.reading(self)
        begin, self._waiting_request = self._waiting_request, None
        if begin is not None:
            begin()

    def requestDone(self, request: Any) -> None:
        self._answering = False
        # Before the next request, which may be here already.
        self.connections.idle(self)
        super().requestDone(request)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.connections.closed(self)
        if self._closing is not None and self._closing.active():
            self._closing.cancel()
        super().connectionLost(reason)

    def loseConnection(self) -> None:
        """Close it once what was written is sent; cut it if the client does not read that."""
        self._close(_UNREAD_TIMEOUT_S)
        super().loseConnection()

    def refuse(self) -> None:
        """Close it after an answer that the client did not wait for: it may still be sending."""
        self._close(_LINGER_TIMEOUT_S)
        super().loseConnection()

    def _close(self, longest_s: float) -> None:
        if self._closing is None:
            self._closing = self.callLater(longest_s, self.cut)

    def _respondToBadRequestAndDisconnect(self) -> None:
        if self._closing is not None:
            return
        error = InvalidInputError("this is not valid HTTP/1.1: the request line, a header or a chunk is wrong")
        self.transport.write(raw_problem_response(error, f"{random.getrandbits(64):016x}"))
        self.refuse()

    def lineLengthExceeded(self, line: bytes) -> None:
        self._respondToBadRequestAndDisconnect()

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


def raise_file_limit(most: int) -> int:
    """Let this process have so many connections besides its files, as far as the system allows.

    Returns:
        How many it can have.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most + _RESERVED_FILES
    limit = math.inf if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = int(min(wanted, limit))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return most if soft == resource.RLIM_INFINITY else max(min(most, soft - _RESERVED_FILES), 1)
