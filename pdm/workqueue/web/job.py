"""One job: how far it is, its failures, first elements and events, the acts on it, and its receipt."""

from __future__ import annotations

import shlex
from collections.abc import AsyncGenerator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

import msgspec
from attrs import evolve
from markupsafe import Markup
from msgspec import UNSET, Meta

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.domain.formatting import display_bytes, display_duration, display_line, display_name
from pdm.workqueue.domain.holds import HOLD_CODE, HoldBy
from pdm.workqueue.domain.jobs import DEFAULT_PRIORITY, FIRST_PRIORITY, LAST_PRIORITY
from pdm.workqueue.domain.notifications import Event, EventKind
from pdm.workqueue.domain.progress import RateColumns, summed_rates
from pdm.workqueue.http import transactions
from pdm.workqueue.http.access import Role
from pdm.workqueue.http.endpoints.holds import change_job, hold_job, resume_job
from pdm.workqueue.http.endpoints.jobs import cancel_job, get_job, retry_job
from pdm.workqueue.http.endpoints.receipts import failure_codes, list_errors
from pdm.workqueue.http.problems import InvalidInputError
from pdm.workqueue.http.receipts import element_line, first_line, receipt_pieces
from pdm.workqueue.http.waiting import limit_sentences
from pdm.workqueue.store import events, outcomes
from pdm.workqueue.store.jobs import ElementFilter
from pdm.workqueue.store.outcomes import NOTHING_RETRIED, WaitingRetries
from pdm.workqueue.web.charts import BarPart, Part, RatePoint, sparkline, stacked_bar
from pdm.workqueue.web.elements import ElementListQuery, element_rows
from pdm.workqueue.web.jobs import Number, site_label
from pdm.workqueue.web.pages import Download, Page, Redirect, Visit, page
from pdm.workqueue.web.rendering import count
from pdm.workqueue.wire.peers import HistoryView
from pdm.workqueue.wire.receipts import CSV, NDJSON, ErrorGroupView
from pdm.workqueue.wire.requests import (
    LONGEST_MESSAGE,
    MOST_ACTIVE,
    ChangeJob,
    HoldRequest,
    RetryQuery,
    WaitQuery,
)
from pdm.workqueue.wire.responses import JobView

#: Elements on a page.
_PAGE_SIZE = 100


class ReceiptQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which elements: those after a number."""

    after: Number | None = None


class ReceiptFileQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """In which form: lines of JSON, which are signed, or CSV."""

    format: Literal["jsonl", "csv"] = "jsonl"


@page("GET", "/web/jobs/<number:job_id>/receipt", query=ReceiptQuery)
async def show_receipt(visit: Visit, job_id: int, query: ReceiptQuery) -> Page:
    """What the job did to every file, in pages."""
    found = await visit.api.database.read(
        "page of a receipt", transactions.receipt_page, job_id, visit.caller.scope, query.after
    )
    lines = [element_line(found, element) for element in found.elements[:_PAGE_SIZE]]
    context: dict[str, Any] = {
        "job_id": job_id,
        "first": first_line(visit.api, found),
        "lines": lines,
        "following": lines[-1].element if len(found.elements) > _PAGE_SIZE else None,
        "is_first_page": query.after is None,
    }
    return Page(template="receipt.html", context=context)


@page("GET", "/web/jobs/<number:job_id>/receipt/download", query=ReceiptFileQuery)
async def download_receipt(visit: Visit, job_id: int, query: ReceiptFileQuery) -> Download:
    """The receipt as a file."""
    first = await visit.api.database.read(
        "page of a receipt", transactions.receipt_page, job_id, visit.caller.scope, None
    )
    media_type = CSV if query.format == "csv" else NDJSON
    pieces = receipt_pieces(visit.api, first, media_type)
    return Download(pieces=pieces, name=f"job-{job_id}-receipt.{query.format}", media_type=media_type)


#: Elements and events that the page of a job shows.
_FIRST_ELEMENTS, _MOST_EVENTS = 25, 200
#: Columns of the picture of a rate, at least.
_LEAST_POINTS = 2

_COMMANDS: Mapping[str, str] = {
    JobType.LIST.name: "pdm ls",
    JobType.COPY.name: "pdm cp",
    JobType.REMOVE.name: "pdm rm",
    JobType.RENAME.name: "pdm mv",
    JobType.MKDIR.name: "pdm mkdir",
}


class RetryForm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is retried; without a code, all that is failed or cancelled."""

    code: tuple[str, ...] = ()


