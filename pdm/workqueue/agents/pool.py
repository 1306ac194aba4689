"""Pool of agent processes: an agent is reused for batches of the same kind, and may queue the next one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from attrs import define, field, frozen
from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.interfaces import IReactorProcess, IReactorTime
from twisted.logger import Logger

from pdm.workqueue.agents.process import (
    AgentCommand,
    AgentProcess,
    AgentStartError,
    BatchListener,
    LeaseOverError,
    watched_start,
)
from pdm.workqueue.domain.limits import StreamSlot
from pdm.workqueue.telemetry.background import Periodic, following
from pdm.workqueue.wire.agent_events import (
    AgentEvent,
    CancelledEvent,
    FailedEvent,
    Fault,
    FinishedEvent,
    TapeEvent,
    UnreadableEvent,
)
from pdm.workqueue.wire.agent_requests import TapeRequest, WorkRequest


@frozen
class Answer:
    """What an agent reported about a request.

    Attributes:
        faults: item key → its first fault; `None` where the agent cancelled the item. Items that succeeded are absent.
        error: why the agent died before it finished the request; None if it finished.
        timed_out: it was killed because it sent no event in time.
        tape: what a tape API has answered; None for other requests.
    """

    faults: Mapping[int, Fault | None] = field(factory=dict)
    error: str | None = None
    timed_out: bool = False
    tape: TapeEvent | None = None


async def ask(
    agent: AgentProcess, request: WorkRequest | TapeRequest, reactor: IReactorTime, silence_s: float
) -> Answer:
    """Have an agent carry out a request. An agent that does not finish it is killed, also if the caller is cancelled.

    ``agent``: acquired from the pool; the caller releases it. ``request``: its events are reduced to the faults of its
    items. ``silence_s``: seconds without an event after which the agent is killed.
    """
    over: Deferred[str | None] = Deferred()
    faults: dict[int, Fault | None] = {}
    tape: TapeEvent | None = None
    finished = timed_out = False

    def on_events(events: Sequence[AgentEvent]) -> None:
        nonlocal finished, tape
        timer.reset(silence_s)
        for event in events:
            if isinstance(event, FinishedEvent):
                finished = True
                over.callback(None)
            elif isinstance(event, (FailedEvent, UnreadableEvent)):
                faults.setdefault(event.key, event.fault)
            elif isinstance(event, CancelledEvent):
                faults.setdefault(event.key, None)
            elif isinstance(event, TapeEvent):
                tape = event

    def on_end(reason: str) -> None:
        if not over.called:
            over.callback(reason)

    def on_timeout() -> None:
        nonlocal timed_out
        timed_out = True
        agent.kill("the helper was silent for too long")

    timer = reactor.callLater(silence_s, on_timeout)
    agent.submit(request, BatchListener(on_events, on_end))
    try:
        error = await over
    finally:
        if timer.active():
            timer.cancel()
        if not finished:
            # The caller may have been cancelled: no other work may queue behind this request.
            agent.kill("its request was cancelled")
        agent.detach(request.id)
    return Answer(faults, error, timed_out, tape)


#: Seconds within which an agent exits when its input is closed.
_END_GRACE_S = 2.0
#: Agents stop this fraction of the remaining lease before its end.
_LEASE_MARGIN = 0.1


def boot_seconds() -> float:
    """Seconds of CLOCK_BOOTTIME: the same for all processes of the machine, and includes time in suspend."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@frozen
class AgentKind:
    """What makes two agents interchangeable.

    Attributes:
        credential: fingerprint of its credential; empty for none.
        environment: variables that the mover sets: trusted authorities, roots.
    """

    helper: str
    credential: str
    environment: Mapping[str, str] = field(hash=False)


@define
class _Idle:
    agent: AgentProcess
    kind: AgentKind
    since: float


@define
class _Living:
    kind: AgentKind
    holders: int
    alone: bool
    # Of the latest batch.
    slot: StreamSlot | None


@define(eq=False)
class _Waiting:
    kind: AgentKind
    slot: StreamSlot | None
    is_wanted: Callable[[], bool]
    woken: Deferred[None] = field(factory=Deferred)

    @property
    def is_open(self) -> bool:
        """Whether it waits only for an agent, not for a stream."""
        return self.slot is None or self.slot.is_open

    def start(self) -> bool:
        return self.slot is None or self.slot.start()

    def follow(self, leader: StreamSlot | None) -> bool:
        if self.slot is None or leader is None:
            return self.start()
        return self.slot.follow(leader)


