"""Background maintenance of queue and storage.

Removes leftover files of copies, resumes jobs that were HELD for missing software, continues changes of large jobs.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Iterator, Mapping
from typing import Any

from attrs import define, field
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from pdm.workqueue.agents.pool import AgentPool, ask
from pdm.workqueue.agents.process import AgentCommand, AgentProcess, AgentStartError
from pdm.workqueue.domain.enums import JobProtocol, JobType, MoverKind
from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.domain.jobs import Batch, ElementRecord, JobRecord
from pdm.workqueue.execution.job_changes import JobChanges
from pdm.workqueue.execution.preparing import NotPossibleError, Preparation
from pdm.workqueue.execution.site_directory import reached_by_protocol
from pdm.workqueue.movers import BUILT_IN, MOVERS
from pdm.workqueue.sites.registry import Site, SiteRegistry, moved_by_tools
from pdm.workqueue.store import held_elements, leftover_files
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.held_elements import HeldRoute
from pdm.workqueue.telemetry.background import Background, Periodic, ReportedError, start_background
from pdm.workqueue.wire.agent_requests import CopyRequest, DiscardRequest, PathItem

#: Elements of one round; the next round continues after them, so that files which cannot be removed do not block
#: others.
_ELEMENTS_AT_ONCE = 500
#: Seconds until the files of a job are tried again after a failure; doubles with each failure.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 20.0, 3600.0
#: Jobs whose failures are remembered; the oldest are dropped, and tried again early.
_MOST_FAILURES = 10_000
_SLACK_S = 5.0
_PERIOD_S = 20.0
_PREREQUISITES_TIMEOUT_S = 60.0


class _NotRemovedError(Exception):
    """Some files of a job could not be removed; the message has the reason."""


@define(eq=False, kw_only=True)
class LeftoverFiles:
    """Has helpers remove temporary files of final elements.

    A retried element removes the files of its earlier attempts itself.
    """

    database: Database
    pool: AgentPool
    preparation: Preparation
    _after: tuple[int, int] = (0, -1)
    _busy: bool = False
    _stopping: bool = False
    #: Job → consecutive failures, and the time of the next try.
    _failures: dict[int, tuple[int, float]] = field(factory=dict)
    _log: Logger = field(factory=Logger)

    def stop(self) -> None:
        """Start no further job."""
        self._stopping = True

    async def remove(self) -> None:
        """Remove the files of one round of elements; a job whose files cannot be removed does not block others."""
        if self._busy or self._stopping:
            return
        self._busy = True
        try:
            left = await self.database.read(
                "find leftover files", leftover_files.leftovers, _ELEMENTS_AT_ONCE, self._after
            )
            last = left[-1][0] if len(left) == _ELEMENTS_AT_ONCE else None
            self._after = (0, -1) if last is None else (last.job_id, last.id)
            for job, elements in _by_job(left):
                await self._remove_of(job, elements)
        finally:
            self._busy = False

    async def _remove_of(self, job: JobRecord, elements: list[ElementRecord]) -> None:
        now = self.preparation.context.reactor.seconds()
        failures, not_before = self._failures.get(job.id, (0, now))
        if self._stopping or now < not_before:
            return
        try:
            await self._discard(Batch.of_one(job, JobType.COPY, elements))
        except (NotPossibleError, AgentStartError, _NotRemovedError) as error:
            self._log.warn("unfinished files of job {job} are still there: {why}", job=job.id, why=str(error))
        except ReportedError:
            # The database is away.
            raise
        except Exception:
            self._log.failure("unfinished files of job {job} could not be removed", job=job.id)
        else:
            self._failures.pop(job.id, None)
            return
        pause_s = min(_FIRST_PAUSE_S * 2.0 ** min(failures, 20), _LONGEST_PAUSE_S)
        self._failures[job.id] = failures + 1, now + pause_s
        while len(self._failures) > _MOST_FAILURES:
            del self._failures[next(iter(self._failures))]

    async def _discard(self, batch: Batch) -> None:
        if batch.job.checked_site is not None:
            # A check writes nothing.
            unwritten = [batch.token(element) for element in batch.elements]
            await self.database.run("clear leftover files", leftover_files.clear_leftovers, unwritten)
            return
        prepared = await self.preparation.prepare(batch, self.preparation.services.service_of_batch(batch))
        request = prepared.built.request
        # Elements with names that no request can contain were never begun.
        removed, why = set(prepared.built.refused), ""
        try:
            if not isinstance(request, CopyRequest | None):
                raise TypeError("only copies leave files behind")
            if request is not None:
                agent = await self.pool.acquire(prepared.kind)
                try:
                    gone, why = await self._ask_to_discard(agent, request)
                    removed |= gone
                finally:
                    self.pool.release(agent, prepared.kind)
        finally:
            self.preparation.release_credential(prepared.kind)
        tokens = [batch.token(element) for key, element in enumerate(batch.elements) if key in removed]
        if tokens:
            await self.database.run("clear leftover files", leftover_files.clear_leftovers, tokens)
            self._log.info("job {job}: {count} unfinished files removed", job=batch.job.id, count=len(tokens))
        if why:
            raise _NotRemovedError(why)

    async def _ask_to_discard(self, agent: AgentProcess, request: CopyRequest) -> tuple[set[int], str]:
        """Have an agent remove the temporary files of a copy.

        Returns:
            Keys of the items whose files are all removed; and the reason for the others, empty if there are none.
        """
        urls = [(item, url) for item in request.items for url in (item.temporary, *item.stale)]
        items = [PathItem(number, url, handed=item.handed) for number, (item, url) in enumerate(urls)]
        discard = DiscardRequest(request.id, items, request.limits, request.service)
        reactor = self.preparation.context.reactor
        answer = await ask(agent, discard, reactor, request.limits.total_s + _SLACK_S)
        if answer.error is not None:
            return set(), answer.error
        removed = {item.key for item in request.items} - {urls[number][0].key for number in answer.faults}
        reasons = ("cancelled" if fault is None else fault.message for fault in answer.faults.values())
        return removed, next(reasons, "")


def _by_job(left: Iterable[tuple[ElementRecord, JobRecord]]) -> list[tuple[JobRecord, list[ElementRecord]]]:
    groups: dict[int, tuple[JobRecord, list[ElementRecord]]] = {}
    for element, job in left:
        groups.setdefault(job.id, (job, []))[1].append(element)
    return list(groups.values())


#: Key of globus-url-copy and gfal among missing prerequisites.
TOOLS = "TOOLS"
#: Resumes HELD elements of a user, a site and protocols of jobs.
Resume = Callable[[int, int, Collection[JobProtocol]], Awaitable[object]]


@define(eq=False, kw_only=True)
class Prerequisites:
    """Programs and libraries that protocols need.

    Attributes:
        find_missing: runs the checks in a helper's environment: name of a protocol → what is missing. OSError if they
            could not be run at all.
        resume: puts HELD elements back into the queue.
    """

    database: Database
    sites: SiteRegistry
    find_missing: Callable[[], Awaitable[Mapping[str, str]]]
    resume: Resume
    _log: Logger = field(factory=Logger)

    async def warn(self) -> None:
        """Log missing prerequisites of protocols that sites offer."""
        for what, why in unusable(self.sites.all(), await self.find_missing()):
            self._log.warn("{what} cannot be used: {why}; jobs that need it are held until it can", what=what, why=why)

    async def resume_held(self) -> None:
        """Resume jobs that were HELD for software that is installed by now."""
        routes = await self.database.read(
            "find jobs held for software", held_elements.held_routes, FailureCode.DEPENDENCY_MISSING
        )
        if not routes:
            return
        found = await self.find_missing()
        missing = _missing_protocols(found).keys()
        blocked: set[tuple[int, int, JobProtocol]] = set()
        open_: set[tuple[int, int, JobProtocol]] = set()
        for route in routes:
            # Resuming selects by site, so one route that is still blocked there keeps the others HELD.
            place = route.user_id, route.source if route.destination is None else route.destination, route.protocol
            lacks_tools = TOOLS in found and self._is_moved_by_tools(route)
            is_open = missing.isdisjoint(self._protocols_of(route)) and not lacks_tools
            (open_ if is_open else blocked).add(place)
        for user_id, site_id, protocol in sorted(open_ - blocked):
            await self.resume(user_id, site_id, {protocol})

    def _protocols_of(self, route: HeldRoute) -> set[JobProtocol]:
        found = {route.protocol}
        site = None if route.destination is None else self.sites.by_id(route.destination)
        if site is not None and (there := reached_by_protocol(route.protocol, site)) is not None:
            found.add(there)
        return found

    def _is_moved_by_tools(self, route: HeldRoute) -> bool:
        sites = [self.sites.by_id(number) for number in (route.source, route.destination) if number is not None]
        return moved_by_tools(route.protocol, None, [site for site in sites if site is not None])


@define(eq=False, kw_only=True)
class Maintenance:
    """Does everything of this module at the start, and then every `_PERIOD_S` seconds.

    Attributes:
        changes: of jobs, some of which need several transactions.
        find_missing: as in `Prerequisites`.
        give_back_held: returns what has not begun of jobs that are held.
    """

    reactor: IReactorTime
    database: Database
    sites: SiteRegistry
    pool: AgentPool
    preparation: Preparation
    changes: JobChanges
    find_missing: Callable[[], Awaitable[Mapping[str, str]]]
    give_back_held: Callable[[], Coroutine[Any, Any, None]]
    leftovers: LeftoverFiles = field(init=False)
    _prerequisites: Prerequisites = field(init=False)
    _timer: Periodic = field(init=False)
    _background: Background = field(factory=Background)

    def __attrs_post_init__(self) -> None:
        self.leftovers = LeftoverFiles(database=self.database, pool=self.pool, preparation=self.preparation)
        self._prerequisites = Prerequisites(
            database=self.database, sites=self.sites, find_missing=self.find_missing, resume=self.changes.resume_at
        )
        self._timer = Periodic(self.reactor, "maintenance", _PERIOD_S, self._work)

    def start(self) -> None:
        self._timer.start()
        self._background.start("warn of missing software", self._prerequisites.warn())
        self._background.start("maintenance", self._work())

    async def stop(self) -> None:
        await self._timer.stop()
        await self._background.over()

    async def _work(self) -> None:
        for what, work in (
            ("continue changes of jobs", self.changes.continue_all),
            ("resume held jobs", self.changes.resume_held),
            ("give back held jobs", self.give_back_held),
            ("resume jobs held for missing software", self._prerequisites.resume_held),
            ("remove leftover files", self.leftovers.remove),
        ):
            # Independently: a task that always fails does not prevent the others.
            await start_background(what, work())


def unusable(sites: Iterable[Site], found: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What sites offer and cannot be used, and why.

    ``found``: of `missing_software`.
    """
    sites = list(sites)
    offered = {protocol for site in sites for protocol in site.endpoints}
    missing = _missing_protocols(found)
    for protocol in sorted(offered & missing.keys()):
        yield protocol.name, missing[protocol]
    if TOOLS in found and any(site.mover is MoverKind.TOOLS for site in sites):
        yield "mover = tools", found[TOOLS]