class HoldForm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why a job is held, and until when."""

    message: Annotated[str, Meta(max_length=LONGEST_MESSAGE)] | None = None
    until: Annotated[str, Meta(max_length=40)] | None = None


class ChangeForm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a job is to have from now on; without ``max_active`` no limit of its own."""

    priority: Annotated[int, Meta(ge=FIRST_PRIORITY, le=LAST_PRIORITY)] = DEFAULT_PRIORITY
    max_active: Annotated[int, Meta(ge=1, le=MOST_ACTIVE)] | None = None


class GroupQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One group of failures."""

    code: str
    scope: Annotated[str, Meta(max_length=20)]


@page("GET", "/web/jobs/<number:job_id>")
async def show_job(visit: Visit, job_id: int) -> Page:
    """The job, with the first of its elements."""
    api, caller = visit.api, visit.caller
    record = await api.job(job_id, caller.scope)
    context: dict[str, Any] = {}
    groups: Sequence[ErrorGroupView] = ()
    if record.counters.failed or record.counters.held:
        groups = await list_errors.handler(api, caller, job_id=job_id)  # type: ignore[assignment]
    job: JobView = await get_job.handler(api, caller, job_id=job_id, query=WaitQuery())  # type: ignore[assignment]
    context |= {"job": job, "is_final": record.status.is_final, "groups": groups}
    context |= {"sentence": job_sentence(job, groups), "can_retry": bool(job.num_failed or job.num_cancelled)}
    is_open = not record.status.is_final and not record.cancel_requested
    is_owner = record.user_id == caller.user_id
    is_operators = record.hold is not None and record.hold.by is HoldBy.OPERATOR
    context |= {
        "can_cancel": is_open,
        "can_hold": is_open and (caller.role is Role.OPERATOR or not is_operators),
        "can_hold_at_once": is_open and record.hold is None and is_owner,
        "can_resume": is_open and record.hold is not None and (caller.role is Role.OPERATOR or not is_operators),
        "needs_message": not is_owner,
    }
    if visit.wants("head", "main"):
        context["clone"] = clone_command(visit, job)
    if visit.wants("facts"):
        context["source"] = site_label(api, visit, job.src_siteid)
        context["destination"] = None if job.dst_siteid is UNSET else site_label(api, visit, job.dst_siteid)
        context["options"] = _options(job)
    if visit.wants("progress"):
        sizes: Mapping[JobStatus, int] = {}
        if job.num_failed or job.num_cancelled or job.held:
            sizes = await api.database.read("sizes set aside", outcomes.sizes_set_aside, job_id)
        again = NOTHING_RETRIED
        if is_open and job.num_submitted > job.held:
            again = await api.database.read(
                "elements that wait for a retry", outcomes.waiting_retries, job_id, api.clock()
            )
        context["bar"] = _bar(job, sizes, again)
        context["again"] = again
        context["limits"] = limit_sentences(api, record)
        context["rate"] = _rate_picture(job, await api.cluster.histories_of(job_id))
    if visit.wants("elements"):
        _, found = await api.database.read(
            "page of elements", transactions.element_page, job_id, caller.scope, ElementFilter(limit=_FIRST_ELEMENTS)
        )
        context["rows"] = await element_rows(visit, record, found)
        context["query"] = ElementListQuery()
        context["statuses"] = [status.name for status in JobStatus if status is not JobStatus.NEW]
    if visit.wants("timeline"):
        happened = await api.database.read(
            "events of a job", events.events_after, 0, _MOST_EVENTS, owner=record.user_id, job=job_id, newest_first=True
        )
        context["timeline"] = [(event.at, *_event_words(event)) for event in happened]
    return Page(template="job.html", context=context)


def job_sentence(job: JobView, groups: Sequence[ErrorGroupView]) -> str:
    """Where a job stands, in one sentence."""
    progress = None if job.progress is UNSET else job.progress
    files = count(job.num_done if progress is None else progress.files_done)
    total = None if progress is None else progress.files_total
    of_total = files if total is None else f"{files} of {count(total, 'file')}"
    failed = ""
    if job.num_failed:
        failed = f"; {count(job.num_failed)} failed"
        if groups:
            failed += f" – {groups[0].code} ({groups[0].scope}): {display_line(groups[0].message)[:200]}"
    if job.status == JobStatus.DONE.name:
        took = "" if progress is None or progress.elapsed is None else f" in {display_duration(progress.elapsed)}"
        left_out = f"; {count(job.skipped, 'entry', 'entries')} left out" if job.skipped else ""
        moved = f", {display_bytes(job.bytes_done)}" if job.bytes_done else ""
        return f"Done: {of_total}{moved}{took}{left_out}."
    if job.status == JobStatus.CANCELLED.name:
        why = "by its user" if job.cancel_reason is UNSET else display_line(job.cancel_reason.message)
        return f"Cancelled {why}; {of_total} done{failed}."
    if job.status == JobStatus.FAILED.name:
        return f"{'Partly done' if progress and progress.files_done else 'Failed'}: {of_total} done{failed}."
    if job.cancel_requested:
        return "It is being cancelled: what runs is terminated."
    if job.hold is not UNSET:
        running = f" {count(job.num_running, 'element')} still {'runs' if job.num_running == 1 else 'run'}."
        reason = display_line(job.hold.reason).rstrip(".")
        return f"Held: {reason}. {job.hold.hint}{running if job.num_running else ''}"
    if not job.num_running and job.waiting is not UNSET:
        return f"Waiting: {'; '.join(display_line(reason) for reason in job.waiting)}{failed}."
    if job.status == JobStatus.SUBMITTED.name:
        return "Waiting for its turn."
    if progress is not None and progress.listing:
        return f"Listing: {count(max(job.num_elements - 1, 0))} found so far, {files} done{failed}."
    return f"Running: {of_total} done{failed}."


def shell_word(text: str) -> str:
    """A word for a shell; characters that cannot be seen are escapes, as bash reads them."""
    shown = display_name(text)
    if shown == text.replace("\\", "\\\\"):
        return shlex.quote(text)
    return "$'" + shown.replace("'", "\\'") + "'"


def clone_command(visit: Visit, job: JobView) -> str:
    """The command that submits a job with the same sites, paths and options again."""
    if "items" in job.extra_opts:
        return f"pdm receipt {job.id} -o receipt.jsonl && pdm cp --redo receipt.jsonl"
    words = _COMMANDS[job.type].split()
    if job.type == JobType.REMOVE.name and job.extra_opts.get("recursive"):
        words.append("-r")
    words += ["--protocol", job.protocol, "--priority", str(job.priority), "--max-tries", str(job.max_tries)]
    if job.label:
        words += ["--label", job.label]
    if job.max_active is not UNSET:
        words += ["--max-active", str(job.max_active)]
    for name, value in job.extra_opts.items():
        if (job.type, name) != (JobType.REMOVE.name, "recursive"):
            words += ["--option", f"{name}={msgspec.json.encode(value).decode()}"]
    words.append(f"{site_label(visit.api, visit, job.src_siteid).name}:{job.src_filepath}")
    if job.dst_filepath is not UNSET:
        number = job.src_siteid if job.dst_siteid is UNSET else job.dst_siteid
        words.append(f"{site_label(visit.api, visit, number).name}:{job.dst_filepath}")
    return " ".join(shell_word(word) for word in words)


def _options(job: JobView) -> list[tuple[str, str]]:
    """Options that were asked for, as text of bounded length."""
    options = []
    for name, value in job.extra_opts.items():
        if name == "items":
            options.append((name, count(len(value), "path")))
        else:
            options.append((name, value if isinstance(value, str) else msgspec.json.encode(value).decode()[:2000]))
    return options


def _bar(job: JobView, sizes: Mapping[JobStatus, int], again: WaitingRetries) -> Markup:
    progress = job.progress
    listing = 0 if progress is UNSET or progress.files_total is None else job.num_elements - progress.files_total
    moving = 0 if progress is UNSET else progress.bytes_moving or 0
    done = max(job.num_done - job.already_there - listing, 0)
    failed, cancelled = (sizes.get(status, 0) for status in (JobStatus.FAILED, JobStatus.CANCELLED))
    held = sizes.get(JobStatus.HELD, 0)
    retried = min(again.count, job.num_submitted - job.held)
    left = max(job.bytes_total - job.bytes_done - moving - failed - cancelled - held - again.size, 0)
    queued = job.num_submitted - job.held - retried
    is_on_hold = job.hold is not UNSET and job.hold.code == HOLD_CODE
    parts = [
        BarPart(part=Part.DONE, files=done, bytes=max(job.bytes_done - job.bytes_already_there, 0)),
        BarPart(part=Part.ALREADY_THERE, files=job.already_there, bytes=job.bytes_already_there),
        BarPart(part=Part.SKIPPED, files=job.skipped),
        # What of a running file has not moved yet counts with the running ones once nothing is queued.
        BarPart(part=Part.RUNNING, files=job.num_running, bytes=moving if queued else moving + left),
        BarPart(part=Part.RETRYING, files=retried, bytes=again.size),
        BarPart(part=Part.FAILED, files=job.num_failed, bytes=failed),
        BarPart(part=Part.CANCELLED, files=job.num_cancelled, bytes=cancelled),
    ]
    waiting = left if queued else 0
    if is_on_hold:
        parts.append(BarPart(part=Part.HELD, files=job.held + queued, bytes=held + waiting))
    else:
        parts.append(BarPart(part=Part.HELD, files=job.held, bytes=held))
        parts.append(BarPart(part=Part.QUEUED, files=queued, bytes=waiting))
    if not job.bytes_total:
        parts = [evolve(part, bytes=None) for part in parts]
    return stacked_bar(parts, key="parts", title=f"Job {job.id}")


def _rate_picture(job: JobView, histories: Sequence[HistoryView]) -> Markup | None:
    """The rate over time since the nodes' starts, of bytes or else of files."""
    total = summed_rates(
        [
            RateColumns(each.begun_at, each.bytes_column_s, each.bytes)
            if job.bytes_total
            else RateColumns(each.begun_at, each.files_column_s, each.files)
            for each in histories
        ]
    )
    if total is None:
        return None
    begun = datetime.fromtimestamp(total.begun_at, UTC)
    points = [
        RatePoint(at=begun + timedelta(seconds=number * total.column_s), rate=rate)
        for number, rate in enumerate(total.rates)
    ]
    if len(points) < _LEAST_POINTS:
        return None

    def words(rate: float) -> str:
        return f"{display_bytes(rate)}/s" if job.bytes_total else f"{rate:.3g} files/s"

    return sparkline(points, key="rate", title=f"Rate of job {job.id}", describe=words)


