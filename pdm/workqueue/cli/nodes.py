"""``pdm nodes``, and ``pdm admin node`` to drain one: for operators."""

from __future__ import annotations

import click

from pdm.workqueue.cli.arguments import format_option
from pdm.workqueue.cli.display import stdout_table
from pdm.workqueue.cli.outcome import print_json
from pdm.workqueue.cli.session import run
from pdm.workqueue.domain.formatting import display_line, display_name, display_time, display_timestamp
from pdm.workqueue.wire.activity import NodeView
from pdm.workqueue.WorkqueueClient import WorkqueueClient


@click.command()
@format_option
def nodes(form: str) -> None:
    """For operators: show the nodes, the daemons that work on the queue.

    STATE is up, drained, sick (it starts nothing, by its own checks) or away (its lease has ended). RUNNING is the
    number of elements that it runs.
    """

    async def action(client: WorkqueueClient) -> None:
        found = await client.nodes()
        if form == "json":
            print_json(found)
            return
        rows = [
            [
                display_name(node.name),
                _state(node),
                str(node.running),
                display_line(node.address or "-"),
                display_line(node.version or "-"),
                "-" if node.since is None else display_time(node.since.timestamp()),
                "-" if node.seen is None else display_time(node.seen.timestamp()),
                display_line(_why(node)),
            ]
            for node in found
        ]
        head = ["NAME", "STATE", "RUNNING", "ADDRESS", "VERSION", "SINCE (UTC)", "SEEN (UTC)", "WHY"]
        click.echo(stdout_table(head, rows, right=[2], flexible=[0, 3, 7]))

    run(action)


def _state(node: NodeView) -> str:
    if not node.alive:
        return "away"
    return "sick" if node.sick is not None else "up" if node.drain is None else "drained"


def _why(node: NodeView) -> str:
    drain = node.drain or ""
    if node.drain_until is not None:
        drain += f" (until {display_timestamp(node.drain_until)})"
    return "; ".join(filter(None, [node.sick, drain])) or "-"


@click.group()
def node() -> None:
    """For operators: drain and resume a node, over the service's API."""


@node.command("drain")
@click.argument("name", metavar="NAME")
@click.argument("message", default="an operator drains it")
@click.option("--deadline", metavar="WHEN", help="Then what still runs goes back to the queue: 30m, or a time.")
@format_option
def drain(name: str, message: str, deadline: str | None, form: str) -> None:
    """Let node NAME start nothing more; what it runs finishes. MESSAGE, one line, says why.

    It stays drained until it is resumed, also when it is restarted.
    """

    async def action(client: WorkqueueClient) -> None:
        _print_node(await client.drain_node(name, message, deadline=deadline), form)

    run(action)


@node.command("resume")
@click.argument("name", metavar="NAME")
@format_option
def resume(name: str, form: str) -> None:
    """Let node NAME start work again."""

    async def action(client: WorkqueueClient) -> None:
        _print_node(await client.resume_node(name), form)

    run(action)


def _print_node(found: NodeView, form: str) -> None:
    if form == "json":
        print_json(found)
        return
    why = "" if found.drain is None else f": {display_line(_why(found))}"
    click.echo(f"node {display_name(found.name)} is {_state(found)}{why}; it runs {found.running} elements")
