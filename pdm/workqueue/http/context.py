"""Context of request handlers: the parts of the service that they use, and their caches."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Protocol, TypeVar

from attrs import define, field, frozen
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from pdm.workqueue.certificates.myproxy import MyProxyLogons
from pdm.workqueue.certificates.trust import Trust
from pdm.workqueue.certificates.vault import Vault
from pdm.workqueue.config.settings import Settings
from pdm.workqueue.domain.credentials import CandidateOfKind, CredentialKind, CredentialNeed, earliest_expiry
from pdm.workqueue.domain.enums import JobProtocol, JobType
from pdm.workqueue.domain.jobs import Counters, JobRecord
from pdm.workqueue.domain.progress import JobProgress
from pdm.workqueue.execution.endpoint_checks import EndpointCheck
from pdm.workqueue.execution.monitoring import PartFault, ProgressBoard
from pdm.workqueue.execution.site_directory import SiteDirectory
from pdm.workqueue.execution.streams import RouteState
from pdm.workqueue.http.access import LogonThrottle
from pdm.workqueue.http.problems import JobNotFoundError
from pdm.workqueue.logstore.store import LogStore
from pdm.workqueue.sites.registry import SiteRegistry
from pdm.workqueue.sites.site import Site
from pdm.workqueue.store.claim_queries import WaitReason
from pdm.workqueue.store.database import Database
from pdm.workqueue.telemetry.background import start_background

_K = TypeVar("_K", bound=CandidateOfKind)
#: A job is asked for once a second, and its credential seldom changes.
_EXPIRY_CACHE_LIFETIME = timedelta(seconds=10)
#: With more known ones all are forgotten.
_MAX_CACHED_EXPIRIES = 10_000


@frozen
class CredentialExpiry:
    """When the first of the credentials of a job ends, and which kind of one that is."""

    at: datetime
    kind: CredentialKind


@define
class ExpiryCache:
    """What was found out a moment ago, by user, sites and what is needed there."""

    _expiries: dict[object, tuple[datetime, CredentialExpiry | None]] = field(factory=dict)

    def find(self, key: object, now: datetime) -> tuple[CredentialExpiry | None] | None:
        """What is known; None if nothing is, or not any more."""
        asked_at, end = self._expiries.get(key, (None, None))
        return None if asked_at is None or abs(now - asked_at) > _EXPIRY_CACHE_LIFETIME else (end,)

    def note(self, key: object, now: datetime, end: CredentialExpiry | None) -> None:
        """Remember for a moment."""
        if len(self._expiries) >= _MAX_CACHED_EXPIRIES:
            self._expiries.clear()
        self._expiries[key] = (now, end)


def first_expiry(chosen: Mapping[int, _K]) -> CredentialExpiry | None:
    """The first end of some credentials; None if none ends."""
    at = earliest_expiry(chosen)
    return (
        None
        if at is None
        else CredentialExpiry(at, next(each.kind for each in chosen.values() if each.valid_until == at))
    )


def expiry_warning(progress: JobProgress, end: CredentialExpiry | None, now: datetime) -> str | None:
    """What a user should know of a credential that ends before the job does; None for nothing."""
    if end is None or progress.eta is None or end.at >= now + timedelta(seconds=progress.eta):
        return None
    return (
        f"the {end.kind.words} ends at {end.at:%Y-%m-%dT%H:%M:%SZ}, and at the present rate this job needs until"
        f" {now + timedelta(seconds=progress.eta):%Y-%m-%dT%H:%M:%SZ}: what is left is held then, and goes on by itself"
        f" when it is renewed ({end.kind.remedy})"
    )


_T = TypeVar("_T")


@frozen
class CredentialLifetimes:
    """How long a credential is to last.

    Attributes:
        least: with less, a job is refused.
        expected: with less, it is accepted with a warning.
    """

    least: timedelta
    expected: timedelta


class RunInThread(Protocol):
    """Runs a function that takes long in a thread."""

    def __call__(self, function: Callable[..., _T], /, *args: Any) -> Awaitable[_T]: ...


def _do_nothing(*_: object) -> None:
    pass


async def _resume_nothing(*_: object) -> int:
    return 0


def _no_full_limits(_job: JobRecord, _listing: bool) -> Sequence[str]:
    return ()


def _no_relays(_protocol: JobProtocol) -> frozenset[JobProtocol]:
    return frozenset()


@define(eq=False)
class ApiContext:
    """The service as handlers see it.

    Attributes:
        clock: the present moment, UTC.
        in_thread: runs key generation and signature checks off the reactor.
        wake: says that there may be something to claim.
        cancelled: says that the cancellation of a job is in the database.
        progress: how far that is what this daemon runs.
        routes: how many streams of work it runs between which sites, and why.
        credential_need: what a protocol needs at a site; None for nothing.
        supports: whether the service can carry out a job type by a protocol.
        trust: the authorities in force, for delegated proxies.
        myproxy: fetches proxies from the MyProxy servers of sites.
        logons: who has sent wrong passwords to them.
        catalogue: which sites can be reached, and what operators have restricted.
        check_site: looks for a user at what the endpoints of a site can do.
        relays_to: to which protocols copies by another can go, through the service.
        credentials_changed: says that a credential was removed or replaced, which may be in use.
        job_retried: says that a job is being retried, of which there may be more to do.
        full: the limits that let no more of a job (of its listing) begin now, a sentence each.
        waiting: why jobs wait, by number, as it was found last: with their counters and the moment.
        expiry_cache: when credentials of jobs end that run.
        faults: parts of the service that do not work.
        may_claim: whether jobs are begun in spite of them.
        resume: lets go on what is held of a user, at a site, by some protocols, from some place on.
    """

    database: Database
    sites: SiteRegistry
    logstore: LogStore
    vault: Vault
    settings: Settings
    clock: Callable[[], datetime]
    in_thread: RunInThread
    wake: Callable[[], None]
    cancelled: Callable[[int], None]
    progress: ProgressBoard
    routes: Callable[[], Sequence[RouteState]]
    credential_need: Callable[[JobProtocol], CredentialNeed | None]
    supports: Callable[[JobProtocol, JobType], bool]
    trust: Callable[[], Trust]
    myproxy: MyProxyLogons
    catalogue: SiteDirectory
    check_site: Callable[[int, Site], Awaitable[Sequence[EndpointCheck]]]
    relays_to: Callable[[JobProtocol], frozenset[JobProtocol]] = _no_relays
    credentials_changed: Callable[[], None] = _do_nothing
    job_retried: Callable[[int], None] = _do_nothing
    resume: Callable[[int, int, frozenset[JobProtocol], tuple[int, int] | None], Awaitable[int]] = _resume_nothing
    full: Callable[[JobRecord, bool], Sequence[str]] = _no_full_limits
    waiting: dict[int, tuple[Counters, datetime, WaitReason, list[str]]] = field(factory=dict)
    faults: Callable[[], Sequence[PartFault]] = tuple
    may_claim: Callable[[], bool] = lambda: True
    expiry_cache: ExpiryCache = field(factory=ExpiryCache)
    logons: LogonThrottle = field(factory=LogonThrottle)

    @property
    def lifetimes(self) -> CredentialLifetimes:
        """What a credential must and should still have for a job."""
        credentials = self.settings.credentials
        return CredentialLifetimes(
            timedelta(seconds=credentials.minimum_lifetime_s), timedelta(seconds=credentials.expected_duration_s)
        )

    def protocols_with(self, kind: CredentialKind) -> frozenset[JobProtocol]:
        """The protocols of jobs that may have waited for a credential of a kind, at either end."""

        def takes(protocol: JobProtocol) -> bool:
            need = self.credential_need(protocol)
            return need is not None and kind in need.kinds

        return frozenset(
            protocol
            for protocol in JobProtocol
            if self.credential_need(protocol) is None or any(map(takes, {protocol, *self.relays_to(protocol)}))
        )

    def may_see(self, user_id: int, scope: int | None, site: Site) -> bool:
        """Whether a user sees a site; operators, whose scope is None, see all."""
        return scope is None or site.is_open_to(user_id)

    async def job(self, job_id: int, scope: int | None) -> JobRecord:
        """A job that the caller may see; out of memory where it is there, without waiting.

        Raises:
            JobNotFoundError: there is none.
        """
        record = await self.database.job(job_id)
        if record is None or scope not in (None, record.user_id):
            raise JobNotFoundError(job_id)
        return record

    async def commit(self, name: str, function: Callable[..., _T], *args: Any, then: Callable[[_T], None]) -> _T:
        """Run a transaction that has an effect, and the effect after its commit.

        A client that goes away cancels its handler; the transaction is committed all the same, and what follows from
        it must not get lost. So both belong to the transaction, and the handler only watches.

        Args:
            name: of the transaction.
            function: what it does.
            args: of the function.
            then: the effect; gets the result.
        """
        watched: Deferred[_T] = Deferred()

        async def work() -> None:
            try:
                result = await self.database.run(name, function, *args)
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
