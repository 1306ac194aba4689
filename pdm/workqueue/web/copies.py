"""A copy from one pane to the other: its options, its plan, and its start.

A plan is a dry run, a job like any other. The copy is registered again from what that job was asked, so that nothing
else than what was planned is copied.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from pdm.workqueue.domain.enums import JobProtocol, JobType
from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.domain.paths import joined
from pdm.workqueue.http.endpoints import jobs
from pdm.workqueue.http.problems import InvalidInputError
from pdm.workqueue.store.idempotency import IdempotencyKey
from pdm.workqueue.web.files import (
    LABEL,
    URL,
    ActPlace,
    FilesForm,
    FilesQuery,
    chosen_site,
    encoded_path,
    in_view,
    selected,
)
from pdm.workqueue.web.jobs import Number
from pdm.workqueue.web.pages import Page, Redirect, Visit, page
from pdm.workqueue.wire.requests import MaxActive, SubmitCopy, WaitQuery

_PLAN_URL = f"{URL}/plan"
#: Seconds that the page of a plan waits for its end.
_WAIT_S = 3.0
#: What a gitignore pattern would take for more than itself.
_SPECIAL = re.compile(r"([\\*?\[\] !#])")
_SYNC_LEVELS = ("exists", "size", "mtime", "checksum")

Existing = Literal["never", "always", "different", "exists", "size", "mtime", "checksum"]


class CopyForm(FilesForm, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is selected, and the options of its copy.

    Attributes:
        existing: an ``overwrite`` or ``sync``.
        rules: filters, a line each: ``+ PATTERN`` or ``- PATTERN``.
        now: whether to copy without a plan.
        token: of the page that the form is on, so that a form that is sent twice registers one job.
    """

    token: Annotated[str, Meta(max_length=100)] | None = None

    protocol: str | None = None
    existing: Existing = "never"
    verify: Literal["checksum", "size"] = "checksum"
    checksum: Literal["ADLER32", "MD5", "SHA256"] | None = None
    rules: Annotated[str, Meta(max_length=100_000)] | None = None
    min_size: Number | None = None
    max_size: Number | None = None
    newer_than: str | None = None
    older_than: str | None = None
    delete_extra: bool = False
    max_delete: Number | None = None
    preserve: tuple[Literal["mtime", "mode"], ...] = ()
    move: bool = False
    stage: bool = False
    stage_lifetime: str | None = None
    stage_timeout: str | None = None
    archive: bool = False
    archive_timeout: str | None = None
    label: str | None = None
    priority: Number | None = None
    max_tries: Number | None = None
    max_active: MaxActive = None
    now: bool = False


def _literal_pattern(name: str) -> str:
    """A gitignore pattern for one entry of the source directory."""
    return "/" + _SPECIAL.sub(r"\\\1", name)


def _filters(form: CopyForm, names: Sequence[str]) -> list[dict[str, str]]:
    """The rules of the form, and with several names those that leave out everything else."""
    found: list[dict[str, str]] = []
    for number, line in enumerate((form.rules or "").splitlines(), 1):
        sign, _, pattern = line.strip().partition(" ")
        if not sign:
            continue
        if sign not in ("+", "-") or not pattern.strip():
            raise InvalidInputError(f"filter {number}: '+ PATTERN' or '- PATTERN' is expected", "rules")
        found.append({"include" if sign == "+" else "exclude": pattern.strip()})
    if len(names) == 1:
        return found
    if any("include" in rule for rule in found):
        raise InvalidInputError("with several entries, filters can only exclude: copy them one by one", "rules")
    return [*found, *({"include": _literal_pattern(name)} for name in names), {"exclude": "*"}]


def _options(form: CopyForm, names: Sequence[str]) -> dict[str, Any]:
    if form.delete_extra and len(names) > 1:
        raise InvalidInputError("what is extra can be removed for one directory only: select it alone", "delete_extra")
    options: dict[str, Any] = {
        "sync" if form.existing in _SYNC_LEVELS else "overwrite": form.existing,
        "verify": form.verify,
        "checksum": form.checksum,
        "filters": _filters(form, names),
        "min_size": form.min_size,
        "max_size": form.max_size,
        "newer_than": form.newer_than,
        "older_than": form.older_than,
        "delete_extra": form.delete_extra,
        "max_delete": form.max_delete,
        "preserve": list(form.preserve),
        "move": form.move,
        "stage": form.stage,
        "stage_lifetime": form.stage_lifetime,
        "stage_timeout": form.stage_timeout,
        "archive": form.archive,
        "archive_timeout": form.archive_timeout,
        "dry_run": not form.now,
    }
    defaults = {"overwrite": "never", "verify": "checksum"}
    return {name: value for name, value in options.items() if value and value != defaults.get(name)}


def _submission(visit: Visit, form: CopyForm, at: ActPlace, names: Sequence[str]) -> SubmitCopy:
    site, directory = _destination(visit, form)
    source, target = at.directory, directory
    if len(names) == 1:
        source, target = joined(at.directory, names[0]), joined(directory, names[0])
    return SubmitCopy(
        src_siteid=at.site.id,
        src_filepath=source,
        dst_siteid=site,
        dst_filepath=target,
        protocol=form.protocol or at.protocol.name,
        extra_opts=_options(form, names) or None,
        label=form.label or LABEL,
        priority=form.priority,
        max_tries=form.max_tries,
        max_active=form.max_active,
    )


