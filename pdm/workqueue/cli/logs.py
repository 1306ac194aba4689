"""``pdm logs``: show logs of attempts, or follow those of running ones (``-f``)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import click
import msgspec
from attrs import frozen

from pdm.workqueue.cli.arguments import format_option
from pdm.workqueue.cli.display import print_stderr
from pdm.workqueue.cli.outcome import print_json
from pdm.workqueue.cli.session import run
from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.formatting import display_line, display_text
from pdm.workqueue.wire.responses import ElementView, OutputView
from pdm.workqueue.WorkqueueClient import WorkqueueClient

#: Seconds between two polls of an element, and of a whole job.
_ELEMENT_POLL_S, _JOB_POLL_S = 0.5, 1.0
#: Running elements of a job whose logs are followed at a time; the logs of others are shown when they end.
_MAX_LIVE_LOGS = 32
#: Pieces of a running attempt's log that are shown before the next element's.
_PIECES_AT_ONCE = 8
#: Maximum pieces of a log that is not followed; the service limits logs to less.
_MAX_PIECES = 100
#: Elements that have a log, or will get no other.
_STARTED_STATUSES = ",".join(
    status.name for status in (JobStatus.RUNNING, JobStatus.DONE, JobStatus.FAILED, JobStatus.CANCELLED)
)
_LOG_GONE = "(this log was deleted from the service's disk)\n"


def print_log(output: OutputView) -> None:
    _print_header(output)
    log = _LOG_GONE if output.log is None else output.log
    click.echo(display_text(log), nl=not log.endswith("\n"))


def _print_header(output: OutputView) -> None:
    click.echo(f"==> {output.jobid}.{output.elementid} attempt {output.attempt} {output.type} {output.status} <==")


async def element_log(client: WorkqueueClient, job_id: int, element_id: int, attempt: int | None) -> OutputView:
    """The log of an attempt, by default the latest; of a running attempt, what has been written so far.

    Raises:
        OutputNotReadyError: the attempt does not exist.
    """
    element = await client.element_status(job_id, element_id)
    if element.status == JobStatus.RUNNING.name and attempt in (None, -1, element.attempts):
        return await _live_log(client, job_id, element_id, element.attempts)
    return await client.element_output(job_id, element_id, attempt)


async def live_outputs(client: WorkqueueClient, job_id: int) -> list[OutputView]:
    """Logs of the first running attempts of a job, up to what has been written."""
    running = await client.elements(job_id, status=JobStatus.RUNNING, limit=_MAX_LIVE_LOGS)
    return [await _live_log(client, job_id, element.id, element.attempts) for element in running]


async def _live_log(client: WorkqueueClient, job_id: int, element_id: int, attempt: int) -> OutputView:
    """A log up to what has been written; one that grows faster than it is read lacks its last lines."""
    whole = await client.live_output(job_id, element_id, attempt)
    piece = whole
    for _ in range(_MAX_PIECES):
        if piece.end is True or not piece.log or not isinstance(piece.offset, int):
            break
        piece = await client.live_output(job_id, element_id, attempt, piece.offset)
        whole = msgspec.structs.replace(piece, log=(whole.log or "") + (piece.log or ""))
    return whole


class LogFollower:
    """Prints the logs of one job as they grow, with a header line wherever the attempt changes."""

    def __init__(self, client: WorkqueueClient, job_id: int, seconds: Callable[[], float]) -> None:
        self._client = client
        self._job_id = job_id
        self._seconds = seconds
        #: Element → the attempt to show next, and its offset.
        self._next: dict[int, tuple[int, int]] = {}
        self._shown: tuple[int, int] | None = None
        #: Where the logs are that cannot be read now, as was said already.
        self._silent: set[str] = set()
        #: All elements up to this one have ended and were shown.
        self._finished = -1

    async def attempt(self, element_id: int, attempt: int) -> None:
        """Show one attempt once it starts; a negative number counts from the present latest.

        Raises:
            OutputNotReadyError: the element ended without such an attempt.
        """
        if attempt < 0:
            attempt = (await self._client.live_output(self._job_id, element_id, attempt)).attempt
        self._next[element_id] = (attempt, 0)
        while True:
            element = await self._client.element_status(self._job_id, element_id)
            final = JobStatus.parse(element.status).is_final
            if attempt <= element.attempts:
                await self._show_attempts(element_id, attempt, all_of_it=final)
                if self._next[element_id][0] > attempt:
                    return
            elif final:
                # Raises an error with the reason.
                await self._client.live_output(self._job_id, element_id, attempt)
            await self._client.pause(_ELEMENT_POLL_S)

    async def element(self, element_id: int) -> None:
        """Show each attempt at an element, until it has ended."""
        while True:
            # The status is read before the logs: after a final status the logs are complete.
            element = await self._client.element_status(self._job_id, element_id)
            final = JobStatus.parse(element.status).is_final
            await self._show_attempts(element_id, element.attempts, all_of_it=final)
            if final:
                return
            await self._client.pause(_ELEMENT_POLL_S)

    async def job(self) -> None:
        """Show each attempt at each element, until the job has ended."""
        while True:
            begun = self._seconds()
            final = JobStatus.parse((await self._client.status(self._job_id)).status).is_final
            await self._show_elements()
            if final:
                return
            # Polling a job with very many elements takes long: the pause is at least as long.
            await self._client.pause(max(_JOB_POLL_S, self._seconds() - begun))

    async def _show_elements(self) -> None:
        live = 0
        after = self._finished if self._finished >= 0 else None
        async for element in self._client.iterate_elements(self._job_id, status=_STARTED_STATUSES, after=after):
            final = JobStatus.parse(element.status).is_final
            live += not final
            if final or live <= _MAX_LIVE_LOGS:
                await self._show_attempts(element.id, element.attempts, all_of_it=final)
            self._pass(element, final)

    def _pass(self, element: ElementView, final: bool) -> None:
        """Skip the finished elements before the first unfinished one in later polls."""
        if final and element.id == self._finished + 1:
            self._finished = element.id
            self._next.pop(element.id, None)

    async def _show_attempts(self, element_id: int, last: int, *, all_of_it: bool) -> None:
        attempt, offset = self._next.get(element_id, (1, 0))
        pieces = 0
        while attempt <= last:
            piece = await self._client.live_output(self._job_id, element_id, attempt, offset)
            self._print(piece)
            if piece.end is True:
                attempt, offset = attempt + 1, 0
            else:
                offset = piece.offset if isinstance(piece.offset, int) else offset
                pieces += 1
                if not piece.log or (pieces >= _PIECES_AT_ONCE and not all_of_it):
                    break
        self._next[element_id] = (attempt, offset)

    def _print(self, piece: OutputView) -> None:
        self._note_silence(piece)
        log = _LOG_GONE if piece.log is None else piece.log
        if not log:
            return
        if self._shown != (piece.elementid, piece.attempt):
            self._shown = (piece.elementid, piece.attempt)
            _print_header(piece)
        click.echo(display_text(log), nl=not log.endswith("\n"))

    def _note_silence(self, piece: OutputView) -> None:
        if isinstance(piece.silent, str):
            if piece.end is not True and piece.silent not in self._silent:
                self._silent.add(piece.silent)
                print_stderr(f"the log of element {piece.elementid} is {display_line(piece.silent)}: trying again")
        else:
            self._silent.clear()


_REFERENCE = re.compile(r"(\d{1,18})(?:\.(\d{1,18})(?:\.(-?\d{1,9}))?)?")


@frozen
class _LogReference:
    job_id: int
    element_id: int | None
    attempt: int | None


class _LogReferenceType(click.ParamType[_LogReference]):
    name = "N[.E[.K]]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> _LogReference:
        if isinstance(value, _LogReference):
            return value
        match = _REFERENCE.fullmatch(str(value))
        if match is None:
            self.fail(
                f"{value!r} is neither a job (214) nor an element (214.37) nor an attempt (214.37.1).", param, ctx
            )
        numbers = [None if group is None else int(group) for group in match.groups()[1:]]
        return _LogReference(int(match[1]), *numbers)


@click.command()
@click.argument("reference", metavar="N[.E[.K]]", type=_LogReferenceType())
@click.option("-a", "--attempt", type=int, help="Number of the attempt, -1 for the latest; the same as K.")
@click.option("-f", "--follow", is_flag=True, help="Print logs as they are written, until the job has ended.")
@format_option
def logs(reference: _LogReference, attempt: int | None, follow: bool, form: str) -> None:
    """Show the log of element E of job N, or of its attempt K, or the latest log of each element.

    Of a running attempt, what has been written so far. Control characters are shown as escapes.
    """
    if attempt is not None and reference.element_id is None:
        raise click.UsageError("-a needs an element: write N.E, such as 214.0.")
    if attempt is not None and reference.attempt is not None:
        raise click.UsageError("The attempt is given twice: omit -a.")
    if follow and form == "json":
        raise click.UsageError("-f prints lines of text: omit -F json.")
    attempt = reference.attempt if attempt is None else attempt

    async def action(client: WorkqueueClient) -> None:
        if follow:
            follower = LogFollower(client, reference.job_id, time.monotonic)
            if reference.element_id is None:
                await follower.job()
            elif attempt is None:
                await follower.element(reference.element_id)
            else:
                await follower.attempt(reference.element_id, attempt)
            return
        if reference.element_id is None:
            outputs = [*await client.output(reference.job_id), *await live_outputs(client, reference.job_id)]
            if form == "json":
                print_json(outputs)
            for output in outputs if form == "text" else ():
                print_log(output)
            if not outputs:
                await _print_why_no_log(client, reference.job_id)
            return
        output = await element_log(client, reference.job_id, reference.element_id, attempt)
        if form == "json":
            print_json(output)
        else:
            click.echo(display_text(output.log or ""), nl=False)

    run(action)


async def _print_why_no_log(client: WorkqueueClient, job_id: int) -> None:
    job = await client.job(job_id)
    print_stderr(f"job {job_id} has no log yet: it is {job.status}, and no element was started")
    for reason in job.waiting or ():
        print_stderr(f"job {job_id} waits: {display_line(reason)}")