def _event_words(event: Event) -> tuple[str, str, str]:
    """An event: status or kind, what happened, and a hint."""
    data = event.data
    if event.kind is EventKind.JOB:
        done, total = data.get("num_done", 0), data.get("num_elements", 0)
        reason = data.get("reason") or {}
        words = f"{count(done)} of {count(total, 'element')} done"
        if data.get("num_failed"):
            words += f", {count(data['num_failed'])} failed"
        if reason:
            words += f": {display_line(str(reason.get('message', reason)))}"
        return str(data.get("status", "")), words if data.get("before") else "registered", ""
    if event.kind is EventKind.FAILURE:
        words = f"{data.get('code')} ({data.get('scope')}), {count(data.get('count', 1), 'time')} so far; "
        words += f"element {data.get('element')}, {display_name(str(data.get('path', '')))}: {data.get('message', '')}"
        return "failure", display_line(words), str(data.get("hint", ""))
    words = display_line(str(data.get("reason", "")))
    return event.kind.value, f"{count(data.get('count', 0), 'element')}: {words}", str(data.get("hint", ""))


@page("GET", "/web/jobs/<number:job_id>/errors")
async def show_errors(visit: Visit, job_id: int) -> Page:
    """The failures of a job, by code and scope."""
    groups = await list_errors.handler(visit.api, visit.caller, job_id=job_id)
    return Page(template="errors.html", context={"groups": groups, "job_id": job_id})


