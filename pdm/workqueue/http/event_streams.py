"""Streams of events (Server-Sent Events), written at the speed of the client.

The memory of a stream is bounded: its subscription queues a limited number of events, which all streams share in their
encoded form, and nothing is written while the transport does not drain. A client that falls behind is dropped, which a
last event says; it can resume where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from functools import lru_cache

import msgspec
from attrs import frozen
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IDelayedCall, IPushProducer, IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from pdm.workqueue.domain.notifications import Event
from pdm.workqueue.execution.event_feed import SlowReaderError, Subscription, SubscriptionEndedError
from pdm.workqueue.http.request import ApiRequest
from pdm.workqueue.store.errors import DatabaseClosedError, DatabaseUnavailableError
from pdm.workqueue.telemetry.logging import log_context, log_incident
from pdm.workqueue.wire.events import EVENT_STREAM, EventView

#: Seconds between two comments, by which both ends notice that the other one is gone.
COMMENT_EVERY_S = 15.0
#: Seconds after which a stream that has begun reads again, while the database is away.
READ_AGAIN_AFTER_S = 1.0
#: Milliseconds after which a browser connects again.
_RETRY_MS = 1000
#: Events that are kept in their encoded form, because several streams give them out at the same time.
_MOST_ENCODED = 1024

_log = Logger()


@frozen
class EventStream:
    """A result that is written until the client leaves, its certificate expires, or the service stops.

    Attributes:
        until: when the certificate expires, by `clock`.
    """

    subscription: Subscription
    reactor: IReactorTime
    clock: Callable[[], datetime]
    until: datetime


def event_view(event: Event) -> EventView:
    return EventView(id=event.id, time=event.at, kind=event.kind.value, job=event.job, data=dict(event.data))


@lru_cache(maxsize=_MOST_ENCODED)
def _encoded(event: Event) -> bytes:
    number = b"" if event.id is None else b"id: %d\n" % event.id
    return b"%sevent: %s\ndata: %s\n\n" % (
        number,
        event.kind.value.encode("ascii"),
        msgspec.json.encode(event_view(event)),
    )


async def write_events(request: ApiRequest, status: int, stream: EventStream) -> None:
    """Write the events that are stored; then return, and write the others, and comments, until one side ends it.

    A stream waits nearly always: it keeps no coroutine for that, only ``request.endless``, which fires at its end.

    Raises:
        DatabaseUnavailableError: the database was away before the first byte was sent.
    """
    subscription = stream.subscription
    try:
        begins_after = await subscription.start()
        request.setResponseCode(status)
        request.setHeader(b"Content-Type", EVENT_STREAM.encode("ascii"))
        # Proxies must not collect it.
        request.setHeader(b"X-Accel-Buffering", b"no")
        if request.method == b"HEAD":
            request.write(b"")
            subscription.close()
            return
        writer = _StreamWriter(request, stream)
        request.registerProducer(writer, True)
        # A client that leaves before the first event resumes from here.
        request.write(b"retry: %d\nid: %d\n\n" % (_RETRY_MS, begins_after))
        request.begin_endless(writer.over)
        await writer.write_stored()
    except BaseException:
        subscription.close()
        raise


@implementer(IPushProducer)
class _StreamWriter:
    """Writes one stream, at the speed of its client, and a comment from time to time.

    Attributes:
        over: fires when nothing more is written; its cancellation ends the stream.
    """

    __slots__ = ("_is_live", "_is_paused", "_request", "_resumed", "_stream", "_timer", "over")

    def __init__(self, request: ApiRequest, stream: EventStream) -> None:
        self._request = request
        self._stream = stream
        #: Whether all that was stored before has been written.
        self._is_live = False
        self._is_paused = False
        self._resumed: Deferred[None] | None = None
        self.over: Deferred[None] = Deferred(lambda _: self._stop())
        self._timer: IDelayedCall = stream.reactor.callLater(COMMENT_EVERY_S, self._comment)
        stream.subscription.on_change = self._write

    async def write_stored(self) -> None:
        """Write what was stored before; what comes later is written as it comes."""
        try:
            while events := await self._read_stored():
                self._request.write(b"".join(map(_encoded, events)))
                while self._is_paused and not self._stream.subscription.has_ended:
                    self._resumed = Deferred()
                    await self._resumed
        except CancelledError:
            self._stop()
            raise
        except SubscriptionEndedError as error:
            self._end(error)
        except Exception:
            self._fail()
        else:
            self._is_live = True
            self._write()

    async def _read_stored(self) -> Sequence[Event]:
        """The next stored events; while the database is away the stream stays: browsers give up at an error status."""
        while True:
            try:
                return await self._stream.subscription.read_stored()
            except DatabaseClosedError as error:
                raise SubscriptionEndedError("the service is stopping") from error
            except DatabaseUnavailableError:
                await deferLater(self._stream.reactor, READ_AGAIN_AFTER_S)

    # -- called by the transport

    def pauseProducing(self) -> None:
        self._is_paused = True

    def resumeProducing(self) -> None:
        self._is_paused = False
        self._write()

    def stopProducing(self) -> None:
        """Does nothing: when the client disconnects, `over` is cancelled."""

    # --

    def _write(self) -> None:
        """Write what has come; while the client does not read, only why the stream ends."""
        subscription = self._stream.subscription
        if not self._is_live:
            resumed, self._resumed = self._resumed, None
            if resumed is not None:
                resumed.callback(None)
            return
        if self._is_paused and not subscription.has_ended:
            return
        try:
            if events := subscription.take():
                self._request.write(b"".join(map(_encoded, events)))
        except SubscriptionEndedError as error:
            self._end(error)
        except Exception:
            self._fail()

    def _comment(self) -> None:
        """Write a comment, unless the client does not read; end the stream of an expired certificate."""
        stream = self._stream
        if stream.clock() >= stream.until:
            # Other requests on the connection are refused from now on, too.
            stream.subscription.end(SubscriptionEndedError("the certificate has expired"))
            return
        if not self._is_paused:
            # They hold what a burst of events has needed.
            self._request.free_buffers()
            self._request.write(b":\n\n")
        self._timer = stream.reactor.callLater(COMMENT_EVERY_S, self._comment)

    def _end(self, error: SubscriptionEndedError) -> None:
        """Say why the stream ends, and close the connection."""
        request, subscription = self._request, self._stream.subscription
        self._stop()
        if isinstance(error, SlowReaderError):
            last = msgspec.json.encode({"reason": str(error), "after": subscription.after})
            request.write(b"event: dropped\ndata: %s\n\n" % last)
        else:
            request.write(b": %s\n\n" % str(error).encode("ascii"))
        request.unregisterProducer()
        request.channel.loseConnection()
        self.over.callback(None)

    def _fail(self) -> None:
        """Log a fault and abort the connection: a problem cannot be sent any more. Its loss cancels `over`."""
        with log_context(request_id=self._request.request_id, subject=self._request.subject):
            log_incident(_log, Failure())
        self._stop()
        self._request.abort()

    def _stop(self) -> None:
        if self._timer.active():
            self._timer.cancel()
        self._stream.subscription.on_change = _do_nothing
        self._stream.subscription.close()


def _do_nothing() -> None:
    pass
