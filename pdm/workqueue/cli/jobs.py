"""``pdm jobs``, ``status``, ``wait``, ``cancel``, ``retry``."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import Any

import click
from msgspec import UNSET

from pdm.workqueue.cli.arguments import DURATION, JOB_NUMBER, MOMENT, format_option
from pdm.workqueue.cli.exit_codes import ExitCode
from pdm.workqueue.cli.following import (
    failure_lines,
    follow,
    print_json,
    report_end,
)
from pdm.workqueue.cli.outcome import SHOWN_SKIPPED, skip_words, skipped_lines
from pdm.workqueue.cli.progress import shown_fraction
from pdm.workqueue.cli.session import complain, exit_code_of, run
from pdm.workqueue.cli.text import shown_bytes, shown_duration, shown_line, shown_moment, shown_name, shown_time, table
from pdm.workqueue.client.errors import WorkqueueClientError
from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.wire.responses import JobView
from pdm.workqueue.WorkqueueClient import Filters, WorkqueueClient

_STATUSES = click.Choice([member.name.lower() for member in JobStatus], case_sensitive=False)
_TYPES = click.Choice([member.name.lower() for member in JobType], case_sensitive=False)
#: How many failed elements ``pdm status`` names.
_SHOWN_FAILURES = 50


@click.command()
@click.option("--status", type=_STATUSES, help="Only jobs that stand so.")
@click.option("--type", "type_", type=_TYPES, help="Only jobs of this type.")
@click.option("--site", help="Only jobs from or to this site.")
@click.option("--label", help="Only jobs with this label.")
@click.option("--since", type=MOMENT, help="Only jobs registered since (12h, 7d, 2026-03-02).")
@click.option("-n", "--last", type=click.IntRange(min=1), default=20, help="Show so many, the newest (default 20).")
@click.option("--all", "all_", is_flag=True, help="Show all.")
@format_option
def jobs(
    status: str | None,
    type_: str | None,
    site: str | None,
    label: str | None,
    since: datetime | None,
    last: int,
    all_: bool,
    form: str,
) -> None:
    """Show my jobs, newest last."""

    async def action(client: WorkqueueClient) -> int:
        found: deque[JobView] = deque(maxlen=None if all_ else last)
        async for job in client.iterate_jobs(
            status=None if status is None else JobStatus.parse(status),
            type=None if type_ is None else JobType.parse(type_),
            site=site,
            label=label,
            since=since,
        ):
            found.append(job)
        if form == "json":
            print_json(list(found))
        elif found:
            names = {each.id: shown_name(each.name) for each in await client.sites()}
            header = ["ID", "TYPE", "STATUS", "DONE", "FAILED", "BYTES", "SUBMITTED (UTC)", "WHAT", "LABEL"]
            click.echo(table(header, [_row(job, names) for job in found], right=[0, 3, 4, 5]))
        return ExitCode.DONE

    run(action)


def _row(job: JobView, names: dict[int, str]) -> list[str]:
    return [
        str(job.id),
        job.type,
        job.status,
        f"{job.num_done}/{job.num_elements}",
        str(job.num_failed),
        _moved(job),
        shown_time(job.timestamp.timestamp()),
        _what(job, names),
        shown_name(job.label or ""),
    ]


def _moved(job: JobView) -> str:
    """``1.5 GiB of 3.4 GiB``, proven bytes only; one number where that is all."""
    if job.bytes_done == job.bytes_total:
        return shown_bytes(job.bytes_done)
    return f"{shown_bytes(job.bytes_done)} of {shown_bytes(job.bytes_total)}"


def _what(job: JobView, names: dict[int, str]) -> str:
    """``cern:/data -> ral:/data``."""
    text = f"{names.get(job.src_siteid, job.src_siteid)}:{shown_name(job.src_filepath)}"
    if job.dst_filepath is not UNSET and job.dst_siteid is not UNSET:
        text += f" -> {names.get(job.dst_siteid, job.dst_siteid)}:{shown_name(job.dst_filepath)}"
    return text


@click.command()
@click.argument("job_id", metavar="N", type=JOB_NUMBER)
@click.option("--all", "all_", is_flag=True, help="Name all that failed or was left out, not only the first of it.")
@format_option
def status(job_id: int, all_: bool, form: str) -> None:
    """Show where job N stands, how far it is and how fast it goes, and what failed or was left out and why."""

    async def action(client: WorkqueueClient) -> int:
        job = await client.job(job_id)
        if form == "json":
            print_json(await _with_all(client, job) if all_ else job)
            return ExitCode.DONE
        names = {each.id: shown_name(each.name) for each in await client.sites()}
        click.echo(f"job {job.id}  {job.type} {_what(job, names)}")
        if job.label:
            click.echo(f"label     {shown_name(job.label)}")
        click.echo(f"status    {job.status}, {job.protocol}, priority {job.priority}")
        ended = "" if job.finished_at is None else f", ended {shown_moment(job.finished_at)}"
        click.echo(f"times     submitted {shown_moment(job.timestamp)}{ended}")
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
        if job.hold is not UNSET:
            click.echo(f"held      {job.hold.code}: {shown_line(job.hold.reason)}")
            click.echo(f"          {shown_line(job.hold.hint)}")
        for line in _progress_lines(job):
            click.echo(line)
        for warning in () if job.warnings is UNSET else job.warnings:
            click.echo(f"warning   {shown_line(warning)}")
        for reason in () if job.waiting is UNSET else job.waiting:
            click.echo(f"waits     {shown_line(reason)}")
        if job.skipped:
            words = skip_words(job)
            click.echo(f"skipped   {job.skipped}{': ' if words else ''}{words}")
            await _echo_skipped(client, job, all_)
        if job.num_failed:
            click.echo("failed")
            await _echo_failed(client, job, all_)
        return ExitCode.DONE

    run(action)


async def _with_all(client: WorkqueueClient, job: JobView) -> dict[str, Any]:
    """A job with all that failed and was left out, for ``-F json``."""
    failed = [each async for each in client.iterate_elements(job.id, status=JobStatus.FAILED)]
    return {"job": job, "failed": failed, "skipped": [each async for each in client.iterate_skipped(job.id)]}


async def _echo_skipped(client: WorkqueueClient, job: JobView, all_: bool) -> None:
    if all_:
        async for entry in client.iterate_skipped(job.id):
            click.echo(skipped_lines([entry], entry.count)[0])
        return
    for line in skipped_lines(await client.skipped(job.id, limit=SHOWN_SKIPPED), job.skipped):
        click.echo(line)


async def _echo_failed(client: WorkqueueClient, job: JobView, all_: bool) -> None:
    shown, after = 0, -1
    while shown == 0 or (all_ and shown < job.num_failed):
        filters: Filters = {"status": JobStatus.FAILED}
        if after >= 0:
            filters["after"] = after
        failures = await client.elements(job.id, limit=_SHOWN_FAILURES, **filters)
        if not failures:
            return
        shown += len(failures)
        for line in failure_lines(failures, len(failures) if all_ else job.num_failed):
            click.echo(line)
        after = failures[-1].id


def _progress_lines(job: JobView) -> list[str]:
    """``bytes``, ``progress``, ``rate`` and ``time``, as far as they are known; null rates are left out."""
    progress = job.progress
    moving = ""
    if progress is not UNSET and progress.bytes_moving:
        moving = f" proven, {shown_bytes(progress.bytes_moving)} moving,"
    lines = [f"bytes     {shown_bytes(job.bytes_done)}{moving} of {shown_bytes(job.bytes_total)}"]
    if progress is UNSET:
        return lines
    if progress.listing:
        lines[0] += " so far: it is still listed how much there is"
    elif percent := shown_fraction(progress):
        lines.append(f"progress  {percent}, {progress.files_done} of {progress.files_total} files")
    rates = [(progress.instant, "/s now"), (progress.average, "/s on average")]
    words = [f"{shown_bytes(rate)}{word}" for rate, word in rates if rate is not None]
    if progress.files_per_second is not None:
        words.append(f"{progress.files_per_second:.1f} files/s")
    if words:
        lines.append(f"rate      {', '.join(words)}")
    if progress.elapsed is not None:
        left = "" if progress.eta is None else f", about {shown_duration(progress.eta)} left"
        lines.append(f"time      {shown_duration(progress.elapsed)} since it was begun{left}")
    return lines


@click.command()
@click.argument("job_id", metavar="N", type=JOB_NUMBER)
@click.option("--timeout", type=DURATION, help="Wait no longer than this (90s, 5m, 12h).")
@format_option
def wait(job_id: int, timeout: float | None, form: str) -> None:
    """Wait until job N has ended, and exit as it ended (see 'pdm help exit-codes')."""

    async def action(client: WorkqueueClient) -> int:
        return await report_end(client, await follow(client, job_id, timeout, form), form)

    run(action)


@click.command()
@click.argument("job_ids", metavar="N...", type=JOB_NUMBER, nargs=-1, required=True)
@format_option
def cancel(job_ids: Sequence[int], form: str) -> None:
    """Cancel jobs. What is done stays done; one that has ended stays as it is."""

    async def one(client: WorkqueueClient, job_id: int) -> JobView:
        job = await client.cancel(job_id)
        if form == "text":
            click.echo(f"job {job_id} {_cancel_word(job)}")
        return job

    _each(job_ids, form, one)


def _cancel_word(job: JobView) -> str:
    if job.status == JobStatus.CANCELLED.name:
        return "cancelled"
    return f"had ended: {job.status}" if JobStatus.parse(job.status).is_final else "is being cancelled"


@click.command()
@click.argument("job_ids", metavar="N...", type=JOB_NUMBER, nargs=-1, required=True)
@format_option
def retry(job_ids: Sequence[int], form: str) -> None:
    """Try what failed or was cancelled in jobs once more."""

    async def one(client: WorkqueueClient, job_id: int) -> JobView:
        job = await client.retry(job_id)
        if form == "text":
            click.echo(f"job {job_id}: {job.retried} elements are tried again")
        return job

    _each(job_ids, form, one)


def _each(job_ids: Sequence[int], form: str, one: Callable[[WorkqueueClient, int], Awaitable[JobView]]) -> None:
    """Do something to each job: all are tried, each failure is said, and the first one's exit status counts."""

    async def action(client: WorkqueueClient) -> int:
        code: int = ExitCode.DONE
        results = []
        for job_id in job_ids:
            try:
                results.append(await one(client, job_id))
            except WorkqueueClientError as error:
                complain(f"job {job_id}: {error.what}", error.advice)
                code = code or exit_code_of(error)
        if form == "json":
            print_json(results if len(job_ids) > 1 else results[0] if results else None)
        return code

    run(action)
