"""Removes the temporary files that cancelled and failed copies have left at destinations."""

from __future__ import annotations

from collections.abc import Iterable

from attrs import define, field
from twisted.logger import Logger

from pdm.workqueue.agents.pool import AgentPool
from pdm.workqueue.agents.process import AgentProcess, AgentStartError
from pdm.workqueue.domain.enums import JobType
from pdm.workqueue.domain.jobs import Batch, ElementRecord, JobRecord
from pdm.workqueue.execution.checking import ask
from pdm.workqueue.execution.preparing import NotPossibleError, Preparation
from pdm.workqueue.store import claims
from pdm.workqueue.store.database import Database
from pdm.workqueue.wire import agent_messages as wire

#: Elements of one round; the next round begins where this one ended, so that files which cannot be removed hide no
#: others.
_AT_ONCE = 500
#: Seconds until the files of a job are tried again after a failure; doubles with each further failure.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 20.0, 3600.0
#: Jobs of which failures are remembered; of more, the oldest are tried again early.
_MOST_REMEMBERED = 10_000
_SLACK_S = 5.0


class _NotRemovedError(Exception):
    """Some files of a job are still there; the text says why."""


@define(eq=False)
class LeftoverFiles:
    """Has helpers remove temporary files of elements that will not run again by themselves.

    Those of elements that will be tried again are removed by their next attempt.
    """

    database: Database
    pool: AgentPool
    preparation: Preparation
    _after: tuple[int, int] = (0, -1)
    _busy: bool = False
    _stopping: bool = False
    #: Job → number of failures in a row, and the time of the next try.
    _failures: dict[int, tuple[int, float]] = field(factory=dict)
    _log: Logger = field(factory=Logger)

    def stop(self) -> None:
        """Begin with no further job."""
        self._stopping = True

    async def remove(self) -> None:
        """Remove the files of one round of elements; a job whose files cannot be removed does not hold up others."""
        if self._busy or self._stopping:
            return
        self._busy = True
        try:
            left = await self.database.read("find residues", claims.residues, _AT_ONCE, self._after)
            last = left[-1][0] if len(left) == _AT_ONCE else None
            self._after = (0, -1) if last is None else (last.job_id, last.id)
            for job, elements in _by_job(left):
                await self._remove_of(job, elements)
        finally:
            self._busy = False

    async def _remove_of(self, job: JobRecord, elements: list[ElementRecord]) -> None:
        now = self.preparation.tools.reactor.seconds()
        failures, not_before = self._failures.get(job.id, (0, now))
        if self._stopping or now < not_before:
            return
        try:
            await self._discard(Batch.of_one(job, JobType.COPY, elements))
        except (NotPossibleError, AgentStartError, _NotRemovedError) as error:
            self._log.warn("unfinished files of job {job} are still there: {why}", job=job.id, why=str(error))
        except Exception:
            self._log.failure("unfinished files of job {job} could not be removed", job=job.id)
        else:
            self._failures.pop(job.id, None)
            return
        pause_s = min(_FIRST_PAUSE_S * 2.0 ** min(failures, 20), _LONGEST_PAUSE_S)
        self._failures[job.id] = failures + 1, now + pause_s
        while len(self._failures) > _MOST_REMEMBERED:
            del self._failures[next(iter(self._failures))]

    async def _discard(self, batch: Batch) -> None:
        prepared = await self.preparation.prepare(batch)
        request = prepared.built.request
        # What no helper can be asked for was never begun.
        removed, why = set(prepared.built.refused), ""
        try:
            if not isinstance(request, wire.CopyRequest | None):
                raise TypeError("only copies leave files behind")
            if request is not None:
                agent = await self.pool.lend(prepared.kind)
                try:
                    gone, why = await self._discarded(agent, request)
                    removed |= gone
                finally:
                    self.pool.give_back(agent, prepared.kind)
        finally:
            self.preparation.let_go(prepared.kind)
        tokens = [batch.token(element) for key, element in enumerate(batch.elements) if key in removed]
        if tokens:
            await self.database.run("residues are gone", claims.clear_residue, tokens)
            self._log.info("job {job}: {count} unfinished files removed", job=batch.job.id, count=len(tokens))
        if why:
            raise _NotRemovedError(why)

    async def _discarded(self, agent: AgentProcess, request: wire.CopyRequest) -> tuple[set[int], str]:
        """Have the temporary files of a copy removed.

        Returns:
            The keys of the items of which all files are gone; and why others are still there, empty if none is.
        """
        urls = [(item.key, url) for item in request.items for url in (item.temporary, *item.stale)]
        failed: dict[int, str] = {}

        def on_event(event: wire.Event) -> None:
            if isinstance(event, wire.Failed):
                failed[urls[event.key][0]] = event.fault.message
            elif isinstance(event, wire.Cancelled):
                failed[urls[event.key][0]] = "cancelled"

        items = [wire.PathItem(number, url) for number, (_, url) in enumerate(urls)]
        discard = wire.DiscardRequest(request.id, items, request.limits)
        reactor = self.preparation.tools.reactor
        died = await ask(agent, discard, on_event, reactor, request.limits.total_s + _SLACK_S)
        if died is not None:
            return set(), died
        return {item.key for item in request.items} - failed.keys(), next(iter(failed.values()), "")


def _by_job(left: Iterable[tuple[ElementRecord, JobRecord]]) -> list[tuple[JobRecord, list[ElementRecord]]]:
    groups: dict[int, tuple[JobRecord, list[ElementRecord]]] = {}
    for element, job in left:
        groups.setdefault(job.id, (job, []))[1].append(element)
    return list(groups.values())
