"""Passwords of MyProxy servers are not tried through the service."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor as _reactor

from pdm.workqueue.certificates import myproxy
from pdm.workqueue.certificates.myproxy import LogonRefusedError, MyProxyError, MyProxyLogons, WrongPasswordError
from pdm.workqueue.certificates.pem import FetchedProxy
from pdm.workqueue.http.access import LOGON_WINDOW, MAX_LOGON_FAILURES
from tests.http.service import Service

reactor: Any = _reactor

_LOGON = {"username": "someone", "password": "not the right one"}


@pytest_twisted.ensureDeferred
async def test_wrong_passwords_cause_a_wait(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    async def fetch(self: MyProxyLogons, server: str, *_: object) -> None:
        asked.append(server)
        raise WrongPasswordError("the MyProxy server does not accept this password")

    monkeypatch.setattr(MyProxyLogons, "fetch", fetch)
    for _ in range(MAX_LOGON_FAILURES):
        answer = await service.call("guessing", "POST", "/sites/4/session", _LOGON)
        assert (answer.status, answer.problem) == (400, "invalid-input $.password")
    answer = await service.call("guessing", "POST", "/sites/4/session", _LOGON)
    assert (answer.status, answer.problem) == (429, "too-many-attempts")
    assert 0 < int(answer.header("Retry-After")) <= LOGON_WINDOW.total_seconds() + 1
    assert len(asked) == MAX_LOGON_FAILURES
    # Others are not hindered, and the time passes.
    assert (await service.call("other", "POST", "/sites/4/session", _LOGON)).status == 400
    service.skip[0] = LOGON_WINDOW + timedelta(seconds=1)
    try:
        assert (await service.call("guessing", "POST", "/sites/4/session", _LOGON)).status == 400
    finally:
        service.skip[0] = timedelta()


@pytest_twisted.ensureDeferred
async def test_a_logon_that_succeeds_buys_no_more_tries(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be at a server of the user's own."""
    answers: list[MyProxyError | FetchedProxy] = []

    async def fetch(self: MyProxyLogons, *_: object) -> FetchedProxy:
        answer = answers.pop(0)
        if isinstance(answer, MyProxyError):
            raise answer
        return answer

    monkeypatch.setattr(MyProxyLogons, "fetch", fetch)
    good = FetchedProxy("/CN=me", service.now() + timedelta(hours=1), (), b"a proxy")
    # What the server says of it may be unknown here: that counts as a wrong password.
    wrong = [WrongPasswordError("no"), LogonRefusedError("PAM says no")]
    statuses = []
    for number in range(MAX_LOGON_FAILURES):
        answers += [wrong[number % 2], good]
        statuses += [(await service.call("cunning", "POST", "/sites/4/session", _LOGON)).status for _ in range(2)]
    assert statuses == [400, 201, 424, 201, 400, 201, 424, 201, 400, 429]


@pytest_twisted.ensureDeferred
async def test_a_server_away_is_no_wrong_password(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fetch(self: MyProxyLogons, *_: object) -> FetchedProxy:
        raise MyProxyError("the MyProxy server cannot be reached")

    monkeypatch.setattr(MyProxyLogons, "fetch", fetch)
    for _ in range(MAX_LOGON_FAILURES + 1):
        assert (await service.call("unlucky", "POST", "/sites/4/session", _LOGON)).status == 424


@pytest.mark.parametrize("word", ["credential ", "authorization ", "x"])
@pytest_twisted.ensureDeferred
async def test_what_a_hostile_server_says_takes_no_time(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of a mebibyte of it took the reactor 20 s."""
    program = tmp_path / myproxy.PROGRAM
    program.write_text(f"#!/bin/sh\nhead -c 250000 {tmp_path}/words >&2\nexit 1\n")
    program.chmod(0o755)
    (tmp_path / "words").write_text(word * (250_000 // len(word) + 1))
    monkeypatch.setattr(myproxy, "SEARCH_PATH", f"{tmp_path}:/usr/bin:/bin")
    before = time.process_time()
    with pytest.raises(LogonRefusedError):
        await MyProxyLogons(reactor, tmp_path).fetch("far.example.org:7512", "me", "a password", 3600)
    assert time.process_time() - before < 8
