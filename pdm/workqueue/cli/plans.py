"""What a copy would do, will take and has shown: plan (``--dry-run``), estimate, outcome of a check."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType

import click
from msgspec import UNSET

from pdm.workqueue.domain.enums import JobStatus, JobType, PlannedAction
from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.domain.formatting import display_bytes, display_duration, display_line, display_name
from pdm.workqueue.wire.plans import EstimateView, PlannedView
from pdm.workqueue.wire.responses import ElementView, JobView
from pdm.workqueue.WorkqueueClient import WorkqueueClient

#: Code of a file that was looked at, and is not as it must be → words for one, and for several.
_FOUND: dict[str, tuple[str, str]] = {
    FailureCode.DIFFERS: ("differs", "differ"),
    FailureCode.NOT_FOUND: ("is missing", "are missing"),
    FailureCode.IS_A_DIRECTORY: ("is a directory", "are directories"),
    FailureCode.SPECIAL_FILE: ("is no file", "are no files"),
}


def is_check(job: JobView) -> bool:
    return bool(job.extra_opts.get("check"))


def is_found(code: str) -> bool:
    """Whether a failure of a check says something about the file."""
    return code in _FOUND


async def check_line(client: WorkqueueClient, job: JobView) -> str:
    """``checked 1,204 files at ral: 1,203 as in the receipt, 1 differs``."""
    counts: Counter[str] = Counter()
    for group in await client.errors(job.id):
        counts[group.code] += group.count
    found = {code: counts[code] for code in _FOUND if counts[code]}
    words = [f"{job.num_done:,} as in the receipt"]
    words += [f"{count:,} {_FOUND[code][count > 1]}" for code, count in found.items()]
    if failed := counts.total() - sum(found.values()):
        words.append(f"{failed:,} could not be checked")
    if left := job.num_elements - job.num_done - counts.total():
        words.append(f"{left:,} not checked")
    count = job.num_done + sum(found.values())
    by = " by size" if job.extra_opts.get("verify") == "size" else ""
    files = "file" if count == 1 else "files"
    return f"checked {count:,} {files}{by} at {await _site(client, job)}: {', '.join(words)}"


async def _site(client: WorkqueueClient, job: JobView) -> str:
    number = job.src_siteid if job.extra_opts["check"] == "source" else job.dst_siteid
    names = (display_name(site.name) for site in await client.sites() if site.id == number)
    return next(names, f"site {number}")


#: Action → what is done; actions are strings because a newer service may have others.
_WORDS: Mapping[str, str] = MappingProxyType(
    {
        PlannedAction.COPY: "copy",
        PlannedAction.OVERWRITE: "overwrite",
        PlannedAction.SAME: "already there",
        PlannedAction.DELETE: "delete",
        PlannedAction.MOVED: "remove at the source",
    }
)
#: Sync levels at which a planned copy compares checksums before it replaces a file.
_COMPARING = ("mtime", "checksum")
_IF_DIFFERENT = "overwrite if different"
_WIDTH = max(len(word) for word in (*_WORDS.values(), _IF_DIFFERENT))


def is_dry_run(job: JobView) -> bool:
    return job.extra_opts.get("dry_run") is True


def planned(job: JobView, action: PlannedAction) -> PlannedView:
    """What a job has planned with one action."""
    nothing = PlannedView(files=0, directories=0, bytes=0)
    return nothing if job.plan is UNSET else job.plan.actions.get(action, nothing)


def _word(job: JobView, action: str) -> str:
    if action == PlannedAction.OVERWRITE and job.extra_opts.get("sync") in _COMPARING:
        return _IF_DIFFERENT
    return _WORDS.get(action, action.lower())


def plan_words(job: JobView) -> str:
    """``copy 2 (3.0 KiB), overwrite 1 (17 B), delete 1, already there 22 (1.1 GiB), filtered out 3``."""
    parts = []
    for action in _WORDS:
        found = planned(job, PlannedAction(action))
        count = found.files + found.directories
        if count or action in (PlannedAction.COPY, PlannedAction.SAME):
            size = f" ({display_bytes(found.bytes)})" if found.bytes else ""
            parts.append(f"{_word(job, action)} {count}{size}")
    if job.plan is not UNSET and job.plan.filtered:
        parts.append(f"filtered out {job.plan.filtered}")
    return ", ".join(parts)


async def print_plan(client: WorkqueueClient, job: JobView) -> None:
    """Print a line for each file that would be copied, replaced or removed."""
    async for element in client.iterate_elements(job.id):
        if element.planned is not UNSET and element.planned != PlannedAction.SAME:
            click.echo(_plan_line(_word(job, element.planned), element))


def _plan_line(word: str, element: ElementView) -> str:
    size = "" if element.type == JobType.MKDIR.name else display_bytes(element.size)
    slash = "/" if element.type == JobType.MKDIR.name else ""
    return f"{word:<{_WIDTH}}  {size:>9}  {display_name(element.src_filepath)}{slash}"


#: Estimated seconds from which a copy that was submitted says how long it may take.
_WORTH_SAYING_S = 60.0


def estimate_words(job: JobView, now: datetime) -> list[str]:
    """What is known of the end of a copy: time with its origin, free space, end of the credential; often nothing."""
    estimate = job.estimate
    if estimate is UNSET:
        return []
    words = []
    if estimate.seconds is not None:
        copies = "copy" if estimate.based_on_jobs == 1 else f"{estimate.based_on_jobs} copies"
        origin = f"as your last {copies} of this route"
        words.append(f"estimate {display_duration(max(estimate.seconds, 1.0))} at {_limiting_rate(estimate)}, {origin}")
    elif estimate.files:
        words.append("no estimate, for you have not copied between these sites for two weeks")
    if estimate.free_bytes is not None:
        words.append(f"the destination has {display_bytes(estimate.free_bytes)} free")
    if estimate.credential_until is not None:
        left_s = (estimate.credential_until - now).total_seconds()
        words.append(f"your credential ends in {display_duration(left_s)}")
    return words


def _limiting_rate(estimate: EstimateView) -> str:
    """The rate that decides the time: of bytes, or of files."""
    by_bytes = estimate.bytes / estimate.bytes_per_second if estimate.bytes_per_second else 0.0
    by_files = estimate.files / estimate.files_per_second if estimate.files_per_second else 0.0
    if by_files > by_bytes:
        return f"{estimate.files_per_second:.3g} files/s"
    return f"{display_bytes(estimate.bytes_per_second or 0.0)}/s"


def estimate_lines(job: JobView, now: datetime) -> list[str]:
    """`estimate_words` in one line, and one for each warning of a job."""
    words = "; ".join(estimate_words(job, now))
    return [*([words] if words else []), *(f"warning: {display_line(warning)}" for warning in job.warnings or ())]


def announcement(job: JobView, now: datetime) -> list[str]:
    """`estimate_lines` of a copy that runs, if it takes long or something may stop it; empty for any other job."""
    is_long = job.estimate is not UNSET and (job.estimate.seconds or 0.0) >= _WORTH_SAYING_S
    is_running = job.estimate is not UNSET and not JobStatus.parse(job.status).is_final
    return estimate_lines(job, now) if is_running and (is_long or job.warnings) else []
