"""``pdm logs``."""

from __future__ import annotations

import re
from typing import Any

import click
from attrs import frozen

from pdm.workqueue.cli.arguments import format_option
from pdm.workqueue.cli.exit_codes import ExitCode
from pdm.workqueue.cli.following import print_json
from pdm.workqueue.cli.session import run
from pdm.workqueue.cli.text import shown_text
from pdm.workqueue.client.errors import OutputNotReadyError
from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.wire.responses import OutputView
from pdm.workqueue.WorkqueueClient import WorkqueueClient

_REFERENCE = re.compile(r"(\d{1,18})(?:\.(\d{1,18}))?")
#: Seconds between two looks of ``-f``.
_LOOK_EVERY_S = 1.0


@frozen
class _Reference:
    job_id: int
    element_id: int | None


class _ReferenceType(click.ParamType[_Reference]):
    name = "N[.E]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> _Reference:
        if isinstance(value, _Reference):
            return value
        match = _REFERENCE.fullmatch(str(value))
        if match is None:
            self.fail(f"{value!r} is neither a job (214) nor an element of one (214.37).", param, ctx)
        return _Reference(int(match[1]), None if match[2] is None else int(match[2]))


@click.command()
@click.argument("reference", metavar="N[.E]", type=_ReferenceType())
@click.option("-a", "--attempt", type=int, help="Which attempt, -1 the latest (only with an element).")
@click.option("-f", "--follow", is_flag=True, help="Print the log of each attempt as it ends, until all has ended.")
@format_option
def logs(reference: _Reference, attempt: int | None, follow: bool, form: str) -> None:
    """Show the log of element E of job N, or the latest log of each of its elements.

    A log is shown once its attempt has ended. Control characters are shown as escapes.
    """
    if attempt is not None and reference.element_id is None:
        raise click.UsageError("-a is about one element: write N.E, such as 214.0.")
    if follow and (attempt is not None or form == "json"):
        raise click.UsageError("-f gives each attempt as it ends, as text: leave -a and -F json away.")

    async def action(client: WorkqueueClient) -> int:
        if follow:
            return await _follow(client, reference)
        if reference.element_id is None:
            outputs = await client.output(reference.job_id)
            if form == "json":
                print_json(outputs)
            else:
                for output in outputs:
                    _print(output)
            return ExitCode.DONE
        output = await client.element_output(reference.job_id, reference.element_id, attempt)
        if form == "json":
            print_json(output)
        else:
            click.echo(shown_text(output.log or ""), nl=False)
        return ExitCode.DONE

    run(action)


async def _follow(client: WorkqueueClient, reference: _Reference) -> int:
    seen: dict[int, int] = {}
    while True:
        # The status first: what ends after it was read is found in the next look.
        final = await _is_final(client, reference)
        for output in await _outputs(client, reference):
            for attempt in range(seen.get(output.elementid, 0) + 1, output.attempt + 1):
                latest = attempt == output.attempt
                _print(output if latest else await client.element_output(output.jobid, output.elementid, attempt))
            seen[output.elementid] = output.attempt
        if final:
            return ExitCode.DONE
        await client.pause(_LOOK_EVERY_S)


async def _is_final(client: WorkqueueClient, reference: _Reference) -> bool:
    if reference.element_id is None:
        return JobStatus.parse((await client.status(reference.job_id)).status).is_final
    return JobStatus.parse((await client.element_status(reference.job_id, reference.element_id)).status).is_final


async def _outputs(client: WorkqueueClient, reference: _Reference) -> list[OutputView]:
    if reference.element_id is None:
        return list(await client.output(reference.job_id))
    try:
        return [await client.element_output(reference.job_id, reference.element_id)]
    except OutputNotReadyError:
        return []  # no attempt has ended yet


def _print(output: OutputView) -> None:
    click.echo(f"==> {output.jobid}.{output.elementid} attempt {output.attempt} {output.type} {output.status} <==")
    log = "(this log is gone from the service's disk)\n" if output.log is None else output.log
    click.echo(shown_text(log), nl=not log.endswith("\n"))
