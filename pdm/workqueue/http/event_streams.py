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
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from pdm.workqueue.domain.events import Event
from pdm.workqueue.execution.event_feed import SlowReaderError, Subscription, SubscriptionEndedError
from pdm.workqueue.http.request import ApiRequest, FlowControl
from pdm.workqueue.store.errors import DatabaseClosedError, DatabaseUnavailableError
from pdm.workqueue.telemetry.logging import log_incident
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
    """Write events, and a comment from time to time, until one side ends it.

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
            return
        flow = FlowControl()
        # A stream that is dropped while it waits for its client must not wait on.
        subscription.on_end = flow.resumeProducing
        request.registerProducer(flow, True)
        # A client that leaves before the first event resumes from here.
        request.write(b"retry: %d\nid: %d\n\n" % (_RETRY_MS, begins_after))
        request.channel.streaming()
        comments = _Comments(request, flow, stream)
        try:
            await _write_all(request, flow, stream)
        except CancelledError:
            raise
        except Exception:
            # A problem cannot be sent any more. The loss of the connection cancels this handler.
            log_incident(_log, Failure())
            request.abort()
            await Deferred()
        finally:
            comments.stop()
    finally:
        subscription.close()


async def _write_all(request: ApiRequest, flow: FlowControl, stream: EventStream) -> None:
    try:
        while True:
            events = await _next_events(stream)
            request.write(b"".join(map(_encoded, events)))
            await flow.open()
    except SlowReaderError as error:
        last = msgspec.json.encode({"reason": str(error), "after": stream.subscription.after})
        request.write(b"event: dropped\ndata: %s\n\n" % last)
    except SubscriptionEndedError as error:
        request.write(b": %s\n\n" % str(error).encode("ascii"))
    request.unregisterProducer()
    request.channel.loseConnection()


async def _next_events(stream: EventStream) -> Sequence[Event]:
    """The next events; while the database is away the stream stays, because browsers give up at an error status."""
    while True:
        try:
            return await stream.subscription.next()
        except DatabaseClosedError as error:
            raise SubscriptionEndedError("the service is stopping") from error
        except DatabaseUnavailableError:
            await deferLater(stream.reactor, READ_AGAIN_AFTER_S)


class _Comments:
    """Writes a comment periodically, unless the client does not read; ends the stream of an expired certificate."""

    def __init__(self, request: ApiRequest, flow: FlowControl, stream: EventStream) -> None:
        self._request = request
        self._flow = flow
        self._stream = stream
        self._timer: IDelayedCall = stream.reactor.callLater(COMMENT_EVERY_S, self._write)

    def stop(self) -> None:
        if self._timer.active():
            self._timer.cancel()

    def _write(self) -> None:
        stream = self._stream
        if stream.clock() >= stream.until:
            # Other requests on the connection are refused from now on, too.
            stream.subscription.end(SubscriptionEndedError("the certificate has expired"))
            return
        if not self._flow.is_paused:
            self._request.write(b":\n\n")
        self._timer = stream.reactor.callLater(COMMENT_EVERY_S, self._write)
