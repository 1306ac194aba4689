"""Streams of events (Server-Sent Events), written at the speed of the client.

The memory of a stream is bounded: its subscription queues a limited number of events, which all streams share in their
encoded form, and nothing is written while the transport does not drain. A client that falls behind is dropped, which a
last event says; it can resume where it was.
"""

from __future__ import annotations

from functools import lru_cache

import msgspec
from attrs import frozen
from twisted.internet.interfaces import IDelayedCall, IReactorTime

from pdm.workqueue.domain.events import Event
from pdm.workqueue.execution.event_feed import SlowReaderError, Subscription, SubscriptionEndedError
from pdm.workqueue.http.request import ApiRequest, FlowControl
from pdm.workqueue.wire.events import EVENT_STREAM, EventView

#: Seconds between two comments, by which both ends notice that the other one is gone.
COMMENT_EVERY_S = 15.0
#: Milliseconds after which a browser connects again.
_RETRY_MS = 1000
#: Events that are kept in their encoded form, because several streams give them out at the same time.
_MOST_ENCODED = 1024


@frozen
class EventStream:
    """A result that is written until the client leaves, or the service stops."""

    subscription: Subscription
    reactor: IReactorTime


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
        comments = _Comments(request, flow, stream.reactor)
        try:
            await _write_all(request, flow, subscription)
        finally:
            comments.stop()
    finally:
        subscription.close()


async def _write_all(request: ApiRequest, flow: FlowControl, subscription: Subscription) -> None:
    try:
        while True:
            events = await subscription.next()
            request.write(b"".join(map(_encoded, events)))
            await flow.open()
    except SlowReaderError as error:
        last = msgspec.json.encode({"reason": str(error), "after": subscription.after})
        request.write(b"event: dropped\ndata: %s\n\n" % last)
    except SubscriptionEndedError as error:
        request.write(b": %s\n\n" % str(error).encode("ascii"))
    request.unregisterProducer()
    request.channel.loseConnection()


class _Comments:
    """Writes a comment periodically, unless the client does not read."""

    def __init__(self, request: ApiRequest, flow: FlowControl, reactor: IReactorTime) -> None:
        self._request = request
        self._flow = flow
        self._reactor = reactor
        self._timer: IDelayedCall = reactor.callLater(COMMENT_EVERY_S, self._write)

    def stop(self) -> None:
        if self._timer.active():
            self._timer.cancel()

    def _write(self) -> None:
        if not self._flow.is_paused:
            self._request.write(b":\n\n")
        self._timer = self._reactor.callLater(COMMENT_EVERY_S, self._write)
