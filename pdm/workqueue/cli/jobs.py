"""``pdm jobs``, ``status``, ``wait``, ``cancel``, ``retry``."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import click
from msgspec import UNSET

from pdm.workqueue.cli.activity import rate_lines
from pdm.workqueue.cli.arguments import DURATION, JOB_NUMBER, TIMESTAMP, format_option, user_number
from pdm.workqueue.cli.display import display_fraction, print_stderr, terminal_width
from pdm.workqueue.cli.exit_codes import ExitCode
from pdm.workqueue.cli.job_table import job_table, paths_cell
from pdm.workqueue.cli.outcome import (
    MAX_LISTED_SKIPPED,
    element_lines,
    failure_lines,
    follow_jobs,
    hint_lines,
    hint_of,
    print_json,
    skip_words,
    skipped_lines,
)
from pdm.workqueue.cli.plans import estimate_words, plan_words
from pdm.workqueue.cli.session import error_text, exit_code_of, print_error, run
from pdm.workqueue.client.errors import WorkqueueClientError
from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.formatting import (
    display_bytes,
    display_duration,
    display_line,
    display_name,
    display_timestamp,
)
from pdm.workqueue.wire.responses import ElementView, JobView, RetriedJobView
from pdm.workqueue.WorkqueueClient import JobFilters, WorkqueueClient

_STATUSES = click.Choice([member.name.lower() for member in JobStatus], case_sensitive=False)
_TYPES = click.Choice([member.name.lower() for member in JobType], case_sensitive=False)
#: Failed elements that ``pdm status`` lists.
_MAX_LISTED_FAILURES = 50
#: Jobs in one page.
_PAGE_SIZE = 500


@click.command()
@click.option("--status", type=_STATUSES, help="Only jobs with this status.")
@click.option("--type", "type_", type=_TYPES, help="Only jobs of this type.")
@click.option("--site", help="Only jobs from or to this site.")
@click.option("--label", help="Only jobs with this label.")
@click.option("--since", type=TIMESTAMP, help="Only jobs registered since (12h, 7d, 2026-03-02).")
@click.option(
    "-n", "--last", type=click.IntRange(min=1), default=20, help="Number of jobs to show, the newest (default 20)."
)
@click.option("--all", "all_", is_flag=True, help="Show all.")
@click.option("--all-users", is_flag=True, help="For operators: the jobs of all users.")
@click.option("--user", metavar="USER", help="For operators: the jobs of one user: number, subject or its last CN.")
@format_option
def jobs(
    status: str | None,
    type_: str | None,
    site: str | None,
    label: str | None,
    since: datetime | None,
    last: int,
    all_: bool,
    all_users: bool,
    user: str | None,
    form: str,
) -> None:
    """Show my jobs, newest last.

    On a terminal the table is shortened to its width; in a file or pipe it is complete.
    """
    if all_users and user is not None:
        raise click.UsageError("--all-users and --user cannot be combined: omit one.")

    async def action(client: WorkqueueClient) -> None:
        filters = JobFilters(
            status=None if status is None else JobStatus.parse(status),
            type=None if type_ is None else JobType.parse(type_),
            site=site,
            label=label,
            since=since,
            user="all" if all_users else None if user is None else await user_number(client, user),
        )
        found = [job async for job in client.iterate_jobs(**filters)] if all_ else await _newest(client, last, filters)
        if form == "json":
            print_json(found)
        elif found:
            names = {each.id: display_name(each.name) for each in await client.sites()}
            click.echo(job_table(found, names, terminal_width(sys.stdout)))

    run(action)


async def _newest(client: WorkqueueClient, count: int, filters: JobFilters) -> list[JobView]:
    """The `count` newest jobs, the newest last."""
    found: list[JobView] = []
    newest = filters.copy()
    newest["order"] = "newest"
    while len(found) < count:
        wanted = min(count - len(found), _PAGE_SIZE)
        page = await client.jobs(limit=wanted, **newest)
        found += page
        if len(page) < wanted:
            break
        newest["before"] = page[-1].id
    return found[::-1]


@click.command()
@click.argument("job_ids", metavar="N...", type=JOB_NUMBER, nargs=-1, required=True)
@click.option("--all", "all_", is_flag=True, help="List all failed and skipped entries, not only the first.")
@click.option("--rate", is_flag=True, help="Show what the jobs have done over time instead.")
@format_option
def status(job_ids: Sequence[int], all_: bool, rate: bool, form: str) -> None:
    """Show the status of jobs: progress, rate, and failed and skipped entries with the reasons."""
    if rate:
        _show_rates(job_ids, form)
    names: dict[int, str] = {}
    shown = False

    async def one(client: WorkqueueClient, job_id: int) -> object:
        nonlocal shown
        job = await client.job(job_id)
        if form == "json":
            return await _with_all(client, job) if all_ else job
        if not names:
            names.update({each.id: display_name(each.name) for each in await client.sites()})
        if shown:
            click.echo()
        shown = True
        await _echo_status(client, job, names, all_=all_)
        return job

    for_each_job(job_ids, form, one)


def _show_rates(job_ids: Sequence[int], form: str) -> None:
    async def one(client: WorkqueueClient, job_id: int) -> object:
        found = await client.rate(job_id)
        if form == "text":
            click.echo("\n".join([f"job {job_id}", *(rate_lines(found) or ["nothing has ended yet"])]))
        return found

    for_each_job(job_ids, form, one)


async def _echo_status(client: WorkqueueClient, job: JobView, names: dict[int, str], *, all_: bool) -> None:
    click.echo(f"job {job.id}  {job.type} {paths_cell(job, names)}")
    if job.owner:
        click.echo(f"owner     {display_line(job.owner)} (user {job.user_id})")
    if job.label:
        click.echo(f"label     {display_name(job.label)}")
    click.echo(f"status    {job.status}, {job.protocol}, priority {job.priority}")
    ended = "" if job.finished_at is None else f", ended {display_timestamp(job.finished_at)}"
    click.echo(f"times     submitted {display_timestamp(job.timestamp)}{ended}")
    waiting = job.num_new + job.num_submitted - job.held
    there = f" ({job.already_there} were there already)" if job.already_there else ""
    counts = [
        (job.num_done, f"done{there}"),
        (job.num_running, "running"),
        (waiting, "waiting"),
        (job.held, "held"),
    ]
    counts += [(job.num_failed, "failed"), (job.num_cancelled, "cancelled")]
    click.echo(f"elements  {job.num_elements}: " + ", ".join(f"{n} {word}" for n, word in counts if n))
    if job.after is not UNSET:
        click.echo(f"after     {', '.join(map(str, job.after))}{' (in whatever state)' if job.after_any else ''}")
    if job.deadline is not UNSET:
        click.echo(f"deadline  {display_timestamp(job.deadline)}")
    if job.cancel_reason is not UNSET:
        click.echo(f"reason    {job.cancel_reason.code}: {display_line(job.cancel_reason.message)}")
    if job.max_active is not UNSET:
        click.echo(f"limit     at most {job.max_active} elements at once")
    if job.hold is not UNSET:
        click.echo(f"held      {job.hold.code}: {display_line(job.hold.reason)}")
        click.echo(f"          {hint_of(job.hold.code, job.hold.hint, job.type, job.id)}")
    for line in _progress_lines(job):
        click.echo(line)
    if job.plan is not UNSET:
        click.echo(f"plan      {plan_words(job)}")
    for words in estimate_words(job, datetime.now(UTC)):
        click.echo(f"expected  {words}")
    for warning in () if job.warnings is UNSET else job.warnings:
        click.echo(f"warning   {display_line(warning)}")
    for reason in () if job.waiting is UNSET else job.waiting:
        click.echo(f"waits     {display_line(reason)}")
    if job.skipped:
        words = skip_words(job)
        click.echo(f"skipped   {job.skipped}{': ' if words else ''}{words}")
        await _echo_skipped(client, job, all_)
    if job.num_failed:
        click.echo("failed")
        await _echo_failed(client, job, all_)


async def _with_all(client: WorkqueueClient, job: JobView) -> dict[str, Any]:
    """A job with all failed elements and skipped entries, for ``-F json``."""
    failed = [each async for each in client.iterate_elements(job.id, status=JobStatus.FAILED)]
    return {"job": job, "failed": failed, "skipped": [each async for each in client.iterate_skipped(job.id)]}


async def _echo_skipped(client: WorkqueueClient, job: JobView, all_: bool) -> None:
    if all_:
        async for entry in client.iterate_skipped(job.id):
            for line in skipped_lines([entry], entry.count):
                click.echo(line)
        return
    for line in skipped_lines(await client.skipped(job.id, limit=MAX_LISTED_SKIPPED), job.skipped):
        click.echo(line)


async def _echo_failed(client: WorkqueueClient, job: JobView, all_: bool) -> None:
    if not all_:
        failures = await client.elements(job.id, status=JobStatus.FAILED, limit=_MAX_LISTED_FAILURES)
        for line in failure_lines(failures, job):
            click.echo(line)
        return
    # One element of each code, for its hint.
    examples: dict[str, ElementView] = {}
    async for element in client.iterate_elements(job.id, status=JobStatus.FAILED):
        for line in element_lines(element):
            click.echo(line)
        if element.failure is not None:
            examples.setdefault(element.failure.code, element)
    for line in hint_lines(examples.values(), job):
        click.echo(line)


def _progress_lines(job: JobView) -> list[str]:
    """The lines ``bytes``, ``progress``, ``rate`` and ``time``, where known."""
    progress = job.progress
    moving = ""
    if progress is not UNSET and progress.bytes_moving:
        moving = f" verified, {display_bytes(progress.bytes_moving)} moving,"
    lines = [f"bytes     {display_bytes(job.bytes_done)}{moving} of {display_bytes(job.bytes_total)}"]
    if progress is UNSET:
        return lines
    if progress.listing:
        lines[0] += " so far: the listing is not complete"
    elif percent := display_fraction(progress):
        lines.append(f"progress  {percent}, {progress.files_done} of {progress.files_total} files")
    rates = [(progress.instant, "/s now"), (progress.average, "/s on average")]
    words = [f"{display_bytes(rate)}{word}" for rate, word in rates if rate is not None]
    if progress.files_per_second is not None:
        words.append(f"{progress.files_per_second:.1f} files/s")
    if words:
        lines.append(f"rate      {', '.join(words)}")
    if progress.elapsed is not None:
        left = "" if progress.eta is None else f", about {display_duration(progress.eta)} left"
        lines.append(f"time      {display_duration(progress.elapsed)} since it started{left}")
    lines += [f"unknown   what runs {display_line(each)}" for each in progress.silent or ()]
    return lines


@click.command()
@click.argument("job_ids", metavar="N...", type=JOB_NUMBER, nargs=-1, required=True)
@click.option("--timeout", type=DURATION, help="Maximum time to wait for all (90s, 5m, 12h).")
@format_option
def wait(job_ids: Sequence[int], timeout: float | None, form: str) -> None:
    """Wait until jobs have ended; the exit status tells how (see 'pdm help exit-codes')."""

    async def action(client: WorkqueueClient) -> int:
        return await follow_jobs(client, job_ids, timeout, form)

    run(action)


@click.command()
@click.argument("job_ids", metavar="N...", type=JOB_NUMBER, nargs=-1, required=True)
@format_option
def cancel(job_ids: Sequence[int], form: str) -> None:
    """Cancel jobs. Finished elements are kept; jobs that have ended are not changed."""
    change_each_job(job_ids, form, WorkqueueClient.cancel, lambda job: f"job {job.id} {_cancel_word(job)}")


def _cancel_word(job: JobView) -> str:
    if job.status == JobStatus.CANCELLED.name:
        return "cancelled"
    return f"had ended: {job.status}" if JobStatus.parse(job.status).is_final else "is being cancelled"


@click.command()
@click.argument("job_ids", metavar="N...", type=JOB_NUMBER, nargs=-1, required=True)
@click.option("--code", "codes", multiple=True, help="Only what failed with this code (see 'pdm errors'); repeatable.")
@click.option("--force", is_flag=True, help="Also what a retry cannot help: after you have corrected the cause.")
@format_option
def retry(job_ids: Sequence[int], codes: Sequence[str], force: bool, form: str) -> None:
    """Retry failed and cancelled elements of jobs.

    Failures that stay what they are, such as a missing file, are left unless --force is given: correct the cause first.
    """
    left_any = False

    async def one(client: WorkqueueClient, job_id: int) -> JobView:
        nonlocal left_any
        job = await client.retry(job_id, code=codes or None, force=force)
        left = job.left or {}
        left_any = left_any or bool(left)
        if form == "text":
            click.echo(_retry_line(job, left))
        if left:
            print_stderr(f"once the cause is corrected: pdm retry {job_id} --force (see 'pdm errors {job_id}')")
        return job

    for_each_job(job_ids, form, one, lambda: ExitCode.PARTIAL if left_any else ExitCode.DONE)


def _retry_line(job: RetriedJobView, left: Mapping[str, int]) -> str:
    if not left:
        return f"job {job.id}: {job.retried} elements are tried again"
    return f"job {job.id}: requeued {job.retried}, left {sum(left.values())} (permanent: {', '.join(sorted(left))})"


def change_each_job(
    job_ids: Sequence[int],
    form: str,
    change: Callable[[WorkqueueClient, int], Awaitable[JobView]],
    line: Callable[[JobView], str],
) -> None:
    """Change each job, and print a line about it; otherwise as `for_each_job`."""

    async def one(client: WorkqueueClient, job_id: int) -> JobView:
        job = await change(client, job_id)
        if form == "text":
            click.echo(line(job))
        return job

    for_each_job(job_ids, form, one)


def for_each_job(
    job_ids: Sequence[int],
    form: str,
    one: Callable[[WorkqueueClient, int], Awaitable[object]],
    exit_code: Callable[[], ExitCode] = lambda: ExitCode.DONE,
) -> None:
    """Apply a function to each job; reports every failure, and exits with the code of the first, else `exit_code`."""

    async def action(client: WorkqueueClient) -> int:
        code: int = ExitCode.DONE
        results = []
        for job_id in job_ids:
            try:
                results.append(await one(client, job_id))
            except WorkqueueClientError as error:
                print_error(f"job {job_id}: {error_text(error)}", error.advice)
                code = code or exit_code_of(error)
        if form == "json" and (results or len(job_ids) > 1):
            print_json(results if len(job_ids) > 1 else results[0])
        return code or exit_code()

    run(action)
