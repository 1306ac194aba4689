"""Transactions of the API: each is one trip to the database thread, and looks only at what the caller may see.

They run in the thread, take the session first and pass it on to `pdm.workqueue.store`; problems they raise roll the
transaction back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime

from attrs import frozen
from sqlalchemy.orm import Session

from pdm.workqueue.domain.credentials import (
    CredentialKind,
    Need,
    NoCredentialError,
    choose_each,
    kinds_of,
)
from pdm.workqueue.domain.enums import JobProtocol, JobStatus
from pdm.workqueue.domain.jobs import ElementRecord, JobRecord, NewJob
from pdm.workqueue.execution.credentials import PROXY
from pdm.workqueue.http.context import Lifetimes
from pdm.workqueue.http.lasting import End, end_of
from pdm.workqueue.http.problems import (
    DelegationNeededError,
    ElementNotFoundError,
    InvalidInputError,
    JobNotFoundError,
)
from pdm.workqueue.store import claims, credentials, jobs, sites, users
from pdm.workqueue.store.claims import Resumed
from pdm.workqueue.store.credentials import CredentialRecord, NewCredential, PendingDelegation
from pdm.workqueue.store.jobs import ElementFilter, IdempotencyKey, JobFilter
from pdm.workqueue.wire.responses import moment_text

#: How many rows are read in one transaction of a longer answer.
PAGE = 500


@frozen
class Needed:
    """The credentials that a job needs.

    Attributes:
        sites: site → what is needed there.
        lifetimes: how long they are to last.
    """

    sites: Mapping[int, Need]
    lifetimes: Lifetimes


@frozen
class Ended:
    """An attempt that has ended."""

    job: JobRecord
    element: ElementRecord
    attempt: int
    status: JobStatus
    is_latest: bool


@frozen
class OutputPage:
    """Latest ended attempts of some elements, in the order of the elements.

    Attributes:
        after: the id behind which the next page begins; None after the last page.
    """

    attempts: Sequence[Ended]
    after: int | None


def register(
    session: Session,
    new: NewJob,
    key: IdempotencyKey | None,
    now: datetime,
    needed: Needed | None,
    stored: Collection[int] = (),
) -> tuple[JobRecord, list[str]]:
    """Register a job, if the user's credential is good enough.

    Args:
        session: of the database.
        new: the job.
        key: under which it is registered once only.
        now: the present moment, UTC.
        needed: the credential that the job needs; None for a job that needs none.
        stored: which of its sites are in the database.

    Returns:
        The job, and warnings.

    Raises:
        DelegationNeededError: there is no credential, or it ends too soon.
        IdempotencyConflictError: the key belongs to another request.
        InvalidInputError: a site was removed in this moment.
    """
    job = jobs.submit(session, new, key, now)
    if stored and job.log_uid == new.log_uid:
        for number in sites.missing(session, stored):
            raise InvalidInputError(f"there is no site {number}; GET /sites lists those there are", "$")
    # A repeated request is answered like the first one, whatever has become of the credential since.
    if needed is not None and job.log_uid == new.log_uid:
        return job, _check_credential(session, new, needed, now)
    return job, []


def _check_credential(session: Session, new: NewJob, needed: Needed, now: datetime) -> list[str]:
    """Look whether the user's credential lasts long enough; returns warnings."""
    lifetimes = needed.lifetimes
    found = [each for kind in kinds_of(needed.sites) for each in credentials.of_kind(session, new.user_id, kind)]
    try:
        chosen = choose_each(found, needed.sites, now)
    except NoCredentialError as error:
        kind = error.kind
        if not any(each.kind is kind for each in found):
            what = "the service holds no credential of yours"
            what += "" if kind is CredentialKind.PROXY else f" ({kind.words})"
        else:
            what = str(error)
        raise DelegationNeededError(f"{what}: {kind.remedy}, then submit again") from error
    first = end_of(chosen)
    if first is None or first.at >= now + max(lifetimes.least, lifetimes.expected):
        return []
    end, kind = first.at, first.kind
    if end < now + lifetimes.least:
        raise DelegationNeededError(
            f"your {kind.words} ends at {moment_text(end)}, and a job needs at least "
            f"{lifetimes.least.total_seconds():.0f} s: {kind.remedy}, then submit again"
        )
    return [
        f"your {kind.words} ends at {moment_text(end)}, perhaps before this job does: what is left is held then, and"
        f" goes on by itself when you renew it ({kind.remedy})"
    ]


