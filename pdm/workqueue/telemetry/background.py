"""Background work: coroutines, periodic calls and threads; each failure is logged under a name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeVar

from attrs import frozen
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


@frozen
class CallOutcome(Generic[_T]):
    """How a call ended.

    Attributes:
        value: its result; None if it has failed.
        error: why it has failed, or has not ended; None for a success.
        at: when it ended, or was last seen unfinished, by the reactor's clock.
    """

    value: _T | None
    error: Exception | None
    at: float


class SharedCall(Generic[_T]):
    """A call whose result is kept for some seconds, and for which callers wait for a limited time.

    At most one call is under way, however many ask, and however long it takes.

    Args:
        function: what is called; it may hang.
        kept_s: seconds for which a success is returned again.
        failure_kept_s: likewise, a failure.
        limit_s: seconds for which a caller waits.
    """

    def __init__(
        self,
        reactor: IReactorTime,
        function: Callable[[], Awaitable[_T]],
        *,
        kept_s: float,
        failure_kept_s: float,
        limit_s: float,
    ) -> None:
        self._reactor = reactor
        self._function = function
        self._kept_s = kept_s
        self._failure_kept_s = failure_kept_s
        self._limit_s = limit_s
        self._running: Deferred[None] | None = None
        self._began_at = 0.0
        #: The latest outcome, and the latest success.
        self._last: CallOutcome[_T] | None = None
        self.succeeded: CallOutcome[_T] | None = None

    async def outcome(self) -> CallOutcome[_T]:
        """The kept outcome, or that of a call; a `TimeoutError` if it does not end in time."""
        last, now = self._last, self._reactor.seconds()
        if last is not None and now - last.at < (self._kept_s if last.error is None else self._failure_kept_s):
            return last
        if self._running is None:
            self._began_at = now
            running = Deferred.fromCoroutine(self._run())
            # It may have ended at once.
            self._running = None if running.called else running
        if self._running is not None:
            await self._wait(self._running)
        now = self._reactor.seconds()
        if self._running is not None or self._last is None:
            return CallOutcome(None, TimeoutError(f"no answer for {now - self._began_at:.1f} s"), now)
        return self._last

    async def _run(self) -> None:
        value: _T | None = None
        error: Exception | None = None
        try:
            value = await self._function()
        except Exception as raised:
            error = raised
        self._last = CallOutcome(value, error, self._reactor.seconds())
        if error is None:
            self.succeeded = self._last
        self._running = None

    async def _wait(self, running: Deferred[None]) -> None:
        waiter: Deferred[None] = Deferred()
        running.addCallback(lambda _: _fire(waiter))
        timer = self._reactor.callLater(self._limit_s, _fire, waiter)
        await waiter
        if timer.active():
            timer.cancel()

    async def over(self) -> None:
        """Wait until no call is under way."""
        if self._running is not None:
            await following(self._running)


def _fire(waiter: Deferred[None]) -> None:
    if not waiter.called:
        waiter.callback(None)


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
