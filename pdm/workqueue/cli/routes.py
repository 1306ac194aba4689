"""``pdm routes``."""

from __future__ import annotations

import click

from pdm.workqueue.cli.arguments import format_option
from pdm.workqueue.cli.exit_codes import ExitCode
from pdm.workqueue.cli.following import print_json
from pdm.workqueue.cli.session import run
from pdm.workqueue.cli.text import shown_bytes, shown_line, shown_name, shown_time, stdout_table
from pdm.workqueue.wire.responses import RouteView
from pdm.workqueue.WorkqueueClient import WorkqueueClient


@click.command()
@format_option
def routes(form: str) -> None:
    """Show how much runs between which sites, and why no more.

    RUNNING is streams of work at present, of as many as there may be (LIMIT); the limit moves with what the streams
    bring, up to MOST.
    """

    async def action(client: WorkqueueClient) -> int:
        found = await client.routes()
        if form == "json":
            print_json(found)
            return ExitCode.DONE
        names = {site.id: shown_name(site.name) for site in await client.sites()}

        def name(number: int | None) -> str:
            return "-" if number is None else names.get(number, str(number))

        rows = [
            [
                name(route.source),
                name(route.destination),
                str(route.running),
                str(route.limit),
                str(route.most),
                _throughput(route),
                shown_time(route.changed_at.timestamp()),
                shown_line(route.reason),
            ]
            for route in found
        ]
        head = ["FROM", "TO", "RUNNING", "LIMIT", "MOST", "THROUGHPUT", "SINCE (UTC)", "WHY"]
        click.echo(stdout_table(head, rows, right=[2, 3, 4, 5], flexible=[0, 1, 7]))
        return ExitCode.DONE

    run(action)


def _throughput(route: RouteView) -> str:
    if route.throughput is None:
        return "-"
    return f"{shown_bytes(route.throughput)}/s" if route.unit == "bytes/s" else f"{route.throughput:,.0f} {route.unit}"
