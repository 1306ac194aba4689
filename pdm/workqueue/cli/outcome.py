"""What came of a job: what is done, what was there already, what was left out and why, what failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from msgspec import UNSET

from pdm.workqueue.cli.text import shown_line, shown_name
from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.wire.responses import JobView, SkippedView

#: How many of the entries that were left out are named one by one.
SHOWN_SKIPPED = 10
#: Type of a job that begins with a listing → what its elements are once they are done.
_DONE_WORDS: Mapping[str, str] = MappingProxyType({JobType.COPY.name: "copied", JobType.REMOVE.name: "removed"})
#: Code → words for one and for several; by word, for a later service may have codes that this client does not know.
_SKIP_WORDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "SPECIAL_FILE": ("special file", "special files"),
        "DANGLING_LINK": ("link that leads nowhere", "links that lead nowhere"),
        "LINK_TO_DIRECTORY": ("link to a directory", "links to directories"),
        "LINK_OUTSIDE": ("link out of the tree", "links out of the tree"),
        "UNNAMED": ("entry that the server does not name", "entries that the server does not name"),
        "PERMISSION_DENIED": ("directory without permission", "directories without permission"),
    }
)


def files_done(job: JobView) -> int:
    """Elements that are done, without the listing that a copy or a removal begins with."""
    if job.progress is not UNSET:
        return job.progress.files_done
    return max(job.num_done - 1, 0) if job.type in _DONE_WORDS else job.num_done


def is_partial(job: JobView) -> bool:
    """Whether an ended job has done a part of what was asked: the rest failed, or was left out."""
    if job.status == JobStatus.DONE.name:
        return job.skipped > 0
    return job.status == JobStatus.FAILED.name and files_done(job) > 0


def outcome_line(job: JobView) -> str:
    """``copied 3, already there 1, skipped 2 (1 link out of the tree, 1 special file), failed 0``.

    Empty for a job of one act, of which its status says all.
    """
    word = _DONE_WORDS.get(job.type)
    skipped = f"skipped {job.skipped}{_reasons(job)}"
    if word is None:
        return skipped if job.skipped else ""
    parts = [f"{word} {files_done(job) - job.already_there}"]
    if job.type == JobType.COPY.name:
        parts.append(f"already there {job.already_there}")
    parts += [skipped, f"failed {job.num_failed}"]
    if job.num_cancelled:
        parts.append(f"cancelled {job.num_cancelled}")
    return ", ".join(parts)


def _reasons(job: JobView) -> str:
    words = skip_words(job)
    return f" ({words})" if words else ""


def skip_words(job: JobView) -> str:
    """``1 link out of the tree, 2 special files``: how many entries were left out for which reason."""
    counts = {} if job.skipped_by_code is UNSET else job.skipped_by_code
    return ", ".join(f"{count} {_words(code)[count != 1]}" for code, count in counts.items())


def _words(code: str) -> tuple[str, str]:
    return _SKIP_WORDS.get(code, (f"directory ({code})", f"directories ({code})"))


def skipped_lines(skipped: Sequence[SkippedView], total: int) -> list[str]:
    """What was left out and why: a line an entry, and how many are not shown.

    Args:
        skipped: the first of them.
        total: how many there are.
    """
    lines = []
    for entry in skipped:
        several = f"{entry.count} entries of " if entry.count > 1 else ""
        lines.append(f"  skipped {several}{shown_name(entry.path)}: {shown_line(entry.reason)}")
    left = total - sum(entry.count for entry in skipped)
    if left > 0 and skipped:
        lines.append(f"  and {left} more: pdm status {skipped[0].job_id} --all")
    return lines
