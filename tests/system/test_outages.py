"""Outages of a real daemon's database, disk and directories: answers, log lines, and work that is settled later."""

from __future__ import annotations

import contextlib
import http.client
import json
import resource
import shutil
import signal
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import sqlalchemy as sa

from pdm.testgrid.service import TestService, service_environment, set_keys
from pdm.workqueue.http.endpoint import Allow
from pdm.workqueue.http.endpoints import ENDPOINTS, ROOT
from tests.store.clusters import PostgresqlServer, programs
from tests.support.instances import health, until
from tests.support.postgresql_proxy import postgresql_proxy
from tests.system.test_faults_of_the_machine import TWISTD

pytestmark = pytest.mark.full

_SETTINGS = {
    "queue": {"first_pause": "50ms", "longest_pause": "200ms", "poll_interval": "500ms", "lease": "15s"},
    "webhooks": {"plain_http": "yes", "allowed": "127.0.0.1"},
}
#: Routes that wait for something else than the database, or answer by the clock.
_LONG = {"/events", "/jobs/{job_id}/events"}
#: Some of what only the database knows.
_STORED = {
    "/jobs",
    "/schedules",
    "/credentials",
    "/webhooks",
    "/mail",
    "/users",
    "/audit",
    "/whoami",
    "/",
    "/web/operators",
}
_BEGIN, _END = "the database cannot be ", "the database can be used again"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[TestService]:
    service = TestService(tmp_path / "instance")
    service.init(**_SETTINGS)
    yield service
    if service.process is not None:
        service.kill()


@pytest.fixture
def postgresql() -> Iterator[PostgresqlServer]:
    """A server of its own: it is stopped and killed."""
    found = programs()
    if found is None:
        pytest.skip("no server programs of PostgreSQL")
    server = PostgresqlServer(found)
    server.start()
    yield server
    server.remove()


@contextmanager
def stopped(server: PostgresqlServer, by: signal.Signals = signal.SIGINT) -> Iterator[None]:
    server.stop(by)
    yield
    server.start()


