"""After a submission: wait with progress, then say how it ended, in words on stderr and by the exit status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import click
import msgspec
from twisted.internet.defer import CancelledError

from pdm.workqueue.cli.exit_codes import CommandError, ExitCode
from pdm.workqueue.cli.progress import display_for_stderr, summary
from pdm.workqueue.cli.session import say
from pdm.workqueue.cli.text import shown_json, shown_line, shown_name
from pdm.workqueue.client.errors import JobTimeoutError
from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.wire.responses import ElementView, JobView
from pdm.workqueue.WorkqueueClient import WorkqueueClient

#: How many failed elements are named one by one.
SHOWN_FAILURES = 10

#: By word, for a later service may have words that this client does not know.
_SPECIAL_CODES: Mapping[str, ExitCode] = {
    FailureCode.NOT_FOUND: ExitCode.NOT_FOUND,
    FailureCode.CREDENTIAL_EXPIRED: ExitCode.CREDENTIAL,
    FailureCode.CREDENTIAL_MISSING: ExitCode.CREDENTIAL,
    FailureCode.CREDENTIAL_REFUSED: ExitCode.CREDENTIAL,
    FailureCode.CONNECTION: ExitCode.TEMPORARY,
    FailureCode.TIMEOUT: ExitCode.TEMPORARY,
    FailureCode.STALLED: ExitCode.TEMPORARY,
    FailureCode.BUSY: ExitCode.TEMPORARY,
    FailureCode.LOCKED: ExitCode.TEMPORARY,
    FailureCode.SERVER_ERROR: ExitCode.TEMPORARY,
}


class WaitingReasons:
    """Says once why a job waits: when a site is tried again stands in the reason, and changes all the time."""

    def __init__(self, job_id: int) -> None:
        self._job_id = job_id
        self._told = False

    def tell(self, job: JobView) -> None:
        """Look at a job."""
        for reason in () if self._told else job.waiting or ():
            say(f"job {self._job_id} waits: {shown_line(reason)}")
        self._told = bool(job.waiting)


async def follow(client: WorkqueueClient, job_id: int, timeout_s: float | None, form: str) -> JobView:
    """Wait for the end of a job and show how it gets on; with `form` ``json``, what is known when the time is up.

    Raises:
        CommandError: ^C (the job goes on), or the time is up (as well).
    """
    display = display_for_stderr()
    held = False
    reasons = WaitingReasons(job_id)

    def show(job: JobView) -> None:
        nonlocal held
        display.show(job)
        reasons.tell(job)
        if job.status == JobStatus.HELD.name and not held:
            held = True
            advice = "it needs a valid credential. Run 'pdm delegate', and it goes on by itself."
            if job.hold:
                advice = f"{shown_line(job.hold.reason)}. {shown_line(job.hold.hint)}"
            say(f"job {job_id} is held: {advice}")

    try:
        return await client.wait(job_id, timeout=timeout_s, on_progress=show)
    except JobTimeoutError as error:
        if form == "json":
            print_json(error.job)
        raise CommandError(ExitCode.TIMED_OUT, error.what, f"pdm wait {job_id} | pdm cancel {job_id}") from error
    except CancelledError:
        display.close()
        say(f"detached: job {job_id} goes on; pdm wait {job_id} | pdm cancel {job_id}")
        raise CommandError(ExitCode.INTERRUPTED, "") from None
    finally:
        display.close()


async def report_end(client: WorkqueueClient, job: JobView, form: str) -> int:
    """Say how a job ended; the exit status comes back."""
    failures: Sequence[ElementView] = ()
    if job.status == JobStatus.FAILED.name:
        failures = await client.elements(job.id, status=JobStatus.FAILED, limit=SHOWN_FAILURES)
    if form == "json":
        print_json(job)
    say(summary(job))
    for line in failure_lines(failures, job.num_failed):
        say(line)
    return exit_code_of_job(job, failures)


def exit_code_of_job(job: JobView, failures: Sequence[ElementView]) -> ExitCode:
    """The exit status for an ended job; `failures` are some of its failed elements."""
    if job.status == JobStatus.DONE.name:
        return ExitCode.DONE
    if job.status == JobStatus.CANCELLED.name:
        return ExitCode.CANCELLED
    # The listing that a copy or a removal begins with is not what was asked for.
    listed_only = 1 if job.type in (JobType.COPY.name, JobType.REMOVE.name) else 0
    if job.num_done > listed_only:
        return ExitCode.PARTIAL
    codes = {element.failure.code for element in failures if element.failure is not None}
    if len(codes) == 1:
        return _SPECIAL_CODES.get(codes.pop(), ExitCode.FAILED)
    return ExitCode.FAILED


def failure_lines(failures: Sequence[ElementView], total: int) -> list[str]:
    """What failed, where, why, and what to do: two lines an element, and how many are not shown."""
    lines = []
    for element in failures:
        lines.append(f"  {element.job_id}.{element.id}  {shown_name(element.src_filepath)}")
        if (failure := element.failure) is not None:
            lines.append(f"      {failure.code} ({failure.scope}): {shown_line(failure.message)}")
            lines.append(f"      {shown_line(failure.hint)}")
    if total > len(failures) and failures:
        lines.append(f"  and {total - len(failures)} more: pdm status {failures[0].job_id}")
    return lines


def print_json(value: object) -> None:
    """A value of the API on stdout, as JSON in several lines."""
    click.echo(shown_json(msgspec.json.format(msgspec.json.encode(value), indent=2).decode()))
