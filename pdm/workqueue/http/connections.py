"""Limits on connections to the API: their number and rate, the time to receive a request, and the memory of each.

Idle connections cost little and are kept. At the limit, a new connection evicts the one that has been silent longest;
connections without a complete request, which may be unauthenticated, are evicted first.

The memory of one connection is bounded in every state: `twisted.web` bounds headers and trailers, `ApiRequest` bounds
the body; `ApiChannel` stops reading while a request is processed or responses are unread, starts a request only after
the earlier responses are sent, and discards data that arrives while the connection closes. The number of connections
without a client certificate is limited separately, which bounds the memory that all of them can take.
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

from pdm.workqueue.http.problems import ErrorFormat, InvalidInputError, raw_error_response

_log = Logger()

#: File descriptors kept for agents (four each), the database and logs.
_RESERVED_FILES = 1024
#: Burst of new connections from one address, in seconds of its rate.
_BURST_S = 10.0
#: Seconds without progress after which the connection of a client that does not read responses is aborted.
_UNREAD_TIMEOUT_S = 120.0
#: Seconds that a refused client may continue to send, so that it can read the response.
_LINGER_TIMEOUT_S = 5.0
#: Seconds between two log lines about refusals.
_WARN_INTERVAL_S = 60.0


@frozen(kw_only=True)
class ConnectionLimits:
    """Limits on the connections of all clients."""

    #: Seconds from the first byte of a request to its last; of a new connection, including the TLS handshake.
    request_s: float
    most: int
    most_of_address: int
    #: Average rate of new connections from one address, each of which costs a handshake; 0 for no limit.
    new_per_s: float
    #: Connections without a client certificate after their handshake.
    most_anonymous: int


@define
class _TokenBucket:
    """Tokens for new connections from one address, as of `at` (seconds)."""

    left: float
    at: float


@define(eq=False)
class ConnectionLimiter:
    """State of all connections of a site; `seconds` is a monotonic clock. Used in the reactor's thread only."""

    limits: ConnectionLimits
    seconds: Callable[[], float]
    _of_address: Counter[str] = field(factory=Counter)
    _buckets: dict[str, _TokenBucket] = field(factory=dict)
    #: Connections whose request is being received (new ones too) → since when, the oldest first.
    _arriving: dict[ApiChannel, float] = field(factory=dict)
    #: Idle connections, the longest idle first.
    _idle: dict[ApiChannel, None] = field(factory=dict)
    #: Connections without a client certificate, the oldest first.
    _anonymous: dict[ApiChannel, None] = field(factory=dict)
    #: Connections whose client does not read its responses → since when.
    _unread: dict[ApiChannel, float] = field(factory=dict)
    _next_warning_at: float = 0.0

    @property
    def count(self) -> int:
        return self._of_address.total()

    def admit(self, address: str) -> bool:
        """Whether an address may open a connection; may evict another connection for it."""
        why = ""
        if not self._take_token(address):
            why = f"it opens more than {self.limits.new_per_s:g} connections a second"
        elif self._of_address[address] >= self.limits.most_of_address:
            why = f"it has {self.limits.most_of_address} connections"
        elif self.count >= self.limits.most and not self._evict():
            why = f"all {self.limits.most} connections are busy"
        if why:
            self._warn("connection from {address} refused: {why}", address=address, why=why)
        return not why

    def _take_token(self, address: str) -> bool:
        """Whether the rate limit allows a new connection."""
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

    def _evict(self) -> bool:
        victim = next(iter(self._arriving), None) or next(iter(self._idle), None)
        if victim is None:
            return False
        self._warn("limit of {count} connections reached: closing those silent for longest", count=self.count)
        victim.abort()
        return True

    def opened(self, channel: ApiChannel) -> None:
        """A connection was accepted; its handshake follows."""
        self._of_address[channel.address] += 1
        self._arriving[channel] = self.seconds()

    def anonymous(self, channel: ApiChannel) -> None:
        """A handshake ended without a client certificate; evicts the oldest such connection at the limit."""
        self._anonymous[channel] = None
        if len(self._anonymous) > self.limits.most_anonymous:
            self._warn(
                "{count} connections without a client certificate: closing the oldest", count=len(self._anonymous)
            )
            next(iter(self._anonymous)).abort()

    def unread(self, channel: ApiChannel) -> None:
        """The client does not read its response."""
        self._unread.setdefault(channel, self.seconds())

    def reading(self, channel: ApiChannel) -> None:
        """The client reads again."""
        self._unread.pop(channel, None)

    def arriving(self, channel: ApiChannel) -> None:
        """The first bytes of a request were received."""
        self._idle.pop(channel, None)
        self._arriving.setdefault(channel, self.seconds())

    def answering(self, channel: ApiChannel) -> None:
        """A request was received completely."""
        self._arriving.pop(channel, None)

    def idle(self, channel: ApiChannel) -> None:
        """A request was answered; the connection awaits the next."""
        self._idle[channel] = None

    def closing(self, channel: ApiChannel) -> None:
        self._arriving.pop(channel, None)
        self._idle.pop(channel, None)
        self._anonymous.pop(channel, None)

    def closed(self, channel: ApiChannel) -> None:
        self.closing(channel)
        self._unread.pop(channel, None)
        self._of_address[channel.address] -= 1
        if self._of_address[channel.address] <= 0:
            del self._of_address[channel.address]

    def sweep(self) -> None:
        """Close connections that exceed a timeout, and drop the token buckets of inactive addresses."""
        now = self.seconds()
        for channel in [one for one, since in self._arriving.items() if since + self.limits.request_s <= now]:
            self.closing(channel)
            channel.request_timed_out()
        for channel in [one for one, since in self._unread.items() if since + _UNREAD_TIMEOUT_S <= now]:
            channel.abort()
        # A bucket that is full again is the same as a new one.
        for address in [one for one, bucket in self._buckets.items() if bucket.at + _BURST_S <= now]:
            del self._buckets[address]

    def _warn(self, text: str, **fields: object) -> None:
        # A flood of connections must not flood the log.
        now = self.seconds()
        if now >= self._next_warning_at:
            self._next_warning_at = now + _WARN_INTERVAL_S
            _log.warn(text, **fields)


