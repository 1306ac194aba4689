"""Copies that are handed over to an FTS3: which, how many at once, and what happens while it does not answer.

They take no streams: the bytes do not pass the daemon's own connections, and an FTS3 has limits of its own for its
storages. Instead, the number of batches at each FTS3 is limited. A batch is one job there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta

from attrs import define, field, frozen
from twisted.logger import Logger

from pdm.workqueue.domain.enums import TOOL_PROTOCOLS, JobProtocol, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureScope
from pdm.workqueue.domain.jobs import Batch, JobRecord
from pdm.workqueue.domain.limits import (
    ALL_SERVICES,
    NO_HAND_OVERS,
    HandOvers,
    LimitKey,
    LimitKind,
    StreamLedger,
    StreamSlot,
)
from pdm.workqueue.domain.pacing import Breaker, BreakerPolicy, BreakerState
from pdm.workqueue.execution.site_directory import reached_by
from pdm.workqueue.movers.fts import FtsMover
from pdm.workqueue.sites.registry import Site, SiteRegistry
from pdm.workqueue.wire.agent_requests import TransferService

#: Protocols of the ends of copies that an FTS3 can make.
FTS_MOVERS: Mapping[JobProtocol, FtsMover] = {protocol: FtsMover(protocol) for protocol in TOOL_PROTOCOLS}
#: All services together get so many times the limit of one.
SERVICES_AT_ONCE = 3
_LONGEST_REASON = 300


@frozen(kw_only=True)
class ServiceLimits:
    """How much is handed over.

    Attributes:
        jobs: batches at one FTS3 at once.
        files: elements of a batch.
        poll_s: as in `TransferService`, like ``patience_s``.
        away_s: seconds for which elements wait for an FTS3 that does not answer; then failures count as tries.
    """

    jobs: int
    files: int
    poll_s: float
    patience_s: float
    away_s: float


@define(eq=False, kw_only=True)
class TransferServices:
    """The FTS3 services that sites name.

    Attributes:
        on_change: called when one does not answer, or answers again.
    """

    sites: SiteRegistry
    limits: ServiceLimits
    policy: BreakerPolicy
    clock: Callable[[], datetime]
    on_change: Callable[[], None] = lambda: None
    _ledger: StreamLedger = field(init=False)
    #: URL → state, and why it does not answer.
    _breakers: dict[str, Breaker] = field(factory=dict)
    _reasons: dict[str, str] = field(factory=dict)
    _log: Logger = field(factory=Logger)

    def __attrs_post_init__(self) -> None:
        self._ledger = StreamLedger(self._limit_of, lambda key, count: None)

    def service_of(self, job: JobRecord) -> str | None:
        """The URL of the FTS3 that copies the files of a job; None for none. May be called from any thread.

        One site that names an FTS3 is enough; where both do, that of the destination is used. An FTS3 gets the user's
        proxy: that of a user's site is for its owner only.
        """
        if job.type is not JobType.COPY or job.dst_siteid is None or job.protocol not in FTS_MOVERS:
            return None
        if job.options.get("mover") is not None or job.checked_site is not None:
            return None
        source, destination = self.sites.by_id(job.src_siteid), self.sites.by_id(job.dst_siteid)
        if source is None or destination is None:
            return None
        named = [each.fts for each in (destination, source) if each.fts is not None and _may_use(job, each)]
        if not named or _is_of_tools(source) or _is_of_tools(destination):
            return None
        ends = {reached_by(job, each, by_tools=False) for each in (source, destination)}
        return named[0] if ends <= FTS_MOVERS.keys() else None

    def service_of_batch(self, batch: Batch) -> str | None:
        """The same of a batch: listings, directories and removals are the daemon's own work."""
        return self.service_of(batch.job) if batch.type is JobType.COPY else None

    def parameters(self, url: str) -> TransferService:
        """What a helper needs to know of an FTS3."""
        return TransferService(url, self.limits.poll_s, self.limits.patience_s)

    # -- limits

    def slot(self, url: str) -> StreamSlot:
        """The slot of a batch that is handed over: it begins at once."""
        slot = self._ledger.slot({(LimitKind.SERVICE, url), ALL_SERVICES})
        slot.start()
        return slot

    @property
    def capacity(self) -> int:
        """How many batches more may be handed over."""
        if not any(site.fts for site in self.sites.all()):
            return 0
        return self._ledger.left(ALL_SERVICES, 1)

    def hand_overs(self) -> HandOvers:
        """What a claim may hand over now."""
        sites: dict[str, set[tuple[int, int | None]]] = {}
        for site in self.sites.all():
            if site.fts is not None:
                sites.setdefault(site.fts, set()).add((site.id, site.owner_id))
        if not sites:
            return NO_HAND_OVERS
        now = self.clock()
        left: dict[LimitKey, int] = {ALL_SERVICES: self._ledger.left(ALL_SERVICES, 1)}
        left |= {(LimitKind.SERVICE, url): self._left(url, now) for url in sites}
        # A single element shows whether an FTS3 is back.
        sizes = {url: self.limits.files if self._phase(url, now) is BreakerState.CLOSED else 1 for url in sites}
        return HandOvers(service_of=self.service_of, sites=sites, sizes=sizes, left=left)

    def _left(self, url: str, now: datetime) -> int:
        phase, key = self._phase(url, now), (LimitKind.SERVICE, url)
        if phase is BreakerState.OPEN:
            return 0
        left = self._ledger.left(key, 1)
        return left if phase is BreakerState.CLOSED else int(not self._ledger.running(key))

    def _limit_of(self, key: LimitKey) -> int:
        return self.limits.jobs * (SERVICES_AT_ONCE if key == ALL_SERVICES else 1)

    # -- availability

    def _phase(self, url: str, now: datetime) -> BreakerState:
        breaker = self._breakers.get(url)
        return BreakerState.CLOSED if breaker is None else breaker.phase(now)

    def worked(self, url: str) -> None:
        """An FTS3 has answered."""
        if self._breakers.pop(url, None) is not None:
            self._reasons.pop(url, None)
            self._log.info("the FTS3 at {url} answers again", url=url)
            self.on_change()

    def failed(self, url: str, failure: AttemptFailure) -> bool:
        """Learn from a failed attempt; returns whether it is excused, because the FTS3 did not answer."""
        if failure.scope is not FailureScope.SERVICE or not failure.unreachable:
            return False
        now = self.clock()
        before = self._breakers.get(url, Breaker())
        after = self._breakers[url] = before.failed(self.policy, now, certain=True)
        self._reasons[url] = f"{failure.code}: {' '.join(failure.message.split())[:_LONGEST_REASON]}"
        if after.opened != before.opened:
            self._log.warn(
                "the FTS3 at {url} gets nothing until {until}: {why}",
                url=url,
                until=f"{after.open_until:%Y-%m-%dT%H:%M:%SZ}",
                why=self._reasons[url],
            )
            self.on_change()
        return after.failing_since is None or now - after.failing_since < timedelta(seconds=self.limits.away_s)

    def next_change(self, now: datetime) -> datetime | None:
        """When an FTS3 is tried again; None if all answer."""
        times = [one.open_until for one in self._breakers.values() if one.phase(now) is BreakerState.OPEN]
        return min((time for time in times if time is not None), default=None)

    def waits(self, job: JobRecord) -> list[str]:
        """Why the copies of a job wait for an FTS3 that does not answer, a sentence each."""
        url, now = self.service_of(job), self.clock()
        breaker = None if url is None else self._breakers.get(url)
        if (
            url is not None
            and breaker is not None
            and breaker.failing_since is not None
            and breaker.open_until is not None
        ):
            since, until = (f"{time:%Y-%m-%dT%H:%M:%SZ}" for time in (breaker.failing_since, breaker.open_until))
            when = f"it is tried again at {until}" if breaker.phase(now) is BreakerState.OPEN else "it is being tried"
            return [f"the FTS3 at {url} does not work since {since}, {when}: {self._reasons[url]}"]
        return []

    def reached_limits(self, url: str) -> list[str]:
        """Limits that keep more from an FTS3, a sentence each."""
        running = self._ledger.running((LimitKind.SERVICE, url))
        if running >= self.limits.jobs or not self._ledger.left(ALL_SERVICES, 1):
            return [f"the FTS3 at {url} has as many batches of this daemon as it may have at once ({running})"]
        return []


def _may_use(job: JobRecord, site: Site) -> bool:
    return site.owner_id is None or site.owner_id == job.user_id


def _is_of_tools(site: Site) -> bool:
    return site.mover.value != "native"
