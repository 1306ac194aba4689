"""Endpoints of what happened over time and who waits now: rates, activity of routes and sites, queue."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from pdm.workqueue.domain.enums import JobType
from pdm.workqueue.domain.failures import FailureCode, hint_for
from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.domain.limits import Route
from pdm.workqueue.http.access import Caller
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.endpoint import endpoint
from pdm.workqueue.http.endpoints.sites import require_operator
from pdm.workqueue.http.problems import JobNotFoundError
from pdm.workqueue.http.waiting import waiting_reasons, with_progress
from pdm.workqueue.sites.registry import Site
from pdm.workqueue.store import activity, queue
from pdm.workqueue.store.activity import Ended, RouteActivity, TimeBuckets
from pdm.workqueue.store.queue import MOST_OPEN_JOBS, QueueShare
from pdm.workqueue.wire.activity import (
    ActivityView,
    FailureCountView,
    QueueShareView,
    QueueSummaryView,
    RateView,
    RouteActivityView,
    SiteActivityView,
    WaitingJobView,
)

#: Parts of the rate of a job.
_RATE_PARTS = 60
#: What is shown to operators: a day in quarters of an hour.
_DAY, _DAY_PARTS = timedelta(hours=24), 96
_HOUR = timedelta(hours=1)
#: Readers of what concerns the whole queue share its rows for this time; those of a job that runs, for a shorter one.
_CACHE_LIFETIME, _RATE_LIFETIME = timedelta(seconds=30), timedelta(seconds=2)
_MAX_CACHED = 1000
_MOST_OLDEST = 10

_T = TypeVar("_T")


async def _cached(api: ApiContext, key: object, lifetime: timedelta, read: Callable[[], Awaitable[_T]]) -> _T:
    now = api.clock()
    known: tuple[Any, _T] | None = api.activity.get(key)
    if known is not None and abs(now - known[0]) < lifetime:
        return known[1]
    found = await read()
    if len(api.activity) >= _MAX_CACHED:
        api.activity.clear()
    api.activity[key] = (now, found)
    return found


@endpoint(
    "GET", "/jobs/{job_id}/rate", summary="What a job has done over time", result=RateView, errors=(JobNotFoundError,)
)
async def get_rate(api: ApiContext, caller: Caller, job_id: int) -> RateView:
    """From its start until now, or its end, in 60 parts; of large jobs from a sample of their elements."""
    job = await api.job(job_id, caller.scope)
    lifetime = _CACHE_LIFETIME if job.finished_at is not None else _RATE_LIFETIME
    # A job that was retried has another end.
    return await _cached(api, ("rate", job_id, job.finished_at), lifetime, lambda: _rate(api, job))


async def _rate(api: ApiContext, job: JobRecord) -> RateView:
    found = await api.database.read("rate of a job", activity.job_rate, job, api.clock(), _RATE_PARTS)
    if found is None:
        return RateView(since=None, seconds=0, files=[], bytes=[], failed=[], sampled=False)
    return RateView(
        since=found.buckets.since.replace(microsecond=0),
        seconds=round(found.buckets.width_s, 3),
        files=[round(each.done) for each in found.ended],
        bytes=[round(each.bytes) for each in found.ended],
        failed=[round(each.failed) for each in found.ended],
        sampled=found.sampled,
    )


async def _activity(api: ApiContext, length: timedelta, parts: int) -> RouteActivity:
    async def read() -> RouteActivity:
        buckets = TimeBuckets.until(api.clock(), length, parts)
        return await api.database.read("activity of routes", activity.route_activity, buckets)

    return await _cached(api, ("activity", length), _CACHE_LIFETIME, read)


@endpoint("GET", "/routes/activity", summary="What ended on all routes in the last 24 hours", result=ActivityView)
async def get_activity(api: ApiContext, caller: Caller) -> ActivityView:
    """For operators; in quarters of an hour. Of many jobs or elements a sample is read, and scaled up."""
    require_operator(caller)
    found = await _activity(api, _DAY, _DAY_PARTS)
    routes = sorted(found.routes.items(), key=lambda item: -_total(item[1]))
    errors = sorted(found.failures.items(), key=lambda item: -item[1])
    return ActivityView(
        since=found.buckets.since.replace(microsecond=0),
        seconds=found.buckets.width_s,
        routes=[
            RouteActivityView(
                source=route.source,
                destination=route.destination,
                done=[round(each.done) for each in ended],
                failed=[round(each.failed) for each in ended],
                bytes=[round(each.bytes) for each in ended],
            )
            for route, ended in routes
        ],
        errors=[
            FailureCountView(scope=scope, code=code, hint=_hint(code), count=round(count))
            for (scope, code), count in errors
        ],
        sampled=found.sampled,
    )


def _total(ended: Sequence[Ended]) -> float:
    return sum(each.done + each.failed for each in ended)


def _hint(code: str) -> str:
    # The jobs are of several types; copies are the most.
    known = FailureCode.__members__.get(code)
    return "" if known is None else hint_for(known, JobType.COPY)


async def _shares(api: ApiContext) -> Sequence[QueueShare]:
    return await _cached(
        api, "queue", _CACHE_LIFETIME, lambda: api.database.read("shares of the queue", queue.queue_shares)
    )


@endpoint("GET", "/sites/activity", summary="What happens at each site", result=list[SiteActivityView])
async def list_site_activity(api: ApiContext, caller: Caller) -> list[SiteActivityView]:
    """Of the sites that the caller may use; sums over all users, at most 30 seconds old."""
    shares = await _shares(api)
    hour = await _activity(api, _HOUR, 1)
    limits = api.settings.queue
    active_in, active_out, running, queued = Counter[int](), Counter[int](), Counter[int](), Counter[int]()
    done, failed = defaultdict[int, float](float), defaultdict[int, float](float)
    for stream in api.routes():
        active_in[_changed_site(stream.route)] += stream.running
        if stream.route.destination is not None:
            active_out[stream.route.source] += stream.running
    for share in shares:
        for number in _ends(share.route):
            running[number] += share.running
            queued[number] += share.waiting
    for route, parts in hour.routes.items():
        for number in _ends(route):
            done[number] += sum(each.done for each in parts)
            failed[number] += sum(each.failed for each in parts)
    return [
        SiteActivityView(
            site=site.id,
            active_in=active_in[site.id],
            active_out=active_out[site.id],
            limit_in=_limit(site, site.limit_in, limits.site_limit_in),
            limit_out=_limit(site, site.limit_out, limits.site_limit_out),
            running=running[site.id],
            queued=queued[site.id],
            done=round(done[site.id]),
            failed=round(failed[site.id]),
        )
        for site in api.sites.listed()
        if api.may_see(caller.user_id, caller.scope, site)
    ]


def _limit(site: Site, own: int | None, usual: int) -> int:
    # Users may lower the limits of their own sites, not raise them.
    return usual if own is None else own if site.owner_id is None else min(own, usual)


def _changed_site(route: Route) -> int:
    return route.source if route.destination is None else route.destination


def _ends(route: Route) -> frozenset[int]:
    return frozenset({route.source, _changed_site(route)})


@endpoint("GET", "/queue", summary="Who works and waits", result=QueueSummaryView)
async def get_queue(api: ApiContext, caller: Caller) -> QueueSummaryView:
    """For operators: unfinished jobs by user and route, and what has waited longest, with the reason."""
    require_operator(caller)
    shares = await _shares(api)
    oldest = sorted(
        (share for share in shares if share.oldest_waiting is not None), key=lambda share: share.oldest_waiting or 0
    )
    waiting = [await _waiting(api, share) for share in oldest[:_MOST_OLDEST]]
    return QueueSummaryView(
        shares=[
            QueueShareView(
                user_id=share.user_id,
                subject=share.subject,
                source=share.route.source,
                destination=share.route.destination,
                jobs=share.jobs,
                waiting=share.waiting,
                running=share.running,
                held=share.held,
            )
            for share in shares
        ],
        oldest=[view for view in waiting if view is not None],
        complete=sum(share.jobs for share in shares) < MOST_OPEN_JOBS,
    )


async def _waiting(api: ApiContext, share: QueueShare) -> WaitingJobView | None:
    job = None if share.oldest_waiting is None else await api.database.job(share.oldest_waiting)
    if job is None or job.status.is_final or job.counters.running:
        # It has begun, or ended, since the queue was read.
        return None
    job, _, blocked_by = await with_progress(api, job)
    _, reasons = await waiting_reasons(api, job, api.clock(), blocked_by)
    return WaitingJobView(
        job=job.id,
        user_id=share.user_id,
        subject=share.subject,
        since=job.timestamp.replace(microsecond=0),
        reasons=list(reasons),
    )