def _destination(visit: Visit, form: FilesForm) -> tuple[int, str]:
    other = form.panes.other(form.side)
    if other.site is None:
        raise InvalidInputError("list a directory in the other pane: the copy goes there", "other_site")
    site, _ = chosen_site(visit, other.site)
    return site.id, site.default_folder if other.path is None else other.path


async def _options_page(visit: Visit, form: CopyForm, at: ActPlace, problem: InvalidInputError | None = None) -> Page:
    names = selected(form)
    number, directory = _destination(visit, form)
    destination = visit.api.sites.by_id(number)
    protocols = [each for each in sorted(at.site.endpoints) if visit.api.supports(each, JobType.COPY)]
    context = {
        "form": form,
        "names": names,
        "at": at,
        "destination": destination,
        "target": directory,
        "protocols": [each.name for each in protocols],
        "protocol": form.protocol or _best_protocol(at, protocols),
        "back": form.panes.url(),
        "encoded": encoded_path,
        "token": form.token or secrets.token_hex(8),
    }
    status = 200 if problem is None else problem.status
    return Page(template="files_copy.html", context=context, status=status, problem=problem)


def _best_protocol(at: ActPlace, protocols: Sequence[JobProtocol]) -> str:
    return at.protocol.name if at.protocol in protocols or not protocols else protocols[0].name


@page("POST", f"{URL}/copy", form=CopyForm)
async def choose_options(visit: Visit, form: CopyForm) -> Page | Redirect:
    """Show the options of a copy of what is selected to the directory of the other pane."""

    async def act(visit: Visit, form: Any, at: ActPlace) -> Page:
        return await _options_page(visit, form, at)

    return await in_view(visit, form, act)


@page("POST", _PLAN_URL, form=CopyForm)
async def plan_copy(visit: Visit, form: CopyForm) -> Page | Redirect:
    """Register the dry run of a copy, or the copy itself (``now``)."""

    async def act(visit: Visit, form: Any, at: ActPlace) -> Page | Redirect:
        try:
            body = _submission(visit, form, at, selected(form))
            key = None if form.token is None else _key(visit, f"of the page {form.token}", body)
            job: Any = await jobs.submit_copy.handler(visit.api, visit.caller, body=body, key=key)
        except InvalidInputError as error:
            return await _options_page(visit, form, at, error)
        if form.now:
            return Redirect(f"/web/jobs/{job.id}", f"job {job.id} copies")
        view = form.panes.url().removeprefix(URL)
        return Redirect(f"{_PLAN_URL}{view}{'&' if view else '?'}plan={job.id}")

    return await in_view(visit, form, act)


def _key(visit: Visit, word: str, body: SubmitCopy) -> IdempotencyKey:
    """The same for a form that is sent twice, by a double click or a reload; another if the form was changed."""
    digest = hashlib.sha256(msgspec.json.encode(body, order="sorted")).hexdigest()
    return IdempotencyKey(visit.caller.user_id, f"copy {word} {digest}", digest)


class PlanQuery(FilesQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A dry run, and the view to go back to."""

    plan: Number


@page("GET", _PLAN_URL, query=PlanQuery)
async def show_plan(visit: Visit, query: PlanQuery) -> Page:
    """What a copy would do, once its dry run has ended."""
    api = visit.api
    job = await api.awaited_job(query.plan, visit.caller.scope, 0.0 if visit.fragments else _WAIT_S)
    if not _is_plan(job):
        raise InvalidInputError(f"job {job.id} is no plan", "plan")
    view: Any = await jobs.get_job.handler(api, visit.caller, query.plan, query=WaitQuery())
    sites = [api.sites.by_id(number) for number in (job.src_siteid, job.dst_siteid) if number is not None]
    context = {
        "job": job,
        "view": view,
        "plan": view.plan or None,
        "estimate": view.estimate or None,
        "sites": [site.name if site else "?" for site in sites],
        "back": query.panes.url(),
    }
    return Page(template="files_plan.html", context=context)


def _is_plan(job: JobRecord) -> bool:
    return job.type is JobType.COPY and bool(job.options.get("dry_run"))


class StartForm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The dry run to carry out."""

    plan: Number


@page("POST", f"{URL}/start", form=StartForm)
async def start_copy(visit: Visit, form: StartForm) -> Redirect:
    """Register the copy that was planned."""
    planned = await visit.api.job(form.plan, visit.caller.user_id)
    if not _is_plan(planned) or planned.dst_siteid is None:
        raise InvalidInputError(f"job {planned.id} is no plan", "plan")
    body = SubmitCopy(
        src_siteid=planned.src_siteid,
        src_filepath=planned.src_filepath,
        dst_siteid=planned.dst_siteid,
        dst_filepath=planned.dst_filepath,
        protocol=planned.protocol.name,
        extra_opts={name: value for name, value in planned.options.items() if name != "dry_run"} or None,
        label=planned.label,
        priority=planned.priority,
        max_tries=planned.max_tries,
        max_active=planned.max_active,
    )
    key = _key(visit, f"of the plan {planned.id}", body)
    job: Any = await jobs.submit_copy.handler(visit.api, visit.caller, body=body, key=key)
    return Redirect(f"/web/jobs/{job.id}", f"job {job.id} copies as planned by job {planned.id}")
