"""Kills an agent that is silent during its batch, or that does not react to a cancellation."""

from __future__ import annotations

from collections.abc import Callable

from attrs import define
from twisted.internet.interfaces import IDelayedCall, IReactorTime

from pdm.workqueue.agents.process import AgentProcess

#: Seconds that a responding agent may take to remove temporary files after a cancellation; it may have to log in.
_CLEAN_UP_S = 4.0


@define(eq=False, kw_only=True)
class AgentWatch:
    """The timers of one batch.

    Attributes:
        silence_s: seconds for which the agent may be silent.
        cancel_grace_s: seconds in which it must report the first element that was cancelled.
        is_paused: whether nothing of it is read, so that it is not silent.
        is_cancelled: whether elements of the batch that are to be cancelled have no verdict.
        began_at: when it finished the request before this one (`IReactorTime.seconds`); None until then.
        has_killed: whether it was killed because it did not react.
    """

    reactor: IReactorTime
    agent: AgentProcess
    silence_s: float
    cancel_grace_s: float
    is_paused: Callable[[], bool]
    is_cancelled: Callable[[], bool]
    began_at: float | None = None
    has_killed: bool = False
    _heard_at: float = 0.0
    _is_responding: bool = False
    _killer: IDelayedCall | None = None
    _watchdog: IDelayedCall | None = None

    @property
    def seconds(self) -> float:
        """Seconds since the begin; 0 before it."""
        return 0.0 if self.began_at is None else self.reactor.seconds() - self.began_at

    def begin(self) -> None:
        """The agent has finished the request before this one: from now on it must not be silent."""
        self.began_at = self._heard_at = self.reactor.seconds()
        self._watchdog = self.reactor.callLater(self.silence_s, self._check_silence)

    def heard(self) -> None:
        """An event has arrived."""
        self._heard_at = self.reactor.seconds()

    def await_end(self) -> None:
        """The agent was told to cancel elements: kill it if it does not react."""
        if self._killer is not None and self._killer.active():
            self._killer.cancel()
        self._is_responding = False
        self._killer = self.reactor.callLater(self.cancel_grace_s, self._cancel_timed_out)

    def responded(self) -> None:
        """An event of a cancelled element has arrived: the agent gets time to clean up."""
        if self._killer is not None and not self._is_responding:
            self._is_responding = True
            if self._killer.active():
                self._killer.reset(_CLEAN_UP_S)

    def stop(self) -> None:
        """The agent is free, or dead."""
        for timer in (self._killer, self._watchdog):
            if timer is not None and timer.active():
                timer.cancel()

    def _cancel_timed_out(self) -> None:
        if self.is_cancelled():
            self.has_killed = True
            self.agent.kill("it did not react to a cancellation")

    def _check_silence(self) -> None:
        now = self.reactor.seconds()
        if self.is_paused():
            self._heard_at = now
        left = self._heard_at + self.silence_s - now
        if left > 0:
            self._watchdog = self.reactor.callLater(left, self._check_silence)
        else:
            self.agent.kill(f"it was silent for {self.silence_s:g} s")
