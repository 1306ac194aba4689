"""Events over HTTP: pages and streams of one's own jobs; a slow reader is dropped, a stop ends streams at once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
import pytest_twisted
import sqlalchemy as sa
from attrs import define, field
from sqlalchemy.orm import Session
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.task import deferLater
from twisted.logger import LogEvent
from twisted.python.failure import Failure
from twisted.web.http_headers import Headers

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.execution import event_feed
from pdm.workqueue.execution.event_feed import EventFeed
from pdm.workqueue.http import event_streams
from pdm.workqueue.store import events
from pdm.workqueue.store.errors import DatabaseUnavailableError
from pdm.workqueue.store.records import events as rows
from tests.http.service import ROOT, Service

reactor: Any = _reactor
_MISSING = AttemptFailure(FailureScope.SOURCE, FailureCode.NOT_FOUND, "no such file")


@define(eq=False)
class Listener(Protocol):
    """Reads a stream of events."""

    status: int = 0
    text: str = ""
    closed: bool = False
    changed: list[Deferred[None]] = field(factory=list)

    def dataReceived(self, data: bytes) -> None:
        self.text += data.decode()
        self._tell()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.closed = True
        self._tell()

    def _tell(self) -> None:
        changed, self.changed = self.changed, []
        for each in changed:
            each.callback(None)

    @property
    def events(self) -> list[dict[str, str]]:
        """Fields of each event; `data` decoded."""
        found = []
        for block in self.text.split("\n\n")[:-1]:
            fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
            if "event" in fields:
                found.append(fields)
        return found

    @property
    def views(self) -> list[Any]:
        return [json.loads(each["data"]) for each in self.events]

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            assert not self.closed, self.text
            change: Deferred[None] = Deferred()
            self.changed.append(change)
            await change.addTimeout(5, reactor)


async def listen(service: Service, user: str, path: str, **headers: str) -> Listener:
    sent = {"Accept": "text/event-stream"} | {name.replace("_", "-"): value for name, value in headers.items()}
    response = await service._client(user).request(
        "GET",
        f"https://localhost:{service.port}{ROOT}{path}",
        headers=Headers({name: [value] for name, value in sent.items()}),
        unbuffered=True,
    )
    listener = Listener(status=response.code)
    response.deliverBody(listener)
    if response.code == 200:
        assert response.headers.getRawHeaders("Content-Type") == ["text/event-stream"]
        await listener.until(lambda: "retry:" in listener.text)
    return listener


def close(*listeners: Listener) -> None:
    for listener in listeners:
        assert listener.transport is not None
        listener.transport.loseConnection()


@pytest_twisted.ensureDeferred
async def test_a_page_of_events(service: Service) -> None:
    job_id = await service.copied("page", "a", "b")
    found = (await service.call("page", "GET", f"/jobs/{job_id}/events")).json
    assert [each["data"]["status"] for each in found] == ["SUBMITTED", "RUNNING", "DONE"]
    assert [(each["kind"], each["job"]) for each in found] == [("job", job_id)] * 3
    assert found[0]["time"].endswith("Z")
    first = found[0]["id"]
    rest = (await service.call("page", "GET", f"/jobs/{job_id}/events?after={first}&limit=1")).json
    assert rest == found[1:2]
    assert (await service.call("page", "GET", f"/events?kinds=failure,held&after={first}")).json == []
    assert (await service.call("page", "GET", "/events")).json == found


@pytest.mark.parametrize(
    ("path", "headers", "problem"),
    [
        ("/events?kinds=noise", {}, "invalid-input ?kinds"),
        ("/events?limit=1001", {}, "invalid-input ?limit"),
        ("/events?after=-1", {}, "invalid-input ?after"),
        ("/events?order=newest", {"Accept": "text/event-stream"}, "invalid-input ?order"),
        ("/events", {"Accept": "text/event-stream", "Last_Event_ID": "latest"}, "invalid-input Last-Event-ID"),
        ("/events", {"Accept": "text/event-stream", "Last_Event_ID": "9" * 19}, "invalid-input Last-Event-ID"),
        ("/events", {"Accept": "text/html"}, "not-acceptable Accept"),
        ("/jobs/999999/events", {"Accept": "text/event-stream"}, "job-not-found"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_what_is_refused(service: Service, path: str, headers: dict[str, Any], problem: str) -> None:
    assert (await service.call("page", "GET", path, **headers)).problem == problem


@pytest_twisted.ensureDeferred
async def test_a_stream_of_a_job_from_its_begin_to_its_end(service: Service) -> None:
    job = await service.submit("stream")
    path = f"/jobs/{job['id']}/events"
    (old,) = (await service.call("stream", "GET", path)).json
    whole, new = await listen(service, "stream", f"{path}?after=0"), await listen(service, "stream", path)
    (token,) = await service.claim(job["id"])
    await service.settle(token, JobStatus.FAILED, _MISSING)
    await whole.until(lambda: len(whole.events) == 4)
    await new.until(lambda: len(new.events) == 3)
    assert whole.views[0] == old
    assert whole.views[1:] == new.views
    assert [each["event"] for each in whole.events] == ["job", "job", "failure", "job"]
    assert whole.views[2]["data"]["code"] == "NOT_FOUND"
    # The id with which it begins, and that of each event.
    assert f"id: {old['id']}\n\n" in new.text
    assert [int(each["id"]) for each in new.events] == [each["id"] for each in new.views]
    again = await listen(service, "stream", path, Last_Event_ID=str(new.views[0]["id"]))
    await again.until(lambda: len(again.events) == 2)
    assert again.views == new.views[1:]
    close(whole, new, again)


@pytest_twisted.ensureDeferred
async def test_each_user_sees_own_jobs_and_operators_all(service: Service) -> None:
    mine, all_ = await listen(service, "one", "/events"), await listen(service, "operator", "/events")
    theirs = (await service.submit("two"))["id"]
    ours = (await service.submit("one"))["id"]
    await service.database.run("note", events.note_site, service.now(), {"site": 1, "state": "down", "reason": "?"})
    await all_.until(lambda: len(all_.events) == 3)
    await mine.until(lambda: mine.events)
    assert [each["job"] for each in all_.views] == [theirs, ours, None]
    assert [each["job"] for each in mine.views] == [ours]
    assert [each["job"] for each in (await service.call("one", "GET", "/events")).json] == [ours]
    assert (await service.call("one", "GET", f"/jobs/{theirs}/events")).problem == "job-not-found"
    assert (await listen(service, "one", f"/jobs/{theirs}/events")).status == 404
    assert (await service.call("operator", "GET", f"/jobs/{theirs}/events")).status == 200
    close(mine, all_)


@pytest_twisted.ensureDeferred
async def test_progress_of_what_runs(service: Service) -> None:
    job = await service.submit("progress")
    listener = await listen(service, "progress", f"/jobs/{job['id']}/events?kinds=progress")
    (token,) = await service.claim(job["id"])
    service.board.begin(*token[:2])
    await listener.until(lambda: listener.events)
    (view, *_) = listener.views
    assert (view["id"], view["kind"], view["job"]) == (None, "progress", job["id"])
    assert view["data"]["bytes_done"] == 0
    assert "id" not in listener.events[0]
    service.board.drop(*token[:2])
    close(listener)


@pytest_twisted.ensureDeferred
async def test_comments_keep_a_stream_alive(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_streams, "COMMENT_EVERY_S", 0.05)
    listener = await listen(service, "quiet", "/events")
    await listener.until(lambda: listener.text.count("\n:\n") >= 2)
    close(listener)
    await deferLater(reactor, 0.1)
    assert service.assembly.feed.listeners == 0


@pytest_twisted.ensureDeferred
async def test_a_reader_that_does_not_read_is_dropped_and_told_so(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_feed, "MOST_QUEUED", 150)
    slow, quick = await listen(service, "slow", "/events"), await listen(service, "slow", "/events")
    transport: Any = slow.transport
    transport.pauseProducing()
    user, number = await service.user_id("slow"), 0
    while service.assembly.feed.listeners == 2:
        # Until the buffers of the sockets are full: some MB.
        assert number < 20_000
        number += 100
        await service.database.run("fill", fill, user, service.now(), 100)
        service.database.on_events()
        await quick.until(lambda: quick.text.count("event: job") >= number)  # noqa: B023 - awaited here
    transport.resumeProducing()
    await slow.until(lambda: "event: dropped" in slow.text)
    *given, last = slow.events
    told = json.loads(last["data"])
    assert last["event"] == "dropped"
    assert "more than 150 events wait" in told["reason"]
    assert quick.text.count("event: job") == number > len(given)
    # It resumes where it was, and misses nothing.
    assert told["after"] == int(given[-1]["id"])
    rest = await listen(service, "slow", "/events", Last_Event_ID=str(told["after"]))
    await rest.until(lambda: rest.text.count("event: job") == number - len(given))
    close(quick, rest)


def fill(session: Session, user: int, now: datetime, count: int) -> None:
    """Write large events, as of a job of a user."""
    row = {"at": now, "kind": "job", "job_id": 1, "owner_id": user, "data": json.dumps({"x": "y" * 4000}), "xact": 0}
    session.execute(sa.insert(rows), [row] * count)


@pytest_twisted.ensureDeferred
async def test_a_stop_ends_streams_at_once(own_service: Service) -> None:
    listener = await listen(own_service, "stop", "/events")
    begun = time.monotonic()
    stopped = Deferred.fromCoroutine(own_service.assembly.feed.stop())
    while not listener.closed:
        await deferLater(reactor, 0.01)
    await stopped
    assert time.monotonic() - begun < 1
    assert listener.text.endswith(": the service is stopping\n\n")


@pytest_twisted.ensureDeferred
async def test_a_stream_outlives_an_outage_of_the_database(
    service: Service, monkeypatch: pytest.MonkeyPatch, lost_errors: list[LogEvent]
) -> None:
    monkeypatch.setattr(event_streams, "READ_AGAIN_AFTER_S", 0.05)
    await service.submit("outage")
    read = EventFeed.read
    failed: list[object] = []

    async def away(feed: EventFeed, *arguments: Any) -> Any:
        if len(failed) < 3:
            failed.append(arguments)
            raise DatabaseUnavailableError("it is away")
        return await read(feed, *arguments)

    monkeypatch.setattr(EventFeed, "read", away)
    listener = await listen(service, "outage", "/events?after=0")
    await listener.until(lambda: listener.events)
    assert len(failed) == 3
    assert "urn:" not in listener.text
    close(listener)
    assert not lost_errors


@pytest_twisted.ensureDeferred
async def test_a_fault_cuts_a_stream(
    service: Service, monkeypatch: pytest.MonkeyPatch, lost_errors: list[LogEvent]
) -> None:
    def broken(_: object) -> bytes:
        raise RuntimeError("a bug")

    listener = await listen(service, "cut", "/events")
    monkeypatch.setattr(event_streams, "_encoded", broken)
    await service.submit("cut")
    while not listener.closed:
        await deferLater(reactor, 0.01)
    assert "urn:" not in listener.text
    (event,) = lost_errors
    assert "a bug" in str(event)
    lost_errors.clear()
    assert service.assembly.feed.listeners == 0


@pytest_twisted.ensureDeferred
async def test_a_stream_ends_with_the_certificate(own_service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_streams, "COMMENT_EVERY_S", 0.05)
    listener = await listen(own_service, "expired", "/events")
    await listener.until(lambda: "\n:\n" in listener.text)
    own_service.skip[0] = timedelta(days=10_000)
    while not listener.closed:
        await deferLater(reactor, 0.01)
    assert listener.text.endswith(": the certificate has expired\n\n")
    assert own_service.assembly.feed.listeners == 0