class Receiver:
    """A receiver of webhooks: ids of its messages."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                receiver.ids.append(self.headers["webhook-id"])
                self.send_response(204)
                self.end_headers()

            def log_request(self, code: int | str = "-", size: int | str = "-") -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hook"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    thread = threading.Thread(target=receiver.server.serve_forever)
    thread.start()
    yield receiver
    receiver.server.shutdown()
    receiver.server.server_close()
    thread.join(10)


class Answer:
    def __init__(self, response: http.client.HTTPResponse, seconds: float) -> None:
        self.status = response.status
        self.retry_after = response.getheader("Retry-After")
        self.type = response.getheader("Content-Type") or ""
        self.body = response.read()
        self.seconds = seconds


def request(service: TestService, method: str, path: str, body: Any = None) -> Answer:
    parts = urlsplit(service.url or "")
    context = ssl.create_default_context(cafile=str(service.directory / "certificates" / "ca.crt"))
    context.load_cert_chain(*service.credentials("admin"))
    connection = http.client.HTTPSConnection(parts.hostname or "", parts.port, timeout=30, context=context)
    with closing(connection):
        began = time.monotonic()
        headers = {} if body is None else {"Content-Type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        return Answer(response, time.monotonic() - began)


def faults_logged(service: TestService, since: int) -> list[str]:
    """Lines of the log that are more than information, since a position; those of the end of an outage, too."""
    lines = service.log_path.read_text(errors="replace")[since:].splitlines()
    told = [line for line in lines if " info  " not in line or _END in line or " again" in line]
    # A machine that is busy.
    return [line for line in told if "ReactorLag" not in line and " took " not in line]


def read_routes(service: TestService, job: int) -> Iterator[tuple[str, Answer]]:
    """The answers of all routes that read, REST and pages."""
    numbers = {"job_id": job, "element_id": 0, "site_id": 1, "user_id": 1, "number": 1, "attempt": 1}
    for endpoint in ENDPOINTS:
        if endpoint.method == "GET" and endpoint.path not in _LONG and endpoint.allow is not Allow.NODES:
            path = endpoint.path
            for part in path.split("/"):
                if part.startswith("{"):
                    path = path.replace(part, str(numbers.get(part[1:-1], 1)))
            yield endpoint.path, request(service, "GET", ROOT + path)
    for page in ("/", f"/web/jobs/{job}", "/web/sites", "/web/operators"):
        yield page, request(service, "GET", page)


def be_due_soon(url: sa.URL) -> None:
    """Let all schedules be due in three seconds."""
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    soon = "datetime('now', '+3 seconds')" if engine.dialect.name == "sqlite" else "now() + interval '3 seconds'"
    with engine.begin() as connection:
        connection.execute(sa.text(f"UPDATE schedules SET next_due = {soon}"))


def sqlite_of(service: TestService) -> sa.URL:
    return sa.URL.create("sqlite", database=str(service.directory / "var" / "workqueue.sqlite"))


def busy_with(service: TestService, receiver: Receiver, url: sa.URL) -> list[int]:
    """Jobs of each kind of background work: a copy that runs, a chain, a deadline, a schedule, a webhook."""
    for path, body in (("/webhooks", {"url": receiver.url, "kinds": ["job"]}),):
        status, answer = service.call("admin", "POST", path, body)
        assert status in (200, 201), answer
    copy = service.submit(
        "admin",
        "copy",
        src_siteid=1,
        src_filepath="/t",
        dst_siteid=2,
        dst_filepath="/c",
        protocol="DUMMY",
        max_tries=1,
        extra_opts={"dummy": {"files": 300, "delay": 0.02}},
    )["id"]
    # Until then the listing runs, which is begun anew after an outage.
    until(service, lambda: service.call("admin", "GET", f"/jobs/{copy}")[1]["num_done"] > 20)
    after = service.submit("admin", "mkdir", src_siteid=1, src_filepath="/after", protocol="DUMMY", after=[copy])["id"]
    schedule = {"recurrence": "every 1h", "job": {"type": "MKDIR", "src_siteid": 1, "src_filepath": "/s"}}
    schedule["job"]["protocol"] = "DUMMY"  # type: ignore[index]
    assert service.call("admin", "POST", "/schedules", schedule)[0] == 201
    be_due_soon(url)
    hangs = {"dummy": {"hang": True}, "deadline": "5s"}
    overdue = service.submit("admin", "list", src_siteid=1, src_filepath="/o", protocol="DUMMY", extra_opts=hangs)["id"]
    return [int(copy), int(after), int(overdue)]


def end_of(service: TestService, jobs: list[int]) -> list[int]:
    """Wait for the end of the jobs, and of the run of the schedule, which was due in the outage; returns all jobs."""
    *done, overdue = jobs
    for job in done:
        ended = service.wait_for("admin", job)
        assert (ended["status"], ended["num_failed"]) == ("DONE", 0), service.tail()
    assert service.wait_for("admin", overdue)["status"] == "CANCELLED"
    until(service, lambda: len(service.call("admin", "GET", "/jobs")[1]) > len(jobs))
    (run,) = {job["id"] for job in service.call("admin", "GET", "/jobs")[1]} - set(jobs)
    assert service.wait_for("admin", run)["status"] == "DONE"
    return [*jobs, run]


@contextmanager
def stream(service: TestService) -> Iterator[list[bytes]]:
    """The chunks of a stream of events that stays open."""
    parts = urlsplit(service.url or "")
    context = ssl.create_default_context(cafile=str(service.directory / "certificates" / "ca.crt"))
    context.load_cert_chain(*service.credentials("admin"))
    connection = http.client.HTTPSConnection(parts.hostname or "", parts.port, timeout=60, context=context)
    received: list[bytes] = []
    with closing(connection):
        connection.request("GET", f"{ROOT}/events?kinds=job", None, {"Accept": "text/event-stream"})
        response = connection.getresponse()
        assert response.status == 200

        def read() -> None:
            try:
                while piece := response.readline():
                    received.append(piece)
                received.append(b"ended")
            except (OSError, ValueError, AttributeError, http.client.HTTPException):
                return

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        yield received


@pytest.mark.postgresql
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL])
def test_postgresql_is_away(
    service: TestService, postgresql: PostgresqlServer, receiver: Receiver, by: signal.Signals
) -> None:
    url = postgresql.url.render_as_string(hide_password=False)
    set_keys(service.directory / "workqueue.conf", {"database": {"url": url}})
    with service.running(), stream(service) as events:
        jobs = busy_with(service, receiver, postgresql.url)
        since = len(service.log_path.read_text(errors="replace"))
        with stopped(postgresql, by):
            until(service, lambda: health(service) == ("paused", ["database"]))
            wrong = []
            for path, answer in read_routes(service, jobs[0]):
                # Some answer from memory, and some know no such thing without asking.
                if answer.status not in (200, 404, 503) or answer.seconds > 5.0:
                    wrong.append((path, answer.status, answer.seconds, answer.body[:200]))
                if path in _STORED:
                    assert answer.status == 503, path
                if answer.status == 503:
                    assert answer.retry_after == "10", path
                    assert (b"<html" in answer.body) == (path == "/" or path.startswith("/web/")), path
                    assert b"psycopg" not in answer.body
            assert not wrong
            body = {"src_siteid": 1, "src_filepath": "/no", "protocol": "DUMMY"}
            assert request(service, "POST", f"{ROOT}/mkdir", body).status == 503
            assert request(service, "GET", "/web/static/style.css").status == 200
            # A deadline and a schedule are due meanwhile.
            time.sleep(4)
        jobs = end_of(service, jobs)
        until(service, lambda: health(service) == ("ok", []))
        _, elements = service.call("admin", "GET", f"/jobs/{jobs[0]}/elements")
        assert "psycopg" not in json.dumps(elements)
        # Refused is refused; and each event of both jobs comes once, on the stream and to the receiver.
        assert {job["id"] for job in service.call("admin", "GET", "/jobs")[1]} == set(jobs)
        stored = {each["id"] for each in service.call("admin", "GET", "/events?kinds=job&limit=1000")[1]}
        until(service, lambda: {int(name.rpartition("_")[2]) for name in receiver.ids} == stored)
        assert len(receiver.ids) == len(stored)
        until(service, lambda: sum(piece.startswith(b"data:") for piece in events) == len(stored))
        assert b"ended" not in events
        until(service, lambda: any(_END in line for line in faults_logged(service, since)))
        begin, end = faults_logged(service, since)
        assert _BEGIN in begin
        assert _END in end


@pytest.mark.postgresql
def test_the_network_to_postgresql_swallows_all_packets(
    service: TestService, postgresql: PostgresqlServer, receiver: Receiver
) -> None:
    with postgresql_proxy(postgresql.url) as proxy:
        set_keys(service.directory / "workqueue.conf", {"database": {"url": proxy.url}})
        with service.running():
            jobs = busy_with(service, receiver, postgresql.url)
            since = len(service.log_path.read_text(errors="replace"))
            proxy.frozen = True
            first = request(service, "GET", f"{ROOT}/jobs")
            assert (first.status, first.seconds < 11.0) == (503, True)
            until(service, lambda: health(service) == ("paused", ["database"]))
            time.sleep(3)
            later = list(read_routes(service, jobs[0]))
            wrong = [
                (path, answer.status, answer.seconds)
                for path, answer in later
                if answer.status not in (200, 404, 503)
                or (path in _STORED and answer.status != 503)
                or answer.seconds > 3.0
            ]
            assert not wrong
            proxy.frozen = False
            end_of(service, jobs)
            until(service, lambda: any(_END in line for line in faults_logged(service, since)))
            begin, *others, end = faults_logged(service, since)
            assert _BEGIN in begin
            assert _END in end
            # The outage may have been longer than the lease.
            assert all("lease" in line or "go back to the queue" in line for line in others), others


@pytest.mark.postgresql
def test_a_start_waits_for_postgresql(service: TestService, postgresql: PostgresqlServer) -> None:
    url = postgresql.url.render_as_string(hide_password=False)
    configuration = service.directory / "workqueue.conf"
    set_keys(configuration, {"database": {"url": url, "start_timeout": "2s"}})
    command = [TWISTD, "--nodaemon", "pdmworkqueue", "--config", str(configuration)]
    with stopped(postgresql):
        done = subprocess.run(
            command,
            env=service_environment(),
            cwd=service.directory,
            capture_output=True,
            text=True,
            timeout=40,
            check=False,
        )
        assert done.returncode == 1
        waits = [line for line in done.stderr.splitlines() if "the start waits for it for up to 2 s" in line]
        assert len(waits) == 1
        (refusal,) = [line for line in done.stderr.splitlines() if line.startswith("pdmworkqueue: cannot start: ")]
        assert "cannot be opened" in refusal
        assert "Traceback" not in done.stderr
        set_keys(configuration, {"database": {"url": url, "start_timeout": "60s"}})
        starter = threading.Thread(target=service.start)
        starter.start()
        until(service, lambda: service.log_path.exists() and "the start waits for it" in service.tail())
    starter.join(40)
    assert service.call("admin", "GET", "/jobs") == (200, [])
    assert service.stop() == 0


@contextmanager
def locked(service: TestService) -> Iterator[None]:
    with closing(sqlite3.connect(service.directory / "var" / "workqueue.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield


@contextmanager
def moved_away(service: TestService) -> Iterator[None]:
    directory = service.directory / "var"
    names = [path.name for path in directory.glob("workqueue.sqlite*")]
    for name in names:
        (directory / name).rename(directory / f"aside-{name}")
    yield
    for name in names:
        (directory / f"aside-{name}").rename(directory / name)


@contextmanager
def full(service: TestService) -> Iterator[None]:
    """No file may grow beyond what the write-ahead log has: like a quota."""
    assert service.process is not None
    pid = service.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    log = service.directory / "var" / "workqueue.sqlite-wal"
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (log.stat().st_size, before[1]))
    yield
    resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("fault", [locked, moved_away, full])
def test_the_file_of_sqlite_cannot_be_used(
    service: TestService, receiver: Receiver, fault: Callable[[TestService], Any]
) -> None:
    with service.running(), stream(service) as events:
        jobs = busy_with(service, receiver, sqlite_of(service))
        since = len(service.log_path.read_text(errors="replace"))
        with fault(service):
            until(service, lambda: health(service)[1] == ["database"])
            body = {"src_siteid": 1, "src_filepath": "/no", "protocol": "DUMMY"}
            answers = [request(service, "POST", f"{ROOT}/mkdir", body) for _ in range(20)]
            assert {answer.status for answer in answers} == {503}
            assert max(answer.seconds for answer in answers) < 6.0
            for path, answer in read_routes(service, jobs[0]):
                assert answer.status in (200, 400, 404, 406, 503), (path, answer.body)
        jobs = end_of(service, jobs)
        assert {job["id"] for job in service.call("admin", "GET", "/jobs")[1]} == set(jobs)
        stored = {each["id"] for each in service.call("admin", "GET", "/events?kinds=job&limit=1000")[1]}
        until(service, lambda: {int(name.rpartition("_")[2]) for name in receiver.ids} == stored)
        assert len(receiver.ids) == len(stored)
        until(service, lambda: sum(piece.startswith(b"data:") for piece in events) == len(stored))
        until(service, lambda: any(_END in line for line in faults_logged(service, since)))
        begin, end = faults_logged(service, since)
        assert _BEGIN in begin
        assert _END in end


def test_pdm_waits_for_the_database_and_says_so(service: TestService) -> None:
    with service.running():
        assert service.call("admin", "GET", "/jobs") == (200, [])
        with locked(service):
            command = subprocess.Popen(
                [sys.executable, "-m", "pdm.workqueue.cli", "mkdir", "--protocol", "dummy", "1:/made"],
                env=service.environment("admin"),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            # SQLite itself waits for five seconds.
            until(service, lambda: health(service)[1] == ["database"])
            time.sleep(2)
        _, said = command.communicate(timeout=60)
        assert command.returncode == 0, said
        assert "pdm: The database is unavailable: the request is sent again in 1" in said
        assert len(service.call("admin", "GET", "/jobs")[1]) == 1


def test_directories_of_the_instance_are_gone(service: TestService) -> None:
    """Those of logs and credentials: the one is done without, without the other nothing is begun."""
    logs, secrets = service.directory / "logs", service.directory / "credentials"
    for path in (logs, secrets):
        path.mkdir()
    set_keys(
        service.directory / "workqueue.conf",
        {"logs": {"folder": str(logs)}, "credentials": {"folder": str(secrets)}},
    )
    with service.running():
        since = len(service.log_path.read_text(errors="replace"))
        body = {"src_siteid": 1, "src_filepath": "/d", "protocol": "DUMMY"}
        shutil.rmtree(logs)
        logs.write_text("no directory")
        done = service.submit("admin", "mkdir", **body)["id"]
        assert service.wait_for("admin", done)["status"] == "DONE"
        until(service, lambda: health(service) == ("degraded", ["attempt logs"]))
        time.sleep(11)
        assert service.wait_for("admin", service.submit("admin", "mkdir", **body)["id"])["status"] == "DONE"
        output = request(service, "GET", f"{ROOT}/jobs/{done}/elements/0/output")
        assert output.status in (400, 404, 500), output.body
        logs.unlink()
        logs.mkdir()
        until(service, lambda: health(service) == ("ok", []))
        begin, *others, end = faults_logged(service, since)
        assert "attempt logs do not work" in begin
        assert "attempt logs work again" in end
        assert all("log-missing" in line for line in others), others


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 160 MB, which the account of PostgreSQL can enter."""
    path = Path(tempfile.mkdtemp(prefix="pdm-disk-"))
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160m", "none", path], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    path.chmod(0o755)
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)
    path.rmdir()


