"""Looks at what the endpoints of a site can do, with a user's credential, through an agent: nothing else is a proof."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import define, field, frozen
from twisted.internet.defer import Deferred

from pdm.workqueue.agents.pool import AgentPool
from pdm.workqueue.agents.process import AgentProcess, AgentStartError, Borrower
from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, Scope
from pdm.workqueue.execution.credentials import CredentialUnusableError
from pdm.workqueue.execution.executor import Executor
from pdm.workqueue.execution.health import Door
from pdm.workqueue.movers import MOVERS
from pdm.workqueue.sites.registry import Site, storage_url
from pdm.workqueue.wire import agent_messages as wire

#: Seconds for one endpoint, its login and its listing.
_LONGEST_S = 30.0
_NOT_REACHED = frozenset({FailureCode.CONNECTION, FailureCode.TIMEOUT, FailureCode.STALLED})
_NOT_LET_IN = frozenset({FailureCode.CERTIFICATE, FailureCode.CREDENTIAL_REFUSED, FailureCode.CREDENTIAL_EXPIRED})
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
        return None if self.failure.code in _NOT_ASKED else self.failure.code not in _NOT_REACHED

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
    """Lists the default folder of a site at each of its endpoints."""

    executor: Executor
    pool: AgentPool
    _busy: set[int] = field(factory=set)

    async def check(self, user_id: int, site: Site) -> Sequence[DoorCheck]:
        """All endpoints at once, as far as there are agents; in the order of the protocols.

        Raises:
            BusyError: the user has another look under way.
        """
        if user_id in self._busy:
            raise BusyError
        self._busy.add(user_id)
        try:
            looks = [
                Deferred.fromCoroutine(self._door(user_id, site, Door(site.id, protocol, url)))
                for protocol in sorted(site.endpoints)
                for url in site.doors(protocol)
            ]
            return [await look for look in looks]
        finally:
            self._busy.discard(user_id)

    async def _door(self, user_id: int, site: Site, door: Door) -> DoorCheck:
        tools = self.executor.tools
        began = tools.reactor.seconds()
        failure = await self._listed(user_id, site, door)
        checked = DoorCheck(door, failure, tools.reactor.seconds() - began)
        if checked.login:
            # So work that waits for it need not wait for the next probe.
            tools.health.worked([door], tools.clock())
        return checked

    async def _listed(self, user_id: int, site: Site, door: Door) -> AttemptFailure | None:
        protocol = door.protocol
        if protocol not in MOVERS:
            return _failure(FailureCode.UNSUPPORTED, f"this service cannot move by {protocol.name}")
        try:
            kind = await self.executor.kind_for(user_id, protocol, [(site, protocol)])
        except CredentialUnusableError as error:
            return error.failure
        try:
            agent = await self.pool.lend(kind, alone=True)
            try:
                return await self._ask(agent, protocol, storage_url(site, protocol, site.default_folder, door.url))
            finally:
                self.pool.give_back(agent, kind)
        except AgentStartError as error:
            return _failure(FailureCode.CRASHED, str(error))
        finally:
            self.executor.let_go(kind)

    async def _ask(self, agent: AgentProcess, protocol: JobProtocol, url: str) -> AttemptFailure | None:
        mover, number = MOVERS[protocol], self.executor.next_request_id()
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

        timer = self.executor.tools.reactor.callLater(_LONGEST_S, too_long)
        limits = wire.Limits(stall_s=_LONGEST_S / 2, total_s=_LONGEST_S - 5)
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
