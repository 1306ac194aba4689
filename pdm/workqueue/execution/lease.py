"""The lease under which a daemon claims: taking, renewing and losing it; and claims whose answer was lost.

Renewal, the release of claims of dead daemons and the comparison with the database are separate tasks: none waits for
another, and the renewal waits for no other transaction.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from datetime import datetime

from attrs import define, field
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger

from pdm.workqueue.agents.pool import boot_seconds
from pdm.workqueue.domain.jobs import ClaimToken
from pdm.workqueue.store import job_counts, leases, nodes
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.errors import DatabaseClosedError
from pdm.workqueue.store.leases import FindBegun, Registration, WorkerIdentity
from pdm.workqueue.telemetry.background import Background, DueTimer, Periodic, ReportedError

#: Seconds after a failed renewal.
_PAUSE_AFTER_ERROR_S = 1.0
#: Seconds between two checks whether another incarnation renews its lease.
_CHECK_LEASE_EVERY_S = 1.0
#: A clock may differ from the database's by this part of the lease.
_CLOCK_TOLERANCE = 0.1
#: Seconds after the end of another daemon's lease at which it is taken away.
_AFTER_END_S = 0.05


class LeaseTakenError(Exception):
    """Another daemon claims under the same name; the text tells the operator what to do."""


class ClockWrongError(Exception):
    """The clock of this machine and that of the database differ too much; the text tells the operator what to do."""


@define(eq=False, kw_only=True)
class Lease:
    """The lease of this daemon.

    Attributes:
        lease_s: seconds for which claims are valid without a renewal.
        begun: finds attempts of an earlier run whose work had begun.
        ends_at: no daemon takes the claims before this time (`boot_seconds`); 0 without a lease.
        on_renewed: called with each new `ends_at`, once it is certain.
        generation: another number after each time when there was no lease, so that others may have taken what was ours.
    """

    reactor: IReactorTime
    database: Database
    worker: WorkerIdentity
    clock: Callable[[], datetime]
    lease_s: float
    begun: FindBegun | None = None
    ends_at: float = 0.0
    generation: int = 0
    on_renewed: list[Callable[[float], None]] = field(factory=list)
    _known: Callable[[], Collection[ClaimToken]] = tuple
    _claims_over: Callable[[], Awaitable[None]] | None = None
    _on_lost: Callable[[], Awaitable[None]] | None = None
    _on_cancelled: Callable[[int], None] = lambda job_id: None
    _on_work: Callable[[], None] = lambda: None
    _on_counted: Callable[[Collection[int]], None] = lambda jobs: None
    _is_ours: bool = False
    #: How often the lease was lost, because it was not renewed in time.
    expired: int = field(default=0, init=False)
    _stopping: bool = False
    _conflict_logged: bool = False
    _tasks: list[Periodic] = field(factory=list)
    _takeover: DueTimer | None = None
    _background: Background = field(factory=Background)
    _reconciling: bool = False
    _log: Logger = field(factory=Logger)

    def connect(
        self,
        known: Callable[[], Collection[ClaimToken]],
        claims_over: Callable[[], Awaitable[None]],
        on_lost: Callable[[], Awaitable[None]],
        on_cancelled: Callable[[int], None],
        on_work: Callable[[], None],
        on_counted: Callable[[Collection[int]], None] = lambda jobs: None,
    ) -> None:
        """Set the callbacks; separate from the constructor because the claimer needs the lease.

        Args:
            known: attempts that run here or whose verdicts are not stored yet.
            claims_over: returns when the current claims are answered, and `known` has their attempts.
            on_lost: ends all running batches.
            on_cancelled: ends what runs of a job.
            on_work: there is something to claim.
            on_counted: to the counters of jobs must be added what stands apart from them.
        """
        self._known = known
        self._claims_over = claims_over
        self._on_lost = on_lost
        self._on_cancelled = on_cancelled
        self._on_work = on_work
        self._on_counted = on_counted

    @property
    def is_held(self) -> bool:
        """Whether claims are valid now."""
        return self._is_ours and boot_seconds() < self.ends_at

    async def start(self) -> None:
        """Take the lease; waits for the end of a lease of the same name that is not renewed any more.

        Raises:
            LeaseTakenError: that lease is renewed.
            ClockWrongError: the clock differs from the database's by more than a tenth of the lease.
        """
        await self._check_clock()
        seen: Registration | None = None
        give_up_at = self.reactor.seconds() + 2 * self.lease_s
        while (held := await self._register()) is not None:
            is_renewed = seen and seen.held_until and held.held_until and held.held_until > seen.held_until
            if is_renewed or self.reactor.seconds() > give_up_at:
                raise LeaseTakenError(_conflict_message(self.worker, held))
            if seen is None:
                self._log.info(
                    "waiting up to {seconds:.0f} s for the lease of an earlier run on {host} to end",
                    seconds=held.held_for_s,
                    host=held.held_by,
                )
            seen = held
            await deferLater(self.reactor, min(max(held.held_for_s, 0.05), _CHECK_LEASE_EVERY_S))
        every_s = self.lease_s / 3
        self._tasks = [
            Periodic(self.reactor, "renew the lease", every_s, self._renew),
            Periodic(self.reactor, "reconcile claims", every_s, self.reconcile),
        ]
        for task in self._tasks:
            task.start()
        if self.database.is_shared:
            self._takeover = DueTimer(self.reactor, "release expired claims", every_s, self._release_expired)
            self._takeover.start()

    async def _check_clock(self) -> None:
        """Compare the clock with that of a shared database.

        Raises:
            ClockWrongError: they differ too much.
        """
        if not self.database.is_shared:
            return
        ahead_s = await self.database.read("compare the clocks", nodes.clock_error_s, self.clock)
        if abs(ahead_s) > _CLOCK_TOLERANCE * self.lease_s:
            side = "ahead of" if ahead_s > 0 else "behind"
            raise ClockWrongError(
                f"the clock of this machine is {abs(ahead_s):.1f} s {side} that of the database: more than a tenth of"
                f" [queue] lease ({self.lease_s:g} s). Synchronize the clocks of all machines (NTP): tries, deadlines"
                " and schedules would be due at the wrong time"
            )

    async def stop(self) -> None:
        """Stop renewing, and release the lease for the next daemon."""
        self._stopping = True
        for task in self._tasks:
            await task.stop()
        if self._takeover is not None:
            await self._takeover.stop()
        await self._background.over()
        if self._is_ours:
            self._is_ours = False
            await self.database.run_for_lease("release the lease", leases.give_up_lease, self.worker.incarnation)

    def reconcile_soon(self) -> None:
        """Reconcile soon: a claim has failed, whose transaction may have succeeded nevertheless."""
        if not self._stopping:
            self._background.start("reconcile claims", self.reconcile())

    async def reconcile(self) -> None:
        """Release claims that this daemon has in the database but does not know, because the answer was lost."""
        if self._reconciling or not self._is_ours or self._claims_over is None:
            return
        self._reconciling = True
        try:
            running = await self.database.read("find running attempts", leases.running_tokens, self.worker.incarnation)
            # After these claims are answered, every claim seen in the database is known or lost.
            await self._claims_over()
            unknown = set(running).difference(self._known())
            if unknown and not self._stopping:
                back = await self.database.run(
                    "release lost claims", leases.release_unknown, self.worker.incarnation, unknown, self.clock()
                )
                if back:
                    self._log.warn("{count} elements go back to the queue: their claim had no answer", count=back)
                    self._on_work()
        finally:
            self._reconciling = False

    async def _register(self) -> Registration | None:
        """Take the lease; returns the owner of a live one, None if it is ours now."""
        began = boot_seconds()
        registration = await self.database.run(
            "register a worker",
            leases.register_worker,
            self.worker,
            self.clock(),
            self.lease_s,
            alone=not self.database.is_shared,
            begun=self.begun,
        )
        if registration.held_by is not None:
            return registration
        if registration.back:
            self._log.info("{count} elements of the last run go back to the queue", count=registration.back)
        self._is_ours = True
        self._conflict_logged = False
        self._extend(began)
        return None

    def _extend(self, began: float) -> None:
        if boot_seconds() >= self.ends_at:
            self.generation += 1
        # Counted from before the request: in the database the lease ends later.
        self.ends_at = began + self.lease_s
        for notify in self.on_renewed:
            notify(self.ends_at)

    async def _renew(self) -> None:
        is_failing = has_ended = False
        while not self._stopping:
            try:
                await self._renew_once()
            except DatabaseClosedError:
                return
            except Exception as error:
                # An outage of the database has a line of its own.
                if not is_failing and not isinstance(error, ReportedError):
                    self._log.warn(
                        "the lease could not be renewed ({why}), and is tried again; it ends in {left:.0f} s",
                        why=_first_line(error),
                        left=max(self.ends_at - boot_seconds(), 0.0),
                    )
                is_failing = True
                if self._is_ours and not self.is_held and not has_ended:
                    has_ended = True
                    self._log.warn(
                        "the lease has ended, for it could not be renewed: what runs is ended, and is repeated later"
                        " without counting"
                    )
                await deferLater(self.reactor, _PAUSE_AFTER_ERROR_S)
            else:
                return

    async def _renew_once(self) -> None:
        if not self._is_ours:
            await self._reacquire()
            return
        began = boot_seconds()
        if not self.database.is_shared:
            # This process has locked the file: no other daemon can claim, whatever the row says.
            self._extend(began)
        renewal = await self.database.run_for_lease(
            "renew the lease", leases.renew, self.worker.incarnation, self.clock(), self.lease_s
        )
        if renewal.lost:
            self._log.error("the lease of {worker} was taken away; its attempts are given up", worker=self.worker.name)
            self._is_ours = False
            self.expired += 1
            self.ends_at = 0.0
            if self._on_lost is not None:
                await self._on_lost()
            await self._reacquire()
            return
        if self.database.is_shared:
            self._extend(began)
        for job_id in renewal.cancelled_jobs:
            self._on_cancelled(job_id)

    async def _reacquire(self) -> None:
        held = await self._register()
        if held is None:
            self._on_work()
        elif not self._conflict_logged:
            self._conflict_logged = True
            self._log.error("nothing is claimed: {why}", why=_conflict_message(self.worker, held))

    def find_cancelled(self) -> None:
        """Look now for jobs that other daemons have cancelled; each renewal does so, too."""
        if self._is_ours and not self._stopping:
            self._background.start("find cancelled jobs", self._find_cancelled())

    async def _find_cancelled(self) -> None:
        found = await self.database.read("find cancelled jobs", leases.cancelled_jobs, self.worker.incarnation)
        for job_id in found:
            self._on_cancelled(job_id)

    async def _release_expired(self) -> float:
        """Take over what dead daemons ran; returns seconds until the next lease may end."""
        ended = await self.database.run_for_lease("end suspended sessions", leases.end_suspended_sessions)
        if ended:
            self._log.warn("{count} database sessions of a daemon that is suspended are ended", count=ended)
        released = count = leases.RELEASED_AT_ONCE
        total = 0
        while count == released and not self._stopping:
            count = await self.database.run("release expired claims", leases.release_expired, self.clock())
            total += count
        if total:
            self._log.warn("{count} elements of a daemon that is gone go back to the queue", count=total)
            self._on_work()
        # A daemon that is gone may have counted some apart from their jobs.
        self._on_counted(await self.database.read("find counters to add up", job_counts.jobs_with_counts))
        left_s = await self.database.run_for_lease(
            "find the next end of a lease", nodes.seconds_to_next_end, self.worker.incarnation
        )
        return self.lease_s if left_s is None else left_s + _AFTER_END_S


def _conflict_message(worker: WorkerIdentity, held: Registration) -> str:
    return (
        f"another daemon ({held.held_by}) claims under the name {worker.name}: stop it, or, if this state directory "
        "is a copy of its own, remove the file worker-name here"
    )


def _first_line(error: Exception) -> str:
    lines = str(getattr(error, "orig", None) or error).splitlines()
    return lines[0] if lines else type(error).__name__
