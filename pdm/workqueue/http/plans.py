"""What was planned for a copy that has ended, and what was left out, in counts."""

from __future__ import annotations

from datetime import datetime

from pdm.workqueue.domain.enums import JobType
from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.domain.planning import SkipCode
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.store import listings, planned_elements
from pdm.workqueue.wire.plans import PlannedView, PlanView

#: Options of a copy that has a plan to show.
_PLANNING_OPTIONS = ("sync", "dry_run", "move", "filters", "min_size", "max_size", "newer_than", "older_than")
#: Plans that are kept: counting reads all elements of a job.
_MOST_CACHED = 1000


async def plan_view(api: ApiContext, job: JobRecord) -> PlanView | None:
    """The plan of a copy that was compared, filtered or moved; None for another job, or one that has not ended."""
    if job.type is not JobType.COPY or job.finished_at is None or not any(map(job.options.get, _PLANNING_OPTIONS)):
        return None
    cached: tuple[datetime, PlanView] | None = api.plans.get(job.id)
    if cached is not None and cached[0] == job.finished_at:
        return cached[1]
    counts = await api.database.read("count what was planned", planned_elements.count_planned, job.id)
    skipped = await api.database.read("count notes", listings.count_notes, job.id)
    plan = PlanView(
        actions={
            one.action.value: PlannedView(files=one.files, directories=one.directories, bytes=one.size)
            for one in counts
        },
        filtered=skipped.get(SkipCode.FILTERED, 0),
        skipped=_asked_for(skipped),
    )
    if len(api.plans) >= _MOST_CACHED:
        api.plans.clear()
    api.plans[job.id] = (job.finished_at, plan)
    return plan


async def skipped_by_code(api: ApiContext, job: JobRecord) -> dict[str, int] | None:
    """How many entries of the source are left out although they were asked for, by code; None for none."""
    if not job.skipped:
        return None
    return _asked_for(await api.database.read("count notes", listings.count_notes, job.id))


def _asked_for(counts: dict[str, int]) -> dict[str, int]:
    return {code: count for code, count in counts.items() if code != SkipCode.FILTERED}
