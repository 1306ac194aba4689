"""Coroutines that need not wait, and those that do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger

from pdm.workqueue.http.app import run_eagerly
from pdm.workqueue.telemetry.logging import LineObserver, log_context


def _ended(work: Deferred[None] | None) -> bool:
    assert work is not None
    return work.called


def test_one_that_waits_for_nothing_is_over_at_once() -> None:
    done = []

    async def work() -> None:
        fired: Deferred[int] = Deferred()
        fired.callback(1)
        done.append(await fired)

    assert run_eagerly(work()) is None
    assert done == [1]


def test_an_immediate_failure_is_reported() -> None:
    async def work() -> None:
        raise LookupError("no")

    with pytest.raises(LookupError, match="no"):
        run_eagerly(work())


def test_a_suspended_coroutine_continues_with_the_result() -> None:
    first: Deferred[int] = Deferred()
    second: Deferred[int] = Deferred()
    came: list[object] = []

    async def work() -> None:
        came.append(await first)
        try:
            await second
        except LookupError as error:
            came.append(str(error))

    waiting = run_eagerly(work())
    assert not _ended(waiting)
    first.callback(1)
    assert (came, _ended(waiting)) == ([1], False)
    second.errback(LookupError("no"))
    assert (came, _ended(waiting)) == ([1, "no"], True)


def test_a_failure_after_the_first_await_is_reported() -> None:
    awaited: Deferred[None] = Deferred()

    async def work() -> None:
        await awaited
        raise LookupError("no")

    waiting = run_eagerly(work())
    awaited.callback(None)
    assert waiting is not None
    failures: list[str] = []
    waiting.addErrback(lambda failure: failures.append(failure.getErrorMessage()))
    assert failures == ["no"]


def test_to_cancel_it_cancels_what_it_waits_for() -> None:
    awaited: Deferred[None] = Deferred()
    cleaned = []

    async def work() -> None:
        try:
            await awaited
        finally:
            cleaned.append(True)

    waiting = run_eagerly(work())
    assert waiting is not None
    waiting.cancel()
    failures: list[object] = []
    waiting.addErrback(lambda failure: failures.append(failure.type))
    assert (cleaned, failures, awaited.called) == ([True], [CancelledError], True)


def test_fields_of_the_log_stay_with_their_coroutine() -> None:
    lines: list[str] = []
    log = Logger(observer=LineObserver(lines.append))
    gates: dict[str, Deferred[None]] = {"a": Deferred(), "b": Deferred()}

    async def work(name: str) -> None:
        with log_context(request_id=name) as fields:
            await gates[name]
            fields["subject"] = f"/CN={name}"
            log.info("inside")
        log.info("outside")

    for name in gates:
        run_eagerly(work(name))
    log.info("beside")
    for name in ("b", "a"):
        gates[name].callback(None)
    marks: Callable[[str], str] = lambda line: line.partition("[")[2].partition("]")[0]  # noqa: E731
    assert [marks(line) for line in lines] == ["", "request_id=b subject=/CN=b", "", "request_id=a subject=/CN=a", ""]
