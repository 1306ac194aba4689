"""After a submission: wait with progress, then say how it ended, in words on stderr and by the exit status."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import click
import msgspec
from msgspec import UNSET
from twisted.internet.defer import CancelledError

from pdm.workqueue.cli.exit_codes import CommandError, ExitCode
from pdm.workqueue.cli.outcome import SHOWN_SKIPPED, is_partial, outcome_line, skipped_lines
from pdm.workqueue.cli.progress import display_for_stderr, is_waiting, summary
from pdm.workqueue.cli.session import say
from pdm.workqueue.cli.text import shown_json, shown_line, shown_name
from pdm.workqueue.client.errors import JobTimeoutError
from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.failures import FailureCode, Scope, hint_for
from pdm.workqueue.wire.responses import ElementView, JobView
from pdm.workqueue.WorkqueueClient import WorkqueueClient

#: How many failed elements are named one by one.
SHOWN_FAILURES = 10
#: Characters of a reason, without its numbers, that tell what kind it is.
_KIND_LENGTH = 20

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


#: What hints name, in the words of this command line.
_WORDS: Mapping[str, str] = {
    "overwrite": "--overwrite always",
    "overwrite_or_different": "--overwrite always, or --overwrite different",
    "recursive": "'pdm rm -r'",
    "parents": "-p",
    "verify": "--verify size",
}


def hint_of(code: str, hint: str, job_type: str, job_id: int | None = None) -> str:
    """What to do about a failure: the service's own hint, with the options of this command line.

    Args:
        code: of the failure.
        hint: as the service gives it, for codes that this client does not know.
        job_type: of the job.
        job_id: of the job; None where there is none.
    """
    try:
        known, type_ = FailureCode(code), JobType.parse(job_type)
    except ValueError:
        return shown_line(hint)
    again = "try again" if job_id is None else f"run 'pdm retry {job_id}'"
    return hint_for(known, type_, {**_WORDS, "retry": again})


class WaitingReasons:
    """Says each kind of reason for which a job waits once: times and numbers in it change all the time."""

    def __init__(self, job_id: int) -> None:
        self._job_id = job_id
        self._told: set[str] = set()
        self._held_told = False

    def tell(self, job: JobView) -> None:
        """Look at a job."""
        if job.status == JobStatus.HELD.name and not self._held_told:
            self._held_told = True
            say(_held_line(job))
        for reason in (job.waiting or ()) if is_waiting(job) else ():
            kind = re.sub(r"\d\S*", "", reason)[:_KIND_LENGTH]
            if kind not in self._told:
                self._told.add(kind)
                say(f"job {self._job_id} waits: {shown_line(reason)}")


def _held_line(job: JobView) -> str:
    advice = "it needs a valid credential. Run 'pdm delegate', and it goes on by itself."
    if job.hold:
        hint = hint_of(job.hold.code, job.hold.hint, job.type, job.id)
        advice = f"{shown_line(job.hold.reason).rstrip('.')}. {hint}"
    return f"job {job.id} is held: {advice}"


async def follow(client: WorkqueueClient, job_id: int, timeout_s: float | None, form: str) -> JobView:
    """Wait for the end of a job and show how it gets on, and why it waits.

    With `form` ``json``, stdout gets what is known when the time is up.

    Raises:
        CommandError: ^C (the job goes on), or the time is up (as well).
    """
    display = display_for_stderr()
    held = False

    def show(job: JobView) -> None:
        nonlocal held
        if job.status == JobStatus.HELD.name and not held:
            held = True
            display.say(_held_line(job))
        display.show(job)

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
    head = f"job {job.id} {job.status}"
    say(summary(job).replace(head, f"{head}, partly", 1) if is_partial(job) else summary(job))
    for line in failure_lines(failures, job):
        say(line)
    if job.skipped:
        for line in skipped_lines(await client.skipped(job.id, limit=SHOWN_SKIPPED), job.skipped):
            say(line)
    if line := outcome_line(job):
        say(line)
    return exit_code_of_job(job, failures)


def exit_code_of_job(job: JobView, failures: Sequence[ElementView]) -> ExitCode:
    """The exit status for an ended job; `failures` are some of its failed elements."""
    if job.status == JobStatus.CANCELLED.name:
        return ExitCode.CANCELLED
    if is_partial(job):
        return ExitCode.PARTIAL
    if job.status == JobStatus.DONE.name:
        return ExitCode.DONE
    codes = {element.failure.code for element in failures if element.failure is not None}
    if len(codes) == 1:
        return _SPECIAL_CODES.get(codes.pop(), ExitCode.FAILED)
    return ExitCode.FAILED


def failure_lines(failures: Sequence[ElementView], job: JobView) -> list[str]:
    """What failed, where and why: two lines an element; how many are not shown; then once for each code what to do."""
    lines = [line for element in failures for line in element_lines(element)]
    if job.num_failed > len(failures) and failures:
        lines.append(f"  and {job.num_failed - len(failures)} more: pdm status {job.id} --all")
    return lines + hint_lines(failures, job)


def element_lines(element: ElementView) -> list[str]:
    """What failed, where and why."""
    failure = element.failure
    at_destination = failure is not None and failure.scope == Scope.DESTINATION and element.dst_filepath is not UNSET
    path = element.dst_filepath if at_destination and element.dst_filepath is not UNSET else element.src_filepath
    lines = [f"  {element.job_id}.{element.id}  {shown_name(path)}"]
    if failure is not None:
        lines.append(f"      {failure.code} ({failure.scope}): {shown_line(failure.message)}")
    return lines


def hint_lines(failures: Iterable[ElementView], job: JobView) -> list[str]:
    """What to do about failures: a line for each hint, however many elements and codes have it."""
    hints = {
        failure.code: hint_of(failure.code, failure.hint, job.type, job.id)
        for failure in (element.failure for element in failures)
        if failure is not None
    }
    lines = []
    for hint in dict.fromkeys(hints.values()):
        codes = ", ".join(code for code, its in hints.items() if its == hint)
        lines.append(f"  {hint}" if len(set(hints.values())) == 1 else f"  {codes}: {hint}")
    return lines


def print_json(value: object) -> None:
    """A value of the API on stdout, as JSON in several lines."""
    click.echo(shown_json(msgspec.json.format(msgspec.json.encode(value), indent=2).decode()))
