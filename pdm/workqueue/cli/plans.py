"""The plan of a copy that was compared, filtered or moved: its summary, and its lines for ``--dry-run``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import click
from msgspec import UNSET

from pdm.workqueue.cli.display import display_bytes, display_name
from pdm.workqueue.domain.enums import JobType, PlannedAction
from pdm.workqueue.wire.responses import ElementView, JobView, PlannedView
from pdm.workqueue.WorkqueueClient import WorkqueueClient

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
