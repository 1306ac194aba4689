"""The list of jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any
from urllib.parse import urlencode

import msgspec
from attrs import frozen
from msgspec import Meta

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.http import transactions
from pdm.workqueue.http.access import Role
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.decoding import enum_members
from pdm.workqueue.http.endpoints.jobs import requested_owner
from pdm.workqueue.store.jobs import JobFilter
from pdm.workqueue.web.pages import Page, Visit, page
from pdm.workqueue.wire.requests import LARGEST_ID

#: Jobs on a page.
_PAGE_SIZE = 50

Number = Annotated[int, Meta(ge=0, le=LARGEST_ID)]


def with_query(path: str, fields: Mapping[str, object]) -> str:
    """An address with the fields that are not None."""
    query = urlencode({name: value for name, value in fields.items() if value is not None})
    return f"{path}?{query}" if query else path


class JobListQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which jobs; `label` is any part of it, `before` and `after` are numbers of jobs."""

    status: str | None = None
    type: str | None = None
    label: Annotated[str, Meta(max_length=255)] | None = None
    user: str | None = None
    before: Number | None = None
    after: Number | None = None

    def url(self, **changes: object) -> str:
        """The address of the list with these fields."""
        return with_query("/", {**msgspec.structs.asdict(self), **changes})


@frozen
class SiteLabel:
    """A site by number; `name` is that of a site that the caller may see."""

    number: int
    name: str


def site_label(api: ApiContext, visit: Visit, number: int) -> SiteLabel:
    """How a site is called on a page."""
    site = api.sites.by_id(number)
    if site is None or not api.may_see(visit.caller.user_id, visit.caller.scope, site):
        return SiteLabel(number, f"site {number}")
    return SiteLabel(number, site.name)


@page("GET", "/", query=JobListQuery)
async def list_jobs(visit: Visit, query: JobListQuery) -> Page:
    """The jobs, the newest first."""
    is_operator = visit.caller.role is Role.OPERATOR
    wanted = JobFilter(
        owner_id=requested_owner(visit.caller, query.user),
        statuses=enum_members(JobStatus, (query.status,) if query.status else (), "status"),
        types=enum_members(JobType, (query.type,) if query.type else (), "type"),
        label_part=query.label,
        # One more shows whether there is a next page.
        limit=_PAGE_SIZE + 1,
        after=query.after,
        before=query.before,
        newest_first=query.after is None,
    )
    found, owners = await visit.api.database.read("page of jobs", transactions.job_page, wanted, query.user is not None)
    jobs = list(found[:_PAGE_SIZE])
    is_more = len(found) > _PAGE_SIZE
    if query.after is not None:
        jobs.reverse()
    context: Mapping[str, Any] = {
        "jobs": [_row(visit, job, owners.get(job.user_id, "")) for job in jobs],
        "query": query,
        "is_operator": is_operator,
        "statuses": [status.name for status in JobStatus if status is not JobStatus.NEW],
        "types": [type_.name for type_ in JobType],
        "newer": _newer(query, jobs, is_more),
        "older": _older(query, jobs, is_more),
    }
    return Page(template="jobs.html", context=context)


def _newer(query: JobListQuery, jobs: Sequence[JobRecord], is_more: bool) -> str | None:
    if not jobs or (query.after is None and query.before is None) or (query.after is not None and not is_more):
        return None
    return query.url(before=None, after=jobs[0].id)


def _older(query: JobListQuery, jobs: Sequence[JobRecord], is_more: bool) -> str | None:
    if not jobs or (query.after is None and not is_more):
        return None
    return query.url(after=None, before=jobs[-1].id)


@frozen
class JobRow:
    """A job in the list.

    Attributes:
        part: of its bytes, or of its elements where it has none, 0 to 100; None while nothing is known.
    """

    job: JobRecord
    owner: str
    source: SiteLabel
    destination: SiteLabel | None
    part: int | None


def _row(visit: Visit, job: JobRecord, owner: str) -> JobRow:
    api, counters = visit.api, job.counters
    done, total = (job.bytes_done, job.bytes_total) if job.bytes_total else (counters.done, counters.elements)
    return JobRow(
        job=job,
        owner=owner,
        source=site_label(api, visit, job.src_siteid),
        destination=None if job.dst_siteid is None else site_label(api, visit, job.dst_siteid),
        part=100 * done // total if total else None,
    )
