"""Carries claimed batches out: finds the sites, the credential and an agent, and looks after what crashes leave."""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import datetime

from attrs import define, field, frozen
from twisted.internet.defer import Deferred, DeferredList
from twisted.logger import Logger

from pdm.workqueue.agents.pool import AgentKind, AgentPool
from pdm.workqueue.agents.process import AgentProcess, AgentStartError, Borrower
from pdm.workqueue.domain.batching import FIRST_SIZE, WorkKind, kind_of, next_size
from pdm.workqueue.domain.bounds import Bounds
from pdm.workqueue.domain.catalogue import Restricted
from pdm.workqueue.domain.credentials import ALL_SITES
from pdm.workqueue.domain.enums import JobProtocol, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, Scope
from pdm.workqueue.domain.jobs import Batch, ElementRecord, JobRecord
from pdm.workqueue.domain.paths import decoded
from pdm.workqueue.domain.planning import plan_for
from pdm.workqueue.domain.streams import Place
from pdm.workqueue.execution.attempt import AttemptTools
from pdm.workqueue.execution.batch import Ending, RunningBatch
from pdm.workqueue.execution.credentials import Credentials
from pdm.workqueue.execution.ends import kept_out, takers
from pdm.workqueue.execution.health import Door
from pdm.workqueue.execution.listing import ListingIntake
from pdm.workqueue.execution.preparing import NotPossibleError, Preparation, Prepared
from pdm.workqueue.execution.streams import Streams
from pdm.workqueue.movers import MOVERS
from pdm.workqueue.sites.registry import SiteRegistry
from pdm.workqueue.store import claims, listings
from pdm.workqueue.store.database import Database
from pdm.workqueue.telemetry.background import Background, Periodic, following, start_background
from pdm.workqueue.telemetry.job_lines import log_ended
from pdm.workqueue.telemetry.logging import log_context
from pdm.workqueue.wire import agent_messages as wire
from pdm.workqueue.wire.options import RemoveOptions

#: Files of crashed attempts that are looked after in one go.
_RESIDUES_AT_ONCE = 500
_JANITOR_PERIOD_S = 20.0
#: Seconds until it is seen that a credential was removed through another daemon.
_CREDENTIALS_PERIOD_S = 2.0
#: Results that may wait for the database; as many again are at work.
_MOST_UNSETTLED = 2000


@frozen
class ExecutionLimits:
    """How much runs at once.

    Attributes:
        batches: copies, removals and the like at once, as far as streams allow; as many may wait, each for its agent.
        listings: listings at once, on a lane of their own.
        batch_elements: elements of one batch at most.
    """

    batches: int
    listings: int
    batch_elements: int


