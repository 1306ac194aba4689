"""Wait for a job with progress, then report its outcome: done, skipped and failed elements, hints, exit status."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from types import MappingProxyType

import click
import msgspec
from msgspec import UNSET
from twisted.internet.defer import CancelledError, Deferred

from pdm.workqueue.cli.display import (
    MAX_MOVING,
    ProgressDisplay,
    display_for_stderr,
    display_json,
    is_waiting,
    print_stderr,
    print_wrapped,
    summary,
)
from pdm.workqueue.cli.exit_codes import CommandError, ExitCode
from pdm.workqueue.cli.plans import (
    announcement,
    check_line,
    estimate_lines,
    is_check,
    is_dry_run,
    is_found,
    plan_words,
    planned,
    print_plan,
)
from pdm.workqueue.cli.session import error_text, exit_code_of, print_error
from pdm.workqueue.client.errors import JobTimeoutError, WorkqueueClientError
from pdm.workqueue.domain.enums import JobStatus, JobType, PlannedAction
from pdm.workqueue.domain.failures import MEANINGS, FailureCode, FailureScope, Remedy, hint_for
from pdm.workqueue.domain.formatting import display_line, display_name
from pdm.workqueue.domain.planning import SkipCode
from pdm.workqueue.wire.responses import ElementView, JobView, SkippedView
from pdm.workqueue.WorkqueueClient import WorkqueueClient

#: Seconds between two looks at the files that move.
_FILES_PERIOD_S = 1.0
#: Skipped entries that are listed.
MAX_LISTED_SKIPPED = 10
#: Type of a job that starts with a listing → word for its finished elements.
_DONE_WORDS: Mapping[str, str] = MappingProxyType({JobType.COPY.name: "copied", JobType.REMOVE.name: "removed"})
#: Planned removal → words for those that are done.
_REMOVAL_WORDS: Mapping[PlannedAction, str] = MappingProxyType(
    {PlannedAction.DELETE: "deleted", PlannedAction.MOVED: "removed at the source"}
)
#: Code → singular and plural; codes are strings because a newer service may have unknown ones.
_SKIP_WORDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "SPECIAL_FILE": ("special file", "special files"),
        "DANGLING_LINK": ("link that leads nowhere", "links that lead nowhere"),
        "LINK_TO_DIRECTORY": ("link to a directory", "links to directories"),
        "LINK_OUTSIDE": ("link out of the tree", "links out of the tree"),
        "UNNAMED": ("entry that the server does not name", "entries that the server does not name"),
        "PERMISSION_DENIED": ("directory without permission", "directories without permission"),
        "NO_TIME": ("file without a known time", "files without a known time"),
        "OCCUPIED": ("entry whose place is taken", "entries whose places are taken"),
        "EXISTS": ("file that may not be overwritten", "files that may not be overwritten"),
        "KEPT": ("source that is kept", "sources that are kept"),
        "LINK_NOT_MOVED": ("link that is not moved", "links that are not moved"),
    }
)


def files_done(job: JobView) -> int:
    """Number of finished elements, without the listing with which a copy or a removal starts."""
    if job.progress is not UNSET:
        return job.progress.files_done
    return max(job.num_done - 1, 0) if job.type in _DONE_WORDS else job.num_done


def is_partial(job: JobView) -> bool:
    """Whether an ended job did only a part: the rest failed or was skipped."""
    if job.status == JobStatus.DONE.name:
        return job.skipped > 0 or kept_sources(job) > 0
    return job.status == JobStatus.FAILED.name and files_done(job) > 0


def kept_sources(job: JobView) -> int:
    """Files that a move which has ended did not remove at the source, because the destination had them before."""
    if job.extra_opts.get("move") is not True or is_dry_run(job) or job.status != JobStatus.DONE.name:
        return 0
    arrived = sum(
        planned(job, action).files for action in (PlannedAction.COPY, PlannedAction.OVERWRITE, PlannedAction.SAME)
    )
    return max(arrived - planned(job, PlannedAction.MOVED).files, 0)


def outcome_line(job: JobView) -> str:
    """``copied 3, already there 1, skipped 2 (1 link out of the tree, 1 special file), failed 0``.

    Empty for a job of one operation.
    """
    word = _DONE_WORDS.get(job.type)
    skipped = f"skipped {job.skipped}{_skip_reasons(job)}"
    if word is None:
        return skipped if job.skipped else ""
    parts = _copied_parts(job) if job.type == JobType.COPY.name else [f"{word} {files_done(job)}"]
    parts += [skipped, f"failed {job.num_failed}"]
    if job.num_cancelled:
        parts.append(f"cancelled {job.num_cancelled}")
    return ", ".join(parts)


def _copied_parts(job: JobView) -> list[str]:
    """What a copy has done, or as a dry run would do."""
    if is_dry_run(job):
        return [f"dry run, nothing was changed: {plan_words(job)}"]
    done = files_done(job) - job.already_there
    removals = [(planned(job, action), words) for action, words in _REMOVAL_WORDS.items()]
    removed = sum(each.files + each.directories for each, _ in removals)
    if removed and job.status != JobStatus.DONE.name:
        # How many of the removals were done is not among the counts of the job.
        parts = [f"copied or removed {done}", f"already there {job.already_there}"]
    else:
        parts = [f"copied {done - removed}", f"already there {job.already_there}"]
        if kept := kept_sources(job):
            # The directories above them stay as well.
            parts += [f"removed at the source {planned(job, PlannedAction.MOVED).files}", f"kept at the source {kept}"]
        else:
            parts += [f"{words} {count}" for each, words in removals if (count := each.files + each.directories)]
    if job.plan is not UNSET and job.plan.filtered:
        parts.append(f"filtered out {job.plan.filtered}")
    return parts


def _skip_reasons(job: JobView) -> str:
    words = skip_words(job)
    return f" ({words})" if words else ""


def skip_words(job: JobView) -> str:
    """``1 link out of the tree, 2 special files``: number of skipped entries by reason."""
    counts = {} if job.skipped_by_code is UNSET else job.skipped_by_code
    return ", ".join(f"{count} {_words_for_skip_code(code)[count != 1]}" for code, count in counts.items())


def _words_for_skip_code(code: str) -> tuple[str, str]:
    return _SKIP_WORDS.get(code, (f"directory ({code})", f"directories ({code})"))


def skipped_lines(skipped: Sequence[SkippedView], total: int) -> list[str]:
    """One line for each of the first skipped entries, and the number of the others.

    What filters leave out was not to be copied: it is counted, and has no line.
    """
    lines = []
    skipped = [entry for entry in skipped if entry.code != SkipCode.FILTERED]
    for entry in skipped:
        several = f"{entry.count} entries of " if entry.count > 1 else ""
        lines.append(f"  skipped {several}{display_name(entry.path)}: {display_line(entry.reason)}")
    left = total - sum(entry.count for entry in skipped)
    if left > 0 and skipped:
        lines.append(f"  and {left} more: pdm status {skipped[0].job_id} --all")
    return lines


#: Failed elements that are listed.
MAX_LISTED_FAILURES = 10
#: Leading characters of a reason, without its numbers, by which its kind is recognised.
_REASON_KIND_LENGTH = 20

#: Exit codes of jobs that failed with one code.
_SPECIAL_CODES: Mapping[str, ExitCode] = {
    FailureCode.NOT_FOUND: ExitCode.NOT_FOUND,
    FailureCode.CREDENTIAL_EXPIRED: ExitCode.CREDENTIAL,
    FailureCode.CREDENTIAL_MISSING: ExitCode.CREDENTIAL,
    FailureCode.CREDENTIAL_REFUSED: ExitCode.CREDENTIAL,
    FailureCode.CREDENTIAL_UNFIT: ExitCode.CREDENTIAL,
    FailureCode.ISSUER_UNAVAILABLE: ExitCode.TEMPORARY,
    FailureCode.CONNECTION: ExitCode.TEMPORARY,
    FailureCode.TIMEOUT: ExitCode.TEMPORARY,
    FailureCode.STALLED: ExitCode.TEMPORARY,
    FailureCode.BUSY: ExitCode.TEMPORARY,
    FailureCode.LOCKED: ExitCode.TEMPORARY,
    FailureCode.SERVER_ERROR: ExitCode.TEMPORARY,
}


#: Options named in hints → options of this command line.
_HINT_WORDS: Mapping[str, str] = {
    "overwrite": "--overwrite always",
    "overwrite_or_different": "--overwrite always, or --overwrite different",
    "recursive": "'pdm rm -r'",
    "parents": "-p",
    "verify": "--verify size",
    "max_delete": "--max-delete N",
}


def hint_of(code: str, hint: str, job_type: str, job_id: int | None = None) -> str:
    """The hint for a failure, with the options of this command line; for unknown codes the service's own `hint`."""
    try:
        known, type_ = FailureCode(code), JobType.parse(job_type)
    except ValueError:
        return display_line(hint)
    # A plain retry leaves what it cannot help.
    force = " --force" if MEANINGS[known].remedy is Remedy.GIVE_UP else ""
    again = "try again" if job_id is None else f"run 'pdm retry {job_id}{force}'"
    return hint_for(known, type_, {**_HINT_WORDS, "retry": again})


