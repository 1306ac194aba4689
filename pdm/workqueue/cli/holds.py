"""``pdm hold``, ``resume`` and ``set``: change how jobs run that exist."""

from __future__ import annotations

from collections.abc import Sequence

import click
from msgspec import UNSET, UnsetType

from pdm.workqueue.cli.arguments import JOB_NUMBER, format_option
from pdm.workqueue.cli.jobs import change_each_job
from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.formatting import display_line, display_timestamp
from pdm.workqueue.domain.holds import HoldBy
from pdm.workqueue.domain.jobs import FIRST_PRIORITY, LAST_PRIORITY
from pdm.workqueue.wire.requests import MOST_ACTIVE
from pdm.workqueue.wire.responses import JobView
from pdm.workqueue.WorkqueueClient import WorkqueueClient


@click.command()
@click.argument("job_ids", metavar="N...", type=JOB_NUMBER, nargs=-1, required=True)
@click.option("-m", "--message", metavar="TEXT", help="Why, in one line; operators need it for jobs of others.")
@click.option("--until", metavar="TIME", help="Resume by itself then: 30m, 12h, or 2026-03-02T08:00:00Z.")
@format_option
def hold(job_ids: Sequence[int], message: str | None, until: str | None, form: str) -> None:
    """Hold jobs: nothing more of them begins until they are resumed. What runs ends by itself.

    A held job can be cancelled. The hold of an operator is ended by operators only.
    """
    change_each_job(job_ids, form, lambda client, job_id: client.hold(job_id, message=message, until=until), _hold_line)


def _hold_line(job: JobView) -> str:
    if job.hold is UNSET or job.hold.by == HoldBy.SERVICE:
        return _not_changed(job)
    until = "it is resumed" if not job.hold.until else display_timestamp(job.hold.until)
    running = f"; {job.num_running} elements still run, and end by themselves" if job.num_running else ""
    return f"job {job.id} is held until {until}{running}"


def _not_changed(job: JobView) -> str:
    if JobStatus.parse(job.status).is_final:
        return f"job {job.id} had ended: {job.status}"
    return f"job {job.id} is being cancelled" if job.cancel_requested else f"job {job.id} is {job.status}"


@click.command()
@click.argument("job_ids", metavar="N...", type=JOB_NUMBER, nargs=-1, required=True)
@format_option
def resume(job_ids: Sequence[int], form: str) -> None:
    """Resume jobs that a person holds. Jobs that wait for a credential or for tape resume by themselves."""
    change_each_job(job_ids, form, WorkqueueClient.resume, _resume_line)


def _resume_line(job: JobView) -> str:
    if JobStatus.parse(job.status).is_final or job.cancel_requested:
        return _not_changed(job)
    held = f"; {job.held} of its elements wait for something else: 'pdm status {job.id}'" if job.held else ""
    return f"job {job.id} is resumed{held}"


def _active(ctx: click.Context, param: click.Parameter, value: str | None) -> int | UnsetType | None:
    if value is None:
        return UNSET
    if value == "none":
        return None
    if value.isascii() and value.isdecimal() and 1 <= int(value[:9]) <= MOST_ACTIVE:
        return int(value[:9])
    raise click.BadParameter(f"a number from 1 to {MOST_ACTIVE}, or none, is expected.")


@click.command("set")
@click.argument("job_ids", metavar="N...", type=JOB_NUMBER, nargs=-1, required=True)
@click.option(
    "--priority", type=click.IntRange(FIRST_PRIORITY, LAST_PRIORITY), help="Among my jobs; 0 is served first."
)
@click.option("--max-active", metavar="N|none", callback=_active, help="Run at most N elements at once.")
@format_option
def set_(job_ids: Sequence[int], priority: int | None, max_active: int | UnsetType | None, form: str) -> None:
    """Change jobs that have not ended; what runs continues."""
    if priority is None and max_active is UNSET:
        raise click.UsageError("Nothing to change: give --priority or --max-active.")
    change_each_job(
        job_ids,
        form,
        lambda client, job_id: client.change_job(job_id, priority=priority, max_active=max_active),
        _set_line,
    )


def _set_line(job: JobView) -> str:
    if JobStatus.parse(job.status).is_final:
        return _not_changed(job)
    most = "" if job.max_active is UNSET else f", at most {job.max_active} elements at once"
    return display_line(f"job {job.id}: priority {job.priority}{most}")