@page("GET", "/web/jobs/<number:job_id>/errors/paths", query=GroupQuery)
async def download_paths(visit: Visit, job_id: int, query: GroupQuery) -> Download:
    """The paths at the source of one group of failures, a shell word each, a line each."""
    (code,) = failure_codes([query.code])
    try:
        scope = FailureScope(query.scope)
    except ValueError as error:
        raise InvalidInputError(f"known scopes are {', '.join(FailureScope)}", "scope") from error
    await visit.api.job(job_id, visit.caller.scope)
    name = f"job-{job_id}-{code.value}-{scope.value}.txt"
    pieces = _paths(visit, job_id, code, scope)
    return Download(pieces=pieces, name=name, media_type="text/plain; charset=utf-8")


async def _paths(visit: Visit, job_id: int, code: FailureCode, scope: FailureScope) -> AsyncGenerator[bytes]:
    wanted = ElementFilter(
        statuses=frozenset({JobStatus.FAILED, JobStatus.HELD}),
        codes=frozenset({code}),
        scopes=frozenset({scope}),
        limit=transactions.PAGE_SIZE,
    )
    while True:
        _, found = await visit.api.database.read(
            "page of elements", transactions.element_page, job_id, visit.caller.scope, wanted
        )
        if found:
            lines = [shell_word(element.src_filepath) + "\n" for element in found]
            yield "".join(lines).encode("utf-8", "replace")
        if len(found) < transactions.PAGE_SIZE:
            return
        wanted = evolve(wanted, after=found[-1].id)


