"""The outcome of a check: how many files are as they must be, differ, are missing, or could not be checked."""

from __future__ import annotations

from collections import Counter

from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.domain.formatting import display_name
from pdm.workqueue.wire.responses import JobView
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