class WaitingReasons:
    """Prints each kind of reason for which a job waits once, although times and numbers in it change."""

    def __init__(self, job_id: int) -> None:
        self._job_id = job_id
        self._printed: set[str] = set()
        self._hold_printed = False

    def report(self, job: JobView) -> None:
        if job.status == JobStatus.HELD.name and not self._hold_printed:
            self._hold_printed = True
            print_stderr(_held_line(job))
        for reason in (job.waiting or ()) if is_waiting(job) else ():
            kind = re.sub(r"\d\S*", "", reason)[:_REASON_KIND_LENGTH]
            if kind not in self._printed:
                self._printed.add(kind)
                print_stderr(f"job {self._job_id} waits: {display_line(reason)}")


def _held_line(job: JobView) -> str:
    advice = "it needs a valid credential. Run 'pdm delegate', and it resumes automatically."
    if job.hold:
        hint = hint_of(job.hold.code, job.hold.hint, job.type, job.id)
        advice = f"{display_line(job.hold.reason).rstrip('.')}. {hint}"
    return f"job {job.id} is held: {advice}"


async def follow(client: WorkqueueClient, job_id: int, timeout_s: float | None, form: str) -> JobView:
    """Wait for the end of a job, and show its progress and why it waits.

    After a timeout with the format ``json``, stdout gets the job's last state.

    Raises:
        CommandError: ^C or the timeout; the job continues.
    """
    display = display_for_stderr()
    held = announced = False

    def show(job: JobView) -> None:
        nonlocal held, announced
        if not announced and (lines := announcement(job, datetime.now(UTC))):
            announced = True
            display.close()
            for line in lines:
                print_wrapped(line)
        if job.status == JobStatus.HELD.name and not held:
            held = True
            display.print_line(_held_line(job))
        display.show(job)

    watching = Deferred.fromCoroutine(_watch_files(client, job_id, display))
    watching.addErrback(lambda failure: failure.trap(CancelledError, WorkqueueClientError))
    try:
        return await client.wait(job_id, timeout=timeout_s, on_progress=show)
    except JobTimeoutError as error:
        if form == "json":
            print_json(error.job)
        raise CommandError(ExitCode.TIMED_OUT, error.what, f"pdm wait {job_id} | pdm cancel {job_id}") from error
    except CancelledError:
        display.close()
        _print_detached([job_id])
        raise CommandError(ExitCode.INTERRUPTED, "") from None
    finally:
        watching.cancel()
        display.close()