def _missing_protocols(found: Mapping[str, str]) -> dict[JobProtocol, str]:
    """What is missing, by protocol: software, or the whole mover."""
    missing = {protocol: "no mover for it is installed" for protocol in JobProtocol if protocol not in MOVERS}
    for protocol, mover in MOVERS.items():
        # Prerequisites of other packages' movers are only known to them.
        if mover is BUILT_IN.get(protocol) and protocol.name in found:
            missing[protocol] = found[protocol.name]
    return missing


def missing_software(command: AgentCommand) -> Mapping[str, str]:
    """What is missing for each protocol, by its name; blocks.

    ``command``: runs `pdm.workqueue.helpers.prerequisites`.

    Raises:
        OSError: no process could be made.
    """
    try:
        done = subprocess.run(
            command.arguments,
            env=dict(command.environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PREREQUISITES_TIMEOUT_S,
            check=False,
        )
        if done.returncode == 0:
            found: dict[str, str] = json.loads(done.stdout)
            return found
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    except (FileNotFoundError, PermissionError) as error:
        why = f"{error.strerror}"
    except subprocess.TimeoutExpired:
        why = f"it did not end within {_PREREQUISITES_TIMEOUT_S:g} s"
    # Nothing can be moved without helpers.
    return dict.fromkeys(JobProtocol.__members__, f"the interpreter of the helpers, {command.arguments[0]}: {why}")
