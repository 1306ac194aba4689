"""Begins to take in listings: what earlier attempts have planned, the plan, and the file of a destination's entries."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from attrs import frozen
from twisted.internet.threads import deferToThread

from pdm.workqueue.agents.process import AgentProcess
from pdm.workqueue.domain.copy_plan import PLAIN_COPY
from pdm.workqueue.domain.enums import JobType
from pdm.workqueue.domain.job_plans import plan_for
from pdm.workqueue.domain.jobs import Batch, ClaimToken, JobRecord, NewElement
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.execution.destination_index import DestinationIndex
from pdm.workqueue.execution.listing import ListingIntake
from pdm.workqueue.store import first_claims, listings, planned_elements, results
from pdm.workqueue.store.database import Database
from pdm.workqueue.wire.agent_requests import ListRequest
from pdm.workqueue.wire.options import CopyOptions, Options, RemoveOptions


@frozen(kw_only=True)
class JobListings:
    """Makes the `ListingIntake` of LIST elements.

    Attributes:
        worker: incarnation that runs the listings.
        scratch: directory for temporary files.
        add_element: runs a transaction that adds an element to a job: `Claimer.add_element`.
        on_elements: called when there are new elements to claim.
    """

    database: Database
    worker: str
    clock: Callable[[], datetime]
    scratch: Path
    add_element: Callable[..., Awaitable[bool]]
    on_elements: Callable[[], None]

    async def intake(
        self, batch: Batch, agent: AgentProcess, request: ListRequest, options: Options, begin: Callable[[Batch], Any]
    ) -> ListingIntake:
        """The intake of a listing, which the caller closes.

        Args:
            agent: lists.
            begin: carries out the batch of an element that was claimed as it was added.
        """
        element, job = batch.elements[0], batch.job
        token = batch.token(element)
        known: set[bytes] = set()
        if element.attempts > 1:
            known = await self._resumed(job, token)
        rules = PLAIN_COPY
        if isinstance(options, CopyOptions):
            make_rules = partial(options.rules, job.timestamp)
            # A thousand patterns take a tenth of a second.
            rules = await deferToThread(make_rules) if options.filters else make_rules()
        plan = plan_for(
            job.type,
            job.src_filepath,
            job.dst_filepath,
            StorageUrl(request.url).text_path,
            recursive=options.recursive if isinstance(options, RemoveOptions) else True,
            only_empty=isinstance(options, RemoveOptions) and options.only_empty,
            rules=rules,
            is_one_server=StorageUrl(request.url).server == StorageUrl(request.destination or "").server,
        )
        index = None if request.destination is None else await deferToThread(DestinationIndex, self.scratch)

        async def add_elements(new: Sequence[NewElement]) -> bool:
            # Claims know which phase may begin.
            is_due = job.type is JobType.COPY and not (new[0].done or new[0].phase)
            to = job if len(new) == 1 and is_due else None
            add = first_claims.add_and_claim
            return await self.add_element(to, new[0].type, "add elements", add, self.worker, token, new, begin=begin)

        return ListingIntake(
            database=self.database,
            add_elements=add_elements,
            token=token,
            plan=plan,
            source=job.src_filepath,
            known=known,
            destination=job.dst_filepath or "",
            index=index,
            pause=agent.pause,
            resume=agent.resume,
            on_elements=self.on_elements,
        )

    async def _resumed(self, job: JobRecord, token: ClaimToken) -> set[bytes]:
        """What an earlier attempt has planned, which is not planned again; but its deletions are."""
        more = job.deletes_extra
        while more:
            drop = planned_elements.drop_deletions
            more = await self.database.run("drop planned deletions", drop, token, self.clock())
        known = await self.database.read("find planned paths", results.known_paths, token.job_id)
        await self.database.run("begin a listing", listings.begin, token)
        return known
