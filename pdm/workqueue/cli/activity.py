"""What the service does and did: ``pdm queue``, ``pdm events``; ``pdm admin why`` and ``top`` for operators."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import click
import msgspec
from attrs import frozen
from twisted.internet.defer import CancelledError

from pdm.workqueue.cli.arguments import DURATION, JOB_NUMBER, common_name, format_option
from pdm.workqueue.cli.display import display_json, stdout_table, table, terminal_height, terminal_width, truncate
from pdm.workqueue.cli.exit_codes import CommandError, ExitCode
from pdm.workqueue.cli.outcome import print_json
from pdm.workqueue.cli.session import run
from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.formatting import (
    display_bytes,
    display_duration,
    display_line,
    display_name,
    display_timestamp,
)
from pdm.workqueue.domain.notifications import EventKind
from pdm.workqueue.wire.activity import (
    ActivityView,
    NodeView,
    QueueSummaryView,
    RateView,
    SiteActivityView,
    WaitingJobView,
)
from pdm.workqueue.wire.events import EventView
from pdm.workqueue.wire.responses import HealthView
from pdm.workqueue.wire.sites import RouteView
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


#: Columns of output that goes to no terminal.
_COLUMNS = 100
_HOUR_S = 3600


@frozen(kw_only=True)
class _Names:
    """Names of sites by their numbers."""

    sites: Mapping[int, str]

    @classmethod
    async def fetch(cls, client: WorkqueueClient) -> _Names:
        return cls(sites={site.id: display_name(site.name) for site in await client.sites()})

    def route(self, source: int, destination: int | None) -> str:
        """``cern -> ral``, or one site."""
        first = self.sites.get(source, str(source))
        return first if destination is None else f"{first} -> {self.sites.get(destination, str(destination))}"


@click.command()
@format_option
def queue(form: str) -> None:
    """For operators: show who works and waits, and what has waited longest, with the reasons."""

    async def action(client: WorkqueueClient) -> None:
        found = await client.queue()
        if form == "json":
            print_json(found)
            return
        names = await _Names.fetch(client)
        rows = [
            [
                common_name(share.subject),
                names.route(share.source, share.destination),
                *map(str, (share.jobs, share.running, share.waiting, share.held)),
            ]
            for share in found.shares
        ]
        head = ["USER", "ROUTE", "JOBS", "RUNNING", "WAITING", "HELD"]
        click.echo(stdout_table(head, rows, right=[2, 3, 4, 5], flexible=[0, 1]) if rows else "nothing waits or runs")
        if not found.complete:
            click.echo("more jobs are not counted")
        for line in _oldest_lines(found.oldest, datetime.now(UTC)):
            click.echo(line)

    run(action)


def _oldest_lines(oldest: Sequence[WaitingJobView], now: datetime) -> list[str]:
    lines = []
    for job in oldest:
        age = display_duration(max((now - job.since).total_seconds(), 0))
        reasons = "; ".join(map(display_line, job.reasons)) or "it is its turn next"
        lines.append(f"job {job.job} of {common_name(job.subject)} waits for {age}: {reasons}")
    return lines


class _JobOrElement(click.ParamType[tuple[int, int | None]]):
    """``214``, or ``214.37`` for its element 37."""

    name = "N[.E]"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int | None]:
        job, dot, element = str(value).partition(".")
        if not (job.isascii() and job.isdecimal() and 0 < int(job) < 2**63):
            self.fail(
                f"{value!r} is not the number of a job, such as 214, or of its element, such as 214.37.", param, ctx
            )
        if dot and not (element.isascii() and element.isdecimal() and int(element) < 2**63):
            self.fail(f"{value!r} is not the number of an element, such as 214.37.", param, ctx)
        return int(job), int(element) if dot else None


@click.command()
@click.argument("number", metavar="N[.E]", type=_JobOrElement())
@format_option
def why(number: tuple[int, int | None], form: str) -> None:
    """Show all reasons why job N, or its element E, does not move.

    Operators may ask about any job. The codes are those of GET /jobs/N/why.
    """
    job, element = number

    async def action(client: WorkqueueClient) -> None:
        found = await client.why(job, element)
        if form == "json":
            print_json(found)
            return
        what = f"job {job}" if element is None else f"element {element} of job {job}"
        click.echo(f"{what} is {found.status}")
        for reason in found.reasons:
            click.echo(display_line(f"{reason.code}: {reason.reason}"))
            if reason.hint:
                click.echo(f"  -> {display_line(reason.hint)}")
        if not found.reasons:
            click.echo("nothing holds it up: it is its turn next")

    run(action)


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """What ``pdm admin top`` shows; ``-F json`` prints it."""

    at: datetime
    health: HealthView
    nodes: Sequence[NodeView]
    routes: Sequence[RouteView]
    queue: QueueSummaryView


@click.command()
@click.option("--once", is_flag=True, help="Print it once, and end.")
@click.option("--interval", type=DURATION, default=2.0, help="Time between two pictures (default 2s).")
@format_option
def top(once: bool, interval: float, form: str) -> None:
    """Show nodes, routes with their rates, the queue, and what has waited longest; ^C ends it.

    On a terminal the picture is drawn anew; elsewhere it is printed once. With -F json it is one line of JSON each
    time.
    """
    redraws = not once and form == "text" and sys.stdout.isatty()

    async def action(client: WorkqueueClient) -> None:
        names = await _Names.fetch(client)
        while True:
            seen = Overview(
                at=datetime.now(UTC),
                health=await client.health(),
                nodes=await client.nodes(),
                routes=await client.routes(),
                queue=await client.queue(),
            )
            if form == "json":
                click.echo(msgspec.json.encode(seen).decode())
            else:
                width = terminal_width(sys.stdout) or _COLUMNS
                lines = overview_lines(seen, names, width)
                if redraws:
                    # From the upper left corner, each line to its end, and then all below it.
                    height = terminal_height(sys.stdout)
                    click.echo(
                        "\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines[: height - 1]) + "\x1b[J", nl=False
                    )
                else:
                    click.echo("\n".join(lines))
            sys.stdout.flush()
            if once or (form == "text" and not redraws):
                return
            await client.pause(max(interval, 0.2))

    run(action)


def overview_lines(seen: Overview, names: _Names, width: int) -> list[str]:
    """The picture; no line is longer than `width`."""
    shares = seen.queue.shares
    running, waiting, held = (sum(getattr(share, name) for share in shares) for name in ("running", "waiting", "held"))
    alive = sum(node.alive for node in seen.nodes)
    faults = ", ".join(fault.part for fault in seen.health.faults)
    lines = [
        f"{seen.at:%Y-%m-%d %H:%M:%S} UTC  version {seen.health.version}  {seen.health.status}"
        f"{': ' if faults else ''}{faults}",
        f"{alive} of {len(seen.nodes)} nodes alive, {sum(share.jobs for share in shares)} jobs: {running} elements run,"
        f" {waiting} wait, {held} are held",
        "",
    ]
    lines += table(
        ["NODE", "HOST", "STATE", "RUNNING"],
        [
            [
                display_name(node.name),
                display_name(node.host or "-"),
                "alive" if node.alive else "gone",
                str(node.running),
            ]
            for node in seen.nodes
        ],
        right=[3],
        width=width,
        flexible=[0, 1],
    ).splitlines()
    if seen.routes:
        rows = [
            [
                names.route(route.source, route.destination),
                f"{route.running}/{route.limit}",
                _rate(route),
                display_line(route.reason),
            ]
            for route in sorted(seen.routes, key=lambda route: -route.running)
        ]
        lines += [
            "",
            *table(["ROUTE", "STREAMS", "RATE", "WHY"], rows, right=[1, 2], width=width, flexible=[0, 3]).splitlines(),
        ]
    if shares:
        rows = [
            [
                common_name(share.subject),
                names.route(share.source, share.destination),
                *map(str, (share.jobs, share.running, share.waiting, share.held)),
            ]
            for share in shares
        ]
        head = ["USER", "ROUTE", "JOBS", "RUNNING", "WAITING", "HELD"]
        lines += ["", *table(head, rows, right=[2, 3, 4, 5], width=width, flexible=[0, 1]).splitlines()]
    if oldest := _oldest_lines(seen.queue.oldest, seen.at):
        lines += ["", *oldest]
    return [truncate(line, max(width, 4)) for line in lines]


def _rate(route: RouteView) -> str:
    if route.throughput is None:
        return "-"
    return (
        f"{display_bytes(route.throughput)}/s" if route.unit == "bytes/s" else f"{route.throughput:,.0f} {route.unit}"
    )


def print_route_activity(found: ActivityView, names: Mapping[int, str]) -> None:
    """What ended on each route in the last hour and in the last 24 hours, and the most frequent failures."""
    parts = max(round(_HOUR_S / found.seconds), 1)
    known = _Names(sites=names)
    rows = [
        [
            known.route(route.source, route.destination),
            *map(str, (sum(route.done[-parts:]), sum(route.failed[-parts:]), sum(route.done), sum(route.failed))),
            display_bytes(sum(route.bytes)),
        ]
        for route in found.routes
    ]
    head = ["ROUTE", "DONE 1H", "FAILED 1H", "DONE 24H", "FAILED 24H", "BYTES 24H"]
    click.echo(stdout_table(head, rows, right=[1, 2, 3, 4, 5], flexible=[0]))
    for error in found.errors:
        click.echo(display_line(f"{error.count:,} attempts failed: {error.scope} {error.code}: {error.hint}"))
    if found.sampled:
        click.echo("estimated from a part of the jobs")


def print_site_activity(found: Sequence[SiteActivityView], names: Mapping[int, str]) -> None:
    """What happens at each site."""
    rows = [
        [
            names.get(site.site, str(site.site)),
            f"{site.active_in}/{site.limit_in}",
            f"{site.active_out}/{site.limit_out}",
            *map(str, (site.running, site.queued, site.done, site.failed)),
        ]
        for site in found
    ]
    head = ["SITE", "STREAMS IN", "STREAMS OUT", "RUNNING", "WAITING", "DONE 1H", "FAILED 1H"]
    click.echo(stdout_table(head, rows, right=[1, 2, 3, 4, 5, 6], flexible=[0]))


def rate_lines(rate: RateView) -> list[str]:
    """What a job has done in each part of its time, one line for each part in which something ended."""
    if rate.since is None:
        return []
    lines = []
    for number, (files, size, failed) in enumerate(zip(rate.files, rate.bytes, rate.failed, strict=True)):
        if files or failed:
            offset = number * rate.seconds
            after = f"{offset:.1f} s" if rate.seconds < 1 else display_duration(offset)
            words = f"{files:,} files, {display_bytes(size / rate.seconds)}/s" if rate.seconds else f"{files:,} files"
            lines.append(f"after {after:>8}  {words}{f', {failed:,} failed' if failed else ''}")
    if rate.sampled:
        lines.append("estimated from a part of the elements")
    return lines
