"""Two trusted authorities at a real daemon: each tries to sign the user and the operator of the other."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdm.testgrid.service import TestService
from pdm.workqueue.certificates.authority import Authority, Credential
from pdm.workqueue.certificates.pem import to_pem
from tests.support.forging import certified

pytestmark = pytest.mark.server

HOST_OPERATOR = "/DC=org/DC=b/CN=host/robot.example.org"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[tuple[TestService, Authority, Authority]]:
    """A daemon that trusts, by one PEM file, its own authority and another one."""
    service = TestService(tmp_path / "instance")
    service.init(tls={"trust": "ca.pem"}, users={"operators": f"\n    /DC=org/DC=b/CN=boss\n    {HOST_OPERATOR}"})
    own = Authority.create("/DC=org/DC=a/CN=CA of a")
    other = Authority.create("/DC=org/DC=b/CN=CA of b")
    (service.directory / "ca.pem").write_bytes(to_pem(own.certificate, other.certificate))
    with service.running():
        yield service, own, other


class Caller:
    """Calls the daemon over one kept connection."""

    def __init__(self, service: TestService, credential: Credential, directory: Path, url: str) -> None:
        file = directory / f"{credential.serial}.pem"
        file.write_bytes(credential.bundle_pem())
        context = ssl.create_default_context(cafile=str(service.directory / "certificates" / "ca.crt"))
        context.load_cert_chain(file)
        self.connection = http.client.HTTPSConnection(url.rpartition("/")[2], context=context, timeout=20)

    def whoami(self) -> tuple[int, Any]:
        """Status and answer; 0 for a connection that is refused or ended."""
        try:
            self.connection.request("GET", "/workqueue/api/v1.0/whoami")
            answer = self.connection.getresponse()
            return answer.status, json.loads(answer.read())
        except (OSError, http.client.HTTPException):
            self.connection.close()
            return 0, None


def test_no_user_becomes_another_one(daemon: Any, tmp_path: Path) -> None:
    service, own, other = daemon
    with contextlib.ExitStack() as stack:
        attempt(service, own, other, tmp_path, stack)


def attempt(
    service: TestService, own: Authority, other: Authority, tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    url = service.url or ""

    def caller(authority: Authority, subject: str, *, proxy: bool = False) -> Caller:
        credential = certified(authority, subject)
        made = Caller(service, credential.proxy() if proxy else credential, tmp_path, url)
        stack.callback(made.connection.close)
        return made

    alice, boss = "/DC=org/DC=a/CN=alice", "/DC=org/DC=b/CN=boss"
    # Without a policy: each is bound to the authority of the first connection.
    status, first = caller(own, alice).whoami()
    assert (status, first["subject"], first["role"]) == (200, alice, "user")
    status, robot = caller(other, HOST_OPERATOR).whoami()
    assert (status, robot["subject"], robot["role"]) == (200, HOST_OPERATOR, "operator")
    assert caller(other, boss).whoami()[1]["role"] == "operator"
    for thief in (caller(other, alice), caller(other, alice, proxy=True)):
        status, answer = thief.whoami()
        assert (status, answer["title"]) == (403, "Not allowed")
        assert "/CN=alice is registered with the authority /DC=org/DC=a/CN=CA of a" in answer["detail"]
        assert "signing policy" in answer["detail"]
    for subject in (boss, HOST_OPERATOR):
        assert caller(own, subject).whoami()[0] == 403
    kept, again = caller(other, "/DC=org/DC=b/CN=bob"), caller(own, alice)
    first = again.whoami()[1] | {"user_id": first["user_id"]}
    assert (kept.whoami()[0], again.whoami()[1]) == (200, first)
    # With one: who may sign what is decided in the handshake.
    policy = "access_id_CA X509 '{}'\npos_rights globus CA:sign\ncond_subjects globus '\"{}\"'\n"
    (service.directory / "ca.signing_policy").write_text(
        policy.format(own.dn, "/DC=org/DC=a/*") + policy.format(other.dn, "/DC=org/DC=b/*")
    )
    reload(service)
    for authority, subject in ((other, alice), (own, boss), (own, HOST_OPERATOR), (own, "/DC=org/DC=b/CN=new")):
        assert caller(authority, subject).whoami()[0] == 0
    assert (kept.whoami()[0], again.whoami()[1]) == (200, first)
    assert caller(other, boss).whoami()[1]["role"] == "operator"
    # An authority that is taken away takes its kept connections along.
    (service.directory / "ca.pem").write_bytes(to_pem(own.certificate))
    reload(service)
    assert kept.whoami()[0] == 0
    assert again.whoami()[1] == first
    log = service.log_path.read_text()
    assert "these authorities have no signing policy" in log
    assert "subject=/DC=org/DC=b/CN=bob reason=its authority is no longer trusted here" in log


def reload(service: TestService) -> None:
    """Have the daemon read its TLS files again, and wait until it has."""
    before = service.log_path.read_text().count("tls files read again")
    assert service.process is not None
    service.process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + 30
    while service.log_path.read_text().count("tls files read again") == before:
        assert time.monotonic() < deadline, service.tail()
        time.sleep(0.05)
