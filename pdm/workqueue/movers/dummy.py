"""Simulated work: what it shall do stands in the options of the job, and travels in the query of each URL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar
from urllib.parse import urlencode

import msgspec
from attrs import evolve, frozen

from pdm.workqueue.domain.credentials import CredentialKind
from pdm.workqueue.domain.enums import JobProtocol, JobType
from pdm.workqueue.domain.failures import AttemptFailure
from pdm.workqueue.domain.jobs import Batch
from pdm.workqueue.movers.mover import ALL_JOB_TYPES, Access, BuiltRequest, SiteUrl, build_request, classify
from pdm.workqueue.wire.agent_events import Fault
from pdm.workqueue.wire.agent_requests import CheckItem, CopyItem, ListRequest, PathItem, RenameItem, TimeLimits
from pdm.workqueue.wire.options import DummyOptions, Options

_Item = TypeVar("_Item", bound=CheckItem | CopyItem | PathItem | RenameItem)
#: What happens to the elements that do the work, and would keep a job from ever having any if it hit its listing.
_BEHAVIOUR = ("hang", "crash", "fail", "fail_times", "delay")


@frozen
class DummyMover:
    """For tests of the queue, and for measuring it without any storage."""

    job_types: frozenset[JobType] = ALL_JOB_TYPES
    helper: str = "pdm.workqueue.helpers.main_dummy"
    needs_credential: CredentialKind | None = None
    prefers_credential: CredentialKind | None = None
    relays_to: frozenset[JobProtocol] = frozenset()

    def request_for(
        self, batch: Batch, urls: SiteUrl, options: Options, limits: TimeLimits, request_id: int
    ) -> BuiltRequest:
        built = build_request(batch, urls, options, limits, request_id)
        plain = built.request
        if plain is None:
            return built
        dummy = options.dummy or DummyOptions()
        if isinstance(plain, ListRequest):
            expanded = batch.job.type is not JobType.LIST
            query = _query(dummy, leave_out=_BEHAVIOUR if expanded else ())
            query = f"{query}{batch.elements[0].attempts}"
            destination = None if plain.destination is None else plain.destination + query
            asked = msgspec.structs.replace(plain, url=plain.url + query, destination=destination)
            return evolve(built, request=asked)
        query = _query(dummy)
        items = [_asking(item, f"{query}{batch.elements[item.key].attempts}") for item in plain.items]
        return evolve(built, request=msgspec.structs.replace(plain, items=items))

    def environment(self, access: Access) -> Mapping[str, str]:
        return {}

    def classify(self, fault: Fault) -> AttemptFailure:
        return classify(fault)


def _asking(item: _Item, query: str) -> _Item:
    if isinstance(item, PathItem | CheckItem):
        return msgspec.structs.replace(item, url=item.url + query)
    return msgspec.structs.replace(item, source=item.source + query)


def _query(dummy: DummyOptions, leave_out: Sequence[str] = ()) -> str:
    """The part of a URL's query that all elements share; the number of the attempt is appended."""
    values = {
        name: int(value) if isinstance(value, bool) else value
        for name, value in msgspec.structs.asdict(dummy).items()
        if value is not None and name not in leave_out
    }
    return f"?{urlencode(values)}&attempt="
