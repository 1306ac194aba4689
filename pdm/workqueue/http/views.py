"""Convert records to the structs of API responses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache

from msgspec import UNSET, UnsetType

from pdm.workqueue.certificates.files import read_authorities
from pdm.workqueue.certificates.names import dn
from pdm.workqueue.domain.credentials import ALL_SITES
from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, hint_for
from pdm.workqueue.domain.holds import HOLD_CODE, JobHold
from pdm.workqueue.domain.jobs import ElementRecord, JobRecord
from pdm.workqueue.domain.oidc import OidcSettings
from pdm.workqueue.domain.pacing import BreakerState
from pdm.workqueue.domain.progress import JobProgress
from pdm.workqueue.domain.sites import RestrictionKind
from pdm.workqueue.execution.cluster import ElementMotion
from pdm.workqueue.execution.endpoint_checks import EndpointCheck
from pdm.workqueue.execution.progress_board import ElementProgress
from pdm.workqueue.execution.streams import RouteState
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.sites.registry import Site
from pdm.workqueue.store.claim_queries import QueuePosition, WaitReason
from pdm.workqueue.store.credentials import CredentialRecord
from pdm.workqueue.store.listings import ListingNote
from pdm.workqueue.wire.credentials import CredentialView, VomsView
from pdm.workqueue.wire.plans import EstimateView, PlanView
from pdm.workqueue.wire.responses import (
    CancelReasonView,
    ElementStatusView,
    ElementView,
    FailureView,
    HoldView,
    JobProgressView,
    JobView,
    NextTryView,
    ProcessView,
    QueueView,
    SkippedView,
)
from pdm.workqueue.wire.sites import CheckView, EndpointView, OidcView, RouteView, SiteView

#: The daemon writes the first line before anything that comes from elsewhere.
_FIRST_LINE = re.compile(r"(?:\S+ ){0,2}host=(\S+) pid=([0-9]{1,10}) ")
_ENDED = re.compile(r"the helper process ([0-9]+) ended \((signal [0-9]+|exit status [0-9]+)")


def process_view(log: str | None, failure: AttemptFailure | None) -> ProcessView | UnsetType:
    """The process of an attempt; ``log`` begins with its first line."""
    found = None if log is None else _FIRST_LINE.match(log)
    if found is None:
        return UNSET
    ended = None
    if failure is not None and failure.code is FailureCode.CRASHED:
        how = _ENDED.search(failure.message)
        ended = None if how is None or how[1] != found[2] else how[2]
    return ProcessView(host=found[1], pid=int(found[2]), ended=ended)


#: Number of jobs ahead in the queue that are listed.
NAMED_AHEAD = 5


def whole_seconds(timestamp: datetime | None) -> datetime | None:
    return None if timestamp is None else timestamp.replace(microsecond=0)


def job_view(
    job: JobRecord,
    progress: JobProgress | None = None,
    waiting: Sequence[str] = (),
    hold: HoldView | None = None,
    skipped_by_code: dict[str, int] | None = None,
    found: WaitReason | None = None,
    owner: str | None = None,
    plan: PlanView | None = None,
    estimate: EstimateView | None = None,
) -> JobView:
    place = None if found is None else found.place
    next_try = None if found is None else found.next_try
    counters = job.counters
    return JobView(
        id=job.id,
        user_id=job.user_id,
        src_siteid=job.src_siteid,
        dst_siteid=UNSET if job.dst_siteid is None else job.dst_siteid,
        src_filepath=job.src_filepath,
        dst_filepath=UNSET if job.dst_filepath is None else job.dst_filepath,
        type=job.type.name,
        status=job.status.name,
        extra_opts=dict(job.options),
        priority=job.priority,
        protocol=job.protocol.name,
        log_uid=job.log_uid,
        timestamp=job.timestamp.replace(microsecond=0),
        finished_at=whole_seconds(job.finished_at),
        label=job.label,
        max_tries=job.max_tries,
        cancel_requested=job.cancel_requested,
        cancel_reason=_cancel_reason_view(job),
        after=UNSET if job.after is None else list(job.after.jobs),
        after_any=UNSET if job.after is None else job.after.any_end,
        schedule=UNSET if job.schedule_id is None else job.schedule_id,
        deadline=UNSET if job.deadline is None else job.deadline.replace(microsecond=0),
        num_elements=counters.elements,
        num_new=0,
        # The reference has no HELD elements: its clients see them as submitted.
        num_submitted=counters.submitted + counters.held,
        num_running=counters.running,
        num_done=counters.done,
        num_failed=counters.failed,
        num_cancelled=counters.cancelled,
        held=counters.held,
        skipped=job.skipped,
        skipped_by_code=skipped_by_code or UNSET,
        plan=UNSET if plan is None else plan,
        estimate=UNSET if estimate is None else estimate,
        already_there=job.already_there,
        bytes_already_there=job.bytes_already_there,
        bytes_total=job.bytes_total,
        bytes_done=job.bytes_done,
        progress=UNSET if progress is None else job_progress_view(progress),
        waiting=list(waiting) or UNSET,
        hold=hold or hold_view(job, None) or UNSET,
        max_active=UNSET if job.max_active is None else job.max_active,
        queue=UNSET if place is None else _queue_view(place),
        next_try=UNSET if next_try is None else _next_try_view(job, next_try),
        owner=UNSET if owner is None else owner,
    )


def _cancel_reason_view(job: JobRecord) -> CancelReasonView | UnsetType:
    # A job whose last elements were DONE all the same was not cancelled.
    if job.cancel_reason is None or job.status is JobStatus.DONE:
        return UNSET
    return CancelReasonView(code=job.cancel_reason.code.value, message=job.cancel_reason.message)


def _queue_view(place: QueuePosition) -> QueueView:
    return QueueView(
        place=len(place.ahead) + 1,
        behind=list(place.ahead[:NAMED_AHEAD]),
        other_users=place.other_users,
        listing=place.listing,
    )


def _next_try_view(job: JobRecord, element: ElementRecord) -> NextTryView | UnsetType:
    if element.not_before is None or element.failure is None:
        return UNSET
    return NextTryView(
        element=element.id,
        at=element.not_before.replace(microsecond=0),
        attempt=element.next_try,
        max_tries=element.max_tries,
        failure=failure_view(element.failure, job.type),
    )


def _job_hold_view(job: JobRecord, hold: JobHold) -> HoldView:
    return HoldView(
        count=job.counters.submitted + job.counters.held,
        code=HOLD_CODE,
        reason=hold.sentence,
        hint=hold.hint,
        by=hold.by.value,
        who=hold.subject,
        message=hold.message,
        since=hold.since.replace(microsecond=0),
        until=whole_seconds(hold.until),
    )


def hold_view(job: JobRecord, first: ElementRecord | None) -> HoldView | None:
    """Why a job is held, or elements of it, by the first of them."""
    return element_hold_view(job, first) if job.hold is None else _job_hold_view(job, job.hold)


def element_hold_view(job: JobRecord, first: ElementRecord | None) -> HoldView | None:
    """Why elements of a job are held, by the first of them."""
    if first is None or first.failure is None or not job.counters.held:
        return None
    failure = first.failure
    hint = hint_for(failure.code, job.type)
    return HoldView(count=job.counters.held, code=failure.code.value, reason=failure.message, hint=hint)


def job_progress_view(progress: JobProgress) -> JobProgressView:
    return JobProgressView(
        listing=progress.listing,
        bytes_done=progress.bytes_done,
        bytes_total=progress.bytes_total,
        bytes_moving=progress.bytes_moving,
        files_done=progress.files_done,
        files_total=progress.files_total,
        instant=progress.instant,
        average=progress.average,
        files_per_second=progress.files_per_second,
        elapsed=progress.elapsed,
        eta=progress.eta,
        silent=list(progress.silent) or UNSET,
    )


def failure_view(failure: AttemptFailure, type_: JobType) -> FailureView:
    """A failure, with a hint for the type of the job."""
    return FailureView(
        scope=failure.scope.value,
        code=failure.code.value,
        retryable=failure.retryable,
        hint=hint_for(failure.code, type_),
        message=failure.message,
    )


def skipped_view(job_id: int, note: ListingNote) -> SkippedView:
    skipped = note.skipped
    return SkippedView(
        id=note.number,
        job_id=job_id,
        path=skipped.path,
        type=skipped.type,
        code=skipped.code,
        reason=skipped.reason,
        count=skipped.count,
    )


def element_view(element: ElementRecord, job: JobRecord) -> ElementView:
    """An element, without its listing."""
    failure = None if element.status is JobStatus.DONE else element.failure
    return ElementView(
        id=element.id,
        job_id=element.job_id,
        src_filepath=element.src_filepath,
        dst_filepath=UNSET if element.dst_filepath is None else element.dst_filepath,
        size=element.size,
        max_tries=element.max_tries,
        attempts=element.attempts,
        type=element.type.name,
        status=element.status.name,
        timestamp=element.timestamp.replace(microsecond=0),
        not_before=whole_seconds(element.not_before),
        # Before, it is the one that was asked for.
        checksum=element.checksum if element.status is JobStatus.DONE else None,
        already_there=element.already_there,
        planned=UNSET if element.planned is None else element.planned.value,
        failure=None if failure is None else failure_view(failure, job.type),
    )


def element_status_view(element: ElementRecord, motion: ElementMotion | None) -> ElementStatusView:
    """Status of an element, with the progress of its transfer (None if no node runs it) or of its last attempt."""
    progress = None if motion is None else motion.progress
    if element.status is not JobStatus.RUNNING:
        # Files that existed already were not transferred: they have no rate.
        transferred = 0 if element.already_there else element.transferred
        elapsed = element.elapsed_s
        average = transferred / elapsed if transferred is not None and elapsed and not element.already_there else None
        progress = ElementProgress(transferred, None, average, elapsed)
    elif progress is None:
        progress = ElementProgress(None, None, None, None)
    return ElementStatusView(
        jobid=element.job_id,
        elementid=element.id,
        status=element.status.name,
        attempts=element.attempts,
        transferred=progress.transferred,
        instant=progress.instant,
        average=progress.average,
        elapsed=progress.elapsed,
        silent=UNSET if motion is None or motion.silent is None else motion.silent,
    )


def credential_view(record: CredentialRecord) -> CredentialView:
    """A credential, without its secret."""
    return CredentialView(
        id=record.id,
        kind=record.kind.value,
        subject=record.subject,
        site=None if record.site_id == ALL_SITES else record.site_id,
        label=record.label,
        valid_until=whole_seconds(record.valid_until),
        stored_at=record.stored_at.replace(microsecond=0),
        voms=[VomsView(vo=each["vo"], fqans=each["fqans"]) for each in record.details.get("voms", ())],
        account=record.details.get("account"),
        public_key=record.details.get("public_key"),
    )


def route_view(state: RouteState, node: str | None) -> RouteView:
    return RouteView(
        source=state.route.source,
        destination=state.route.destination,
        running=state.running,
        limit=state.limit,
        least=state.least,
        most=state.most,
        throughput=state.throughput,
        unit=state.unit,
        reason=state.reason,
        decided_at=state.decided_at.replace(microsecond=0),
        changed_at=state.changed_at.replace(microsecond=0),
        node=node,
    )


def site_view(api: ApiContext, site: Site, *, with_health: bool = False) -> SiteView:
    now, directory = api.clock(), api.site_directory
    state, reason = "ok", None
    sentences = (directory.health.sentence(site, protocol, now) for protocol in sorted(site.endpoints))
    if unavailable := [sentence for sentence in sentences if sentence is not None]:
        state, reason = "paused", "; ".join(unavailable)
    drained = directory.restriction(RestrictionKind.SITE, site.id)
    if drained is not None:
        state, reason = "drained", drained.message
    return SiteView(
        id=site.id,
        name=site.name,
        description=site.description,
        default_folder=site.default_folder,
        protocols=[protocol.name for protocol in sorted(site.endpoints)],
        endpoints={protocol.name: site.endpoints[protocol] for protocol in sorted(site.endpoints)},
        alternatives={protocol.name: list(urls) for protocol, urls in sorted(site.alternatives.items())},
        owner=site.owner_id,
        public=site.public,
        limit_in=site.limit_in,
        limit_out=site.limit_out,
        authorities=list(_authority_subjects(site.authorities)),
        myproxy=site.myproxy,
        mover=site.mover.value,
        tape=site.tape,
        fts=site.fts,
        oidc=None if site.oidc is None else _oidc_view(site.oidc),
        state=state,
        reason=reason,
        health=_endpoint_views(api, site) if with_health else UNSET,
    )


def _oidc_view(oidc: OidcSettings) -> OidcView:
    return OidcView(
        issuer=oidc.issuer,
        client_id=oidc.client_id,
        has_secret=oidc.has_secret,
        scope=oidc.scope,
        audience=list(oidc.audiences),
        base_path=oidc.base_path,
        exchange=oidc.exchange,
    )


def check_view(check: EndpointCheck) -> CheckView:
    return CheckView(
        protocol=check.endpoint.protocol.name,
        url=check.endpoint.url,
        ok=check.failure is None,
        reachable=check.reachable,
        login=check.login,
        listing=check.listing,
        seconds=round(check.seconds, 3),
        failure=None if check.failure is None else failure_view(check.failure, JobType.LIST),
    )


def _endpoint_views(api: ApiContext, site: Site) -> list[EndpointView]:
    return [
        EndpointView(
            protocol=endpoint.protocol.name,
            url=endpoint.url,
            state=health.phase.value,
            failures=health.failures,
            failing_since=whole_seconds(health.failing_since),
            next_try=whole_seconds(health.next_try) if health.phase is BreakerState.OPEN else None,
            reason=health.reason,
        )
        for endpoint, health in api.site_directory.health.of_site(site, api.clock())
    ]


@lru_cache(maxsize=256)
def _authority_subjects(pem: str) -> tuple[str, ...]:
    return tuple(dn(certificate.subject) for certificate in read_authorities(pem)) if pem else ()
