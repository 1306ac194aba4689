"""Site checks: a few at a time, and an answer in time even if all helpers are busy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from pdm.workqueue.agents.pool import AgentKind
from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.execution.endpoint_checks import SiteCheck, SiteCheckRunningError
from pdm.workqueue.sites.registry import Site

DUMMY = JobProtocol.DUMMY
SITE = Site(1, "ONE", "", "~", {DUMMY: "dummy://0"}, {DUMMY: tuple(f"dummy://{number}" for number in range(1, 6))})


class Busy:
    """Stands for a preparation and a pool of which all helpers are at work."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.context = SimpleNamespace(reactor=self.clock)
        self.waiting: list[Deferred[Any]] = []
        self.given_back: list[object] = []

    async def agent_kind(self, *_: object, **__: object) -> AgentKind:
        return AgentKind("helper", "", {})

    def release_credential(self, kind: AgentKind) -> None:
        pass

    def acquire(self, kind: AgentKind, *, alone: bool) -> Deferred[Any]:
        self.waiting.append(Deferred())
        return self.waiting[-1]

    def release(self, agent: object, kind: AgentKind) -> None:
        self.given_back.append(agent)


def test_a_look_is_answered_in_time_although_all_helpers_are_busy() -> None:
    busy = Busy()
    check = SiteCheck(preparation=busy, pool=busy, timeout_s=10.0)  # type: ignore[arg-type]
    answer = Deferred.fromCoroutine(check.check(1, SITE))
    assert len(busy.waiting) == 4, "the others wait for these"
    busy.clock.advance(9.0)
    assert not answer.called
    busy.clock.advance(1.0)
    found: list[Any] = []
    answer.addCallback(found.extend)
    assert [each.endpoint.url for each in found] == [f"dummy://{number}" for number in range(6)]
    assert {(each.reachable, each.login, each.failure.code) for each in found} == {(None, None, "TIMEOUT")}
    # Repeated requests of one user do not fill the queue for helpers.
    again = Deferred.fromCoroutine(check.check(1, SITE))
    with pytest.raises(SiteCheckRunningError):
        raise again.result.value  # type: ignore[attr-defined]
    again.addErrback(lambda _: None)
    # Helpers that come too late go back unused, and then the user may ask again.
    for number, lent in enumerate(busy.waiting):
        lent.callback(number)
    assert busy.given_back == [0, 1, 2, 3]
    Deferred.fromCoroutine(check.check(1, SITE)).addErrback(lambda _: None)
    assert len(busy.waiting) == 8
