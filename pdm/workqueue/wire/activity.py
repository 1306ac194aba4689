"""What happened over time, and who waits now. Times are UTC; numbers may be estimated from a sample."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import msgspec
from msgspec import Meta


class RateView(msgspec.Struct, frozen=True, kw_only=True):
    """What a job has done since its start, in parts of equal length; the listing is left out."""

    since: Annotated[datetime | None, Meta(description="Start of the job; null before it.")]
    seconds: Annotated[float, Meta(description="Length of each part.")]
    files: Annotated[list[int], Meta(description="Elements that were done in each part.")]
    bytes: Annotated[list[int], Meta(description="Bytes that these transferred.")]
    failed: Annotated[list[int], Meta(description="Attempts that failed in each part.")]
    sampled: Annotated[bool, Meta(description="Whether the numbers are estimated from a part of the elements.")]


class RouteActivityView(msgspec.Struct, frozen=True, kw_only=True):
    """What ended on a route, in parts of equal length."""

    source: Annotated[int, Meta(description="Number of a site.")]
    destination: Annotated[int | None, Meta(description="Number of a site; null where only the source is used.")]
    done: Annotated[list[int], Meta(description="Attempts that succeeded in each part, listings included.")]
    failed: Annotated[list[int], Meta(description="Attempts that failed in each part.")]
    bytes: Annotated[list[int], Meta(description="Bytes that were transferred by those that succeeded.")]


class FailureCountView(msgspec.Struct, frozen=True, kw_only=True):
    """How many attempts failed for one reason."""

    scope: str
    code: str
    hint: str
    count: int


class ActivityView(msgspec.Struct, frozen=True, kw_only=True):
    """What ended on all routes in the last 24 hours."""

    since: datetime
    seconds: Annotated[float, Meta(description="Length of each part.")]
    routes: Annotated[list[RouteActivityView], Meta(description="Those with the most attempts first.")]
    errors: Annotated[list[FailureCountView], Meta(description="The most frequent first.")]
    sampled: Annotated[bool, Meta(description="Whether the numbers are estimated from a part of jobs or elements.")]


class SiteActivityView(msgspec.Struct, frozen=True, kw_only=True):
    """What happens at a site now, for all users together."""

    site: Annotated[int, Meta(description="Number of a site.")]
    active_in: Annotated[int, Meta(description="Streams into it, of this daemon.")]
    active_out: Annotated[int, Meta(description="Streams out of it, of this daemon.")]
    limit_in: Annotated[int, Meta(description="Streams that there may be into it.")]
    limit_out: Annotated[int, Meta(description="Streams that there may be out of it.")]
    running: Annotated[int, Meta(description="Elements that run with this site as an end.")]
    queued: Annotated[int, Meta(description="Elements that wait.")]
    done: Annotated[int, Meta(description="Attempts that succeeded in the last hour.")]
    failed: Annotated[int, Meta(description="Attempts that failed in the last hour, whatever was at fault.")]


class QueueShareView(msgspec.Struct, frozen=True, kw_only=True):
    """Unfinished jobs of one user on one route; waiting, running and held are elements."""

    user_id: int
    subject: str
    source: Annotated[int, Meta(description="Number of a site.")]
    destination: Annotated[int | None, Meta(description="Number of a site; null where only the source is used.")]
    jobs: int
    waiting: int
    running: int
    held: int


class WaitingJobView(msgspec.Struct, frozen=True, kw_only=True):
    """A job of which nothing runs, and why."""

    job: Annotated[int, Meta(description="Number of the job.")]
    user_id: int
    subject: str
    since: Annotated[datetime, Meta(description="When it was registered.")]
    reasons: Annotated[list[str], Meta(description="Sentences, as in ``waiting`` of the job.")]


class QueueSummaryView(msgspec.Struct, frozen=True, kw_only=True):
    """The whole queue: who works and waits, and what has waited longest."""

    shares: Annotated[list[QueueShareView], Meta(description="By user and route, the oldest job first.")]
    oldest: Annotated[list[WaitingJobView], Meta(description="Of each user and route at most one; at most ten.")]
    complete: Annotated[bool, Meta(description="Whether all unfinished jobs are counted; 100,000 are at most.")]


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """A node: a daemon that works on the queue. Times are of the database's clock, if several share one."""

    name: Annotated[str, Meta(description="For people: ``[node] name``, by default the host name.")]
    worker: Annotated[str, Meta(description="Unique, also among nodes with the same name; part of names of logs.")]
    host: Annotated[str | None, Meta(description="Host and process id.")]
    address: Annotated[str | None, Meta(description="URL under which other nodes reach it; null for none.")]
    version: Annotated[str | None, Meta(description="Of its program.")]
    since: Annotated[datetime | None, Meta(description="When it was started.")]
    seen: Annotated[datetime | None, Meta(description="When it renewed its lease last.")]
    alive: Annotated[bool, Meta(description="Whether its lease is valid.")]
    lease_until: datetime | None
    running: Annotated[int, Meta(description="Elements that it runs.")]
    drain: Annotated[str | None, Meta(description="Why it starts nothing more, by an operator; null while it does.")]
    drain_until: Annotated[datetime | None, Meta(description="When it gives back what still runs; null for never.")]
    sick: Annotated[str | None, Meta(description="Why it starts nothing, by its own checks; null if it is healthy.")]


class DrainRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a node is drained."""

    message: Annotated[str, Meta(min_length=1, max_length=500, description="One line: why.")]
    deadline: Annotated[
        Annotated[str, Meta(min_length=1, max_length=40)] | None,
        Meta(description="When it gives back what still runs: a time, or a duration such as 30m. By default never."),
    ] = None


class ReasonView(msgspec.Struct, frozen=True, kw_only=True):
    """One reason why a job or an element does not move."""

    code: Annotated[str, Meta(description="Stable word: what holds it up.")]
    reason: Annotated[str, Meta(description="A sentence.")]
    hint: Annotated[str, Meta(description="What to do; empty if nothing needs to be done.")] = ""


class WhyView(msgspec.Struct, frozen=True, kw_only=True):
    """Why a job or an element does not move, or what it does."""

    job: Annotated[int, Meta(description="Number of the job.")]
    element: Annotated[int | None, Meta(description="Number of the element; null for the whole job.")]
    status: str
    reasons: Annotated[list[ReasonView], Meta(description="All that are known, those that stop everything first.")]


class WhyQuery(msgspec.Struct, frozen=True, kw_only=True):
    """What ``GET /jobs/{job_id}/why`` is about."""

    element: Annotated[
        Annotated[int, Meta(ge=0, le=2**63 - 1)] | None,
        Meta(description="Number of an element; without it, of the whole job."),
    ] = None
