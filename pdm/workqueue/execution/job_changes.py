"""Changes of many elements: continue cancellations and retries, and resume what is HELD, a part at a time.

A request changes the first part of a large job itself. The rest follows here, so that other writers can interleave;
`continue_all` and `resume_held` find what a daemon that stopped has left.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import datetime

from attrs import define, field

from pdm.workqueue.domain.credentials import ALL_SITES
from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.execution.preparing import Preparation
from pdm.workqueue.execution.site_directory import protocols_reaching
from pdm.workqueue.store import held_elements, job_changes
from pdm.workqueue.store.database import Database
from pdm.workqueue.telemetry.background import Background, start_background
from pdm.workqueue.telemetry.logging import log_ended


@define(eq=False, kw_only=True)
class JobChanges:
    """Continues changes of jobs until `stop`.

    Attributes:
        on_work: called when elements in the database became due.
        is_stopping: each change ends after its current part.
    """

    database: Database
    clock: Callable[[], datetime]
    preparation: Preparation
    on_work: Callable[[], None]
    _changing: set[int] = field(factory=set)
    is_stopping: bool = False
    _background: Background = field(factory=Background)

    async def stop(self) -> None:
        """Return when no change is under way."""
        self.is_stopping = True
        await self._background.over()

    def continue_change(self, job_id: int) -> None:
        """Continue the cancellation or retry of a large job in the background."""
        self._background.start("continue a change of a job", self._continue_change(job_id))

    async def _continue_change(self, job_id: int) -> None:
        """Cancel or retry a part of a job at a time, so that other writers can interleave."""
        if job_id in self._changing:
            return
        self._changing.add(job_id)
        now = None
        try:
            more = True
            while more and not self.is_stopping:
                now = self.clock()
                more = await self.database.run("change a part of a job", job_changes.continue_change, job_id, now)
        finally:
            self._changing.discard(job_id)
        job = await self.database.job(job_id)
        if job is not None and now is not None and job.finished_at == now:
            # The last part made it final, which no settled verdict has logged.
            log_ended(job)
        self.on_work()

    async def continue_all(self) -> None:
        """Continue cancellations and retries that a daemon has not completed."""
        for job_id in await self.database.read("find unfinished changes", job_changes.unfinished_changes):
            await start_background(f"continue a change of job {job_id}", self._continue_change(job_id))

    async def resume_held(self) -> None:
        """Resume jobs that are HELD although their user has stored a credential since."""
        for kind, protocols in protocols_reaching(self.preparation.access).items():
            for user_id in await self.database.read(
                "find users with held jobs", held_elements.held_despite_credential, kind, protocols
            ):
                work = self.resume_at(user_id, ALL_SITES, protocols)
                await start_background(f"resume held jobs of user {user_id}", work)

    async def resume_at(self, user_id: int, site_id: int, protocols: Collection[JobProtocol]) -> None:
        await self.resume(user_id, site_id, protocols, (0, -1))

    async def resume(
        self, user_id: int, site_id: int, protocols: Collection[JobProtocol], after: tuple[int, int] | None
    ) -> int:
        """Put HELD elements of a user back into the queue, a part at a time, so that other writers can interleave.

        ``site_id``: only jobs that use this site, or `ALL_SITES`. ``protocols``: only jobs with one of these protocols.
        ``after``: where to begin.

        Returns:
            The number of elements.
        """
        count = 0
        while after is not None and not self.is_stopping:
            resumed = await self.database.run(
                "resume held elements",
                held_elements.resume_held,
                user_id,
                self.clock(),
                site_id,
                protocols,
                after,
            )
            count, after = count + resumed.count, resumed.after
            self.on_work()
        return count
