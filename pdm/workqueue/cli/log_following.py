"""Logs of attempts that run: as far as they are written, or with ``-f`` until nothing more will be."""

from __future__ import annotations

from collections.abc import Callable

import click
import msgspec

from pdm.workqueue.cli.text import shown_text
from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.wire.responses import ElementView, OutputView
from pdm.workqueue.WorkqueueClient import WorkqueueClient

#: Seconds between two looks at an element, and at a whole job.
_ELEMENT_EVERY_S, _JOB_EVERY_S = 0.5, 1.0
#: Running elements of a job whose logs are looked at at a time; those of all others come when they end.
_MOST_LIVE = 32
#: Pieces of a running attempt's log that are shown before others have their turn.
_PIECES_AT_ONCE = 8
#: Pieces of one log that are read where it is not followed; the service keeps logs shorter than that.
_MOST_PIECES = 100
#: What has a log, or never will have one more.
_BEGUN = ",".join(status.name for status in (JobStatus.RUNNING, JobStatus.DONE, JobStatus.FAILED, JobStatus.CANCELLED))
_GONE = "(this log is gone from the service's disk)\n"


def print_log(output: OutputView) -> None:
    """A whole log, below a line that says whose it is."""
    _print_header(output)
    log = _GONE if output.log is None else output.log
    click.echo(shown_text(log), nl=not log.endswith("\n"))


def _print_header(output: OutputView) -> None:
    click.echo(f"==> {output.jobid}.{output.elementid} attempt {output.attempt} {output.type} {output.status} <==")


async def element_log(client: WorkqueueClient, job_id: int, element_id: int, attempt: int | None) -> OutputView:
    """The log of an attempt, the latest without a number: of one that runs, what is written so far.

    Raises:
        OutputNotReadyError: nothing was begun, or there is no such attempt.
    """
    element = await client.element_status(job_id, element_id)
    if element.status == JobStatus.RUNNING.name and attempt in (None, -1, element.attempts):
        return await _written_so_far(client, job_id, element_id, element.attempts)
    return await client.element_output(job_id, element_id, attempt)


async def live_outputs(client: WorkqueueClient, job_id: int) -> list[OutputView]:
    """What is written so far of the first attempts that run of a job."""
    running = await client.elements(job_id, status=JobStatus.RUNNING, limit=_MOST_LIVE)
    return [await _written_so_far(client, job_id, element.id, element.attempts) for element in running]


async def _written_so_far(client: WorkqueueClient, job_id: int, element_id: int, attempt: int) -> OutputView:
    """A log as far as it is written; one that grows faster than it is read comes without its last lines."""
    whole = await client.live_output(job_id, element_id, attempt)
    piece = whole
    for _ in range(_MOST_PIECES):
        if piece.end is True or not piece.log or not isinstance(piece.offset, int):
            break
        piece = await client.live_output(job_id, element_id, attempt, piece.offset)
        whole = msgspec.structs.replace(piece, log=(whole.log or "") + (piece.log or ""))
    return whole


class LogFollower:
    """Shows the logs of one job; a line says whose it is wherever another one goes on.

    Args:
        client: of the service.
        job_id: of the job.
        seconds: a clock.
    """

    def __init__(self, client: WorkqueueClient, job_id: int, seconds: Callable[[], float]) -> None:
        self._client = client
        self._job_id = job_id
        self._seconds = seconds
        #: Element → the attempt that is shown next, and how far it has been shown.
        self._next: dict[int, tuple[int, int]] = {}
        self._shown: tuple[int, int] | None = None
        #: All elements up to this one have ended and are shown.
        self._over = -1

    async def attempt(self, element_id: int, attempt: int) -> None:
        """Show one attempt, from when it begins; a negative number is of those there are now.

        Raises:
            OutputNotReadyError: it will never begin.
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
                # To be told why.
                await self._client.live_output(self._job_id, element_id, attempt)
            await self._client.pause(_ELEMENT_EVERY_S)

    async def element(self, element_id: int) -> None:
        """Show each attempt at an element, until it has ended."""
        while True:
            # First where it stands, then the logs: nothing is written later than what a final status says.
            element = await self._client.element_status(self._job_id, element_id)
            final = JobStatus.parse(element.status).is_final
            await self._show_attempts(element_id, element.attempts, all_of_it=final)
            if final:
                return
            await self._client.pause(_ELEMENT_EVERY_S)

    async def job(self) -> None:
        """Show each attempt at each element, until the job has ended."""
        while True:
            begun = self._seconds()
            final = JobStatus.parse((await self._client.status(self._job_id)).status).is_final
            await self._look_at_elements()
            if final:
                return
            # A look at a job of very many elements takes long; then it is not the next thing to look again.
            await self._client.pause(max(_JOB_EVERY_S, self._seconds() - begun))

    async def _look_at_elements(self) -> None:
        live = 0
        after = self._over if self._over >= 0 else None
        async for element in self._client.iterate_elements(self._job_id, status=_BEGUN, after=after):
            final = JobStatus.parse(element.status).is_final
            live += not final
            if final or live <= _MOST_LIVE:
                await self._show_attempts(element.id, element.attempts, all_of_it=final)
            self._pass(element, final)

    def _pass(self, element: ElementView, final: bool) -> None:
        """Look no more at the elements before the first that goes on."""
        if final and element.id == self._over + 1:
            self._over = element.id
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
        log = _GONE if piece.log is None else piece.log
        if not log:
            return
        if self._shown != (piece.elementid, piece.attempt):
            self._shown = (piece.elementid, piece.attempt)
            _print_header(piece)
        click.echo(shown_text(log), nl=not log.endswith("\n"))
