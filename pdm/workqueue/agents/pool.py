"""Agents kept warm: lent to one batch at a time, kept for the next of the same kind and credential."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

from attrs import define, field, frozen
from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.interfaces import IReactorProcess, IReactorTime
from twisted.logger import Logger

from pdm.workqueue.agents.process import AgentCommand, AgentProcess, AgentStartError, watched_start
from pdm.workqueue.telemetry.background import Periodic, following


@frozen
class AgentKind:
    """What makes two agents exchangeable.

    Attributes:
        helper: name of the helper program.
        credential: fingerprint of the credential it works with; empty for none.
        environment: what the mover asks for, by name.
    """

    helper: str
    credential: str
    environment: Mapping[str, str] = field(eq=False)


@define
class _Idle:
    agent: AgentProcess
    kind: AgentKind
    since: float


class AgentPool:
    """Lends agents.

    Args:
        spawner, timer: the reactor, which is both.
        command_for: how an agent of a kind is started.
        most: how many agents may live at once.
        idle_s: seconds after which an unused agent is ended.
        unused: called with the fingerprint of a credential once no agent lives that works with it.
        start_timeout_s: seconds an agent may take to be ready.
    """

    _log = Logger()

    def __init__(
        self,
        spawner: IReactorProcess,
        timer: IReactorTime,
        command_for: Callable[[AgentKind], AgentCommand],
        *,
        most: int,
        idle_s: float,
        unused: Callable[[str], None],
        start_timeout_s: float = 30.0,
    ) -> None:
        self._spawner = spawner
        self._timer = timer
        self._command_for = command_for
        self._most = most
        self._idle_s = idle_s
        self._unused = unused
        self._start_timeout_s = start_timeout_s
        self._idle: list[_Idle] = []
        self._living: dict[AgentProcess, AgentKind] = {}
        self._waiting: deque[Deferred[None]] = deque()
        self._stopping = False
        self._sweeper = Periodic(timer, "end idle agents", max(idle_s / 4, 0.5), self._end_idle)

    def start(self) -> None:
        self._sweeper.start()

    async def stop(self, grace_s: float = 2.0) -> None:
        """End all agents: ask, wait, kill."""
        self._stopping = True
        await self._sweeper.stop()
        for waiting in list(self._waiting):
            waiting.errback(AgentStartError("the service is stopping"))
        self._waiting.clear()
        living = list(self._living)
        for agent in living:
            agent.end()

        def kill_all() -> None:
            for agent in living:
                agent.kill("the service stops")

        killer = self._timer.callLater(grace_s, kill_all)
        await DeferredList([following(agent.ended) for agent in living])
        if killer.active():
            killer.cancel()

    async def lend(self, kind: AgentKind) -> AgentProcess:
        """An agent that is ready; waits while all are in use.

        Raises:
            AgentStartError: it could not be started.
        """
        while True:
            if self._stopping:
                raise AgentStartError("the service is stopping")
            for idle in reversed(self._idle):
                if idle.kind == kind:
                    self._idle.remove(idle)
                    return idle.agent
            if len(self._living) < self._most:
                return await self._started(kind)
            if self._idle:
                # The place is needed for another kind: the longest unused one makes room.
                oldest = self._idle.pop(0)
                oldest.agent.end()
                await following(oldest.agent.ended)
                continue
            turn: Deferred[None] = Deferred()
            self._waiting.append(turn)
            await turn

    def give_back(self, agent: AgentProcess, kind: AgentKind) -> None:
        """Return an agent whose batch is finished."""
        agent.give_back()
        if agent.alive:
            self._idle.append(_Idle(agent, kind, self._timer.seconds()))
            self._next()

    async def _started(self, kind: AgentKind) -> AgentProcess:
        agent = AgentProcess(self._command_for(kind))
        self._living[agent] = kind
        agent.ended.addCallback(self._gone, agent)
        try:
            agent.start(self._spawner)
        except AgentStartError:
            self._forget(agent)
            raise
        ready = await watched_start(agent, self._timer, self._start_timeout_s)
        self._log.info("agent {name} ready, pid {pid}: {tools}", name=kind.helper, pid=agent.pid, tools=ready.tools)
        return agent

    def _gone(self, sentence: str, agent: AgentProcess) -> str:
        self._forget(agent)
        return sentence

    def _forget(self, agent: AgentProcess) -> None:
        kind = self._living.pop(agent)
        self._idle = [idle for idle in self._idle if idle.agent is not agent]
        if kind.credential and all(other.credential != kind.credential for other in self._living.values()):
            self._unused(kind.credential)
        self._next()

    def _next(self) -> None:
        if self._waiting:
            self._waiting.popleft().callback(None)

    async def _end_idle(self) -> None:
        before = self._timer.seconds() - self._idle_s
        for idle in [idle for idle in self._idle if idle.since <= before]:
            self._idle.remove(idle)
            idle.agent.end()
