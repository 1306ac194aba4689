"""The elements of a job are looked at."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from datetime import datetime

import attrs

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.jobs import ElementRecord, JobRecord
from pdm.workqueue.http import transactions
from pdm.workqueue.http.access import Caller
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.decoding import enum_members
from pdm.workqueue.http.endpoint import JsonStream, endpoint, json_array, json_items
from pdm.workqueue.http.endpoints.jobs import site_number, utc_timestamp
from pdm.workqueue.http.listings import has_listing, with_listing
from pdm.workqueue.http.problems import ElementNotFoundError, InvalidInputError, JobNotFoundError
from pdm.workqueue.http.views import element_status_view, element_view
from pdm.workqueue.store import jobs
from pdm.workqueue.store.jobs import ElementFilter
from pdm.workqueue.wire.requests import ElementQuery
from pdm.workqueue.wire.responses import ElementStatusView, ElementView


@endpoint(
    "GET",
    "/jobs/{job_id}/elements",
    summary="The elements of a job",
    query=ElementQuery,
    result=list[ElementView],
    errors=(InvalidInputError, JobNotFoundError),
)
async def list_elements(api: ApiContext, caller: Caller, job_id: int, query: ElementQuery) -> JsonStream:
    """In their order. Ask for pages (``limit``, ``after``) where a job may have many."""
    wanted = ElementFilter(
        statuses=enum_members(JobStatus, query.status, "status"),
        types=enum_members(JobType, query.type, "type"),
        limit=_page_size(query.limit),
        after=query.after,
    )
    site = None if query.site is None else site_number(api, caller, query.site)
    since = utc_timestamp(query.since)
    job, page = await api.database.read("page of elements", transactions.element_page, job_id, caller.scope, wanted)
    if (site is not None and site not in (job.src_siteid, job.dst_siteid)) or query.label not in (None, job.label):
        page = []
    return JsonStream(json_array(_element_pages(api, job, page, wanted, since, query.limit)))


def _page_size(limit: int | None) -> int:
    return transactions.PAGE_SIZE if limit is None else min(transactions.PAGE_SIZE, limit)


async def _element_pages(
    api: ApiContext,
    job: JobRecord,
    page: list[ElementRecord],
    wanted: ElementFilter,
    since: datetime | None,
    limit: int | None,
) -> AsyncGenerator[bytes | AsyncGenerator[bytes]]:
    """The elements of a page and of those after it."""
    while True:
        chosen = [element for element in page if since is None or element.timestamp >= since][:limit]
        plain: list[ElementView] = []
        for element in chosen:
            if job.type is JobType.LIST and has_listing(element):
                if plain:
                    yield json_items(plain)
                    plain = []
                yield with_listing(api, job, element, element_view(element, job), in_list=True)
            else:
                plain.append(element_view(element, job))
        if plain:
            yield json_items(plain)
        if limit is not None:
            limit -= len(chosen)
            if limit == 0:
                return
        if wanted.limit is None or len(page) < wanted.limit:
            return
        wanted = attrs.evolve(wanted, after=page[-1].id, limit=_page_size(limit))
        page = await api.database.read("page of elements", jobs.page_elements, job.id, wanted)


@endpoint(
    "GET",
    "/jobs/{job_id}/elements/{element_id}",
    summary="One element of a job",
    result=ElementView,
    errors=(JobNotFoundError, ElementNotFoundError),
)
async def get_element(api: ApiContext, caller: Caller, job_id: int, element_id: int) -> ElementView | JsonStream:
    """A LIST element that is done has its listing."""
    job, element = await api.database.read(
        "fetch an element", transactions.fetch_element, job_id, element_id, caller.scope
    )
    if not has_listing(element):
        return element_view(element, job)
    return JsonStream(with_listing(api, job, element, element_view(element, job), in_list=True))


@endpoint(
    "GET",
    "/jobs/{job_id}/elements/{element_id}/status",
    summary="Where an element stands",
    result=ElementStatusView,
    errors=(JobNotFoundError, ElementNotFoundError),
)
async def get_element_status(api: ApiContext, caller: Caller, job_id: int, element_id: int) -> ElementStatusView:
    """The status, and for a transfer how far it is and how fast."""
    _, element = await api.database.read(
        "fetch an element", transactions.fetch_element, job_id, element_id, caller.scope
    )
    return element_status_view(element, api.progress.of_element(job_id, element_id))
