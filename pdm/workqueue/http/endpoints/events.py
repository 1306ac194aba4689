"""Endpoints of events: streams that follow them, and pages of those that are stored."""

from __future__ import annotations

from collections.abc import Sequence

from pdm.workqueue.domain.notifications import EventFilter, EventKind
from pdm.workqueue.http.access import Caller
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.decoding import enum_members
from pdm.workqueue.http.endpoint import endpoint
from pdm.workqueue.http.event_streams import EventStream, event_view
from pdm.workqueue.http.problems import InvalidInputError, JobNotFoundError
from pdm.workqueue.http.request import JSON
from pdm.workqueue.store import events
from pdm.workqueue.wire.events import EVENT_STREAM, EventQuery, EventView
from pdm.workqueue.wire.requests import LARGEST_ID

#: What a stream of all jobs gives out, unless it is asked for something else.
_WITHOUT_PROGRESS = frozenset(EventKind) - {EventKind.PROGRESS}
_MEDIA_TYPES = (JSON.decode("ascii"), EVENT_STREAM)


@endpoint(
    "GET",
    "/events",
    summary="Events of all jobs of the caller",
    query=EventQuery,
    result=list[EventView],
    errors=(InvalidInputError,),
    media_types=_MEDIA_TYPES,
)
async def list_events(
    api: ApiContext, caller: Caller, query: EventQuery, media_type: str, last_event_id: str | None
) -> Sequence[EventView] | EventStream:
    """A page of what is stored; with ``Accept: text/event-stream`` a stream that begins now.

    A stream is resumed by ``Last-Event-ID`` or ``after``, without gap or double. Operators get the events of all users,
    and those of sites. ``progress`` is in the stream only if ``kinds`` names it.
    """
    kinds = _kinds(query)
    if kinds is None and media_type == EVENT_STREAM:
        kinds = _WITHOUT_PROGRESS
    return await _given(api, caller, EventFilter(owner=caller.scope, kinds=kinds), query, media_type, last_event_id)


@endpoint(
    "GET",
    "/jobs/{job_id}/events",
    summary="Events of a job",
    query=EventQuery,
    result=list[EventView],
    errors=(InvalidInputError, JobNotFoundError),
    media_types=_MEDIA_TYPES,
)
async def list_job_events(
    api: ApiContext, caller: Caller, job_id: int, query: EventQuery, media_type: str, last_event_id: str | None
) -> Sequence[EventView] | EventStream:
    """A page of what is stored; with ``Accept: text/event-stream`` a stream that begins now, with ``progress``.

    A stream is resumed by ``Last-Event-ID`` or ``after``, without gap or double.
    """
    await api.job(job_id, caller.scope)
    return await _given(api, caller, EventFilter(job=job_id, kinds=_kinds(query)), query, media_type, last_event_id)


def _kinds(query: EventQuery) -> frozenset[EventKind] | None:
    return enum_members(EventKind, query.kinds, "kinds") or None


async def _given(
    api: ApiContext,
    caller: Caller,
    wanted: EventFilter,
    query: EventQuery,
    media_type: str,
    last_event_id: str | None,
) -> Sequence[EventView] | EventStream:
    if media_type == EVENT_STREAM:
        if query.order == "newest":
            raise InvalidInputError("a stream begins with the oldest: leave order out", "?order")
        after = query.after if last_event_id is None else _event_id(last_event_id)
        return EventStream(api.feed.subscribe(wanted, after), api.reactor, api.clock, caller.certificate_ends_at)
    page = await api.database.read(
        "page of events",
        events.events_after,
        query.after or 0,
        query.limit,
        owner=wanted.owner,
        job=wanted.job,
        kinds=wanted.kinds,
        newest_first=query.order == "newest",
    )
    return [event_view(event) for event in page]


def _event_id(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) <= LARGEST_ID):
        raise InvalidInputError("expected the id of an event, a number", "Last-Event-ID")
    return int(text)
