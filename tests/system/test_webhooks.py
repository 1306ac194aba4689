"""Deliveries of webhooks by real daemons that are killed in the middle of one."""

from __future__ import annotations

import json
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from pdm.testgrid.service import TestService
from tests.store.clusters import cluster, programs

_SETTINGS = {"webhooks": {"plain_http": "yes", "allowed": "127.0.0.1"}}
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


def _until(condition: Callable[[], bool], service: TestService, timeout_s: float = 60.0) -> None:
    give_up_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_at, service.tail()
        time.sleep(0.05)


def _check_deliveries(service: TestService, receiver: _Receiver, jobs: int) -> None:
    """All events of the jobs have arrived, those of a job in order; only the message held back has come twice."""

    def ended() -> bool:
        listed = _call(service, "GET", "/jobs")
        return len(listed) == jobs and all(job["status"] == "DONE" for job in listed)

    _until(ended, service)
    # Several daemons: in the order of their transactions.
    stored = sorted(each["id"] for each in _call(service, "GET", "/events?kinds=job&limit=1000"))
    _until(lambda: {int(name.rpartition("_")[2]) for name, _ in receiver.messages} >= set(stored), service)
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
    service.init(**_SETTINGS)
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
    found = programs()
    if found is None:
        pytest.skip("PostgreSQL is not installed")
    with cluster(found) as server:
        name = f"webhooks_{secrets.token_hex(4)}"
        engine = sa.create_engine(server, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(sa.text(f"CREATE DATABASE {name}"))
        engine.dispose()
        url = server.set(database=name, drivername="postgresql").render_as_string(hide_password=False)
        daemons = [TestService(tmp_path / each) for each in ("first", "second")]
        for service in daemons:
            service.init(database={"url": url}, queue={"lease": "6s", "poll_interval": "1s"}, **_SETTINGS)
        for part in ("sites.d", "certificates"):
            shutil.rmtree(daemons[1].directory / part)
            shutil.copytree(daemons[0].directory / part, daemons[1].directory / part)
        try:
            daemons[0].start()
            shutil.copy(daemons[0].directory / "var" / "credentials.key", daemons[1].directory / "var")
            daemons[1].start()
            _call(daemons[0], "POST", "/webhooks", {"url": receiver.url, "kinds": ["job"]})
            for service in daemons:
                _submit(service, _JOBS)
            assert receiver.holding.wait(30), daemons[0].tail()
            engine = sa.create_engine(server.set(database=name))
            with engine.connect() as connection:
                sender = connection.execute(
                    sa.text("SELECT host FROM workers JOIN webhooks ON incarnation = leased_by")
                ).scalar_one()
            engine.dispose()
            processes = [service.process for service in daemons]
            first_sends = processes[0] is not None and sender.endswith(f"pid {processes[0].pid}")
            dead, live = daemons if first_sends else reversed(daemons)
            dead.kill()
            receiver.release()
            _check_deliveries(live, receiver, 2 * _JOBS)
        finally:
            for service in daemons:
                if service.process is not None:
                    service.kill()
