"""What handlers may use."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from typing import Any, Protocol, TypeVar

from attrs import define, field, frozen
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from pdm.workqueue.certificates.myproxy import MyProxyLogons
from pdm.workqueue.certificates.trust import Trust
from pdm.workqueue.certificates.vault import Vault
from pdm.workqueue.config.settings import Settings
from pdm.workqueue.domain.credentials import CredentialKind, Need
from pdm.workqueue.domain.enums import JobProtocol, JobType
from pdm.workqueue.domain.jobs import Counters, JobRecord
from pdm.workqueue.execution.catalogue import Catalogue
from pdm.workqueue.execution.checking import DoorCheck
from pdm.workqueue.execution.progress import ProgressBoard
from pdm.workqueue.execution.streams import RouteState
from pdm.workqueue.http.lasting import KnownEnds
from pdm.workqueue.http.logon_guard import LogonGuard
from pdm.workqueue.http.problems import JobNotFoundError
from pdm.workqueue.logstore.files import LogStore
from pdm.workqueue.sites.registry import Site, SiteRegistry
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.queue_place import Waiting
from pdm.workqueue.telemetry.background import start_background

_T = TypeVar("_T")


@frozen
class Lifetimes:
    """How long a credential is to last.

    Attributes:
        least: with less, a job is refused.
        expected: with less, it is accepted with a warning.
    """

    least: timedelta
    expected: timedelta


class InThread(Protocol):
    """Runs a function that takes long in a thread."""

    def __call__(self, function: Callable[..., _T], /, *args: Any) -> Awaitable[_T]: ...


def _no_matter(*_: object) -> None:
    pass


async def _none_left(*_: object) -> int:
    return 0


def _never_full(_job: JobRecord, _listing: bool) -> Sequence[str]:
    return ()


def _nowhere(_protocol: JobProtocol) -> frozenset[JobProtocol]:
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
        steered: says that a job is being retried, of which there may be more to do.
        full: the limits that let no more of a job (of its listing) begin now, a sentence each.
        waiting: why jobs wait, by number, as it was found last: with their counters and the moment.
        known_ends: when credentials of jobs end that run.
        resume: lets go on what is held of a user, at a site, by some protocols, from some place on.
    """

    database: Database
    sites: SiteRegistry
    logstore: LogStore
    vault: Vault
    settings: Settings
    clock: Callable[[], datetime]
    in_thread: InThread
    wake: Callable[[], None]
    cancelled: Callable[[int], None]
    progress: ProgressBoard
    routes: Callable[[], Sequence[RouteState]]
    credential_need: Callable[[JobProtocol], Need | None]
    supports: Callable[[JobProtocol, JobType], bool]
    trust: Callable[[], Trust]
    myproxy: MyProxyLogons
    catalogue: Catalogue
    check_site: Callable[[int, Site], Awaitable[Sequence[DoorCheck]]]
    relays_to: Callable[[JobProtocol], frozenset[JobProtocol]] = _nowhere
    credentials_changed: Callable[[], None] = _no_matter
    steered: Callable[[int], None] = _no_matter
    resume: Callable[[int, int, frozenset[JobProtocol], tuple[int, int] | None], Awaitable[int]] = _none_left
    full: Callable[[JobRecord, bool], Sequence[str]] = _never_full
    waiting: dict[int, tuple[Counters, datetime, Waiting, list[str]]] = field(factory=dict)
    known_ends: KnownEnds = field(factory=KnownEnds)
    logons: LogonGuard = field(factory=LogonGuard)

    @property
    def lifetimes(self) -> Lifetimes:
        """What a credential must and should still have for a job."""
        credentials = self.settings.credentials
        return Lifetimes(
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
