"""``pdm user`` and ``pdm audit``, for operators."""

from __future__ import annotations

import click

from pdm.workqueue.cli.arguments import format_option
from pdm.workqueue.cli.exit_codes import ExitCode
from pdm.workqueue.cli.following import print_json
from pdm.workqueue.cli.session import run
from pdm.workqueue.cli.text import shown_line, shown_moment, stdout_table
from pdm.workqueue.wire.sites import AuditView, UserView
from pdm.workqueue.WorkqueueClient import WorkqueueClient

_PAGE = 1000
_NUMBER = click.IntRange(min=1, max=2**63 - 1)


@click.group()
def user() -> None:
    """For operators: list, ban and unban users."""


@user.command("list")
@format_option
def list_(form: str) -> None:
    """Show all users."""

    async def action(client: WorkqueueClient) -> int:
        found: list[UserView] = []
        while page := await client.users(limit=_PAGE, after=found[-1].id if found else None):
            found += page
        if form == "json":
            print_json(found)
        else:
            rows = [[str(one.id), one.role, shown_line(one.subject), shown_line(one.banned or "")] for one in found]
            click.echo(stdout_table(["ID", "ROLE", "SUBJECT", "BANNED"], rows, right=[0], flexible=[2, 3]))
        return ExitCode.DONE

    run(action)


@user.command("ban")
@click.argument("number", metavar="N", type=_NUMBER)
@click.argument("message")
def ban(number: int, message: str) -> None:
    """Let user N submit and start nothing more; the user sees MESSAGE."""

    async def action(client: WorkqueueClient) -> int:
        found = await client.ban(number, message)
        click.echo(f"user {found.id} {shown_line(found.subject)} is banned")
        return ExitCode.DONE

    run(action)


@user.command("unban")
@click.argument("number", metavar="N", type=_NUMBER)
def unban(number: int) -> None:
    """End the ban of user N."""

    async def action(client: WorkqueueClient) -> int:
        found = await client.unban(number)
        click.echo(f"user {found.id} {shown_line(found.subject)} is not banned")
        return ExitCode.DONE

    run(action)


@click.command()
@format_option
def audit(form: str) -> None:
    """For operators: show who did what to sites and users, the oldest first."""

    async def action(client: WorkqueueClient) -> int:
        found: list[AuditView] = []
        while page := await client.audit(limit=_PAGE, after=found[-1].id if found else None):
            found += page
        if form == "json":
            print_json(found)
        else:
            for one in found:
                line = f"{shown_moment(one.at)}  {one.subject}  {one.action} {one.target}  {one.details}"
                click.echo(shown_line(line))
        return ExitCode.DONE

    run(action)