@define(eq=False)
class Executor:
    """Runs batches.

    Attributes:
        streams: say where more may run.
        preparation: finds what a batch needs.
        on_room: called when a batch has ended or new elements stand in the database.
        batch_sizes: elements of the next batch, by kind of work.
        restricted: numbers of the sites, or users, that operators have put out of use.
    """

    database: Database
    sites: SiteRegistry
    pool: AgentPool
    credentials: Credentials
    worker: str
    tools: AttemptTools
    limits: ExecutionLimits
    streams: Streams
    preparation: Preparation
    on_room: Callable[[], None]
    batch_sizes: dict[WorkKind, int] = field(factory=dict)
    restricted: Callable[[Restricted], Collection[int]] = lambda kind: ()
    #: With the fingerprint of the credential that they use; empty for none, or as long as it is not known.
    _running: dict[RunningBatch, str] = field(factory=dict)
    _janitor: Periodic | None = None
    _credentials_watch: Periodic | None = None
    _cleaning: bool = False
    _background: Background = field(factory=Background)
    _steering: set[int] = field(factory=set)
    _stopping: bool = False
    _log: Logger = field(factory=Logger)

    # -- life

    def start(self) -> None:
        self._janitor = Periodic(self.tools.reactor, "take up what was left", _JANITOR_PERIOD_S, self._take_up)
        self._janitor.start()
        self._background.start("take up what was left", self._take_up())
        self._credentials_watch = Periodic(
            self.tools.reactor, "look for removed credentials", _CREDENTIALS_PERIOD_S, self._look_at_credentials
        )
        self._credentials_watch.start()

    async def stop(self) -> None:
        """End all batches; what was not done goes back to the queue."""
        self._stopping = True
        # First: what is waited for below may itself wait for an agent.
        await self.end_all(Ending.STOPPED)
        if self._janitor is not None:
            await self._janitor.stop()
        if self._credentials_watch is not None:
            await self._credentials_watch.stop()
        # All of it works with the database, which is closed soon.
        await self._background.over()

    async def end_all(self, why: Ending) -> None:
        running = list(self._running)
        for batch in running:
            batch.end(why)
        await DeferredList([following(batch.finished) for batch in running])

    def room(self) -> tuple[int, int]:
        """How many more batches, and how many more listings, may begin; no batch while results wait to be stored."""
        listing = sum(1 for batch in self._running if batch.batch.type is JobType.LIST)
        batches = self.streams.room()
        if self.tools.settler.backlog > _MOST_UNSETTLED:
            batches = 0
        return batches, self.limits.listings - listing

    def bounds(self, now: datetime) -> Bounds:
        """What may not begin at a moment."""
        health = self.tools.health
        return Bounds(
            paused=kept_out(self.sites, health.paused(now)),
            probed=kept_out(self.sites, health.probed(now)),
            drained=frozenset(self.restricted(Restricted.SITE)),
            banned=frozenset(self.restricted(Restricted.USER)),
            next_change=health.next_change(now),
        )

    def full(self, job: JobRecord, listing: bool) -> list[str]:
        """Limits of this daemon that let no more of a job begin now, a sentence each; ``listing``: of its listing."""
        if not listing:
            return self.streams.full(job)
        most = self.limits.listings
        return [] if self.room()[1] > 0 else [f"all {most} listings that may run at once are running"]

    # -- work

    def begin(self, batch: Batch) -> None:
        """Carry a claimed batch out, in the background."""
        running = RunningBatch(batch, MOVERS[batch.job.protocol], self.tools, on_nearly_done=self.pool.look_again)
        self._running[running] = ""
        # Counted at once: the next claim must know.
        place = None if batch.type is JobType.LIST else self.streams.place(batch)
        with log_context(job=batch.job.id if len(batch.jobs) == 1 else None):
            start_background("carry out a batch", self._carry_out(running, place))

    def cancel(self, job_id: int) -> None:
        """End what runs of a job whose cancellation is in the database."""
        for running in list(self._running):
            if job_id in running.batch.jobs:
                running.cancel(job_id)

        self.steer_on(job_id)

    def steer_on(self, job_id: int) -> None:
        """Cancel or retry what is left of a job that is being cancelled or retried, in the background."""
        self._background.start("go on with a change of a job", self._steer_on(job_id))

    async def _steer_on(self, job_id: int) -> None:
        """Cancel or retry a part of a job at a time, so that others can write in between."""
        if job_id in self._steering:
            return
        self._steering.add(job_id)
        now = None
        try:
            more = True
            while more and not self._stopping:
                now = self.tools.clock()
                more = await self.database.run("change a part of a job", claims.steer_on, job_id, now)
        finally:
            self._steering.discard(job_id)
        job = await self.database.job(job_id)
        if job is not None and now is not None and job.finished_at == now:
            # Its last part made it final; whatever else does that says so itself.
            log_ended(job)
        self.on_room()

    async def _take_up_steering(self) -> None:
        """Take up what a daemon had no time to bring to its end: cancellations, retries, what was held."""
        for job_id in await self.database.read("what is being changed", claims.being_steered):
            await self._steer_on(job_id)
        for kind, protocols in takers(self.preparation.access).items():
            for user_id in await self.database.read("who is held", claims.held_too_long, kind, protocols):
                await self.resume(user_id, ALL_SITES, protocols, (0, -1))

    async def resume(
        self, user_id: int, site_id: int, protocols: Collection[JobProtocol], after: tuple[int, int] | None
    ) -> int:
        """Put what is held of a user back into the queue, a part at a time, so that others can write in between.

        Args:
            user_id: whose.
            site_id: only what has to do with this site, or `ALL_SITES`.
            protocols: only jobs that are moved by one of these.
            after: where to begin.

        Returns:
            How many elements go back.
        """
        count = 0
        while after is not None and not self._stopping:
            resumed = await self.database.run(
                "resume a part of what is held",
                claims.resume_held,
                user_id,
                self.tools.clock(),
                site_id,
                protocols,
                after,
            )
            count, after = count + resumed.count, resumed.after
            self.on_room()
        return count

    async def _carry_out(self, running: RunningBatch, place: Place | None) -> None:
        agent: AgentProcess | None = None
        kind: AgentKind | None = None
        doors: Collection[Door] = ()
        try:
            prepared = await self.preparation.prepare(running.batch)
            kind, doors = prepared.kind, prepared.doors.values()
            self._running[running] = kind.credential
            self.tools.health.begin(doors)
            agent = await self.pool.lend(kind, alone=place is None, place=place)
            intake = await self._intake_for(running.batch, agent, prepared)
            if running.ending is not None:
                running.drop()
            else:
                running.run(agent, prepared.request, intake, prepared.doors)
            await following(running.finished)
            self._note_seconds(running)
        except NotPossibleError as error:
            running.refuse(error.failure)
        except AgentStartError as error:
            self._refuse(running, FailureCode.CRASHED, str(error))
        except Exception as error:
            self._log.failure("a batch of job {job} could not be begun", job=running.batch.job.id)
            self._refuse(running, FailureCode.INTERNAL, f"the service could not begin: {error}")
        finally:
            self._running.pop(running, None)
            self.tools.health.end(doors)
            if place is not None:
                place.leave()
                if running.seconds:
                    self.streams.ended(running.batch, running.run_so_far)
            if agent is not None and kind is not None:
                self.pool.give_back(agent, kind)
            if kind is not None:
                self.preparation.let_go(kind)
            # Who waits for a stream may be of any kind, and the agent may be gone.
            self.pool.look_again()
            self.on_room()

    def _note_seconds(self, running: RunningBatch) -> None:
        """Have the next batches of its kind take the time that a batch should."""
        kind, elements = kind_of(running.batch.job), running.batch.elements
        if running.seconds and running.ending is None and running.batch.type is not JobType.LIST:
            size = self.batch_sizes.get(kind, FIRST_SIZE)
            self.batch_sizes[kind] = next_size(size, len(elements), running.seconds, self.limits.batch_elements)

    def credentials_changed(self) -> None:
        """A user has removed or replaced a credential."""
        self._background.start("look at credentials", self._look_at_credentials())

    async def _look_at_credentials(self) -> None:
        """End what works with credentials that are not to be used any more; it is done again with what there is."""
        outdated = await self.credentials.outdated()
        for credential in outdated.ended | outdated.renewed:
            self.pool.retire(credential)
        for running, credential in list(self._running.items()):
            if credential in outdated.ended and running.ending is None:
                self._log.info("what runs with a credential that was removed is ended", job=running.batch.job.id)
                running.end(Ending.CREDENTIAL)

    def _refuse(self, running: RunningBatch, code: FailureCode, message: str) -> None:
        if running.ending is not None:
            running.drop()
        else:
            running.refuse(AttemptFailure(Scope.SERVICE, code, message))

    async def _intake_for(self, batch: Batch, agent: AgentProcess, prepared: Prepared) -> ListingIntake | None:
        if batch.type is not JobType.LIST:
            return None
        element, job = batch.elements[0], batch.job
        token = batch.token(element)
        known: set[bytes] = set()
        if element.attempts > 1:
            # An earlier attempt may have come half way: what it planned stands, and is not planned again.
            known = await self.database.read("what is planned", claims.known_paths, job.id)
        await self.database.run("begin a listing", listings.begin, token)
        tree = prepared.request.url if isinstance(prepared.request, wire.ListRequest) else ""
        options = prepared.options
        recursive = options.recursive if isinstance(options, RemoveOptions) else True
        plan = plan_for(job.type, job.src_filepath, job.dst_filepath, _path_of(tree), recursive=recursive)
        hooks = agent.pause, agent.resume, self.on_room
        return ListingIntake(self.database, self.worker, token, plan, job.src_filepath, known, *hooks)

    # -- what was left behind

    async def _take_up(self) -> None:
        await self._take_up_steering()
        await self.clean_up()

    def clean_up_soon(self) -> None:
        """There may be something to remove, perhaps of elements that were cancelled."""
        if not self._stopping:
            self._background.start("remove what crashed attempts left", self.clean_up())

    async def clean_up(self) -> None:
        """Remove temporary files of ended elements whose agent died.

        Those of elements that will be tried again go with their next attempt.
        """
        if self._cleaning:
            return
        self._cleaning = True
        try:
            left = await self.database.read("find residues", claims.residues, _RESIDUES_AT_ONCE)
            groups: dict[int, tuple[JobRecord, list[ElementRecord]]] = {}
            for element, job in left:
                groups.setdefault(job.id, (job, []))[1].append(element)
            for job, elements in groups.values():
                if self._stopping:
                    break
                await self._discard(Batch.of_one(job, JobType.COPY, elements))
        finally:
            self._cleaning = False

    async def _discard(self, batch: Batch) -> None:
        try:
            prepared = await self.preparation.prepare(batch)
        except NotPossibleError as error:
            self._log.warn("files of job {job} wait to be removed: {why}", job=batch.job.id, why=str(error))
            return
        if not isinstance(prepared.request, wire.CopyRequest):
            raise TypeError("only copies leave files behind")
        try:
            agent = await self.pool.lend(prepared.kind)
            try:
                cleaned = await _discarded(agent, prepared.request)
            finally:
                self.pool.give_back(agent, prepared.kind)
        except AgentStartError as error:
            self._log.warn("files of job {job} wait to be removed: {why}", job=batch.job.id, why=str(error))
            return
        finally:
            self.preparation.let_go(prepared.kind)
        tokens = [batch.token(element) for key, element in enumerate(batch.elements) if key in cleaned]
        if tokens:
            await self.database.run("residues are gone", claims.clear_residue, tokens)
            self._log.info("job {job}: {count} unfinished files removed", job=batch.job.id, count=len(tokens))


async def _discarded(agent: AgentProcess, request: wire.CopyRequest) -> set[int]:
    """Have the temporary files of a copy removed; returns the keys for which all are gone."""
    urls = [(item.key, url) for item in request.items for url in (item.temporary, *item.stale)]
    failed: set[int] = set()
    over: Deferred[None] = Deferred()

    def finish() -> None:
        if not over.called:
            over.callback(None)

    def on_event(event: wire.Event) -> None:
        if isinstance(event, (wire.Failed, wire.Cancelled)):
            failed.add(urls[event.key][0])
        elif isinstance(event, wire.Finished):
            finish()

    died = False

    def on_end(sentence: str) -> None:
        nonlocal died
        died = not over.called
        finish()

    items = [wire.PathItem(number, url) for number, (_, url) in enumerate(urls)]
    agent.give(wire.DiscardRequest(request.id, items, request.limits), Borrower(on_event, on_end))
    await over
    agent.take_back(request.id)
    return set() if died else {item.key for item in request.items} - failed


def _path_of(url: str) -> str:
    """The path in a storage URL, as text."""
    _, _, rest = url.partition("://")
    slash = rest.find("/")
    return decoded(rest[slash:].partition("?")[0]) if slash >= 0 else "/"