def first_end(session: Session, user_id: int, needs: Mapping[int, Need], now: datetime) -> End | None:
    """When the first of the credentials that a job works with ends; None for never, or where there are none."""
    found = [each for kind in kinds_of(needs) for each in credentials.of_kind(session, user_id, kind)]
    try:
        return end_of(choose_each(found, needs, now))
    except NoCredentialError:
        # The next attempt says so.
        return None


def job(session: Session, job_id: int, scope: int | None) -> JobRecord:
    """A job that the caller may see.

    Raises:
        JobNotFoundError: there is none.
    """
    found = jobs.fetch(session, job_id, scope)
    if found is None:
        raise JobNotFoundError(job_id)
    return found


def job_page(session: Session, wanted: JobFilter, with_owners: bool) -> tuple[list[JobRecord], Mapping[int, str]]:
    """Some jobs, and the subjects of their users by number where these are asked for."""
    page = jobs.page(session, wanted)
    return page, users.subjects(session, {job.user_id for job in page}) if with_owners else {}


def element(session: Session, job_id: int, element_id: int, scope: int | None) -> tuple[JobRecord, ElementRecord]:
    """An element with its job.

    Raises:
        JobNotFoundError: there is no such job.
        ElementNotFoundError: the job has no such element.
    """
    owner = job(session, job_id, scope)
    found = jobs.fetch_element(session, job_id, element_id)
    if found is None:
        raise ElementNotFoundError(job_id, element_id)
    return owner, found


def job_and_listing(session: Session, job_id: int) -> tuple[JobRecord, JobStatus]:
    """A job that was found before, and where its first element stands.

    The element is looked at first: once its listing is done, the job's numbers are those of all that it has found.
    """
    first = jobs.fetch_element(session, job_id, 0)
    owner = job(session, job_id, None)
    return owner, owner.status if first is None else first.status


def attempt(
    session: Session, job_id: int, element_id: int, scope: int | None, number: int
) -> tuple[JobRecord, ElementRecord, int, JobStatus | None]:
    """An attempt that has ended or that runs, with its number, counted from 1, and its status; None if there is none.

    Args:
        session: of the database.
        job_id: whose.
        element_id: whose, in the job.
        scope: of the caller.
        number: from 1; negative ones count from the latest, running or not.

    Raises:
        JobNotFoundError: there is no such job.
        ElementNotFoundError: the job has no such element.
    """
    owner, found = element(session, job_id, element_id, scope)
    latest = found.attempts
    number += latest + 1 if number < 0 else 0
    if not 1 <= number <= latest:
        return owner, found, number, None
    if number == latest and found.status is JobStatus.RUNNING:
        return owner, found, number, JobStatus.RUNNING
    record = jobs.fetch_attempt(session, job_id, element_id, number)
    return owner, found, number, None if record is None else record.status


def elements(
    session: Session, job_id: int, scope: int | None, wanted: ElementFilter
) -> tuple[JobRecord, list[ElementRecord]]:
    """A job with some of its elements.

    Raises:
        JobNotFoundError: there is no such job.
    """
    return job(session, job_id, scope), jobs.page_elements(session, job_id, wanted)


