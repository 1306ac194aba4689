"""The progress of a job, and why it waits: sites, other jobs, the next try of an element, its place in the queue."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

import msgspec

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.jobs import JobRecord, Predecessors
from pdm.workqueue.domain.notifications import Event, EventKind
from pdm.workqueue.domain.progress import JobProgress, job_progress, listing_status
from pdm.workqueue.http import transactions
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.views import NAMED_AHEAD, job_progress_view
from pdm.workqueue.store import chains, claim_queries
from pdm.workqueue.store.chains import AwaitedJob
from pdm.workqueue.store.claim_queries import MOST_COUNTED, QueuePosition, WaitReason


async def with_progress(api: ApiContext, job: JobRecord) -> tuple[JobRecord, JobProgress, list[str]]:
    """A job with its progress, and sentences about sites and limits that make it wait.

    A DONE listing is final and cached for each job. Until then the job is read again in one transaction with the status
    of its listing, because its counters must be consistent with that status.
    """
    known = listing_status(job)
    if known is not None:
        listing = known
    elif api.progress.is_listed(job.id, job.counters.elements):
        listing = JobStatus.DONE
    else:
        job, listing = await api.database.read("where a listing stands", transactions.job_and_listing, job.id)
        if listing is JobStatus.DONE:
            api.progress.remember_listed(job.id, job.counters.elements)
    motion = await api.cluster.of_job(job)
    now = api.clock()
    progress = job_progress(job, listing, motion.moving, now, motion.silent)
    waits = api.site_directory.waits(job, now)
    if job.after is not None and job.started_at is None and not job.status.is_final:
        awaited = await api.database.read("find awaited jobs", chains.awaited_jobs, job.id)
        waits = [*_chain_sentences(job.after, awaited), *waits]
    return job, progress, waits


async def progress_event(api: ApiContext, job_id: int) -> Event | None:
    """The progress of a job as an event; None if there is no such job."""
    job = await api.database.job(job_id)
    if job is None:
        return None
    job, progress, _ = await with_progress(api, job)
    data = msgspec.to_builtins(job_progress_view(progress))
    return Event(id=None, at=api.clock(), kind=EventKind.PROGRESS, job=job.id, owner=job.user_id, data=data)


def _chain_sentences(after: Predecessors, awaited: Sequence[AwaitedJob]) -> list[str]:
    if not awaited:
        return []
    how = "has ended" if after.any_end else "is DONE"
    if len(awaited) > 1:
        how = "have ended" if after.any_end else "are DONE"
    words = f"it begins when {_job_numbers([job.id for job in awaited])} {how}"
    return [f"{words}; that job is {awaited[0].status.name} now" if len(awaited) == 1 else words]


#: Seconds for which a new job's place in the queue is not queried: it is usually claimed at once.
_SETTLING_TIME = timedelta(seconds=1)
#: Cache of reasons for waiting: lifetime and size.
_WAITING_CACHE_LIFETIME, _MAX_CACHED_WAITING = timedelta(seconds=1), 1000


async def waiting_reasons(
    api: ApiContext, job: JobRecord, now: datetime, blocked_by: Sequence[str]
) -> tuple[WaitReason, Sequence[str]]:
    """Why a job waits that has no running element; nothing for other jobs.

    Returns:
        Its place in the queue and next try, and all reasons as sentences. A job that is `blocked_by` sites or limits
        has no place in the queue.
    """
    counters = job.counters
    is_settling = now < job.timestamp + _SETTLING_TIME
    if blocked_by or counters.running or not counters.submitted or job.cancel_requested or is_settling:
        return WaitReason(None, None), blocked_by
    known = api.waiting.get(job.id)
    if known is not None and known[0] == counters and known[1] <= now < known[1] + _WAITING_CACHE_LIFETIME:
        return known[2], known[3]
    found = await api.database.read("why a job waits", claim_queries.wait_reason, job, now)
    sentences = _sentences(api, job, found)
    if len(api.waiting) >= _MAX_CACHED_WAITING:
        api.waiting.clear()
    api.waiting[job.id] = (counters, now, found, sentences)
    return found, sentences


async def queue_sentences(api: ApiContext, job: JobRecord, now: datetime) -> tuple[list[str], list[str]]:
    """When the next element of a job is due, and its place in the queue with the limits that are reached.

    Unlike `waiting_reasons`, also of a job that runs.
    """
    found = await api.database.read("why a job waits", claim_queries.wait_reason, job, now)
    return _due_sentences(found), _place_sentences(api, job, found)


def limit_sentences(api: ApiContext, job: JobRecord) -> list[str]:
    """What keeps more of a job from running at once, of which something runs and something waits."""
    counters = job.counters
    if not counters.running or not counters.submitted or job.cancel_requested:
        return []
    if job.hold is not None:
        return [job.hold.sentence]
    own = []
    if job.max_active is not None and counters.running >= job.max_active:
        own = [f"at most {job.max_active} of its elements may run at once"]
    return [*own, *api.full(job, False)]


def _sentences(api: ApiContext, job: JobRecord, found: WaitReason) -> list[str]:
    return [*_due_sentences(found), *_place_sentences(api, job, found)]


def _due_sentences(found: WaitReason) -> list[str]:
    if found.next_try is None or found.next_try.not_before is None:
        return []
    element, failure = found.next_try, found.next_try.failure
    because = "" if failure is None else f", after {failure.code}: {' '.join(failure.message.split())[:300]}"
    return [
        f"element {element.id} is tried again at {element.not_before:%Y-%m-%dT%H:%M:%SZ} (try"
        f" {element.next_try} of {element.max_tries}){because}"
    ]


def _place_sentences(api: ApiContext, job: JobRecord, found: WaitReason) -> list[str]:
    if found.place is None:
        return []
    return [*api.full(job, found.place.listing), _place_sentence(found.place)]


def _place_sentence(place: QueuePosition) -> str:
    count, words = len(place.ahead), "it is the next of its user"
    if count:
        words = f"it is number {count + 1} of its user, behind {_job_numbers(place.ahead)}"
    if place.other_users:
        others = "another user has" if place.other_users == 1 else f"{place.other_users} other users have"
        words += f"; {others} jobs waiting, and users take turns"
    return f"in the queue for {'listings' if place.listing else 'work'} {words}"


def _job_numbers(ahead: Sequence[int]) -> str:
    """``job 12``, ``jobs 12 and 13``, ``jobs 12, 13, 14, 15, 16 and 41 more``."""
    if len(ahead) == 1:
        return f"job {ahead[0]}"
    named = [str(number) for number in ahead[:NAMED_AHEAD]]
    left = len(ahead) - len(named)
    if left:
        many = f"at least {left}" if len(ahead) >= MOST_COUNTED else str(left)
        return f"jobs {', '.join(named)} and {many} more"
    return f"jobs {', '.join(named[:-1])} and {named[-1]}"
