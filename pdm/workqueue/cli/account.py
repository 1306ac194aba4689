"""``pdm delegate``, ``sites``, ``whoami``."""

from __future__ import annotations

from datetime import timedelta

import click

from pdm.workqueue.cli.arguments import DURATION, format_option
from pdm.workqueue.cli.exit_codes import ExitCode
from pdm.workqueue.cli.following import print_json
from pdm.workqueue.cli.session import run
from pdm.workqueue.cli.text import shown_line, shown_moment, shown_name, stdout_table
from pdm.workqueue.wire.responses import SiteView
from pdm.workqueue.WorkqueueClient import WorkqueueClient


@click.command()
@click.option("--lifetime", type=DURATION, default="12h", help="How long the proxy is valid (30m, 12h; default 12h).")
@format_option
def delegate(lifetime: float, form: str) -> None:
    """Let the service act for me at the sites, for a while.

    It makes a key and I sign a proxy for it; my own key stays here. The proxy ends with my own certificate at the
    latest. Jobs that are held for want of it go on by themselves.
    """

    async def action(client: WorkqueueClient) -> int:
        delegation = await client.delegate(timedelta(seconds=lifetime))
        if form == "json":
            print_json(delegation)
        else:
            click.echo(f"delegated until {shown_moment(delegation.termination_time)}")
        return ExitCode.DONE

    run(action)


@click.command()
@format_option
def sites(form: str) -> None:
    """Show the sites and what they offer."""
    show_sites(form)


def _state(site: SiteView) -> str:
    """What stands before the description of a site that is not as it should be; of a drained one, the message."""
    if site.state == "ok":
        return ""
    return f"[{site.state}: {site.reason}] " if site.state == "drained" else f"[{site.state}] "


def show_sites(form: str) -> None:
    """Carry out ``pdm sites``, and ``pdm site list``."""

    async def action(client: WorkqueueClient) -> int:
        found = await client.sites()
        if form == "json":
            print_json(found)
            return ExitCode.DONE
        rows = [
            [
                str(site.id),
                shown_name(site.name),
                ", ".join(name.lower() for name in site.protocols),
                shown_name(site.default_folder),
                shown_line(f"{_state(site)}{site.description}").strip(),
            ]
            for site in found
        ]
        header = ["ID", "NAME", "PROTOCOLS", "FOLDER", "DESCRIPTION"]
        click.echo(stdout_table(header, rows, right=[0], flexible=[3, 4]))
        return ExitCode.DONE

    run(action)


@click.command()
@format_option
def whoami(form: str) -> None:
    """Show as whom the service sees me."""

    async def action(client: WorkqueueClient) -> int:
        me = await client.whoami()
        if form == "json":
            print_json(me)
        else:
            until = me.credential_valid_until
            click.echo(f"{shown_name(me.subject)} ({me.role})")
            click.echo(f"certificate valid until {shown_moment(me.certificate_valid_until)}")
            click.echo(f"delegated {'nothing' if until is None else 'until ' + shown_moment(until)}")
        return ExitCode.DONE

    run(action)