async def _watch_files(client: WorkqueueClient, job_id: int, display: ProgressDisplay) -> None:
    """Show which files of a job move, until it is cancelled or a request fails."""
    while display.shows_files:
        await client.pause(_FILES_PERIOD_S)
        files = []
        for element in await client.elements(job_id, status=JobStatus.RUNNING, type=JobType.COPY, limit=MAX_MOVING):
            seen = await client.element_status(job_id, element.id)
            part = None if seen.transferred is None or not element.size else min(seen.transferred / element.size, 1.0)
            files.append((element.src_filepath, part, seen.instant))
        display.show_files(files)


async def follow_jobs(client: WorkqueueClient, job_ids: Sequence[int], timeout_s: float | None, form: str) -> int:
    """Follow jobs one after the other, and report how each ended; returns their common exit code.

    The timeout is that of all together. With the format ``json``, stdout gets one object, or an array of several.

    Raises:
        CommandError: ^C; the jobs continue. Of one job also a timeout.
        WorkqueueClientError: of one job.
    """
    if len(job_ids) == 1:
        return await report_end(client, await follow(client, job_ids[0], timeout_s, form), form)
    until = None if timeout_s is None else time.monotonic() + timeout_s
    codes: list[int] = []
    last: list[JobView] = []
    for position, job_id in enumerate(job_ids):
        left_s = None if until is None else max(until - time.monotonic(), 0.0)
        try:
            job = await follow(client, job_id, left_s, "text")
            codes.append(await report_end(client, job, "text"))
            last.append(job)
        except CommandError as error:
            if error.code == ExitCode.INTERRUPTED:
                _print_detached(job_ids[position + 1 :])
                raise
            print_error(error.what, error.advice)
            codes.append(error.code)
            if form == "json":
                last.append(await client.job(job_id))
        except WorkqueueClientError as error:
            print_error(f"job {job_id}: {error_text(error)}", error.advice)
            codes.append(exit_code_of(error))
    if form == "json":
        print_json(last)
    return common_exit_code(codes)


