"""``pdm webhook`` and ``pdm mail``: be notified of what becomes of jobs."""

from __future__ import annotations

from collections.abc import Sequence

import click
from msgspec import UNSET

from pdm.workqueue.cli.arguments import JOB_NUMBER, format_option
from pdm.workqueue.cli.display import print_stderr, stdout_table
from pdm.workqueue.cli.exit_codes import ExitCode
from pdm.workqueue.cli.outcome import print_json
from pdm.workqueue.cli.session import run
from pdm.workqueue.domain.formatting import display_line, display_name, display_timestamp
from pdm.workqueue.wire.events import DeliveryView, MailView, WebhookView
from pdm.workqueue.WorkqueueClient import WorkqueueClient

_KINDS = ("job", "failure", "held", "resumed", "site")


@click.group()
def webhook() -> None:
    """Send events of my jobs to a URL: add, list, show, test or remove a webhook."""


@webhook.command()
@click.argument("url")
@click.option(
    "--kinds", metavar="KIND,...", default="job,failure,held,resumed", show_default=True,
    help=f"Of {', '.join(_KINDS)}.",
)  # fmt: skip
@click.option("--job", metavar="N", type=JOB_NUMBER, help="Only events of job N.")
@format_option
def add(url: str, kinds: str, job: int | None, form: str) -> None:
    r"""Send events to URL, signed by the rules of Standard Webhooks.

    \b
    pdm webhook add https://example.org/pdm
    pdm webhook add --kinds failure,held --job 12 https://example.org/pdm

    The secret with which a receiver verifies the signatures is printed on stdout, once.
    """

    async def action(client: WorkqueueClient) -> None:
        added = await client.add_webhook(url, [each.strip() for each in kinds.split(",")], job=job)
        print_stderr(f"webhook {added.id} added; 'pdm webhook test {added.id}' sends a test message")
        if form == "json":
            print_json(added)
        else:
            click.echo(added.secret)

    run(action)


@webhook.command(name="list")
@format_option
def list_(form: str) -> None:
    """Show my webhooks."""

    async def action(client: WorkqueueClient) -> None:
        found = await client.webhooks()
        if form == "json":
            print_json(found)
            return
        rows = [
            [
                str(each.id),
                _state(each),
                str(each.waiting),
                "" if each.job is None else str(each.job),
                ",".join(each.kinds),
                display_name(each.url),
            ]
            for each in found
        ]
        if rows:
            click.echo(
                stdout_table(["ID", "STATE", "WAITING", "JOB", "KINDS", "URL"], rows, right=[0, 2, 3], flexible=[5])
            )

    run(action)


@webhook.command()
@click.argument("number", metavar="N", type=JOB_NUMBER)
@format_option
def show(number: int, form: str) -> None:
    """Show webhook N with its last 100 deliveries, the newest first."""

    async def action(client: WorkqueueClient) -> None:
        found = await client.webhook(number)
        if form == "json":
            print_json(found)
            return
        click.echo(f"webhook {found.id}  {_state(found)}")
        click.echo(f"url      {display_name(found.url)}")
        click.echo(f"kinds    {', '.join(found.kinds)}" + ("" if found.job is None else f" of job {found.job}"))
        click.echo(f"waiting  {found.waiting}")
        if found.disabled_why is not None:
            click.echo(f"why      {display_line(found.disabled_why)}")
            click.echo(f"         'pdm webhook test {found.id}' enables it again, if the message is accepted")
        deliveries: Sequence[DeliveryView] = () if found.deliveries is UNSET else found.deliveries
        rows = [
            [
                display_timestamp(each.created_at),
                each.kind,
                "" if each.job is None else str(each.job),
                each.state,
                str(each.attempts),
                "" if each.next_try is None else display_timestamp(each.next_try),
                display_line(each.error or ""),
            ]
            for each in deliveries
        ]
        if rows:
            head = ["CREATED", "KIND", "JOB", "STATE", "TRIES", "NEXT TRY", "ERROR"]
            click.echo(stdout_table(head, rows, right=[2, 4], flexible=[6]))

    run(action)


def _state(found: WebhookView) -> str:
    if found.disabled_at is not None:
        return "DISABLED"
    return "OK" if found.failing_since is None else "FAILING"


@webhook.command()
@click.argument("number", metavar="N", type=JOB_NUMBER)
@format_option
def test(number: int, form: str) -> None:
    """Send a test message to webhook N; the exit status is 1 if it is not accepted."""

    async def action(client: WorkqueueClient) -> int:
        found = await client.test_webhook(number)
        if form == "json":
            print_json(found)
        elif found.accepted:
            more = "; the webhook is enabled again" if found.enabled else ""
            print_stderr(f"accepted ({found.status}) after {found.seconds:.1f} s{more}")
        else:
            print_stderr(f"not accepted: {display_line(found.error or '')}")
        return ExitCode.DONE if found.accepted else ExitCode.FAILED

    run(action)


@webhook.command()
@click.argument("number", metavar="N", type=JOB_NUMBER)
def remove(number: int) -> None:
    """Remove webhook N; events that wait for it are not sent."""

    async def action(client: WorkqueueClient) -> None:
        await client.remove_webhook(number)
        print_stderr(f"webhook {number} removed")

    run(action)


@click.group()
def mail() -> None:
    """Get mail when my jobs end, fail or wait: show, set, confirm or stop."""


@mail.command(name="show")
@format_option
def show_mail(form: str) -> None:
    """Show what is mailed to me."""

    async def action(client: WorkqueueClient) -> None:
        _print_mail(await client.mail(), form)

    run(action)


@mail.command(name="set")
@click.argument("address")
@click.option("--notify", metavar="WHAT,...", default="failed,held", show_default=True, help="Of ended, failed, held.")
@click.option("--per", type=click.Choice(["job", "day"]), default="job", show_default=True, help="How often.")
@format_option
def set_mail(address: str, notify: str, per: str, form: str) -> None:
    """Mail me at ADDRESS. A new address gets a code first: 'pdm mail confirm CODE'."""

    async def action(client: WorkqueueClient) -> None:
        found = await client.set_mail(address, [each.strip() for each in notify.split(",")], per=per)
        _print_mail(found, form)
        if not found.confirmed:
            print_stderr(f"a code was sent to {display_name(address)}: 'pdm mail confirm CODE'")

    run(action)


@mail.command()
@click.argument("code")
@format_option
def confirm(code: str, form: str) -> None:
    """Confirm my address by the CODE that was sent to it."""

    async def action(client: WorkqueueClient) -> None:
        _print_mail(await client.confirm_mail(code), form)

    run(action)


@mail.command()
def stop() -> None:
    """Mail me no more, and forget my address."""

    async def action(client: WorkqueueClient) -> None:
        await client.stop_mail()
        print_stderr("no more mail is sent")

    run(action)


def _print_mail(found: MailView, form: str) -> None:
    if form == "json":
        print_json(found)
        return
    if found.address is None:
        click.echo("no mail: 'pdm mail set ADDRESS'")
        return
    click.echo(f"address  {display_name(found.address)}{'' if found.confirmed else ' (not confirmed)'}")
    click.echo(f"notify   {', '.join(found.notify)}, a mail each {found.per}")
    if found.sent_at is not None:
        click.echo(f"sent     {display_timestamp(found.sent_at)}")
    if found.error is not None:
        click.echo(f"error    {display_line(found.error)}")
