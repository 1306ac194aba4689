"""The client's stream of events against the real service: it continues where it was; a wait needs few requests."""

from __future__ import annotations

from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from pdm.workqueue.client import events as client_events
from pdm.workqueue.client.errors import NotFoundError, UnreachableError
from pdm.workqueue.client.settings import ClientSettings
from pdm.workqueue.domain.notifications import EventKind
from pdm.workqueue.execution.event_feed import SubscriptionEndedError
from pdm.workqueue.wire.responses import JobView
from pdm.workqueue.WorkqueueClient import WorkqueueClient
from tests.client.test_service import ClientOf, as_user
from tests.http.service import Service, certificates, service

__all__ = ["as_user", "certificates", "service"]

reactor: Any = _reactor
ensure = pytest_twisted.ensureDeferred


async def until(condition: Any) -> None:
    for _ in range(500):
        if condition():
            return
        await deferLater(reactor, 0.01)
    raise AssertionError("it has not happened within 5 s")


@ensure
async def test_a_page(as_user: ClientOf) -> None:
    client = as_user("pager")
    jobs = [await client.list(1, "a", protocol="dummy") for _ in range(3)]
    assert [event.job for event in await client.events_page()] == [job.id for job in jobs]
    (event,) = await client.events_page(jobs[1].id, kinds=[EventKind.JOB], limit=1)
    assert (event.job, event.data["status"]) == (jobs[1].id, "SUBMITTED")
    assert [each.job for each in await client.events_page(after=event.id)] == [jobs[2].id]
    latest = await client.events_page(newest_first=True, limit=2)
    assert [each.job for each in latest] == [jobs[2].id, jobs[1].id]


@ensure
async def test_a_stream_continues_after_interruptions(service: Service, as_user: ClientOf) -> None:
    client = as_user("follower")
    expected = [(await client.list(1, "a", protocol="dummy")).id]
    found: list[int | None] = []

    async def follow() -> None:
        async for event in client.events(after=0):
            found.append(event.job)  # noqa: PERF401 - they are looked at meanwhile

    following = Deferred.fromCoroutine(follow())
    for _ in range(3):
        await until(lambda: len(found) == len(expected))  # noqa: B023 - awaited here
        for subscription in list(service.assembly.feed._subscriptions):
            subscription.end(SubscriptionEndedError("a restart"))
        expected += [(await client.list(1, "a", protocol="dummy")).id for _ in range(2)]
    await until(lambda: len(found) >= len(expected))
    following.addErrback(lambda _: None)
    following.cancel()
    assert found == expected


@ensure
async def test_more_events_than_the_caller_takes_are_read_later(
    as_user: ClientOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_events, "_MOST_QUEUED", 3)
    client = as_user("busy")
    expected = [(await client.list(1, "a", protocol="dummy")).id for _ in range(10)]
    stream = client.events(after=0)
    assert [(await stream.__anext__()).job for _ in expected] == expected
    await stream.aclose()


@ensure
async def test_a_stream_that_is_refused(as_user: ClientOf) -> None:
    with pytest.raises(NotFoundError):
        await as_user("nobody's").events(999_999).__anext__()


@ensure
async def test_a_service_that_was_never_reached(pki: Any) -> None:
    settings = ClientSettings("https://127.0.0.1:1", pki / "alice.crt", pki / "alice.key", pki / "ca.crt")
    client = WorkqueueClient.from_settings(reactor, settings)
    with pytest.raises(UnreachableError):
        await client.events().__anext__()
    await client.close()


@ensure
async def test_a_wait_is_told_of_the_end_and_asks_seldom(
    service: Service, as_user: ClientOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = as_user("waiter")
    job = await client.list(1, "a", protocol="dummy")
    asked = []
    fetch = client.job

    def counted(job_id: int, **more: Any) -> Deferred[JobView]:
        asked.append(job_id)
        return fetch(job_id, **more)

    monkeypatch.setattr(client, "job", counted)
    seen: list[JobView] = []
    waiting = client.wait(job.id, on_progress=seen.append)
    await until(lambda: service.assembly.feed.listeners)
    (token,) = await service.claim(job.id)
    service.board.begin(*token[:2])
    await until(lambda: any(each.status == "RUNNING" and each.progress for each in seen))
    shown = len(seen)
    await until(lambda: len(seen) > shown + 2)
    service.board.drop(*token[:2])
    await service.settle(token)
    assert (await waiting).status == "DONE"
    assert len(asked) <= 4
    assert seen[-1].status == "DONE"
