"""Runs claimed batches: finds the sites, the credential and an agent."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path

from attrs import Factory, define, field, frozen
from twisted.internet.defer import DeferredList
from twisted.internet.threads import deferToThread
from twisted.logger import Logger

from pdm.workqueue.agents.pool import AgentKind, AgentPool
from pdm.workqueue.agents.process import AgentMissingError, AgentProcess, AgentStartError, LeaseOverError
from pdm.workqueue.domain.credentials import CredentialKind
from pdm.workqueue.domain.enums import JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import Batch, ClaimToken, JobRecord
from pdm.workqueue.domain.limits import (
    ClaimExclusions,
    StreamSlot,
)
from pdm.workqueue.domain.sites import RestrictionKind
from pdm.workqueue.execution.attempts import AttemptContext
from pdm.workqueue.execution.batch import RunningBatch
from pdm.workqueue.execution.batch_sizes import BatchSizes
from pdm.workqueue.execution.batch_verdicts import Ending
from pdm.workqueue.execution.credentials import Credentials
from pdm.workqueue.execution.endpoint_health import SiteEndpoint
from pdm.workqueue.execution.job_changes import JobChanges
from pdm.workqueue.execution.job_listings import JobListings
from pdm.workqueue.execution.listing import ListingIntake
from pdm.workqueue.execution.maintenance import Maintenance
from pdm.workqueue.execution.preparing import NotPossibleError, Preparation, missing_mover
from pdm.workqueue.execution.service_health import ServicePart, check_resources
from pdm.workqueue.execution.site_directory import blocked_sites, job_moved_by_tools, job_mover, protocols_reaching
from pdm.workqueue.execution.streams import Streams
from pdm.workqueue.execution.transfer_services import FTS_MOVERS
from pdm.workqueue.movers.dummy import DummyMover
from pdm.workqueue.sites.registry import SiteRegistry
from pdm.workqueue.store import held_elements, holds
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.errors import DatabaseUnavailableError
from pdm.workqueue.telemetry.background import Background, Periodic, following, start_background
from pdm.workqueue.telemetry.logging import log_context
from pdm.workqueue.wire.agent_requests import ListRequest

#: Seconds until a credential that was removed through another daemon is noticed.
_CREDENTIALS_PERIOD_S = 2.0
#: Verdicts that may wait for the database; nothing is claimed above that.
_MOST_UNSETTLED = 2000


async def _nothing_missing() -> Mapping[str, str]:
    return {}


@frozen(kw_only=True)
class ExecutionLimits:
    """How much runs at once.

    Attributes:
        batches: copies, removals and so on, if streams allow; as many more may wait for an agent.
        listings: have a limit of their own.
    """

    batches: int
    listings: int
    batch_elements: int


@define(eq=False, kw_only=True)
class Executor:
    """Runs batches.

    Attributes:
        on_capacity: called when a batch has ended.
        on_work: called when elements in the database became due.
        add_element: runs a transaction that adds an element to a job: `Claimer.add_element`.
        scratch: directory for temporary files.
        restricted: ids of drained sites, or of banned users.
    """

    database: Database
    sites: SiteRegistry
    pool: AgentPool
    credentials: Credentials
    worker: str
    context: AttemptContext
    limits: ExecutionLimits
    streams: Streams
    preparation: Preparation
    on_capacity: Callable[[], None]
    on_work: Callable[[], None]
    add_element: Callable[..., Awaitable[bool]]
    scratch: Path
    batch_sizes: BatchSizes = field(
        init=False,
        default=Factory(lambda self: BatchSizes(sites=self.sites, most=self.limits.batch_elements), takes_self=True),
    )
    restricted: Callable[[RestrictionKind], Collection[int]] = lambda kind: ()
    find_missing: Callable[[], Awaitable[Mapping[str, str]]] = _nothing_missing
    #: Batch → fingerprint of its credential; empty for none, or until it is known.
    _running: dict[RunningBatch, str] = field(factory=dict)
    #: Slots of batches that are no listings, and when they were claimed.
    _slots: dict[RunningBatch, tuple[StreamSlot, float]] = field(factory=dict)
    #: Jobs that were cancelled since the running claims were sent.
    _just_cancelled: set[int] = field(factory=set)
    #: And jobs that were held.
    _just_held: set[int] = field(factory=set)
    _credentials_watch: Periodic | None = None
    _background: Background = field(factory=Background)
    _listings: JobListings = field(
        init=False,
        default=Factory(
            lambda self: JobListings(
                database=self.database,
                worker=self.worker,
                clock=self.context.clock,
                scratch=self.scratch,
                add_element=self.add_element,
                on_elements=self.on_capacity,
            ),
            takes_self=True,
        ),
    )
    changes: JobChanges = field(
        init=False,
        default=Factory(
            lambda self: JobChanges(
                database=self.database,
                clock=self.context.clock,
                preparation=self.preparation,
                on_work=self.on_work,
            ),
            takes_self=True,
        ),
    )
    _maintenance: Maintenance = field(
        init=False,
        default=Factory(
            lambda self: Maintenance(
                reactor=self.context.reactor,
                database=self.database,
                sites=self.sites,
                pool=self.pool,
                preparation=self.preparation,
                changes=self.changes,
                find_missing=self.find_missing,
                give_back_held=self._give_back_held,
            ),
            takes_self=True,
        ),
    )
    _stopping: bool = False
    _log: Logger = field(factory=Logger)

    # -- life

    def start(self) -> None:
        self._maintenance.start()
        self._credentials_watch = Periodic(
            self.context.reactor, "check credentials in use", _CREDENTIALS_PERIOD_S, self._check_credentials
        )
        self._credentials_watch.start()

    async def stop(self) -> None:
        """End all batches; elements that are not done go back to the queue."""
        self._stopping = self.changes.is_stopping = True
        self._maintenance.leftovers.stop()
        # First: the tasks below may themselves wait for an agent.
        await self.end_all(Ending.STOPPED)
        await self._maintenance.stop()
        if self._credentials_watch is not None:
            await self._credentials_watch.stop()
        # These tasks use the database, which is closed next.
        await self.changes.stop()
        await self._background.over()

    async def end_all(self, why: Ending) -> None:
        running = list(self._running)
        for batch in running:
            batch.end(why)
        await DeferredList([following(batch.finished) for batch in running])

    def capacity(self) -> tuple[int, int]:
        """How many more batches and listings may begin; no batch while many verdicts wait for the database."""
        listing = sum(1 for batch in self._running if batch.batch.type is JobType.LIST)
        batches = self.streams.capacity()
        if self.context.settler.backlog > _MOST_UNSETTLED:
            batches = 0
        return batches, self.limits.listings - listing

    def exclusions(self, now: datetime) -> ClaimExclusions:
        """What may not start now."""
        health = self.context.health
        changes = health.next_change(now), self.preparation.services.next_change(now)
        return ClaimExclusions(
            paused=blocked_sites(self.sites, health.paused(now)),
            probed=blocked_sites(self.sites, health.probed(now)),
            drained=frozenset(self.restricted(RestrictionKind.SITE)),
            banned=frozenset(self.restricted(RestrictionKind.USER)),
            next_change=min(filter(None, changes), default=None),
        )

    def reached_limits(self, job: JobRecord, listing: bool) -> list[str]:
        """Limits of this daemon that prevent more of a job from starting, a sentence each; ``listing``: its listing."""
        if not listing:
            services = self.preparation.services
            service = services.service_of(job)
            return self.streams.reached_limits(job) if service is None else services.reached_limits(service)
        most = self.limits.listings
        return [] if self.capacity()[1] > 0 else [f"all {most} listings that may run at once are running"]

    # -- work

    def before_claims(self) -> None:
        """Claims are sent now: they see what `cancel` and `held` were called for before."""
        self._just_cancelled.clear()
        self._just_held.clear()

    @property
    def running_counts(self) -> tuple[int, int]:
        """Number of batches that run, and of their attempts."""
        return len(self._running), len(self.attempts())

    def attempts(self) -> set[ClaimToken]:
        """Attempts that run here."""
        return {token for running in self._running for token in running.verdicts.attempts_open()}

    def _running_of(self, job_id: int) -> list[RunningBatch]:
        return [running for running in self._running if job_id in running.batch.jobs]

    def begin(self, batch: Batch, behind: RunningBatch | None = None) -> None:
        """Run a claimed batch in the background.

        ``behind``: the listing that it follows; if the listing is about to end, the batch gets its agent.
        """
        services = self.preparation.services
        service = services.service_of_batch(batch)
        by_tools = job_moved_by_tools(batch.job, self.sites)
        mover = FTS_MOVERS[batch.job.protocol] if service else job_mover(batch.job, self.sites, by_tools=by_tools)
        running = RunningBatch(
            batch=batch,
            mover=mover or DummyMover(),
            context=self.context,
            service=service,
            services=services,
            wake_waiting=self.pool.wake_waiting,
        )
        if mover is None:
            running.refuse(missing_mover(batch.job.protocol))
            return
        if behind is not None:
            behind.verdicts.is_followed = True
        self._running[running] = ""
        self.context.settler.counts.begun(batch, self.context.clock())
        # Counted at once, for the next claim.
        slot = None
        if service is not None:
            slot = services.slot(service)
        elif batch.type is not JobType.LIST:
            slot = self.streams.slot(batch)
        if slot is not None:
            self._slots[running] = slot, self.context.reactor.seconds()
        with log_context(job=batch.job.id if len(batch.jobs) == 1 else None):
            start_background("run a batch", self._run(running, slot, behind))
        for job_id in self._just_cancelled.intersection(batch.jobs):
            # The job was cancelled after its claim and before the answer.
            running.cancel(job_id)
        for job_id in self._just_held.intersection(batch.jobs):
            running.withdraw(job_id)

    def cancel(self, job_id: int) -> None:
        """End what runs of a job that is cancelled in the database."""
        self._end_job(job_id)
        self.changes.continue_change(job_id)

    def cancel_elements(self, job_id: int, numbers: Collection[int]) -> bool:
        """End some elements of a job; they are CANCELLED once that is done. Returns whether any of them run here."""
        found = [running.cancel(job_id, numbers) for running in self._running_of(job_id)]
        return any(found)

    def cancelled_elsewhere(self, job_id: int) -> None:
        """End what runs of a job that another daemon has cancelled."""
        self._background.start("end a cancelled job", self._end_if_cancelled(job_id))

    async def _end_if_cancelled(self, job_id: int) -> None:
        job = await self.database.job(job_id)
        # The signal may be late: the job may run again by now.
        if job is not None and job.cancel_requested:
            self._end_job(job_id)

    def _end_job(self, job_id: int) -> None:
        self._just_cancelled.add(job_id)
        for running in self._running_of(job_id):
            running.cancel(job_id)

    def held(self, job_id: int) -> None:
        """Return what has not begun of a job that is held in the database; what runs ends by itself."""
        self._just_held.add(job_id)
        for running in self._running_of(job_id):
            running.withdraw(job_id)

    def held_elsewhere(self, job_id: int | None) -> None:
        """Return what has not begun of a job, None for any, that another daemon has held."""
        # The answer to a claim of a job that is not known here may be on its way.
        self._background.start("give back a held job", self._give_back_held({job_id} if job_id is not None else None))

    async def _give_back_held(self, numbers: Collection[int] | None = None) -> None:
        """Return what has not begun of those of some jobs, None for all that run here, that are held now."""
        if numbers is None:
            numbers = {number for running in self._running for number in running.batch.jobs}
        if numbers:
            # A signal may be late: the job may be resumed by now.
            for job_id in await self.database.read("find held jobs", holds.held_among, numbers):
                self.held(job_id)

    def requeue_waiting(self, waited_s: float) -> None:
        """Return batches to the queue that have waited here for so many seconds, for nodes that are idle."""
        before = self.context.reactor.seconds() - waited_s
        for running, (slot, claimed_at) in list(self._slots.items()):
            if not slot.has_stream and claimed_at <= before:
                running.end(Ending.GIVEN_BACK)

    def requeue_not_begun(self) -> None:
        """Return all that has not begun to the queue: this node shall start nothing more."""
        self.requeue_waiting(0.0)
        for running in list(self._running):
            running.return_elements(running.not_begun())

    def on_streams(self) -> list[tuple[RunningBatch, StreamSlot]]:
        """The batches that have a stream."""
        return [(running, slot) for running, (slot, _) in self._slots.items() if slot.has_stream]

    async def token_stored(self, user_id: int, site_id: int, resumed: held_elements.Resumed) -> None:
        """A login has a new token: resume the rest of what is HELD for it, and let running batches use it."""
        await self._check_credentials()
        await self.changes.resume(
            user_id, site_id, protocols_reaching(self.preparation.access)[CredentialKind.TOKEN], resumed.after
        )
        self.on_work()

    async def _run(self, running: RunningBatch, slot: StreamSlot | None, behind: RunningBatch | None = None) -> None:
        agent: AgentProcess | None = None
        kind: AgentKind | None = None
        endpoints: Collection[SiteEndpoint] = ()
        intake: ListingIntake | None = None
        try:
            if behind is not None and behind.is_listed:
                await following(behind.finished)
            prepared = await self.preparation.prepare(running.batch, running.service)
            kind, endpoints = prepared.kind, prepared.endpoints.values()
            self._running[running] = kind.credential
            self.context.health.begin(endpoints)
            request = prepared.permitted_request
            running.verdicts.exclude({**prepared.built.refused, **prepared.unfit}, prepared.built.postponed)
            if request is not None:
                is_wanted = running.is_wanted
                # One that waits for an FTS3 keeps no other batch from its agent.
                alone = slot is None or running.service is not None
                agent = await self.pool.acquire(kind, alone=alone, slot=slot, is_wanted=is_wanted)
                if isinstance(request, ListRequest):
                    begin = partial(self.begin, behind=running)
                    intake = await self._listings.intake(running.batch, agent, request, prepared.options, begin)
            if running.ending is not None or request is None or agent is None:
                running.drop()
            else:
                running.run(agent, request, intake, prepared.endpoints)
            await following(running.finished)
            self.batch_sizes.ended(running)
        except NotPossibleError as error:
            running.refuse(error.failure)
        except LeaseOverError:
            running.end(Ending.LAPSED)
            running.drop()
        except AgentMissingError as error:
            self._log.error("no helper can be started: {why}", why=str(error))
            message = "the service cannot run its helpers: a program is missing"
            self._refuse(running, AttemptFailure(FailureScope.SERVICE, FailureCode.DEPENDENCY_MISSING, message))
        except AgentStartError as error:
            if running.ending is None and kind is not None and not self._stopping:
                self._report_helpers(kind, error)
            self._refuse(
                running, AttemptFailure(FailureScope.SERVICE, FailureCode.INTERNAL, "no helper could be started")
            )
        except Exception as error:
            if not isinstance(error, (DatabaseUnavailableError, OSError)):
                self._log.failure("a batch of job {job} could not be started", job=running.batch.job.id)
            self._refuse(running, self.context.service_health.blame(error, ServicePart.CREDENTIAL_FILES))
        finally:
            self._running.pop(running, None)
            self._slots.pop(running, None)
            self.context.service_health.tally.add(self.context.board.clock(), worked=running.verdicts.elements)
            if intake is not None:
                intake.close()
            self.context.health.end(endpoints)
            if slot is not None:
                slot.leave()
                if running.seconds and running.batch.is_of_its_kind and running.service is None:
                    self.streams.ended(running.batch, running.verdicts.run_so_far(running.seconds))
            if agent is not None and kind is not None:
                self.pool.release(agent, kind)
            if kind is not None:
                self.preparation.release_credential(kind)
            # Waiting batches may need another kind of agent, and this agent may be dead.
            self.pool.wake_waiting()
            self.on_capacity()

    def credentials_changed(self) -> None:
        """A user has removed or replaced a credential."""
        self._background.start("check credentials in use", self._check_credentials())

    async def _check_credentials(self) -> None:
        """End batches whose credentials were removed or replaced; they are run again with the current ones."""
        outdated = await self.credentials.outdated()
        for credential in outdated.ended | outdated.renewed:
            self.pool.retire(credential)
        for running, credential in list(self._running.items()):
            if credential in outdated.ended and running.ending is None:
                self._log.info("attempts with a removed credential are ended", job=running.batch.job.id)
                running.end(Ending.CREDENTIAL)

    def _report_helpers(self, kind: AgentKind, error: AgentStartError) -> None:
        async def check() -> None:
            await deferToThread(check_resources)
            # Without the user's credentials the agent gets no request.
            await self.pool.try_start(AgentKind(kind.helper, "", {}))

        self.context.service_health.report(ServicePart.HELPERS, str(error), check)

    @staticmethod
    def _refuse(running: RunningBatch, failure: AttemptFailure) -> None:
        if running.ending is not None:
            running.drop()
        else:
            running.refuse(failure)

    def clean_up_soon(self) -> None:
        """Leftover files may exist, for example of cancelled elements."""
        self._background.start("remove leftover files", self._maintenance.leftovers.remove())