@page("POST", "/web/jobs/<number:job_id>/cancel")
async def cancel(visit: Visit, job_id: int) -> Redirect:
    """Cancel the job."""
    await cancel_job.handler(visit.api, visit.caller, job_id=job_id)
    return Redirect(f"/web/jobs/{job_id}", f"Job {job_id} is cancelled; what is done stays.")


@page("POST", "/web/jobs/<number:job_id>/hold", form=HoldForm)
async def hold(visit: Visit, job_id: int, form: HoldForm) -> Redirect:
    """Hold the job."""
    body = HoldRequest(message=form.message, until=form.until)
    job: Any = await hold_job.handler(visit.api, visit.caller, job_id=job_id, body=body, key=None)
    return Redirect(f"/web/jobs/{job_id}", job_sentence(job, ()))


@page("POST", "/web/jobs/<number:job_id>/resume")
async def resume(visit: Visit, job_id: int) -> Redirect:
    """End the hold of the job."""
    await resume_job.handler(visit.api, visit.caller, job_id=job_id, key=None)
    return Redirect(f"/web/jobs/{job_id}", f"Job {job_id} is resumed.")


@page("POST", "/web/jobs/<number:job_id>/change", form=ChangeForm)
async def change(visit: Visit, job_id: int, form: ChangeForm) -> Redirect:
    """Change the priority of the job, and how much of it may run at once."""
    body = ChangeJob(priority=form.priority, max_active=form.max_active)
    await change_job.handler(visit.api, visit.caller, job_id=job_id, body=body)
    most = (
        "without a limit of its own"
        if form.max_active is None
        else f"at most {count(form.max_active, 'element')} at once"
    )
    return Redirect(f"/web/jobs/{job_id}", f"Job {job_id} has priority {form.priority}, {most}.")


@page("POST", "/web/jobs/<number:job_id>/retry", form=RetryForm)
async def retry(visit: Visit, job_id: int, form: RetryForm) -> Redirect:
    """Retry what has failed or was cancelled, or only the failures with some codes."""
    result: Any = await retry_job.handler(
        visit.api, visit.caller, job_id=job_id, query=RetryQuery(code=form.code), key=None
    )
    return Redirect(f"/web/jobs/{job_id}", f"{count(result.retried, 'element')} of job {job_id} are tried again.")
