"""The feed of events: one reader of the database for all listeners, each with a bounded queue.

A listener first reads pages of the database, from the event on that it names, as fast as it takes them; then it gets
what the feed reads. The feed reads after each commit of this daemon that has written events, and periodically those of
other daemons, as long as there are listeners. Progress comes from memory, and only the newest of each job is kept for a
listener.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import datetime

from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater

from pdm.workqueue.domain.notifications import Event, EventFilter, EventKind
from pdm.workqueue.execution.endpoint_health import SiteEndpoint
from pdm.workqueue.store import events
from pdm.workqueue.store.database import Database
from pdm.workqueue.telemetry.background import Background, DueTimer, Periodic

#: Seconds for which commits are gathered before they are read.
_GATHERED_S = 0.02
#: Seconds between two reads at most: with other daemons, or with none, after a read that has failed.
_SHARED_PERIOD_S, _ALONE_PERIOD_S = 0.25, 5.0
#: Events of one read of the feed, and of one page of a listener.
_READ_AT_ONCE, _PAGE = 500, 100
#: Events that wait for a listener at most.
MOST_QUEUED = 1000
#: Seconds between two looks at the progress of a job; the same with several daemons, where a look is a query.
_PROGRESS_S, _SHARED_PROGRESS_S = 0.25, 1.0
#: Jobs whose progress those see that listen to all jobs.
_MOST_PROGRESS = 100


class SubscriptionEndedError(Exception):
    """A subscription gives no more events."""


class SlowReaderError(SubscriptionEndedError):
    """The listener has not taken its events, and more than `MOST_QUEUED` wait for it."""


@define(eq=False)
class Subscription:
    """The events that one listener wants, in order, none twice and none left out.

    Attributes:
        wanted: which.
        after: id of the last event that was given out, or of the one after which it begins; None before `start`.
        on_change: called when it has events to `take`, or gives out no more.
    """

    wanted: EventFilter
    after: int | None
    _feed: EventFeed
    on_change: Callable[[], None] = lambda: None
    _order: tuple[int, int] = (0, 0)
    #: A list, because an empty deque takes 600 bytes.
    _queue: list[Event] = field(factory=list)
    #: Job → its newest progress.
    _progress: dict[int, Event] = field(factory=dict)
    _is_live: bool = False
    #: What the feed reads while a page is read; None at other times.
    _meanwhile: list[Event] | None = None
    _ended: SubscriptionEndedError | None = None

    async def start(self) -> int:
        """Determine where it begins, and return the id of the event after which it does.

        Raises:
            DatabaseUnavailableError: the database is away.
        """
        self.after, self._order = await self._feed.position(self.after)
        return self.after

    @property
    def has_ended(self) -> bool:
        """Whether it gives out no more events."""
        return self._ended is not None

    async def read_stored(self) -> Sequence[Event]:
        """The next events that were stored before; none once all have been read, and then `take` gives the rest.

        Raises:
            SubscriptionEndedError: it was closed, or the service stops.
            DatabaseUnavailableError: the database is away; call it again.
        """
        if self.after is None:
            await self.start()
        while not self._is_live and self._ended is None:
            if page := await self._read_page():
                return page
        self._check()
        return ()

    def take(self) -> Sequence[Event]:
        """The events that have come since; none if there are none now.

        Raises:
            SlowReaderError: it has been dropped.
            SubscriptionEndedError: it was closed, or the service stops.
        """
        self._check()
        taken = [*self._queue, *self._progress.values()]
        if self._queue:
            self.after, self._order = self._queue[-1].id, self._queue[-1].order
        self._queue.clear()
        self._progress.clear()
        return taken

    def close(self) -> None:
        """Give out no more events."""
        self.end(SubscriptionEndedError("it was closed"))

    # -- called by the feed

    def offer(self, event: Event) -> None:
        """Queue a stored event, if it is wanted."""
        if self._ended is not None or not self.wanted.matches(event):
            return
        if not self._is_live:
            if self._meanwhile is not None and len(self._meanwhile) <= MOST_QUEUED:
                self._meanwhile.append(event)
            return
        if event.order <= self._order:
            return
        if len(self._queue) >= MOST_QUEUED:
            self.end(SlowReaderError(f"more than {MOST_QUEUED} events wait for this listener"))
            return
        self._queue.append(event)
        self.on_change()

    def offer_progress(self, job_id: int, event: Event) -> None:
        """Replace the progress of a job by a newer one."""
        if self._is_live and self.wanted.matches(event):
            self._progress[job_id] = event
            self.on_change()

    def end(self, reason: SubscriptionEndedError) -> None:
        if self._ended is None:
            self._ended = reason
            self._queue.clear()
            self._progress.clear()
            self._feed.forget(self)
            self.on_change()

    # --

    def _check(self) -> None:
        if self._ended is not None:
            raise self._ended

    async def _read_page(self) -> Sequence[Event]:
        """The next page of the database; after the last one, the feed gives the rest."""
        await self._feed.positioned()
        meanwhile: list[Event] = []
        self._meanwhile = meanwhile
        try:
            page = await self._feed.read(self.after or 0, _PAGE, self.wanted)
        finally:
            self._meanwhile = None
        if page:
            self.after, self._order = page[-1].id, page[-1].order
        if len(page) < _PAGE and len(meanwhile) <= MOST_QUEUED:
            # The page was read after the feed had begun: what it has not seen, the feed has read meanwhile.
            self._is_live = True
            for event in meanwhile:
                self.offer(event)
        return page


async def _nothing_running() -> Sequence[int]:
    return ()


@define(eq=False, kw_only=True)
class EventFeed:
    """Gives events to subscriptions, and has requests look again that wait for a change of a job.

    Attributes:
        progress_of: the progress of a job as an event; None if there is no such job.
        running: numbers of the jobs that run in any daemon.
        on_written: called after each commit of this daemon that has written events.
    """

    reactor: IReactorTime
    database: Database
    clock: Callable[[], datetime]
    progress_of: Callable[[int], Awaitable[Event | None]] | None = None
    running: Callable[[], Awaitable[Sequence[int]]] = _nothing_running
    on_written: Callable[[], None] = lambda: None
    _subscriptions: set[Subscription] = field(factory=set)
    #: Those that name a job or an owner; all others hear everything.
    _of_job: dict[int, set[Subscription]] = field(factory=dict)
    _of_owner: dict[int, set[Subscription]] = field(factory=dict)
    _of_all: set[Subscription] = field(factory=set)
    #: Id of the last event that was read; None while nothing is read.
    _after: int | None = None
    _starting: list[Deferred[None]] = field(factory=list)
    _timer: DueTimer | None = None
    _progress: Periodic | None = None
    _last_progress: dict[int, Event] = field(factory=dict)
    _background: Background = field(factory=Background)
    _stopping: bool = False

    def start(self) -> None:
        shared = self.database.is_shared
        self._timer = DueTimer(
            self.reactor, "read events", _SHARED_PERIOD_S if shared else _ALONE_PERIOD_S, self._read_new
        )
        self.database.on_events = self._written
        self._timer.start()
        self._progress = Periodic(
            self.reactor, "progress of jobs", _SHARED_PROGRESS_S if shared else _PROGRESS_S, self._tell_progress
        )
        self._progress.start()

    async def stop(self) -> None:
        """End all subscriptions, and read no more."""
        self._stopping = True
        for subscription in list(self._subscriptions):
            subscription.end(SubscriptionEndedError("the service is stopping"))
        self._tell_started()
        self.database.on_events = lambda: None
        if self._timer is not None and self._progress is not None:
            await self._timer.stop()
            await self._progress.stop()
        await self._background.over()

    def subscribe(self, wanted: EventFilter, after: int | None = None) -> Subscription:
        """A new subscription, which its listener must close.

        ``after``: id of the event after which it begins; None for events from now on.
        """
        subscription = Subscription(wanted, after, self)
        if self._stopping:
            subscription.end(SubscriptionEndedError("the service is stopping"))
            return subscription
        self._subscriptions.add(subscription)
        self._group(wanted).add(subscription)
        if self._timer is not None and self._after is None:
            self._timer.wake()
        return subscription

    @property
    def listeners(self) -> int:
        """Number of subscriptions."""
        return len(self._subscriptions)

    def site_changed(self, endpoint: SiteEndpoint, reason: str | None) -> None:
        """Store that an endpoint of a site does not work, and why, or that it works again (None)."""
        data = {
            "site": endpoint.site_id,
            "state": "up" if reason is None else "down",
            "protocol": endpoint.protocol.name,
            "url": endpoint.url,
            "reason": reason or "it can be reached again",
        }
        if not self._stopping:
            self._background.start(
                "event of a site", self.database.run("note an event of a site", events.note_site, self.clock(), data)
            )

    def written_elsewhere(self) -> None:
        """Another daemon has written events."""
        if self._has_readers and self._timer is not None:
            self._timer.wake()

    def watch_jobs(self) -> None:
        """Read events as long as requests wait for a change of a job, which another daemon may make."""
        if self._after is None and self._timer is not None and self.database.is_shared:
            self._timer.wake()

    @property
    def _has_readers(self) -> bool:
        return bool(self._subscriptions) or (self.database.is_shared and self.database.has_waiting)

    # -- called by subscriptions

    def forget(self, subscription: Subscription) -> None:
        self._subscriptions.discard(subscription)
        wanted = subscription.wanted
        self._group(wanted).discard(subscription)
        if wanted.job is not None and not self._of_job[wanted.job]:
            del self._of_job[wanted.job]
        elif wanted.job is None and wanted.owner is not None and not self._of_owner[wanted.owner]:
            del self._of_owner[wanted.owner]

    async def positioned(self) -> None:
        """Wait until each event that is committed from now on will be read."""
        if self._after is None and not self._stopping:
            started: Deferred[None] = Deferred()
            self._starting.append(started)
            await started

    async def position(self, after: int | None) -> tuple[int, tuple[int, int]]:
        return await self.database.read("where events begin", events.position, after)

    async def read(self, after: int, limit: int, wanted: EventFilter) -> list[Event]:
        return await self.database.read(
            "read a page of events",
            events.events_after,
            after,
            limit,
            owner=wanted.owner,
            job=wanted.job,
            kinds=wanted.kinds,
        )

    # --

    def _group(self, wanted: EventFilter) -> set[Subscription]:
        if wanted.job is not None:
            return self._of_job.setdefault(wanted.job, set())
        if wanted.owner is not None:
            return self._of_owner.setdefault(wanted.owner, set())
        return self._of_all

    def _written(self) -> None:
        self.on_written()
        self.written_elsewhere()

    async def _read_new(self) -> float:
        """Read what is new and offer it; returns seconds until the next read."""
        period_s = _SHARED_PERIOD_S if self.database.is_shared else _ALONE_PERIOD_S
        if not self._has_readers:
            self._after = None
            return period_s
        if self._after is None:
            self._after, _ = await self.position(None)
            self._tell_started()
            return period_s
        await deferLater(self.reactor, _GATHERED_S)
        while not self._stopping:
            found = await self.read(self._after or 0, _READ_AT_ONCE, EventFilter())
            for event in found:
                if event.job is not None:
                    self.database.written_elsewhere(event.job)
                for subscription in list(self._hearers(event)):
                    subscription.offer(event)
            if found:
                self._after = found[-1].id
            if len(found) < _READ_AT_ONCE:
                break
        return period_s

    def _tell_started(self) -> None:
        starting, self._starting = self._starting, []
        for each in starting:
            if not each.called:
                each.callback(None)

    def _hearers(self, event: Event) -> Iterator[Subscription]:
        yield from self._of_all
        if event.job is not None:
            yield from self._of_job.get(event.job, ())
        if event.owner is not None:
            yield from self._of_owner.get(event.owner, ())

    async def _tell_progress(self) -> None:
        if self.progress_of is None or not self._subscriptions:
            self._last_progress.clear()
            return
        watched = {job_id for job_id, those in self._of_job.items() if _want_progress(those)}
        wide = any(map(_want_progress, [self._of_all, *self._of_owner.values()]))
        running = await self.running() if watched or wide else ()
        watched = {job_id for job_id in running if job_id in watched}
        if wide:
            watched.update(running[:_MOST_PROGRESS])
        known, self._last_progress = self._last_progress, {}
        for job_id in watched:
            event = await self.progress_of(job_id)
            if event is None:
                continue
            self._last_progress[job_id] = event
            last = known.get(job_id)
            if last is None or last.data != event.data:
                for subscription in list(self._hearers(event)):
                    subscription.offer_progress(job_id, event)


def _want_progress(subscriptions: set[Subscription]) -> bool:
    return any(each.wanted.kinds is None or EventKind.PROGRESS in each.wanted.kinds for each in subscriptions)
