"""Background work: coroutines, periodic calls and threads; each failure is logged under a name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.threads import deferToThread
from twisted.logger import Logger
from twisted.python.failure import Failure

_T = TypeVar("_T")

_log = Logger()


class ReportedError(Exception):
    """A failure that its source has logged already; it is not logged again."""


def start_background(name: str, coroutine: Coroutine[Deferred[Any], Any, None]) -> Deferred[None]:
    """Run a coroutine in the background; a failure is logged under its name.

    Returns:
        Fires with None when it has ended, however; cancel it to end the work.
    """
    work = Deferred.fromCoroutine(coroutine)

    def failed(failure: Failure) -> None:
        if not failure.check(CancelledError, ReportedError):
            _log.failure("{name} failed", failure, name=name)

    return work.addErrback(failed)


async def run_in_thread(function: Callable[..., _T], /, *arguments: Any) -> _T:
    """The result of a function that runs in a thread of the reactor's pool."""
    result: _T = await deferToThread(function, *arguments)
    return result


def following(source: Deferred[_T]) -> Deferred[_T]:
    """A Deferred that fires with another's result and leaves that to its next reader."""
    follower: Deferred[_T] = Deferred()

    def pass_on(result: _T) -> _T:
        follower.callback(result)
        return result

    source.addCallback(pass_on)
    return follower


class Background:
    """Background work of one owner, which waits for it when it stops."""

    def __init__(self) -> None:
        self._under_way: set[Deferred[None]] = set()

    def start(self, name: str, coroutine: Coroutine[Deferred[Any], Any, None]) -> None:
        """Run a coroutine; a failure is logged under its name."""
        work = start_background(name, coroutine)
        if not work.called:
            self._under_way.add(work)
            work.addCallback(lambda _: self._under_way.discard(work))

    async def over(self) -> None:
        """Wait until all that was started has ended."""
        while self._under_way:
            await following(next(iter(self._under_way)))


class Periodic:
    """Calls a function again and again, each time when the last call has ended; failures are logged.

    Args:
        interval_s: seconds from the end of one run to the begin of the next.
    """

    def __init__(
        self, reactor: IReactorTime, name: str, interval_s: float, function: Callable[[], Awaitable[None] | None]
    ) -> None:
        self._reactor = reactor
        self._name = name
        self._interval_s = interval_s
        self._function = function
        self._timer: IDelayedCall | None = None
        self._running: Deferred[None] | None = None
        self._started = False

    def start(self) -> None:
        """Begin; the first run is one interval from now."""
        if not self._started:
            self._started = True
            self._plan()

    async def stop(self) -> None:
        """Schedule no further run, and wait for a running one."""
        self._started = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._running is not None:
            ended: Deferred[None] = Deferred()
            self._running.addCallback(lambda _: ended.callback(None))
            await ended

    def _plan(self) -> None:
        self._timer = self._reactor.callLater(self._interval_s, self._begin)

    def _begin(self) -> None:
        self._timer = None
        self._running = start_background(self._name, self._run())
        self._running.addCallback(self._ended)

    async def _run(self) -> None:
        result = self._function()
        if result is not None:
            await result

    def _ended(self, _: None) -> None:
        self._running = None
        if self._started:
            self._plan()


class DueTimer:
    """Calls a function that attends to what is due, at once when woken, and again when something is due next.

    Args:
        attend: returns for how many seconds nothing more is due.
        longest_s: it is called at least so often, because others may add what is due.
    """

    def __init__(
        self, reactor: IReactorTime, name: str, longest_s: float, attend: Callable[[], Awaitable[float]]
    ) -> None:
        self._reactor = reactor
        self._name = name
        self._longest_s = longest_s
        self._attend = attend
        self._timer: IDelayedCall | None = None
        self._background = Background()
        self._attending = False
        self._woken = False
        self._stopping = False

    def start(self) -> None:
        self.wake()

    async def stop(self) -> None:
        """Call it no more, and wait for a running call."""
        self._stopping = True
        self._cancel_timer()
        await self._background.over()

    def wake(self, _step: object = None) -> None:
        """Something was added, or the clock was set."""
        self._woken = True
        if not self._attending and not self._stopping:
            self._cancel_timer()
            self._background.start(self._name, self._run())

    async def _run(self) -> None:
        self._attending = True
        pause_s = self._longest_s
        try:
            while self._woken and not self._stopping:
                self._woken = False
                pause_s = min(max(await self._attend(), 0.0), self._longest_s)
        finally:
            self._attending = False
            if not self._stopping:
                self._timer = self._reactor.callLater(pause_s, self.wake)

    def _cancel_timer(self) -> None:
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self._timer = None
