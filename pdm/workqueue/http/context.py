"""Context of request handlers: the parts of the service that they use, and their caches."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Protocol, TypeVar

from attrs import define, field, frozen
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.defer import TimeoutError as DeferredTimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure

from pdm.workqueue.certificates.myproxy import MyProxyLogons
from pdm.workqueue.certificates.trust import Trust
from pdm.workqueue.certificates.vault import Vault
from pdm.workqueue.config.settings import Settings
from pdm.workqueue.domain.credentials import CandidateOfKind, CredentialKind, CredentialNeed, earliest_expiry
from pdm.workqueue.domain.enums import JobProtocol, JobType
from pdm.workqueue.domain.jobs import Counters, JobRecord
from pdm.workqueue.execution.cluster import ClusterLogs, ClusterProgress
from pdm.workqueue.execution.endpoint_checks import EndpointCheck
from pdm.workqueue.execution.event_feed import EventFeed
from pdm.workqueue.execution.notifications import Notifications
from pdm.workqueue.execution.oidc_logins import OidcLogins
from pdm.workqueue.execution.progress_board import ProgressBoard
from pdm.workqueue.execution.service_health import PartFault
from pdm.workqueue.execution.site_directory import SiteDirectory
from pdm.workqueue.execution.streams import RouteState
from pdm.workqueue.http.problems import JobNotFoundError, JobPurgedError
from pdm.workqueue.sites.registry import Site, SiteRegistry
from pdm.workqueue.store import purged_jobs
from pdm.workqueue.store.claim_queries import WaitReason
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.estimates import EstimateBasis
from pdm.workqueue.telemetry.background import start_background
from pdm.workqueue.wire.plans import PlanView

_K = TypeVar("_K", bound=CandidateOfKind)
#: Clients poll a job once a second, and its credential seldom changes.
_EXPIRY_CACHE_LIFETIME = timedelta(seconds=10)
#: Interval in seconds at which a job of a shared database is read again for waiting clients.
_LOOK_AGAIN_S = 0.5
#: When full, the cache is cleared.
_MAX_CACHED_EXPIRIES = 10_000


@frozen
class CredentialExpiry:
    """Earliest expiry among the credentials of a job, and the kind of that credential."""

    at: datetime
    kind: CredentialKind


@define
class ExpiryCache:
    """Recent expiries by user, sites and protocol."""

    _expiries: dict[object, tuple[datetime, CredentialExpiry | None]] = field(factory=dict)

    def find(self, key: object, now: datetime) -> tuple[CredentialExpiry | None] | None:
        """The cached value, in a tuple; None for a miss."""
        cached_at, end = self._expiries.get(key, (None, None))
        return None if cached_at is None or abs(now - cached_at) > _EXPIRY_CACHE_LIFETIME else (end,)

    def store(self, key: object, now: datetime, end: CredentialExpiry | None) -> None:
        if len(self._expiries) >= _MAX_CACHED_EXPIRIES:
            self._expiries.clear()
        self._expiries[key] = (now, end)


def first_expiry(chosen: Mapping[int, _K]) -> CredentialExpiry | None:
    """Earliest expiry of some credentials; None if none expires."""
    at = earliest_expiry(chosen)
    if at is None:
        return None
    return CredentialExpiry(at, next(each.kind for each in chosen.values() if each.valid_until == at))


_T = TypeVar("_T")


@frozen
class CredentialLifetimes:
    """Remaining lifetimes of a credential: below `least` a job is refused, below `expected` it gets a warning."""

    least: timedelta
    expected: timedelta


class RunInThread(Protocol):
    """Runs a blocking function in a thread."""

    def __call__(self, function: Callable[..., _T], /, *args: Any) -> Awaitable[_T]: ...


def _do_nothing(*_: object) -> None:
    pass


async def _resume_nothing(*_: object) -> int:
    return 0


def _no_full_limits(_job: JobRecord, _listing: bool) -> Sequence[str]:
    return ()


def _no_relays(_protocol: JobProtocol) -> frozenset[JobProtocol]:
    return frozenset()


@define(eq=False, kw_only=True)
class ApiContext:
    """The parts of the service that request handlers use."""

    database: Database
    sites: SiteRegistry
    logs: ClusterLogs
    vault: Vault
    settings: Settings
    #: Current time, UTC.
    clock: Callable[[], datetime]
    #: Runs key generation and signature checks outside the reactor's thread.
    in_thread: RunInThread
    #: Notifies the claimer that elements may have become ready.
    wake: Callable[[], None]
    reactor: IReactorTime
    #: Runs a transaction that adds an element to a job: `Claimer.add_element`.
    add_element: Callable[..., Awaitable[Any]]
    #: Notifies the executor that a job's cancellation was committed.
    cancelled: Callable[[int], None]
    #: Ends some elements of a job, which become CANCELLED; returns whether this daemon runs any of them.
    cancel_elements: Callable[[int, Collection[int]], bool]
    #: What this daemon runs.
    progress: ProgressBoard
    #: What all daemons run.
    cluster: ClusterProgress
    #: Whether the peer of a connection is another node of the service, by its certificate.
    is_node: Callable[[Any], Awaitable[bool]]
    #: Streams between sites, their limits, and the reasons for these.
    routes: Callable[[], Sequence[RouteState]]
    #: Credential that a protocol needs at a site; None for none.
    credential_need: Callable[[JobProtocol], CredentialNeed | None]
    supports: Callable[[JobProtocol, JobType], bool]
    #: Current certificate authorities, for delegated proxies.
    trust: Callable[[], Trust]
    myproxy: MyProxyLogons
    logins: OidcLogins
    site_directory: SiteDirectory
    feed: EventFeed
    #: Checks the endpoints of a site with a user's credential.
    check_site: Callable[[int, Site], Awaitable[Sequence[EndpointCheck]]]
    notifications: Notifications
    #: Host name in the service's certificate.
    service_name: Callable[[], str]
    #: Signs bytes with the host key, outside the reactor's thread; a detached JWS.
    sign: Callable[[bytes], Awaitable[str]]
    #: Protocols to which the service can relay copies from a protocol.
    relays_to: Callable[[JobProtocol], frozenset[JobProtocol]] = _no_relays
    #: Notifies the executor that a credential, possibly in use, was removed or replaced.
    credentials_changed: Callable[[], None] = _do_nothing
    #: Continues the retry of a job beyond its first transaction.
    job_retried: Callable[[int], None] = _do_nothing
    #: Notifies the scheduler that a schedule was stored or resumed.
    schedules_changed: Callable[[], None] = _do_nothing
    #: Notifies the watch of deadlines that a job has one.
    deadline_added: Callable[[], None] = _do_nothing
    #: Notifies the executor, and the watch of the ends of holds, that a job is held.
    held: Callable[[JobRecord], None] = _do_nothing
    #: Notifies this daemon that an operator has drained or resumed a node.
    drain_changed: Callable[[], None] = _do_nothing
    #: Resumes held elements of a user, for a site and protocols, from a (job, element) on; returns their number.
    resume: Callable[[int, int, frozenset[JobProtocol], tuple[int, int] | None], Awaitable[int]] = _resume_nothing
    #: Sentences about the limits that keep a job (True: its listing) from starting more work.
    full: Callable[[JobRecord, bool], Sequence[str]] = _no_full_limits
    #: Cache: job → its counters, the time, and why it waited then.
    waiting: dict[int, tuple[Counters, datetime, WaitReason, list[str]]] = field(factory=dict)
    #: Parts of the service that do not work.
    faults: Callable[[], Sequence[PartFault]] = tuple
    #: Whether the daemon starts jobs in spite of these.
    may_claim: Callable[[], bool] = lambda: True
    expiry_cache: ExpiryCache = field(factory=ExpiryCache)
    #: Job → when it ended, and its plan.
    plans: dict[int, tuple[datetime, PlanView]] = field(factory=dict)
    #: Job → when it was read, and what its estimate is taken from.
    estimates: dict[int, tuple[datetime, EstimateBasis]] = field(factory=dict)
    #: What was read of rates, routes and the queue → when, and the result.
    activity: dict[object, tuple[datetime, Any]] = field(factory=dict)

    @property
    def lifetimes(self) -> CredentialLifetimes:
        """Lifetimes that the configuration requires of credentials."""
        credentials = self.settings.credentials
        return CredentialLifetimes(
            timedelta(seconds=credentials.minimum_lifetime_s), timedelta(seconds=credentials.expected_duration_s)
        )

    def protocols_with(self, kind: CredentialKind) -> frozenset[JobProtocol]:
        """Protocols of jobs that may be held for a credential of a kind, at either end."""

        def takes(protocol: JobProtocol) -> bool:
            need = self.credential_need(protocol)
            return need is not None and kind in need.kinds

        return frozenset(
            protocol
            for protocol in JobProtocol
            if self.credential_need(protocol) is None or any(map(takes, {protocol, *self.relays_to(protocol)}))
        )

    def may_see(self, user_id: int, scope: int | None, site: Site) -> bool:
        """Whether a user may see a site; operators, whose scope is None, see all."""
        return scope is None or site.is_open_to(user_id)

    async def job(self, job_id: int, scope: int | None) -> JobRecord:
        """A job that the caller may see, without waiting if it is cached.

        Raises:
            JobNotFoundError: the job does not exist, or is another user's.
            JobPurgedError: it was removed by its age.
        """
        record = await self.database.job(job_id)
        if record is None:
            purged = await self.database.read("find a purged job", purged_jobs.purged_job, job_id, scope)
            if purged is not None:
                raise JobPurgedError(purged)
        if record is None or scope not in (None, record.user_id):
            raise JobNotFoundError(job_id)
        return record

    async def awaited_job(self, job_id: int, scope: int | None, wait_s: float) -> JobRecord:
        """Like `job`, but returns when its status changes, or after ``wait_s``; at once if it has ended."""
        if not wait_s:
            return await self.job(job_id, scope)
        until = self.reactor.seconds() + wait_s
        before = None
        while True:
            # Registered before the job is read, so that no change is missed.
            written = self.database.written(job_id)
            self.feed.watch_jobs()
            try:
                job = await self.job(job_id, scope)
                before = before or job.status
                left_s = until - self.reactor.seconds()
                if job.status is not before or job.status.is_final or left_s <= 0:
                    return job
                # The signal of a change by another daemon may be lost.
                written.addTimeout(min(left_s, _LOOK_AGAIN_S) if self.database.is_shared else left_s, self.reactor)
                with contextlib.suppress(DeferredTimeoutError):
                    await written
            finally:
                written.addErrback(_ignore_cancellation)
                written.cancel()

    async def commit(
        self,
        name: str,
        function: Callable[..., Any],
        *args: Any,
        then: Callable[[_T], None],
        run: Callable[..., Awaitable[_T]] | None = None,
    ) -> _T:
        """Run a transaction by `run` (default: `Database.run`), and after its commit an effect (`then`) of its result.

        A client that disconnects cancels its handler, but not the transaction, whose effect must not be lost: so both
        run in the background and the handler only awaits them.
        """
        watched: Deferred[_T] = Deferred()

        async def work() -> None:
            try:
                result = await (run or self.database.run)(name, function, *args)
            except Exception:
                if watched.called:
                    raise
                watched.errback(Failure())
                return
            try:
                then(result)
            finally:
                watched.callback(result)

        start_background(name, work())
        return await watched


def _ignore_cancellation(failure: Failure) -> None:
    failure.trap(CancelledError)