def _print_detached(job_ids: Sequence[int]) -> None:
    if job_ids:
        numbers = " ".join(map(str, job_ids))
        which = "job" if len(job_ids) == 1 else "jobs"
        continues = "continues" if len(job_ids) == 1 else "continue"
        print_stderr(f"detached: {which} {numbers} {continues}; pdm wait {numbers} | pdm cancel {numbers}")


def common_exit_code(codes: Sequence[int]) -> int:
    """The exit code of a command that did several things: 6 if some ended well, else that of the first failure."""
    failed = [code for code in codes if code != ExitCode.DONE]
    if not failed:
        return ExitCode.DONE
    if ExitCode.TIMED_OUT in failed:
        return ExitCode.TIMED_OUT
    return failed[0] if len(failed) == len(codes) else ExitCode.PARTIAL


async def report_end(client: WorkqueueClient, job: JobView, form: str) -> int:
    """Print how a job ended; returns the exit code."""
    failures: Sequence[ElementView] = ()
    if job.status == JobStatus.FAILED.name:
        failures = await client.elements(job.id, status=JobStatus.FAILED, limit=MAX_LISTED_FAILURES)
    if form == "json":
        print_json(job)
    elif is_dry_run(job):
        await print_plan(client, job)
    head = f"job {job.id} {job.status}"
    print_wrapped(summary(job).replace(head, f"{head}, partly", 1) if is_partial(job) else summary(job))
    if job.cancel_reason is not UNSET:
        print_stderr(f"  {job.cancel_reason.code}: {display_line(job.cancel_reason.message)}")
    for line in failure_lines(failures, job):
        print_wrapped(line)
    if job.skipped:
        for line in skipped_lines(await client.skipped(job.id, limit=MAX_LISTED_SKIPPED), job.skipped):
            print_wrapped(line)
    if line := await check_line(client, job) if is_check(job) else outcome_line(job):
        print_wrapped(line)
    for line in estimate_lines(job, datetime.now(UTC)) if is_dry_run(job) else ():
        print_wrapped(line)
    return exit_code_of_job(job, failures)


def exit_code_of_job(job: JobView, failures: Sequence[ElementView]) -> ExitCode:
    """The exit code for an ended job and some of its failed elements."""
    if job.status == JobStatus.CANCELLED.name:
        return ExitCode.CANCELLED
    if is_partial(job):
        return ExitCode.PARTIAL
    if job.status == JobStatus.DONE.name:
        return ExitCode.DONE
    codes = {element.failure.code for element in failures if element.failure is not None}
    if is_check(job) and any(map(is_found, codes)):
        return ExitCode.PARTIAL
    if len(codes) == 1:
        return _SPECIAL_CODES.get(codes.pop(), ExitCode.FAILED)
    return ExitCode.FAILED


def failure_lines(failures: Sequence[ElementView], job: JobView) -> list[str]:
    """Two lines for each failed element, the number of the others, then one hint for each code."""
    lines = [line for element in failures for line in element_lines(element)]
    if job.num_failed > len(failures) and failures:
        lines.append(f"  and {job.num_failed - len(failures)} more: pdm status {job.id} --all")
    return lines + hint_lines(failures, job)


def element_lines(element: ElementView) -> list[str]:
    failure = element.failure
    at_destination = (
        failure is not None and failure.scope == FailureScope.DESTINATION and element.dst_filepath is not UNSET
    )
    path = element.dst_filepath if at_destination and element.dst_filepath is not UNSET else element.src_filepath
    lines = [f"  {element.job_id}.{element.id}  {display_name(path)}"]
    if failure is not None:
        lines.append(f"      {failure.code} ({failure.scope}): {display_line(failure.message)}")
    return lines


def hint_lines(failures: Iterable[ElementView], job: JobView) -> list[str]:
    """One line for each distinct hint."""
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
    """Print a value of the API as indented JSON."""
    click.echo(display_json(msgspec.json.format(msgspec.json.encode(value), indent=2).decode()))
