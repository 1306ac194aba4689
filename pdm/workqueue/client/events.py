"""Follow the events of the service: a stream that is resumed after an interruption, and the wait for a job on it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import msgspec
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.defer import TimeoutError as DeferredTimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater

from pdm.workqueue.client.connection import Connection, Query
from pdm.workqueue.client.errors import (
    ConnectionBrokenError,
    JobTimeoutError,
    RequestRefusedError,
    TemporaryRefusalError,
    UnexpectedAnswerError,
    UnreachableError,
)
from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.notifications import EventKind
from pdm.workqueue.wire.events import EVENT_STREAM, EventView
from pdm.workqueue.wire.responses import JobProgressView, JobView

#: Events that wait for the caller at most; then the connection is closed until they are taken.
_MOST_QUEUED = 1000
#: Bytes of one event at most.
_LONGEST_EVENT = 1024 * 1024
#: Seconds before the first, second … connection after one that broke; the last one is repeated.
_PAUSES_S = (0.1, 0.3, 1.0, 2.0)
_INTERRUPTIONS = (UnreachableError, ConnectionBrokenError, TemporaryRefusalError)


class EventReader:
    """Reads a stream of events, and connects again where it was when that ends.

    Args:
        path: of the stream, below the root of the API.
        query: of the request, without ``after``.
        after: id of the event after which it begins; None for events from now on.
        outage_s: how long the service may be unreachable, once it has answered any request of the connection.
    """

    def __init__(
        self,
        reactor: IReactorTime,
        connection: Connection,
        *,
        path: str,
        query: Query,
        after: int | None,
        outage_s: float,
    ) -> None:
        self._reactor = reactor
        self._connection = connection
        self._path = path
        self._query = query
        self._outage_s = outage_s
        self._last_id = None if after is None else str(after)
        self._received = b""
        self._queue: deque[EventView] = deque()
        self._waiting: Deferred[None] | None = None
        self._error: BaseException | None = None
        self._reading: Deferred[None] | None = None
        self._heard_at = connection.answered_at
        self._breaks = 0

    async def take(self, timeout_s: float | None = None) -> Sequence[EventView]:
        """The next events; none if none came within ``timeout_s`` seconds.

        Raises:
            WorkqueueClientError: the service refused the request, or was unreachable for too long.
        """
        if not self._queue and self._error is None:
            self._waiting = Deferred()
            if self._reading is None:
                reading = self._reading = Deferred.fromCoroutine(self._read())
                reading.addBoth(self._ended)
            if timeout_s is not None:
                self._waiting.addTimeout(max(timeout_s, 0.0), self._reactor)
            try:
                await self._waiting
            except DeferredTimeoutError:
                return ()
            finally:
                self._waiting = None
        taken = list(self._queue)
        self._queue.clear()
        if not taken and self._error is not None:
            raise self._error
        return taken

    def close(self) -> None:
        """Close the connection."""
        if self._reading is not None:
            self._reading.cancel()

    async def _read(self) -> None:
        try:
            while len(self._queue) < _MOST_QUEUED:
                await self._read_once()
        except CancelledError:
            # Closed, or too many events wait: the next call of `take` connects again.
            pass
        except Exception as error:
            self._error = error
            self._tell()

    def _ended(self, _result: object) -> None:
        self._reading = None

    async def _read_once(self) -> None:
        self._received = b""
        resume = {} if self._last_id is None else {"Last-Event-ID": self._last_id}
        try:
            await self._connection.request(
                "GET", self._path, query=self._query, accept=EVENT_STREAM, headers=resume, write=self._take_in
            )
        except _INTERRUPTIONS:
            now = self._reactor.seconds()
            if self._heard_at is None or now - self._heard_at > self._outage_s:
                raise
        pause_s = _PAUSES_S[min(self._breaks, len(_PAUSES_S) - 1)]
        self._breaks += 1
        await deferLater(self._reactor, pause_s)

    def _take_in(self, data: bytes) -> None:
        self._heard_at, self._breaks = self._reactor.seconds(), 0
        *blocks, self._received = (self._received + data).split(b"\n\n")
        if len(self._received) > _LONGEST_EVENT:
            raise UnexpectedAnswerError("an event of the service is too long", "Report this to an operator.")
        for block in blocks:
            self._take_block(block)
        if self._queue:
            self._tell()
        if len(self._queue) >= _MOST_QUEUED and self._reading is not None:
            self._reading.cancel()

    def _take_block(self, block: bytes) -> None:
        fields = dict(line.partition(b": ")[::2] for line in block.split(b"\n"))
        if b"id" in fields:
            self._last_id = fields[b"id"].decode("ascii", "replace")
        if fields.get(b"event", b"dropped") == b"dropped":
            # A comment, the id at the begin, or the end of a stream that was read too slowly, and is resumed.
            return
        try:
            self._queue.append(msgspec.json.decode(fields.get(b"data", b""), type=EventView))
        except msgspec.DecodeError as error:
            raise UnexpectedAnswerError(
                f"an event of the service cannot be read ({error})", "Install the same version of client and service."
            ) from error

    def _tell(self) -> None:
        if self._waiting is not None and not self._waiting.called:
            self._waiting.callback(None)


#: Seconds after which a job is read again without an event: why it waits is no event.
_READ_AGAIN_S = 10.0


class JobFollower:
    """Waits for the end of a job by its events, and passes each state to `on_progress`."""

    def __init__(
        self,
        reactor: IReactorTime,
        *,
        fetch_job: Callable[[], Deferred[JobView]],
        events: EventReader,
        on_progress: Callable[[JobView], object],
    ) -> None:
        self._reactor = reactor
        self._fetch_job = fetch_job
        self._events = events
        self._on_progress = on_progress

    async def until_end(self, job: JobView, timeout_s: float | None) -> JobView | None:
        """The ended job; None if the service gives out no events.

        ``job``: its present state, which has not ended.

        Raises:
            JobTimeoutError: the job did not end in time.
            WorkqueueClientError: the service refused a request, or was unreachable for too long.
        """
        begun = self._reactor.seconds()
        try:
            while True:
                left_s = _READ_AGAIN_S if timeout_s is None else begun + timeout_s - self._reactor.seconds()
                if left_s <= 0:
                    raise JobTimeoutError(
                        f"job {job.id} had not ended after {timeout_s:g} s",
                        "It continues: wait longer, or cancel it.",
                        job,
                    )
                try:
                    events = await self._events.take(min(left_s, _READ_AGAIN_S))
                except TemporaryRefusalError:
                    raise
                except RequestRefusedError:
                    return None
                job = await self._changed(job, events)
                self._on_progress(job)
                if JobStatus.parse(job.status).is_final:
                    return job
        finally:
            self._events.close()

    async def _changed(self, job: JobView, events: Sequence[EventView]) -> JobView:
        if not events or any(event.kind != EventKind.PROGRESS for event in events):
            try:
                return await self._fetch_job()
            except _INTERRUPTIONS:
                # The stream determines for how long the service may be away.
                return job
        progress = msgspec.convert(events[-1].data, JobProgressView)
        return msgspec.structs.replace(job, progress=progress)
