"""A log store on real files with its real thread; the test runs the reactor's part."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorFromThreads
from twisted.python.failure import Failure
from zope.interface import implementer

from pdm.workqueue.logstore.attempt_log import LogRef
from pdm.workqueue.logstore.store import LogStore
from pdm.workqueue.logstore.writer import ClosedLog
from tests.support.attempt_logs import attempt_lines

#: Timeout in seconds; reached only by a failing test.
_PATIENCE_S = 30.0


@implementer(IReactorFromThreads)
class ReactorThread:
    """Runs functions that other threads pass to the reactor, in the test's thread."""

    def __init__(self) -> None:
        self._handed: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()

    def callFromThread(self, callable: Callable[..., object], *args: object, **kwargs: object) -> None:  # noqa: A002
        self._handed.put(lambda: callable(*args, **kwargs))

    def wait(self, what: Deferred[Any] | Coroutine[Deferred[Any], Any, Any]) -> Any:
        """The result of a Deferred; raises its failure."""
        deferred = what if isinstance(what, Deferred) else Deferred.fromCoroutine(what)
        results: list[Any] = []
        deferred.addBoth(results.append)
        until = time.monotonic() + _PATIENCE_S
        while not results:
            self._handed.get(timeout=until - time.monotonic())()
        if isinstance(results[0], Failure):
            results[0].raiseException()
        return results[0]

    def run_handed(self) -> None:
        """Run the functions passed so far."""
        while not self._handed.empty():
            self._handed.get()()


@define
class WallClock:
    """A clock that only the test advances."""

    seconds: float = 1_800_000_000.25

    def __call__(self) -> float:
        return self.seconds


@define
class Logs:
    """A store under test."""

    store: LogStore
    reactor: ReactorThread
    clock: WallClock
    directory: Path
    ref: LogRef = field(factory=lambda: LogRef("abcdef0123", 7, 1))

    @property
    def file(self) -> Path:
        return self.directory / "ab" / "abcdef0123" / "log"

    @property
    def old_file(self) -> Path:
        """The file of this attempt, as earlier versions wrote it."""
        return self.directory / "ab" / "abcdef0123" / "7" / "attempt1.log"

    def close(self, last_line: str = "end") -> ClosedLog:
        closed = self.reactor.wait(self.store.close(self.ref, last_line))
        assert isinstance(closed, ClosedLog)
        return closed

    def text(self) -> str:
        """The attempt's part of the file."""
        return "".join(f"{line}\n" for line in attempt_lines(self.file).get((7, 1), []))

    def read(self, **where: Any) -> str:
        """The attempt's log, read by the store."""
        text = self.reactor.wait(self.store.read(self.ref, **where))
        assert isinstance(text, str)
        return text

    def flush(self) -> None:
        self.reactor.wait(self.store.flush())

    def lines(self) -> list[str]:
        """The lines of the attempt in the file, without their times."""
        return [line.partition("Z ")[2] for line in attempt_lines(self.file).get((7, 1), [])]


MakeLogs = Callable[..., Logs]


@pytest.fixture
def make_logs(tmp_path: Path) -> Iterator[MakeLogs]:
    """Makes started stores; they are stopped at the end."""
    made: list[Logs] = []

    def make(directory: Path = tmp_path / "logs", **more: Any) -> Logs:
        reactor, clock = ReactorThread(), WallClock()
        logs = Logs(LogStore(reactor, directory, now=clock, **more), reactor, clock, directory)
        logs.store.start()
        made.append(logs)
        return logs

    yield make
    for logs in made:
        logs.reactor.wait(logs.store.stop())


@pytest.fixture
def logs(make_logs: MakeLogs) -> Logs:
    return make_logs()
