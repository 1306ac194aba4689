"""How far a job is, and why it waits: its record, what this daemon runs of it, its listing, its place in the queue."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.domain.progress import JobProgress, job_progress, listing_status
from pdm.workqueue.http import lookups
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.views import NAMED_AHEAD
from pdm.workqueue.store import queue_place
from pdm.workqueue.store.queue_place import MOST_COUNTED, QueuePlace, Waiting


async def with_progress(api: ApiContext, job: JobRecord) -> tuple[JobRecord, JobProgress, list[str]]:
    """A job with its progress, and why it has to wait.

    That a listing is done stays true, so it is looked up once for each job; until then the job is read again along
    with it, for its numbers and the end of its listing must be of the same moment.

    Args:
        api: what is known.
        job: as it was just found.
    """
    known = listing_status(job)
    if known is not None:
        listing = known
    elif api.progress.is_listed(job.id, job.counters.elements):
        listing = JobStatus.DONE
    else:
        job, listing = await api.database.read("where a listing stands", lookups.job_and_listing, job.id)
        if listing is JobStatus.DONE:
            api.progress.remember_listed(job.id, job.counters.elements)
    now = api.clock()
    progress = job_progress(job, listing, api.progress.of_job(job.id, job.bytes_done), now)
    return job, progress, api.catalogue.waits(job, now)


#: A job that was registered just now is about to be claimed: no look at the queue for it.
_SETTLING_TIME = timedelta(seconds=1)
#: However often a job is asked for, its place is looked up no more often; and for so many jobs it is remembered.
_LOOKS_AGAIN_AFTER, _MOST_REMEMBERED = timedelta(seconds=1), 1000


async def why_waiting(
    api: ApiContext, job: JobRecord, now: datetime, kept_out: Sequence[str]
) -> tuple[Waiting, Sequence[str]]:
    """Why a job waits of which nothing runs; nothing for all others.

    Args:
        api: what is known.
        job: as it was just found.
        now: the present moment, UTC.
        kept_out: why it may not begin at all; then its place in the queue means nothing.

    Returns:
        Its place and its next try, and all reasons in sentences.
    """
    counters = job.counters
    is_settling = now < job.timestamp + _SETTLING_TIME
    if kept_out or counters.running or not counters.submitted or job.cancel_requested or is_settling:
        return Waiting(None, None), kept_out
    known = api.waiting.get(job.id)
    if known is not None and known[0] == counters and known[1] <= now < known[1] + _LOOKS_AGAIN_AFTER:
        return known[2], known[3]
    found = await api.database.read("why a job waits", queue_place.waiting, job, now)
    sentences = _sentences(api, job, found)
    if len(api.waiting) >= _MOST_REMEMBERED:
        api.waiting.clear()
    api.waiting[job.id] = (counters, now, found, sentences)
    return found, sentences


def _sentences(api: ApiContext, job: JobRecord, found: Waiting) -> list[str]:
    sentences = []
    if found.next_try is not None and found.next_try.not_before is not None:
        element, failure = found.next_try, found.next_try.failure
        because = "" if failure is None else f", after {failure.code}: {' '.join(failure.message.split())[:300]}"
        sentences.append(
            f"element {element.id} is tried again at {element.not_before:%Y-%m-%dT%H:%M:%SZ} (try"
            f" {element.next_try} of {element.max_tries}){because}"
        )
    if found.place is not None:
        sentences += api.full(job, found.place.listing)
        sentences.append(_place_sentence(found.place))
    return sentences


def _place_sentence(place: QueuePlace) -> str:
    count, words = len(place.ahead), "it is the next of its user"
    if count:
        words = f"it is number {count + 1} of its user, behind {_numbers(place.ahead)}"
    if place.other_users:
        others = "another user has" if place.other_users == 1 else f"{place.other_users} other users have"
        words += f"; {others} jobs waiting, and users take turns"
    return f"in the queue for {'listings' if place.listing else 'work'} {words}"


def _numbers(ahead: Sequence[int]) -> str:
    """``job 12``, ``jobs 12 and 13``, ``jobs 12, 13, 14, 15, 16 and 41 more``."""
    if len(ahead) == 1:
        return f"job {ahead[0]}"
    named = [str(number) for number in ahead[:NAMED_AHEAD]]
    left = len(ahead) - len(named)
    if left:
        many = f"at least {left}" if len(ahead) >= MOST_COUNTED else str(left)
        return f"jobs {', '.join(named)} and {many} more"
    return f"jobs {', '.join(named[:-1])} and {named[-1]}"