class ApiChannel(HTTPChannel):
    """A connection that reports its state to the `ConnectionLimiter`; the site sets the first three attributes."""

    connections: ConnectionLimiter
    address: str
    error_format: ErrorFormat
    transport: Any
    #: Whether the client has a certificate; None before the end of the handshake.
    identified: bool | None
    _answering: bool
    _closing: IDelayedCall | None
    _waiting_request: Callable[[], None] | None

    # An object with more than 25 attributes in its dictionary takes a kilobyte more, and idle connections are kept.
    # Some of these are twisted.web's, which it sets in `__init__`.
    __slots__ = (
        "_answering",
        "_closing",
        "_dataBuffer",
        "_handlingRequest",
        "_transferDecoder",
        "_waiting_request",
        "address",
        "connections",
        "identified",
        "requests",
    )

    def __init__(self) -> None:
        super().__init__()
        self.identified = None
        self._answering = False
        self._closing = None
        self._waiting_request = None

    def connectionMade(self) -> None:
        super().connectionMade()
        self.connections.opened(self)

    def dataReceived(self, data: bytes) -> None:
        if self._closing is not None:
            # Discarded: if it were left unread, TCP would reset the connection and the client would lose the response.
            return
        if self.identified is None:
            # Transports without TLS lack this method.
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
            # HTTPChannel itself would not stop reading here while a response is unread, and would buffer without limit.
            self._networkProducer.pauseProducing()

    def allContentReceived(self) -> None:
        self._answering = True
        self.connections.answering(self)
        super().allContentReceived()

    def streaming(self) -> None:
        """The response has no end: the connection may be closed like an idle one, to make room for another."""
        self.connections.idle(self)

    def when_read(self, begin: Callable[[], None]) -> None:
        """Call `begin` now, or once the client has read enough of the earlier responses."""
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
        # Before super(), which may start the next, pipelined request.
        self.connections.idle(self)
        super().requestDone(request)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.connections.closed(self)
        if self._closing is not None and self._closing.active():
            self._closing.cancel()
        super().connectionLost(reason)

    def loseConnection(self) -> None:
        """Close once all written data is sent; abort if the client does not read it in time."""
        self._close(_UNREAD_TIMEOUT_S)
        super().loseConnection()

    def refuse(self) -> None:
        """Close after an early response, while the client may still be sending."""
        self._close(_LINGER_TIMEOUT_S)
        super().loseConnection()

    def _close(self, longest_s: float) -> None:
        if self._closing is None:
            self._closing = self.callLater(longest_s, self.abort)

    def _respondToBadRequestAndDisconnect(self) -> None:
        if self._closing is not None:
            return
        error = InvalidInputError("not valid HTTP/1.1: the request line, a header or a chunk is malformed")
        self.transport.write(raw_error_response(error, f"{random.getrandbits(64):016x}", self.error_format))
        self.refuse()

    def lineLengthExceeded(self, line: bytes) -> None:
        self._respondToBadRequestAndDisconnect()

    def request_timed_out(self) -> None:
        """Answer a request that was not received in time, if its headers were, and close."""
        if self.requests:
            self.requests[0].refuse_slow()
        else:
            self.abort()

    def abort(self) -> None:
        """Close at once, without sending what is buffered."""
        self.connections.closing(self)
        self.transport.abortConnection()


def raise_file_limit(most: int) -> int:
    """Raise RLIMIT_NOFILE for a number of connections; returns the number that the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most + _RESERVED_FILES
    limit = math.inf if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = int(min(wanted, limit))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return most if soft == resource.RLIM_INFINITY else max(min(most, soft - _RESERVED_FILES), 1)
