"""Deliveries of webhooks by real daemons that are killed in the middle of one."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pdm.testgrid.service import TestService
from tests.support.cluster import cluster_of
from tests.support.instances import until

_WEBHOOKS = {"plain_http": "yes", "allowed": "127.0.0.1"}
_JOBS = 12
#: Messages that are answered before the receiver holds one back.
_ANSWERED = 5


class _Receiver:
    """Records each message; holds back its answer to one, until `release`, and answers no other meanwhile."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, str]] = []
        self.most_at_once = 0
        self.holding = threading.Event()
        self._released = threading.Event()
        self._lock = threading.Lock()
        self._under_way = 0
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"])).decode()
                receiver._take(self.headers["webhook-id"], body)
                try:
                    self.send_response(204)
                    self.end_headers()
                except ConnectionError:
                    self.close_connection = True

            def log_request(self, code: int | str = "-", size: int | str = "-") -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/hook"

    def _take(self, identifier: str, body: str) -> None:
        with self._lock:
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
            self.messages.append((identifier, body))
            holds = len(self.messages) > _ANSWERED
        if holds and not self._released.is_set():
            self.holding.set()
            self._released.wait(60)
        with self._lock:
            self._under_way -= 1

    def release(self) -> None:
        self._released.set()

    def close(self) -> None:
        self.release()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


@pytest.fixture
def receiver() -> Iterator[_Receiver]:
    receiver = _Receiver()
    yield receiver
    receiver.close()


def _call(service: TestService, method: str, path: str, body: Any = None) -> Any:
    status, answer = service.call("admin", method, path, body)
    assert status in (200, 201), answer
    return answer


def _submit(service: TestService, count: int) -> None:
    for number in range(count):
        body = {"src_siteid": 1, "src_filepath": f"/made/{number}", "protocol": "DUMMY"}
        _call(service, "POST", "/mkdir", body)


def _check_deliveries(service: TestService, receiver: _Receiver, jobs: int) -> None:
    """All events of the jobs have arrived, those of a job in order; only the message held back has come twice."""

    def ended() -> bool:
        listed = _call(service, "GET", "/jobs")
        return len(listed) == jobs and all(job["status"] == "DONE" for job in listed)

    until(service, ended, 60.0)
    # Several daemons: in the order of their transactions.
    stored = sorted(each["id"] for each in _call(service, "GET", "/events?kinds=job&limit=1000"))
    until(service, lambda: {int(name.rpartition("_")[2]) for name, _ in receiver.messages} >= set(stored), 60.0)
    names = [name for name, _ in receiver.messages]
    assert sorted({int(name.rpartition("_")[2]) for name in names}) == stored
    of_job: dict[int, list[int]] = {}
    for name, body in receiver.messages:
        of_job.setdefault(json.loads(body)["data"]["job"], []).append(int(name.rpartition("_")[2]))
    assert len(of_job) == jobs
    for numbers in of_job.values():
        assert numbers == sorted(numbers)
    twice = [name for name in set(names) if names.count(name) > 1]
    assert len(twice) <= 1
    # A receiver knows a message that comes again by its id: it is the same one.
    assert len(set(receiver.messages)) == len(set(names))
    assert receiver.most_at_once == 1


@pytest.mark.full
def test_a_killed_daemon_sends_again_what_was_not_answered(tmp_path: Path, receiver: _Receiver) -> None:
    service = TestService(tmp_path / "instance")
    service.init(webhooks=_WEBHOOKS)
    with service.running():
        _call(service, "POST", "/webhooks", {"url": receiver.url, "kinds": ["job"]})
        _submit(service, _JOBS)
        assert receiver.holding.wait(30), service.tail()
        held = receiver.messages[-1]
        service.kill()
        receiver.release()
        service.start()
        _check_deliveries(service, receiver, _JOBS)
        assert receiver.messages.count(held) == 2


@pytest.mark.full
@pytest.mark.postgresql
def test_another_daemon_sends_what_a_killed_one_has_not(tmp_path: Path, receiver: _Receiver) -> None:
    with cluster_of(2, tmp_path, queue={"lease": "6s", "poll_interval": "1s"}, webhooks=_WEBHOOKS) as cluster:
        first, second = cluster.nodes
        _call(first, "POST", "/webhooks", {"url": receiver.url, "kinds": ["job"]})
        for service in cluster.nodes:
            _submit(service, _JOBS)
        assert receiver.holding.wait(30), first.tail()
        (sender,) = cluster.query("SELECT node FROM workers JOIN webhooks ON incarnation = leased_by")
        dead, live = (first, second) if sender.node == first.directory.name else (second, first)
        dead.kill()
        receiver.release()
        _check_deliveries(live, receiver, 2 * _JOBS)
