"""``pdm events``: show what has happened to jobs, or follow it (``-f``)."""

from __future__ import annotations

import sys
from typing import Any

import click
import msgspec
from twisted.internet.defer import CancelledError

from pdm.workqueue.cli.arguments import JOB_NUMBER, format_option
from pdm.workqueue.cli.display import display_json, terminal_width, truncate
from pdm.workqueue.cli.exit_codes import CommandError, ExitCode
from pdm.workqueue.cli.session import run
from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.events import EventKind
from pdm.workqueue.domain.formatting import display_bytes, display_line, display_timestamp
from pdm.workqueue.wire.events import EventView
from pdm.workqueue.WorkqueueClient import WorkqueueClient

_KINDS = click.Choice([kind.value for kind in EventKind], case_sensitive=False)
_MOST = 1000


@click.command()
@click.argument("job_id", metavar="[N]", type=JOB_NUMBER, required=False)
@click.option("-f", "--follow", is_flag=True, help="Show events as they happen; of one job, until it has ended.")
@click.option("--kind", "kinds", type=_KINDS, multiple=True, help="Only events of this kind; may be repeated.")
@click.option("-n", "--last", type=click.IntRange(1, _MOST), default=20, help="Show the newest N events (default 20).")
@format_option
def events(job_id: int | None, follow: bool, kinds: tuple[str, ...], last: int, form: str) -> None:
    """Show what has happened to job N, or to all my jobs: status changes, failures, held jobs.

    With -F json, each line is one event.
    """

    async def action(client: WorkqueueClient) -> int:
        newest = await client.events_page(job_id, kinds=kinds, limit=last, newest_first=True)
        for event in reversed(newest):
            _print(event, form)
        after = newest[0].id or 0 if newest else 0
        if follow:
            await _follow(client, job_id, kinds, after, form)
        return ExitCode.DONE

    run(action)


async def _follow(client: WorkqueueClient, job_id: int | None, kinds: tuple[str, ...], after: int, form: str) -> None:
    if job_id is not None and await _has_ended(client, job_id):
        return
    # The end of a job is an event that is always asked for, if not shown.
    asked = [*kinds, EventKind.JOB] if kinds and job_id is not None else kinds
    stream = client.events(job_id, kinds=asked, after=after)
    try:
        async for event in stream:
            if not kinds or event.kind in kinds:
                _print(event, form)
            if job_id is not None and event.kind == EventKind.JOB and await _has_ended(client, job_id):
                return
    except CancelledError:
        raise CommandError(ExitCode.INTERRUPTED, "") from None
    finally:
        await stream.aclose()


async def _has_ended(client: WorkqueueClient, job_id: int) -> bool:
    return JobStatus.parse((await client.job(job_id)).status).is_final


def _print(event: EventView, form: str) -> None:
    if form == "json":
        click.echo(display_json(msgspec.json.encode(event).decode()))
        return
    of = "" if event.job is None else f"job {event.job} "
    line = display_line(f"{display_timestamp(event.time)} {of}{event_words(event)}")
    width = terminal_width(sys.stdout)
    click.echo(line if width is None else truncate(line, width))


def event_words(event: EventView) -> str:
    """What has happened, in one line."""
    data: dict[str, Any] = event.data
    if event.kind == EventKind.JOB:
        before = data.get("before")
        change = data["status"] if before is None else f"{before} -> {data['status']}"
        parts = [f"{data['num_done']} of {data['num_elements']} done"]
        if data["num_failed"]:
            parts.append(f"{data['num_failed']} failed")
        if data["bytes_total"]:
            parts.append(display_bytes(data["bytes_done"]))
        if reason := data.get("reason"):
            parts.append(reason["message"])
        return f"{change}: {', '.join(parts)}"
    if event.kind == EventKind.FAILURE:
        return f"{data['code']} ({data['scope']}), {data['count']}x: {data['path']}: {data['message']}"
    if event.kind == EventKind.HELD:
        return f"held for {data['code']}: {data['reason']}"
    if event.kind == EventKind.RESUMED:
        return f"resumed: {data['reason']}"
    if event.kind == EventKind.SITE:
        return f"site {data['site']} {data['state']}: {data['url']} {data['reason']}".rstrip()
    total = "?" if data["bytes_total"] is None else display_bytes(data["bytes_total"])
    files = "?" if data["files_total"] is None else data["files_total"]
    return f"{data['files_done']} of {files} files, {display_bytes(data['bytes_done'])} of {total}"
