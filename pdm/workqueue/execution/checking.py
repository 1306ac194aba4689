"""Looks at what the endpoints of a site can do, with a user's credential, through an agent: nothing else is a proof."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import define, field, frozen
from twisted.internet.defer import Deferred, DeferredList, DeferredSemaphore
from twisted.logger import Logger

from pdm.workqueue.agents.pool import AgentPool
from pdm.workqueue.agents.process import AgentProcess, AgentStartError, Borrower
from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, Scope
from pdm.workqueue.execution.credentials import CredentialUnusableError
from pdm.workqueue.execution.health import Door
from pdm.workqueue.execution.preparing import Preparation
from pdm.workqueue.movers import MOVERS
from pdm.workqueue.sites.registry import Site, storage_url
from pdm.workqueue.wire import agent_messages as wire

#: Seconds for one endpoint, its login and its listing.
_LONGEST_S = 20.0
#: Seconds for all of a site, waiting for a free agent included: clients are told what was found by then.
LONGEST_ALL_S = 45.0
#: Endpoints that are looked at at once, for all users: their agents work beside the limits that are for jobs.
_AT_ONCE = 4
_NOT_REACHED = frozenset({FailureCode.CONNECTION, FailureCode.TIMEOUT, FailureCode.STALLED})
_NOT_LET_IN = frozenset(
    {
        FailureCode.CERTIFICATE,
        FailureCode.HOST_KEY,
        FailureCode.CREDENTIAL_REFUSED,
        FailureCode.CREDENTIAL_EXPIRED,
    }
)
#: The look came to its end before the endpoint was asked.
_NOT_ASKED = frozenset(
    {FailureCode.CREDENTIAL_MISSING, FailureCode.CRASHED, FailureCode.INTERNAL, FailureCode.UNSUPPORTED}
)


class BusyError(Exception):
    """One look at a time: agents are for the work of all."""


@frozen
class DoorCheck:
    """What was found at an endpoint.

    Attributes:
        failure: why the default folder could not be listed; None if it could.
        seconds: how long it took.
    """

    door: Door
    failure: AttemptFailure | None
    seconds: float

    @property
    def reachable(self) -> bool | None:
        """Whether a server answers; None where nobody knows."""
        if self.failure is None:
            return True
        late = self.failure.scope is Scope.SERVICE and self.failure.code is FailureCode.TIMEOUT
        if late or self.failure.code in _NOT_ASKED:
            return None
        return self.failure.code not in _NOT_REACHED

    @property
    def login(self) -> bool | None:
        """Whether it lets the user in."""
        if not self.reachable or self.failure is None:
            return self.reachable or None
        return self.failure.code not in _NOT_LET_IN

    @property
    def listing(self) -> bool | None:
        """Whether the default folder is there and can be listed."""
        if not self.login:
            return None
        return self.failure is None


@define(eq=False)
class SiteCheck:
    """Lists the default folder of a site at each of its endpoints.

    Attributes:
        longest_s: seconds after which what was not looked at by then is given up.
    """

    preparation: Preparation
    pool: AgentPool
    longest_s: float = LONGEST_ALL_S
    _turns: DeferredSemaphore = field(factory=lambda: DeferredSemaphore(_AT_ONCE))
    _busy: set[int] = field(factory=set)
    _log: Logger = field(factory=Logger)

    async def check(self, user_id: int, site: Site) -> Sequence[DoorCheck]:
        """A few endpoints at once; in the order of the protocols.

        Raises:
            BusyError: the user has another look under way.
        """
        if user_id in self._busy:
            raise BusyError
        self._busy.add(user_id)
        until = self.preparation.tools.reactor.seconds() + self.longest_s
        doors = [Door(site.id, protocol, url) for protocol in sorted(site.endpoints) for url in site.doors(protocol)]
        found: dict[Door, DoorCheck] = {}
        looks = [Deferred.fromCoroutine(self._in_turn(user_id, site, door, until, found)) for door in doors]
        # Who has asked may go away; what is under way comes to its end, and only then may the user ask again.
        over = DeferredList(looks).addCallback(lambda _: self._busy.discard(user_id))
        await self._waited(over)
        late = _failure(FailureCode.TIMEOUT, f"not looked at within {self.longest_s:g} s: the service is busy")
        return [found.get(door) or DoorCheck(door, late, self.longest_s) for door in doors]

    async def _waited(self, over: Deferred[None]) -> None:
        """Wait for the end of all looks, or of the time for them."""
        enough: Deferred[None] = Deferred()

        def end(result: object) -> object:
            if timer.active():
                timer.cancel()
            if not enough.called:
                enough.callback(None)
            return result

        timer = self.preparation.tools.reactor.callLater(self.longest_s, end, None)
        over.addCallback(end)
        try:
            await enough
        finally:
            if timer.active():
                timer.cancel()

    async def _in_turn(self, user_id: int, site: Site, door: Door, until: float, found: dict[Door, DoorCheck]) -> None:
        await self._turns.acquire()
        try:
            if self.preparation.tools.reactor.seconds() < until:
                found[door] = await self._door(user_id, site, door, until)
        except Exception:
            self._log.failure("an endpoint of site {site} could not be looked at", site=site.id)
            why = _failure(FailureCode.INTERNAL, "a fault of the service: tell an operator")
            found[door] = DoorCheck(door, why, 0.0)
        finally:
            self._turns.release()

    async def _door(self, user_id: int, site: Site, door: Door, until: float) -> DoorCheck:
        tools = self.preparation.tools
        began = tools.reactor.seconds()
        failure = await self._listed(user_id, site, door, until)
        checked = DoorCheck(door, failure, tools.reactor.seconds() - began)
        if checked.login:
            # So work that waits for it need not wait for the next probe.
            tools.health.worked([door], tools.clock())
        return checked

    async def _listed(self, user_id: int, site: Site, door: Door, until: float) -> AttemptFailure | None:
        protocol = door.protocol
        if protocol not in MOVERS:
            return _failure(FailureCode.UNSUPPORTED, f"this service cannot move by {protocol.name}")
        try:
            kind = await self.preparation.kind_for(user_id, protocol, [(site, protocol)])
        except CredentialUnusableError as error:
            return error.failure
        try:
            agent = await self.pool.lend(kind, alone=True)
            try:
                if self.preparation.tools.reactor.seconds() >= until:
                    return _failure(FailureCode.TIMEOUT, "there was no free helper in time: the service is busy")
                return await self._ask(agent, protocol, storage_url(site, protocol, site.default_folder, door.url))
            finally:
                self.pool.give_back(agent, kind)
        except AgentStartError as error:
            return _failure(FailureCode.CRASHED, str(error))
        finally:
            self.preparation.let_go(kind)

    async def _ask(self, agent: AgentProcess, protocol: JobProtocol, url: str) -> AttemptFailure | None:
        mover, number = MOVERS[protocol], self.preparation.next_request_id()
        over: Deferred[None] = Deferred()
        failure: AttemptFailure | None = None
        finished = False

        def on_event(event: wire.Event) -> None:
            nonlocal failure, finished
            if isinstance(event, (wire.Failed, wire.Unreadable)):
                failure = failure or mover.judge(event.fault)
            elif isinstance(event, wire.Finished):
                finished = True
                over.callback(None)

        def on_end(sentence: str) -> None:
            nonlocal failure
            if not over.called:
                failure = failure or _failure(FailureCode.CRASHED, sentence)
                over.callback(None)

        def too_long() -> None:
            nonlocal failure
            failure = AttemptFailure(Scope.SOURCE, FailureCode.TIMEOUT, f"no listing within {_LONGEST_S:g} s")
            agent.kill("a site was not looked at in time")

        timer = self.preparation.tools.reactor.callLater(_LONGEST_S, too_long)
        limits = wire.Limits(stall_s=_LONGEST_S / 2, total_s=_LONGEST_S - 2)
        agent.give(wire.ListRequest(number, 0, url, 0, limits), Borrower(on_event, on_end))
        try:
            await over
        finally:
            if timer.active():
                timer.cancel()
            if not finished:
                # Whoever has asked may be gone: nothing else is to wait behind this.
                agent.kill("a look at a site was broken off")
            agent.take_back(number)
        return failure


def _failure(code: FailureCode, message: str) -> AttemptFailure:
    return AttemptFailure(Scope.SERVICE, code, message)
