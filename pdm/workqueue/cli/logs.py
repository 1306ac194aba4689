"""``pdm logs``."""

from __future__ import annotations

import re
import time
from typing import Any

import click
from attrs import frozen

from pdm.workqueue.cli.arguments import format_option
from pdm.workqueue.cli.exit_codes import ExitCode
from pdm.workqueue.cli.following import print_json
from pdm.workqueue.cli.log_following import LogFollower, element_log, live_outputs, print_log
from pdm.workqueue.cli.session import run, say
from pdm.workqueue.cli.text import shown_line, shown_text
from pdm.workqueue.WorkqueueClient import WorkqueueClient

_REFERENCE = re.compile(r"(\d{1,18})(?:\.(\d{1,18})(?:\.(-?\d{1,9}))?)?")


@frozen
class _Reference:
    job_id: int
    element_id: int | None
    attempt: int | None


class _ReferenceType(click.ParamType[_Reference]):
    name = "N[.E[.K]]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> _Reference:
        if isinstance(value, _Reference):
            return value
        match = _REFERENCE.fullmatch(str(value))
        if match is None:
            self.fail(
                f"{value!r} is neither a job (214) nor an element (214.37) nor an attempt (214.37.1).", param, ctx
            )
        numbers = [None if group is None else int(group) for group in match.groups()[1:]]
        return _Reference(int(match[1]), *numbers)


@click.command()
@click.argument("reference", metavar="N[.E[.K]]", type=_ReferenceType())
@click.option("-a", "--attempt", type=int, help="Which attempt, -1 the latest; the same as K.")
@click.option("-f", "--follow", is_flag=True, help="Print each log as it is written, until all has ended.")
@format_option
def logs(reference: _Reference, attempt: int | None, follow: bool, form: str) -> None:
    """Show the log of element E of job N, or of its attempt K, or the latest log of each element.

    Of an attempt that runs, what is written so far. Control characters are shown as escapes.
    """
    if attempt is not None and reference.element_id is None:
        raise click.UsageError("-a is about one element: write N.E, such as 214.0.")
    if attempt is not None and reference.attempt is not None:
        raise click.UsageError("The attempt is given twice: leave -a away.")
    if follow and form == "json":
        raise click.UsageError("-f gives each line as it is written, as text: leave -F json away.")
    attempt = reference.attempt if attempt is None else attempt

    async def action(client: WorkqueueClient) -> int:
        if follow:
            follower = LogFollower(client, reference.job_id, time.monotonic)
            if reference.element_id is None:
                await follower.job()
            elif attempt is None:
                await follower.element(reference.element_id)
            else:
                await follower.attempt(reference.element_id, attempt)
            return ExitCode.DONE
        if reference.element_id is None:
            outputs = [*await client.output(reference.job_id), *await live_outputs(client, reference.job_id)]
            if form == "json":
                print_json(outputs)
            for output in outputs if form == "text" else ():
                print_log(output)
            if not outputs:
                await _say_why_there_is_none(client, reference.job_id)
            return ExitCode.DONE
        output = await element_log(client, reference.job_id, reference.element_id, attempt)
        if form == "json":
            print_json(output)
        else:
            click.echo(shown_text(output.log or ""), nl=False)
        return ExitCode.DONE

    run(action)


async def _say_why_there_is_none(client: WorkqueueClient, job_id: int) -> None:
    job = await client.job(job_id)
    say(f"job {job_id} has no log yet: it is {job.status}, and nothing of it was begun")
    for reason in job.waiting or ():
        say(f"job {job_id} waits: {shown_line(reason)}")
