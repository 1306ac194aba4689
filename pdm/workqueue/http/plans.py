"""What is planned for a copy, in counts, and its estimate: time, space, credentials, and their warnings."""

from __future__ import annotations

from datetime import datetime, timedelta

from pdm.workqueue.domain.enums import JobType, PlannedAction
from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.domain.planning import SkipCode
from pdm.workqueue.domain.progress import JobProgress
from pdm.workqueue.http import credential_checks
from pdm.workqueue.http.context import ApiContext, CredentialExpiry
from pdm.workqueue.http.decoding import credential_needs
from pdm.workqueue.http.views import whole_seconds
from pdm.workqueue.store import listings, planned_elements
from pdm.workqueue.store.estimates import EstimateBasis, estimate_basis
from pdm.workqueue.wire.plans import EstimateView, PlannedView, PlanView

#: Options of a copy that has a plan to show.
_PLANNING_OPTIONS = ("sync", "dry_run", "move", "filters", "min_size", "max_size", "newer_than", "older_than")
#: Plans that are kept: counting reads all elements of a job.
_MOST_PLANS = 1000


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
    if len(api.plans) >= _MOST_PLANS:
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


#: Age of a job before it is estimated: many copies end sooner.
_LEAST_AGE = timedelta(seconds=1)
#: Lifetime and size of the cache.
_ESTIMATE_LIFETIME, _MOST_ESTIMATES = timedelta(minutes=1), 1000
_GIB = 1 << 30


async def estimate_view(
    api: ApiContext, job: JobRecord, progress: JobProgress, plan: PlanView | None
) -> EstimateView | None:
    """The estimate of a copy that has been listed and has not ended, or of a dry run; None for any other job.

    ``plan``: of a job that has ended.
    """
    if job.type is not JobType.COPY:
        return None
    if job.options.get("dry_run"):
        if plan is None:
            return None
        moved = [found for action in _MOVED if (found := plan.actions.get(action)) is not None]
        files, size = sum(one.files + one.directories for one in moved), sum(one.bytes for one in moved)
    else:
        counters = job.counters
        if job.status.is_final or progress.listing or api.clock() < job.timestamp + _LEAST_AGE:
            return None
        files = counters.submitted + counters.running + counters.held
        size = max(job.bytes_total - job.bytes_done - (progress.bytes_moving or 0), 0)
    basis = await _basis(api, job)
    expiry = await _first_expiry(api, job)
    speed = basis.speed
    return EstimateView(
        files=files,
        bytes=size,
        seconds=None if speed is None else speed.seconds(size, files),
        bytes_per_second=None if speed is None else speed.bytes_per_second,
        files_per_second=None if speed is None else speed.files_per_second,
        based_on_jobs=0 if speed is None else speed.jobs,
        free_bytes=basis.free_bytes,
        credential_until=None if expiry is None else whole_seconds(expiry.at),
    )


#: Actions that write to the destination.
_MOVED = (PlannedAction.COPY.value, PlannedAction.OVERWRITE.value)


async def _basis(api: ApiContext, job: JobRecord) -> EstimateBasis:
    now = api.clock()
    cached = api.estimates.get(job.id)
    if cached is not None and cached[0] <= now < cached[0] + _ESTIMATE_LIFETIME:
        return cached[1]
    basis = await api.database.read("what an estimate is taken from", estimate_basis, job, now)
    if len(api.estimates) >= _MOST_ESTIMATES:
        api.estimates.clear()
    api.estimates[job.id] = (now, basis)
    return basis


async def _first_expiry(api: ApiContext, job: JobRecord) -> CredentialExpiry | None:
    """The earliest expiry of the credentials of a job; None if none expires."""
    now, key = api.clock(), (job.user_id, job.src_siteid, job.dst_siteid, job.protocol)
    known = api.expiry_cache.find(key, now)
    if known is None:
        needs = credential_needs(api, job)
        end = None
        if needs:
            end = await api.database.read(
                "expiry of a credential", credential_checks.first_credential_expiry, job.user_id, needs, now
            )
        api.expiry_cache.store(key, now, end)
        known = (end,)
    return known[0]


async def estimate_warnings(
    api: ApiContext, job: JobRecord, progress: JobProgress, estimate: EstimateView | None
) -> list[str]:
    """Warn of a credential that will expire before the estimated end, and of a destination without enough space."""
    warnings = []
    rate, seconds = "the current rate", progress.eta
    if seconds is None and estimate is not None:
        rate, seconds = "the rate of earlier copies", estimate.seconds
    if seconds is not None:
        expiry = await _first_expiry(api, job)
        if expiry is not None and (warning := _expiry_warning(expiry, seconds, rate, api.clock())) is not None:
            warnings.append(warning)
    if estimate is not None and estimate.free_bytes is not None:
        # Free space is that of the time when the source was listed: what has arrived since was to be written, too.
        size = estimate.bytes if job.options.get("dry_run") else job.bytes_total - job.bytes_already_there
        if size > estimate.free_bytes:
            warnings.append(
                f"the copy needs {_gib(size)}, but the destination had {_gib(estimate.free_bytes)} free when the source"
                " was listed"
            )
    return warnings


def _expiry_warning(expiry: CredentialExpiry, seconds: float, rate: str, now: datetime) -> str | None:
    end = now + timedelta(seconds=seconds)
    if expiry.at >= end:
        return None
    return (
        f"the {expiry.kind.words} expires at {expiry.at:%Y-%m-%dT%H:%M:%SZ}, and at {rate} this job will take until"
        f" {end:%Y-%m-%dT%H:%M:%SZ}: the remaining elements will then be held, and resume automatically when the"
        f" credential is renewed ({expiry.kind.remedy})"
    )


def _gib(size: int) -> str:
    return f"{size} bytes" if size < _GIB else f"{size / _GIB:.1f} GiB"
