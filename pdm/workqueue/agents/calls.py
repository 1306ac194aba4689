"""Ask an agent for something that belongs to no job: the site check, endpoint probes, removal of leftover files."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import field, frozen
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime

from pdm.workqueue.agents.process import AgentProcess, BatchListener
from pdm.workqueue.wire.agent_messages import (
    AgentEvent,
    CancelledEvent,
    FailedEvent,
    Fault,
    FinishedEvent,
    UnreadableEvent,
    WorkRequest,
)


@frozen
class Answer:
    """What an agent reported about a request.

    Attributes:
        faults: item key → its first fault; `None` where the agent cancelled the item. Items that succeeded are absent.
        error: why the agent died before it finished the request; None if it finished.
        timed_out: it was killed because it sent no event in time.
    """

    faults: Mapping[int, Fault | None] = field(factory=dict)
    error: str | None = None
    timed_out: bool = False


async def ask(agent: AgentProcess, request: WorkRequest, reactor: IReactorTime, silence_s: float) -> Answer:
    """Have an agent carry out a request. An agent that does not finish it is killed, also if the caller is cancelled.

    ``agent``: acquired from the pool; the caller releases it. ``request``: its events are reduced to the faults of its
    items. ``silence_s``: seconds without an event after which the agent is killed.
    """
    over: Deferred[str | None] = Deferred()
    faults: dict[int, Fault | None] = {}
    finished = timed_out = False

    def on_event(event: AgentEvent) -> None:
        nonlocal finished
        if isinstance(event, FinishedEvent):
            finished = True
            over.callback(None)
            return
        timer.reset(silence_s)
        if isinstance(event, (FailedEvent, UnreadableEvent)):
            faults.setdefault(event.key, event.fault)
        elif isinstance(event, CancelledEvent):
            faults.setdefault(event.key, None)

    def on_end(reason: str) -> None:
        if not over.called:
            over.callback(reason)

    def on_timeout() -> None:
        nonlocal timed_out
        timed_out = True
        agent.kill("the helper was silent for too long")

    timer = reactor.callLater(silence_s, on_timeout)
    agent.submit(request, BatchListener(on_event, on_end))
    try:
        error = await over
    finally:
        if timer.active():
            timer.cancel()
        if not finished:
            # The caller may have been cancelled: no other work may queue behind this request.
            agent.kill("its request was cancelled")
        agent.detach(request.id)
    return Answer(faults, error, timed_out)