class AgentPool:
    """Lends agents.

    Args:
        spawner, timer: the reactor, which is both.
        command_for: how to start an agent of a kind.
        most: agents that may work at once.
        spare: additional idle agents: a login takes a server 0.1 s, so agents of users who take turns are kept.
        kept_free: how many of ``most`` are reserved for callers that need an agent alone.
        idle_s: seconds after which an unused agent is ended.
        unused: called with the fingerprint of a credential once no agent uses it any more.
        start_timeout_s: seconds until an agent must be ready.
    """

    _log = Logger()

    def __init__(
        self,
        *,
        spawner: IReactorProcess,
        timer: IReactorTime,
        command_for: Callable[[AgentKind], AgentCommand],
        most: int,
        idle_s: float,
        unused: Callable[[str], None],
        start_timeout_s: float = 30.0,
        kept_free: int = 0,
        spare: int = 0,
    ) -> None:
        self._spawner = spawner
        self._timer = timer
        self._command_for = command_for
        self._most = most
        self._kept_free = kept_free
        self._most_living = most + spare
        self._idle_s = idle_s
        self._unused = unused
        self._start_timeout_s = start_timeout_s
        self._idle: list[_Idle] = []
        self._living: dict[AgentProcess, _Living] = {}
        #: In order of arrival.
        self._waiting: list[_Waiting] = []
        self._making_room = 0
        #: Fingerprints of credentials whose agents end as soon as they are idle.
        self._retired: set[str] = set()
        self._stopping = False
        #: Agents may work until this time; None for no limit.
        self._lease_until: float | None = None
        self._sweeper = Periodic(timer, "end idle agents", max(idle_s / 4, 0.5), self._end_idle)

    def start(self) -> None:
        self._sweeper.start()

    async def stop(self) -> None:
        """End all agents: close their input, wait, kill."""
        self._stopping = True
        await self._sweeper.stop()
        self.wake_waiting()
        living = list(self._living)
        for agent in living:
            self._end(agent, "the service stops")
        await DeferredList([following(agent.ended) for agent in living])

    def hold_lease(self, until: float) -> None:
        """Tell all agents the end of the renewed lease; each exits shortly before it, unless a later one arrives.

        ``until``: end by `boot_seconds`, counted from the start of the renewal.
        """
        left_s = max(until - boot_seconds(), 0.0)
        self._lease_until = until - _LEASE_MARGIN * left_s
        for agent in self._living:
            agent.hold_lease(self._lease_until)

    async def acquire(
        self,
        kind: AgentKind,
        *,
        alone: bool = False,
        slot: StreamSlot | None = None,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> AgentProcess:
        """An agent that is ready or nearly done; waits while all are busy, or limits allow no further stream.

        ``alone``: whether it must be idle: for requests that must not wait behind a batch. ``slot``: of the batch, if
        streams are limited; the caller leaves it. ``is_wanted``: whether the caller still waits; after a change it
        calls `wake_waiting`.

        Raises:
            AgentStartError: it could not be started, or is not wanted any more.
            LeaseOverError: there is no lease under which it could work.
        """
        if self._lease_until is not None and boot_seconds() >= self._lease_until:
            raise LeaseOverError
        waiting = _Waiting(kind, slot, is_wanted)
        self._waiting.append(waiting)
        try:
            agent = await self._place(waiting, alone)
        finally:
            self._waiting.remove(waiting)
        if agent is None:
            return await self._started(kind, alone, slot)
        living = self._living[agent]
        living.holders += 1
        living.alone = alone
        living.slot = slot
        return agent

    async def _place(self, waiting: _Waiting, alone: bool) -> AgentProcess | None:
        """An agent of the kind; None if a new one may be started."""
        kind = waiting.kind
        while True:
            if self._stopping:
                raise AgentStartError("the service is stopping")
            if not waiting.is_wanted():
                raise AgentStartError("its batch was ended")
            if alone or (self._working() < self._most - self._kept_free and waiting.start()):
                agent = self._free(kind)
                if agent is not None:
                    return agent
                if len(self._living) + self._making_room < self._most_living:
                    return None
                if self._idle:
                    # The longest unused agent of another kind makes room.
                    await self._make_room(self._idle.pop(0).agent)
                    continue
            elif (agent := self._nearly_free(waiting)) is not None:
                return agent
            waiting.woken = Deferred()
            await waiting.woken

    async def _make_room(self, agent: AgentProcess) -> None:
        # Reserve the place: a caller that is woken earlier must not take it.
        self._making_room += 1
        try:
            self._end(agent)
            await following(agent.ended)
        finally:
            self._making_room -= 1

    def _end(self, agent: AgentProcess, why: str = "it did not end when it had nothing more to do") -> None:
        """End an agent; kill it if it does not react, for others may wait for its place."""
        agent.end()
        killer = self._timer.callLater(_END_GRACE_S, agent.kill, why)

        def over(sentence: str) -> str:
            if killer.active():
                killer.cancel()
            return sentence

        agent.ended.addCallback(over)

    def _working(self) -> int:
        return sum(1 for living in self._living.values() if living.holders and not living.alone)

    def _free(self, kind: AgentKind) -> AgentProcess | None:
        for idle in reversed(self._idle):
            if idle.kind == kind:
                self._idle.remove(idle)
                return idle.agent
        return None

    def _nearly_free(self, waiting: _Waiting) -> AgentProcess | None:
        """An agent that will soon finish; not while an earlier caller of another kind waits for a place."""
        before = self._waiting[: self._waiting.index(waiting)]
        if any(other.kind != waiting.kind and other.is_open for other in before):
            return None
        for agent, living in self._living.items():
            fits = living.kind == waiting.kind and living.holders == 1 and agent.takes_next
            if fits and waiting.follow(living.slot):
                return agent
        return None

    def wake_waiting(self) -> None:
        """Have all waiting callers look again for an agent and a stream."""
        for waiting in list(self._waiting):
            if not waiting.woken.called:
                waiting.woken.callback(None)

    def slots(self) -> dict[str, int]:
        """How many agents are ``busy`` and ``idle``, and the ``limit`` of busy ones."""
        return {"busy": len(self._living) - len(self._idle), "idle": len(self._idle), "limit": self._most}

    def works_with(self, credential: str) -> bool:
        """Whether an agent with a credential is alive."""
        return any(living.kind.credential == credential for living in self._living.values())

    def retire(self, credential: str) -> None:
        """End the agents of a credential: idle ones at once, others when they are released."""
        if self.works_with(credential):
            self._retired.add(credential)
        for idle in [idle for idle in self._idle if idle.kind.credential == credential]:
            self._idle.remove(idle)
            self._end(idle.agent)

    def release(self, agent: AgentProcess, kind: AgentKind) -> None:
        """Return an agent after its batch."""
        if agent.alive:
            living = self._living[agent]
            living.holders -= 1
            if not living.holders and kind.credential in self._retired:
                self._end(agent)
            elif not living.holders:
                self._idle.append(_Idle(agent, kind, self._timer.seconds()))
            self.wake_waiting()

    async def _started(self, kind: AgentKind, alone: bool, slot: StreamSlot | None) -> AgentProcess:
        agent = AgentProcess(self._command_for(kind))
        self._living[agent] = _Living(kind, 1, alone, slot)
        agent.ended.addCallback(self._gone, agent)
        try:
            agent.start(self._spawner)
        except AgentStartError:
            self._forget(agent)
            raise
        if self._lease_until is not None:
            agent.hold_lease(self._lease_until)
        ready = await watched_start(agent, self._timer, self._start_timeout_s)
        self._log.info("agent {name} ready, pid {pid}: {tools}", name=kind.helper, pid=agent.pid, tools=ready.tools)
        return agent

    async def try_start(self, kind: AgentKind) -> None:
        """Check that an agent can be started, outside the pool, and end it.

        Raises:
            AgentStartError: it could not be started.
        """
        agent = AgentProcess(self._command_for(kind))
        agent.start(self._spawner)
        await watched_start(agent, self._timer, self._start_timeout_s)
        self._end(agent)
        await following(agent.ended)

    def _gone(self, sentence: str, agent: AgentProcess) -> str:
        self._forget(agent)
        return sentence

    def _forget(self, agent: AgentProcess) -> None:
        kind = self._living.pop(agent).kind
        self._idle = [idle for idle in self._idle if idle.agent is not agent]
        if kind.credential and not self.works_with(kind.credential):
            self._retired.discard(kind.credential)
            self._unused(kind.credential)
        self.wake_waiting()

    async def _end_idle(self) -> None:
        before = self._timer.seconds() - self._idle_s
        for idle in [idle for idle in self._idle if idle.since <= before]:
            self._idle.remove(idle)
            self._end(idle.agent)
