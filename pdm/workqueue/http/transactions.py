"""Database transactions of the REST API; each reads only what the caller may see (`scope`: a user, or None for all).

They run in the database thread; an exception rolls the transaction back. Those for a job raise `JobNotFoundError`,
or `JobPurgedError`, those for an element also `ElementNotFoundError`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime

from attrs import evolve, frozen
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobProtocol, JobStatus
from pdm.workqueue.domain.failures import AttemptFailure
from pdm.workqueue.domain.holds import HoldBy, JobEdit, JobHold
from pdm.workqueue.domain.jobs import (
    AttemptRecord,
    Batch,
    ElementRecord,
    JobRecord,
    LogSpan,
    NewJob,
)
from pdm.workqueue.domain.notifications import DeliveryRecord, WebhookRecord
from pdm.workqueue.domain.schedules import ScheduleEdit, ScheduleRecord, ScheduleRun
from pdm.workqueue.domain.sites import Actor
from pdm.workqueue.execution.credentials import PROXY
from pdm.workqueue.http.credential_checks import CredentialNeeds, check_credential
from pdm.workqueue.http.problems import (
    ElementNotFoundError,
    InvalidInputError,
    JobNotFoundError,
    JobPurgedError,
    NotFoundError,
)
from pdm.workqueue.store import (
    chains,
    credentials,
    first_claims,
    held_elements,
    holds,
    job_changes,
    job_settings,
    jobs,
    outcomes,
    purged_jobs,
    schedules,
    selected_retries,
    sites,
    users,
    waits,
    webhooks,
)
from pdm.workqueue.store.credentials import CredentialRecord, EncryptedCredential, PendingDelegation
from pdm.workqueue.store.first_claims import FirstClaim
from pdm.workqueue.store.held_elements import Resumed
from pdm.workqueue.store.idempotency import IdempotencyKey
from pdm.workqueue.store.jobs import ElementFilter, JobFilter
from pdm.workqueue.store.outcomes import FailureGroup
from pdm.workqueue.store.selected_retries import Retried, RetrySelection

#: Rows read in one transaction of a streamed response.
PAGE_SIZE = 500


@frozen
class EndedAttempt:
    """An attempt that has ended; ``worker`` is the daemon that ran it, ``log`` says where in its file the log is."""

    job: JobRecord
    element: ElementRecord
    attempt: int
    status: JobStatus
    is_latest: bool
    failure: AttemptFailure | None
    worker: str
    log: LogSpan | None


@frozen
class KnownAttempt:
    """An attempt, running or ended.

    Attributes:
        status: None if there is no such attempt.
        worker: the daemon that runs it or ran it; None if none does any more.
        log: where in the file of that daemon its log is; None if unknown.
        failure: of one that has ended.
    """

    job: JobRecord
    element: ElementRecord
    attempt: int
    status: JobStatus | None
    worker: str | None = None
    log: LogSpan | None = None
    failure: AttemptFailure | None = None


@frozen
class ScheduleHistory:
    """A schedule with its runs, the newest first.

    Attributes:
        held: the last job, and its first held element; None if nothing of it is held.
    """

    schedule: ScheduleRecord
    runs: Sequence[ScheduleRun]
    held: tuple[JobRecord, ElementRecord | None] | None


@frozen
class OutputPage:
    """Latest ended attempts of some elements, in the order of the elements."""

    attempts: Sequence[EndedAttempt]
    #: The element after which the next page begins; None if this is the last.
    after: int | None


@frozen
class ReceiptPage:
    """Some elements of a job, and when their attempts began and ended, by number; ``owner`` is a subject."""

    job: JobRecord
    owner: str
    elements: Sequence[ElementRecord]
    times: Mapping[int, tuple[datetime | None, datetime | None]]


def register(
    session: Session,
    new: NewJob,
    key: IdempotencyKey | None,
    now: datetime,
    needed: CredentialNeeds | None,
    stored: Collection[int] = (),
) -> tuple[JobRecord, list[str]]:
    """Register a job, if the user's credentials are valid for long enough; returns the job and warnings.

    `stored` are those of its sites that are in the database, checked again in this transaction.

    Raises:
        DelegationNeededError: a credential is missing, or expires too soon.
        IdempotencyConflictError: the key belongs to another request.
        InvalidInputError: a site has just been removed.
        NoPredecessorError: a job that it is to wait for is not there, or another user's.
    """
    job = jobs.submit(session, new, key, now)
    if stored and job.log_uid == new.log_uid:
        for number in sites.missing(session, stored):
            raise InvalidInputError(f"there is no site {number}; GET /sites lists all", "$")
    if job.log_uid == new.log_uid:
        job = waits.hold_items(session, chains.begin_waiting(session, job, now), new, now)
    # A repeated request gets the same answer as the first one, even if the credential has expired since.
    if needed is not None and job.log_uid == new.log_uid:
        return job, check_credential(session, new, needed, now)
    return job, []


def register_and_claim(
    session: Session,
    new: NewJob,
    key: IdempotencyKey | None,
    now: datetime,
    needed: CredentialNeeds | None,
    stored: Collection[int],
    claim: FirstClaim | None,
) -> tuple[tuple[JobRecord, list[str]], Batch | None]:
    """Like `register`; with ``claim`` also claim the first element of a new job.

    Returns:
        The job as registered, with the warnings, and the claimed batch.
    """
    registered = register(session, new, key, now, needed, stored)
    job, _ = registered
    # An element is claimed alone only if nothing else of its job is due.
    if claim is None or job.log_uid != new.log_uid or new.more or job.status is JobStatus.HELD:
        return registered, None
    return registered, first_claims.claim_first_element(session, job, claim)


def fetch_job(session: Session, job_id: int, scope: int | None) -> JobRecord:
    found = jobs.fetch(session, job_id, scope)
    if found is None:
        purged = purged_jobs.purged_job(session, job_id, scope)
        raise JobNotFoundError(job_id) if purged is None else JobPurgedError(purged)
    return found


def job_page(session: Session, wanted: JobFilter, with_owners: bool) -> tuple[list[JobRecord], Mapping[int, str]]:
    """A page of jobs, and with `with_owners` the subjects of their users by id."""
    page = jobs.page(session, wanted)
    return page, users.subjects(session, {job.user_id for job in page}) if with_owners else {}


def fetch_element(session: Session, job_id: int, element_id: int, scope: int | None) -> tuple[JobRecord, ElementRecord]:
    owner = fetch_job(session, job_id, scope)
    found = jobs.fetch_element(session, job_id, element_id)
    if found is None:
        raise ElementNotFoundError(job_id, element_id)
    return owner, found


def job_and_listing(session: Session, job_id: int) -> tuple[JobRecord, JobStatus]:
    """A job, and the status of its first element.

    The element is read first: if its listing is DONE, the job's counters, read later, include all that it has found.
    """
    first = jobs.fetch_element(session, job_id, 0)
    owner = fetch_job(session, job_id, None)
    return owner, owner.status if first is None else first.status


def fetch_attempt(session: Session, job_id: int, element_id: int, scope: int | None, number: int) -> KnownAttempt:
    """An attempt, with its job and element.

    Attempts count from 1; negative numbers count from the latest, running or not.
    """
    owner, found = fetch_element(session, job_id, element_id, scope)
    latest = found.attempts
    number += latest + 1 if number < 0 else 0
    if not 1 <= number <= latest:
        return KnownAttempt(owner, found, number, None)
    if number == latest and found.status is JobStatus.RUNNING:
        worker = jobs.worker_of_element(session, job_id, element_id)
        return KnownAttempt(owner, found, number, JobStatus.RUNNING, worker)
    record = jobs.fetch_attempt(session, job_id, element_id, number)
    if record is None:
        return KnownAttempt(owner, found, number, None)
    return KnownAttempt(owner, found, number, record.status, record.worker, record.log, record.failure)


def element_page(
    session: Session, job_id: int, scope: int | None, wanted: ElementFilter
) -> tuple[JobRecord, list[ElementRecord]]:
    return fetch_job(session, job_id, scope), jobs.page_elements(session, job_id, wanted)


def ended_attempts(
    session: Session, job_id: int, element_id: int, scope: int | None
) -> tuple[ElementRecord, Sequence[EndedAttempt]]:
    """An element with its ended attempts, the oldest first."""
    owner, found = fetch_element(session, job_id, element_id, scope)
    records = jobs.attempts(session, job_id, element_id)
    return found, [_ended(owner, found, record, is_latest=record is records[-1]) for record in records]


def _ended(owner: JobRecord, element: ElementRecord, record: AttemptRecord, *, is_latest: bool) -> EndedAttempt:
    return EndedAttempt(
        owner, element, record.attempt, record.status, is_latest, record.failure, record.worker, record.log
    )


def latest_attempts(session: Session, job_id: int, scope: int | None, after: int | None) -> OutputPage:
    """The latest ended attempts of the elements after an id."""
    owner = fetch_job(session, job_id, scope)
    page = jobs.page_elements(session, job_id, ElementFilter(limit=PAGE_SIZE, after=after, with_attempts=True))
    if not page:
        return OutputPage([], None)
    latest = jobs.latest_attempts(session, job_id, page[0].id, page[-1].id)
    ended = [_ended(owner, found, latest[found.id], is_latest=True) for found in page if found.id in latest]
    return OutputPage(ended, page[-1].id if len(page) == PAGE_SIZE else None)


def receipt_page(session: Session, job_id: int, scope: int | None, after: int | None) -> ReceiptPage:
    """Elements of a job after a number, for its receipt."""
    owner = fetch_job(session, job_id, scope)
    page = jobs.page_elements(session, job_id, ElementFilter(limit=PAGE_SIZE, after=after))
    times = outcomes.attempt_times(session, job_id, page[0].id, page[-1].id) if page else {}
    return ReceiptPage(owner, users.subjects(session, [owner.user_id]).get(owner.user_id, ""), page, times)


def failure_groups(session: Session, job_id: int, scope: int | None) -> tuple[JobRecord, Sequence[FailureGroup]]:
    """The failures of a job by code and scope."""
    return fetch_job(session, job_id, scope), outcomes.failure_groups(session, job_id)


def cancel(session: Session, job_id: int, scope: int | None, now: datetime) -> JobRecord:
    fetch_job(session, job_id, scope)
    return job_changes.cancel(session, job_id, now)


def hold(session: Session, job_id: int, scope: int | None, new: JobHold, by: Actor) -> JobRecord:
    fetch_job(session, job_id, scope)
    return holds.hold(session, job_id, new, by)


def resume(session: Session, job_id: int, scope: int | None, as_whom: HoldBy, by: Actor, now: datetime) -> JobRecord:
    """End the hold of a job."""
    fetch_job(session, job_id, scope)
    return holds.resume(session, job_id, as_whom, by, now)


def change_job(session: Session, job_id: int, scope: int | None, changes: JobEdit, now: datetime) -> JobRecord:
    fetch_job(session, job_id, scope)
    return job_settings.change(session, job_id, changes, now)


def retry(session: Session, job_id: int, scope: int | None, now: datetime) -> tuple[JobRecord, int]:
    """Put failed and cancelled elements back into the queue; returns the job and their number."""
    fetch_job(session, job_id, scope)
    job, retried = job_changes.retry(session, job_id, now)
    if retried:
        job = chains.begin_waiting(session, job, now)
    return job, retried


def retry_selected(
    session: Session, job_id: int, scope: int | None, now: datetime, selection: RetrySelection
) -> Retried:
    """Put some failed and cancelled elements back into the queue."""
    fetch_job(session, job_id, scope)
    retried = selected_retries.retry_selected(session, job_id, now, selection)
    if retried.count:
        return evolve(retried, job=chains.begin_waiting(session, retried.job, now))
    return retried


def schedules_of_user(session: Session, user_id: int) -> list[tuple[ScheduleRecord, ScheduleRun | None]]:
    """The schedules of a user, each with its last run."""
    found = schedules.of_user(session, user_id)
    last = schedules.last_runs(session, [each.id for each in found])
    return [(each, last.get(each.id)) for each in found]


def fetch_schedule(session: Session, schedule_id: int, scope: int | None) -> ScheduleHistory:
    """A schedule with its runs.

    Raises:
        NotFoundError: it does not exist.
    """
    found = schedules.fetch(session, schedule_id, scope)
    if found is None:
        raise NotFoundError(f"there is no schedule {schedule_id}; GET /schedules lists yours")
    runs = schedules.runs(session, schedule_id)
    # Later runs are skipped while its job is held.
    last = next((run.job_id for run in runs if run.job_id is not None), None)
    job = None if last is None else jobs.fetch(session, last, None)
    is_held = job is not None and (job.counters.held or job.hold is not None)
    held = (job, first_held_element(session, job.id)) if job is not None and is_held else None
    return ScheduleHistory(found, runs, held)


def change_schedule(
    session: Session,
    schedule_id: int,
    scope: int | None,
    changes: ScheduleEdit,
    following: Callable[[ScheduleRecord], datetime | None],
) -> ScheduleRecord:
    """Change a schedule; returns it."""
    found = fetch_schedule(session, schedule_id, scope).schedule
    return schedules.edit(session, schedule_id, changes, following) or found


def remove_schedule(session: Session, schedule_id: int, scope: int | None) -> None:
    fetch_schedule(session, schedule_id, scope)
    schedules.remove(session, schedule_id)


def fetch_webhook(session: Session, webhook_id: int, user_id: int) -> tuple[WebhookRecord, list[DeliveryRecord]]:
    """A webhook of a user with its latest deliveries.

    Raises:
        NotFoundError: it does not exist.
    """
    found = webhooks.fetch(session, webhook_id, user_id)
    if found is None:
        raise NotFoundError(f"there is no webhook {webhook_id}; GET /webhooks lists yours")
    return found, webhooks.latest_deliveries(session, webhook_id)


def remove_webhook(session: Session, webhook_id: int, user_id: int) -> None:
    fetch_webhook(session, webhook_id, user_id)
    webhooks.remove(session, webhook_id)


def begin_delegation(session: Session, pending: PendingDelegation) -> PendingDelegation:
    """Store a pending delegation, unless there is one already; returns the stored one."""
    known = credentials.find_pending(session, pending.user_id)
    if known is not None:
        return known
    credentials.put_pending(session, pending)
    return pending


def put_credential(
    session: Session, user_id: int, new: EncryptedCredential, protocols: Collection[JobProtocol], now: datetime
) -> tuple[CredentialRecord, Resumed]:
    """Store a credential, and put elements that were held for it back into the queue: all, or the first batch."""
    record = credentials.put(session, user_id, new, now)
    return record, held_elements.resume_held(session, user_id, now, new.site_id, protocols)


def put_delegation(
    session: Session, user_id: int, new: EncryptedCredential, protocols: Collection[JobProtocol], now: datetime
) -> tuple[CredentialRecord, Resumed]:
    """Store a delegated proxy in place of the pending delegation."""
    credentials.drop_pending(session, user_id)
    return put_credential(session, user_id, new, protocols, now)


def put_generated_key(
    session: Session, user_id: int, new: EncryptedCredential, protocols: Collection[JobProtocol], now: datetime
) -> tuple[CredentialRecord, Resumed]:
    """Store a generated SSH key, unless there is a generated one for that site.

    So a repeated request returns the same key, which may be installed at the site by now.
    """
    known = credentials.find(session, user_id, new.kind, new.site_id)
    if known is not None and known.details.get("made_here"):
        return known, Resumed(0, None)
    return put_credential(session, user_id, new, protocols, now)


def remove_delegation(session: Session, user_id: int) -> None:
    """Remove a user's delegated proxy and pending delegation."""
    credentials.remove(session, user_id, PROXY)
    credentials.drop_pending(session, user_id)


def first_held_element(session: Session, job_id: int) -> ElementRecord | None:
    found = jobs.page_elements(session, job_id, ElementFilter(limit=1, statuses=frozenset({JobStatus.HELD})))
    return found[0] if found else None
