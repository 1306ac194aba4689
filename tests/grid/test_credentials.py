"""Credentials on the real grid: what is held resumes when they are renewed, and what is secret shows nowhere."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from pdm.testgrid import TestGrid
from pdm.testgrid.grid_servers import MyProxyServer
from pdm.testgrid.service import TestService, set_keys
from tests.security.canary import PASSWORD, TOKEN


@pytest.fixture(scope="module")
def myproxy(grid: TestGrid) -> Iterator[MyProxyServer]:
    server = grid.add_myproxy()
    server.store(grid.users["bob"].files, "bob", PASSWORD)
    yield server
    server.stop()


@pytest.fixture
def service(grid: TestGrid, myproxy: MyProxyServer, tmp_path: Path) -> TestService:
    service = TestService(tmp_path / "instance", grid.description(), grid.directory)
    service.init(credentials={"minimum_lifetime": "0s"}, logs={"level": "debug"})
    set_keys(service.directory / "sites.d" / "sites.conf", {"A": {"myproxy": myproxy.address}})
    return service


def held_job(service: TestService, grid: TestGrid, directory: Path) -> int:
    """A job of one try whose proxy has expired before it could begin."""
    server = grid.sites["A"].server
    with service.running():
        assert service.pdm("bob", "delegate", "--lifetime", "8s").returncode == 0
        server.freeze()
        job = service.submit("bob", "list", src_siteid=1, src_filepath=str(directory), max_tries=1)
        assert "expires at" in job["warnings"][0]
        assert "pdm delegate" in job["warnings"][0]
        service.wait_for("bob", job["id"], until=["RUNNING"])
        service.kill()
    time.sleep(8.5)
    server.thaw()
    return int(job["id"])


def shown_as_held(service: TestService, job_id: int) -> None:
    held = service.wait_for("bob", job_id, until=["HELD"])
    assert held["held"] == held["hold"]["count"] == 1
    assert held["hold"]["code"] == "CREDENTIAL_EXPIRED"
    assert "expired at" in held["hold"]["reason"]
    status = service.pdm("bob", "status", str(job_id)).stdout
    assert "CREDENTIAL_EXPIRED" in status
    assert "pdm delegate" in status
    assert "it is held" in service.log_path.read_text()
    assert "CREDENTIAL_EXPIRED" in service.pdm("bob", "logs", str(job_id)).stdout


@pytest.mark.full
def test_a_held_job_resumes_after_a_delegation(service: TestService, grid: TestGrid, grid_directories: Any) -> None:
    job_id = held_job(service, grid, grid_directories.a)
    with service.running():
        shown_as_held(service, job_id)
        error = service.call("bob", "GET", f"/jobs/{job_id}/elements/0")[1]["error"]
        assert (error["code"], error["retryable"]) == ("CREDENTIAL_EXPIRED", True)
        assert "pdm delegate" in error["hint"]
        status, problem = service.call("bob", "POST", "/list", {"src_siteid": 1, "src_filepath": "/"})
        assert (status, "pdm delegate" in problem["detail"]) == (409, True)
        service.delegate("bob")
        ended = service.wait_for("bob", job_id, timeout_s=10)
        # With one try in all, an attempt that counted would have been the last.
        assert (ended["status"], ended["max_tries"], "hold" in ended) == ("DONE", 1, False)
        assert "1 held elements resumed" in service.log_path.read_text()


@pytest.mark.full
def test_a_held_job_resumes_after_a_logon(
    service: TestService, grid: TestGrid, grid_directories: Any, myproxy: MyProxyServer
) -> None:
    job_id = held_job(service, grid, grid_directories.a)
    with service.running():
        shown_as_held(service, job_id)
        shown, failed = at_terminal(service, ["login", "A", "-u", "bob", "--lifetime", "2h"], PASSWORD)
        assert failed == 0, shown
        status, session = service.call("bob", "GET", "/sites/1/session")
        assert status == 200, session
        assert (session["kind"], session["site"], session["subject"]) == ("proxy", 1, grid.users["bob"].files.dn)
        ended = service.wait_for("bob", job_id, timeout_s=10)
        assert (ended["status"], ended["max_tries"]) == ("DONE", 1)
        assert service.call("bob", "GET", "/sites/1/session") == (200, session)
        # It is for that site only, and its proxy is no one else's.
        assert service.call("bob", "GET", "/sites/2/session") == (200, None)
        assert service.call("alice", "GET", "/sites/1/session") == (200, None)
        body = {"src_siteid": 2, "src_filepath": str(grid_directories.b)}
        assert service.call("bob", "POST", "/list", body)[0] == 409
        shown = service.pdm("bob", "credentials").stdout
        assert "proxy" in shown
        assert service.pdm("bob", "logout", "A").returncode == 0
        assert service.call("bob", "GET", "/sites/1/session") == (200, None)


FILES = 50


@pytest.mark.full
def test_a_proxy_that_ends_in_the_middle_of_a_job(service: TestService, grid: TestGrid, grid_directories: Any) -> None:
    """Elements that are DONE stay DONE, running ones end, the rest is HELD and resumes; with one try in all."""
    set_keys(service.directory / "workqueue.conf", {"agents": {"max_agents": "1"}, "queue": {"batch_elements": "5"}})
    server = grid.sites["B"].server
    for directory in (grid_directories.a, grid_directories.b):
        grid.give(directory, "bob")
    source = grid_directories.a / "tree"
    source.mkdir()
    for number in range(FILES):
        (source / f"{number:02}").write_bytes(os.urandom(4_000_000))
    grid.give(source, "bob")
    with service.running():
        for lifetime in (12, 24, 48):
            copy = grid_directories.b / f"copy {lifetime}"
            assert service.pdm("bob", "delegate", "--lifetime", f"{lifetime}s").returncode == 0
            ends_at = time.monotonic() + lifetime
            job = service.submit(
                "bob",
                "copy",
                src_siteid=1,
                src_filepath=str(source),
                dst_siteid=2,
                dst_filepath=str(copy),
                max_tries=1,
            )
            while arrived(copy) < FILES * 0.4 and time.monotonic() < ends_at - 2:
                time.sleep(0.002)
            server.freeze()
            if FILES * 0.4 <= arrived(copy) < FILES * 0.9 and time.monotonic() < ends_at:
                break
            # This machine is too slow, or too quick, for what is to be shown.
            server.thaw()
            service.call("bob", "DELETE", f"/jobs/{job['id']}")
            service.wait_for("bob", job["id"])
        time.sleep(max(ends_at + 1 - time.monotonic(), 0))
        server.thaw()
        held = service.wait_for("bob", job["id"], until=["HELD", "DONE", "FAILED"])
        assert (held["status"], held["num_failed"]) == ("HELD", 0), service.tail()
        done = held["num_done"] - 1
        assert FILES * 0.4 <= done < FILES
        assert held["held"] == held["hold"]["count"] == FILES - done
        assert held["hold"]["code"] == "CREDENTIAL_EXPIRED"
        assert arrived(copy) == done
        service.delegate("bob")
        ended = service.wait_for("bob", job["id"], timeout_s=20)
        assert (ended["status"], ended["num_done"], ended["max_tries"]) == ("DONE", FILES + 1, 1), service.tail()
    for path in source.iterdir():
        assert (copy / path.name).read_bytes() == path.read_bytes()
    assert not list(copy.glob(".pdm-*"))


def arrived(directory: Path) -> int:
    """Files of which all is there."""
    return sum(not path.name.startswith(".pdm-") for path in directory.iterdir()) if directory.exists() else 0


@pytest.mark.full
def test_logons_that_fail_say_why(service: TestService, grid: TestGrid, myproxy: MyProxyServer, tmp_path: Path) -> None:
    def refused(**body: object) -> tuple[int, str, str]:
        status, problem = service.call("bob", "POST", "/sites/1/session", {"username": "bob", **body})
        return status, problem.get("pointer", ""), problem["detail"]

    sites = service.directory / "sites.d" / "sites.conf"
    with service.running():
        assert refused(password="another one")[:2] == (400, "$.password")
        assert refused(password="short")[:2] == (400, "$.password")
        assert refused(password=PASSWORD, username="nobody")[:2] == (400, "$.username")
        assert service.call("bob", "POST", "/sites/2/session", {"username": "bob", "password": "x"})[0] == 409
    set_keys(sites, {"A": {"myproxy": "localhost:1"}})
    with service.running():
        status, _, words = refused(password=PASSWORD)
        assert (status, "cannot be reached" in words) == (424, True)
    empty = tmp_path / "nobody"
    empty.mkdir()
    set_keys(sites, {"A": {"myproxy": myproxy.address}})
    set_keys(service.directory / "workqueue.conf", {"credentials": {"trust_dir": str(empty)}})
    with service.running():
        status, _, words = refused(password=PASSWORD)
        assert (status, "is not trusted" in words) == (424, True)
    assert "Traceback" not in service.log_path.read_text()
    assert not grep(service, [PASSWORD, "another one"])


@pytest.mark.full
def test_the_password_is_typed_without_echo(service: TestService, myproxy: MyProxyServer) -> None:
    """At a terminal: what is typed does not come back."""
    with service.running():
        shown, status = at_terminal(service, ["login", "A", "-u", "bob"], PASSWORD)
        assert status == 0, shown
        assert "logged on at A" in shown
        assert PASSWORD not in shown


def at_terminal(service: TestService, arguments: Sequence[str], typed: str) -> tuple[str, int]:
    pid, terminal = pty.fork()
    if pid == 0:
        try:
            environment = service.environment("bob")
            os.execve(sys.executable, [sys.executable, "-m", "pdm.workqueue.cli", *arguments], environment)
        finally:
            os._exit(127)
    shown = b""
    sent = False
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:
            break
        if not piece:
            break
        shown += piece
        if not sent and b"Password" in shown:
            os.write(terminal, typed.encode() + b"\n")
            sent = True
    os.close(terminal)
    return shown.decode(errors="replace"), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# -- the canary


def grep(service: TestService, secrets: Sequence[str]) -> list[str]:
    """Files of the instance that hold one of the secrets."""
    return [
        str(path)
        for path in service.directory.rglob("*")
        if path.is_file() and any(secret.encode() in path.read_bytes() for secret in secrets)
    ]


def processes_of(service: TestService) -> dict[str, bytes]:
    """Arguments and environment of the daemon and of all below it, now."""
    assert service.process is not None
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal():
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents.setdefault(int(fields[1]), []).append(int(entry.name))
        except OSError:
            continue
    seen: dict[str, bytes] = {}
    waiting = [service.process.pid]
    while waiting:
        pid = waiting.pop()
        waiting += parents.get(pid, [])
        for name in ("cmdline", "environ"):
            try:
                seen[f"{pid}/{name}"] = Path(f"/proc/{pid}/{name}").read_bytes()
            except OSError:
                continue
    return seen


def test_secrets_show_nowhere(
    service: TestService, grid: TestGrid, grid_directories: Any, myproxy: MyProxyServer
) -> None:
    # Of the daemon's own process.
    service.popen = subprocess.Popen
    key = ed25519.Ed25519PrivateKey.generate()
    key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode()
    secrets = [PASSWORD, TOKEN, key_pem.splitlines()[2]]
    answers: list[str] = []
    seen: dict[str, bytes] = {}

    def send(method: str, path: str, body: object = None) -> int:
        status, answer = service.call("bob", method, path, body)
        answers.append(json.dumps(answer))
        seen.update(processes_of(service))
        return status

    with service.running():
        logon = {"username": "bob", "password": PASSWORD}
        for path, body in (
            ("/sites/1/session", logon | {"lifetime": "long"}),
            ("/sites/1/session", logon | {"username": 1}),
            ("/sites/1/session", logon | {"password": PASSWORD + "\n"}),
            ("/sites/1/session", logon | {"password": [PASSWORD]}),
            ("/sites/1/session", logon | {"username": "nobody"}),
            ("/sites/1/session", logon | {"password": PASSWORD + " "}),
            ("/sites/2/session", logon),
            ("/sites/99/session", logon),
            ("/credentials", {"kind": "token", "secret": f"Bearer {TOKEN}"}),
            ("/credentials", {"kind": "token", "secret": TOKEN, "site": 99}),
            ("/credentials", {"kind": "token", "secret": [TOKEN]}),
            ("/credentials", {"kind": "ssh-key", "secret": key_pem.replace("-----END", "x-----END")}),
            ("/credentials", {"kind": "ssh-key", "secret": key_pem, "account": "-oProxyCommand=x"}),
        ):
            assert send("POST", path, body) in (400, 404, 409), (path, answers[-1])
        assert send("POST", "/credentials", {"kind": "token", "secret": TOKEN, "site": 1}) == 201
        assert send("POST", "/credentials", {"kind": "ssh-key", "secret": key_pem, "site": 1}) == 201
        # A server that does not answer, so that the logon is seen at work.
        myproxy.signal(signal.SIGSTOP)
        thread = threading.Thread(target=service.call, args=("bob", "POST", "/sites/1/session", logon))
        thread.start()
        give_up_at = time.monotonic() + 20
        while not any(b"myproxy-logon" in content for content in seen.values()):
            assert time.monotonic() < give_up_at
            seen.update(processes_of(service))
        myproxy.signal(signal.SIGCONT)
        thread.join()
        assert service.call("bob", "GET", "/sites/1/session")[1]["kind"] == "proxy"
        assert send("GET", "/credentials") == 200
        job = service.submit("bob", "list", src_siteid=1, src_filepath=str(grid_directories.a))
        service.wait_for("bob", job["id"])
        assert send("GET", f"/jobs/{job['id']}/output") == 200
        directory = service.directory / "var" / "credentials"
        used = f"X509_USER_PROXY={directory}".encode()
        seen.update(processes_of(service))
        assert any(used in content for content in seen.values()), "an agent is there, and works with a file"
        assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} <= {0o600}
        assert directory.stat().st_mode & 0o777 == 0o700
    for secret in secrets:
        assert not [answer for answer in answers if secret in answer]
        assert not [name for name, content in seen.items() if secret.encode() in content]
    assert len(seen) >= 4
    assert not grep(service, secrets)
    # When the daemon has ended, no credential is left on disk.
    assert not list((service.directory / "var" / "credentials").iterdir())