@pytest.mark.postgresql
def test_the_disk_of_postgresql_is_full(
    service: TestService, small_disk: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = programs()
    if found is None:
        pytest.skip("no server programs of PostgreSQL")
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    server = PostgresqlServer(found, "fsync=off", "max_wal_size=48MB", "min_wal_size=32MB")
    monkeypatch.undo()
    try:
        server.start()
        url = server.url.render_as_string(hide_password=False)
        set_keys(service.directory / "workqueue.conf", {"database": {"url": url}})
        with service.running():
            jobs = busy_with(service, receiver, server.url)
            filler = small_disk / "filler"
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            body = {"src_siteid": 1, "src_filepath": "/no", "protocol": "DUMMY"}
            accepted = []
            statuses = set()
            give_up_at = time.monotonic() + 60
            while 503 not in statuses:
                assert time.monotonic() < give_up_at
                answer = request(service, "POST", f"{ROOT}/mkdir", body)
                statuses.add(answer.status)
                if answer.status == 200:
                    accepted.append(json.loads(answer.body)["id"])
            assert statuses <= {200, 503}
            assert "Traceback" not in service.tail(500)
            filler.unlink()
            # It may have ended with PANIC: it starts again as after a crash.
            server.stop()
            server.start()
            for job in [*jobs[:2], *accepted]:
                assert service.wait_for("admin", job)["status"] == "DONE", service.tail()
            until(service, lambda: health(service) == ("ok", []))
    finally:
        server.remove()