def ended_attempts(
    session: Session, job_id: int, element_id: int, scope: int | None
) -> tuple[ElementRecord, Sequence[Ended]]:
    """An element with those of its attempts that have ended, the oldest first.

    Raises:
        JobNotFoundError: there is no such job.
        ElementNotFoundError: the job has no such element.
    """
    owner, found = element(session, job_id, element_id, scope)
    records = jobs.attempts(session, job_id, element_id)
    return found, [Ended(owner, found, record.attempt, record.status, record is records[-1]) for record in records]


def latest_attempts(session: Session, job_id: int, scope: int | None, after: int | None) -> OutputPage:
    """The latest ended attempts of the elements behind an id.

    Raises:
        JobNotFoundError: there is no such job.
    """
    owner = job(session, job_id, scope)
    page = jobs.page_elements(session, job_id, ElementFilter(limit=PAGE, after=after, with_attempts=True))
    latest = []
    for found in page:
        if found.status in (JobStatus.DONE, JobStatus.FAILED):
            # Its last attempt is what made it so; only of others the attempts have to be looked up.
            latest.append(Ended(owner, found, found.attempts, found.status, True))
        else:
            records = jobs.attempts(session, job_id, found.id)
            if records:
                latest.append(Ended(owner, found, records[-1].attempt, records[-1].status, True))
    return OutputPage(latest, page[-1].id if len(page) == PAGE else None)


def cancel(session: Session, job_id: int, scope: int | None, now: datetime) -> JobRecord:
    """Cancel a job.

    Raises:
        JobNotFoundError: there is no such job.
    """
    job(session, job_id, scope)
    return jobs.cancel(session, job_id, now)


def retry(session: Session, job_id: int, scope: int | None, now: datetime) -> tuple[JobRecord, int]:
    """Put what has failed or was cancelled back into the queue.

    Raises:
        JobNotFoundError: there is no such job.
    """
    job(session, job_id, scope)
    return jobs.retry(session, job_id, now)


def keep_pending(session: Session, pending: PendingDelegation) -> PendingDelegation:
    """Keep a delegation that was begun, unless another one was in the meantime; the kept one comes back."""
    known = credentials.find_pending(session, pending.user_id)
    if known is not None:
        return known
    credentials.put_pending(session, pending)
    return pending


def take_credential(
    session: Session, user_id: int, new: NewCredential, protocols: Collection[JobProtocol], now: datetime
) -> tuple[CredentialRecord, Resumed]:
    """Store a credential; what was held for want of it goes back to the queue, or the first part of it.

    Returns:
        The credential, and what goes back.
    """
    record = credentials.put(session, user_id, new, now)
    return record, claims.resume_held(session, user_id, now, new.site_id, protocols)


def take_delegation(
    session: Session, user_id: int, new: NewCredential, protocols: Collection[JobProtocol], now: datetime
) -> tuple[CredentialRecord, Resumed]:
    """Store a delegated proxy, and end the delegation that was begun."""
    credentials.drop_pending(session, user_id)
    return take_credential(session, user_id, new, protocols, now)


def take_made_key(
    session: Session, user_id: int, new: NewCredential, protocols: Collection[JobProtocol], now: datetime
) -> tuple[CredentialRecord, Resumed]:
    """Store an SSH key that the service has made, unless one of its making is there for that site.

    So a request that is repeated gives the same key, which may be installed at the site by now.
    """
    known = credentials.find(session, user_id, new.kind, new.site_id)
    if known is not None and known.details.get("made_here"):
        return known, Resumed(0, None)
    return take_credential(session, user_id, new, protocols, now)


def forget_credential(session: Session, user_id: int) -> None:
    """Remove a user's delegated proxy, and one that is being delegated."""
    credentials.remove(session, user_id, PROXY)
    credentials.drop_pending(session, user_id)


def first_held(session: Session, job_id: int) -> ElementRecord | None:
    """The first element of a job that is held; None if none is."""
    found = jobs.page_elements(session, job_id, ElementFilter(limit=1, statuses=frozenset({JobStatus.HELD})))
    return found[0] if found else None
