"""Passwords of MyProxy servers are not tried through the service."""

from __future__ import annotations

from datetime import timedelta

import pytest
import pytest_twisted

from pdm.workqueue.certificates.myproxy import MyProxyLogons, WrongPasswordError
from pdm.workqueue.http.logon_guard import MOST_FAILURES, WITHIN
from tests.http.service import Service

_LOGON = {"username": "someone", "password": "not the right one"}


@pytest_twisted.ensureDeferred
async def test_who_sends_wrong_passwords_has_to_wait(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    async def fetch(self: MyProxyLogons, server: str, *_: object) -> None:
        asked.append(server)
        raise WrongPasswordError("the MyProxy server does not accept this password")

    monkeypatch.setattr(MyProxyLogons, "fetch", fetch)
    for _ in range(MOST_FAILURES):
        answer = await service.call("guessing", "POST", "/sites/4/session", _LOGON)
        assert (answer.status, answer.problem) == (400, "invalid-input $.password")
    answer = await service.call("guessing", "POST", "/sites/4/session", _LOGON)
    assert (answer.status, answer.problem) == (429, "too-many-attempts")
    assert 0 < int(answer.header("Retry-After")) <= WITHIN.total_seconds() + 1
    assert len(asked) == MOST_FAILURES
    # Others are not hindered, and the time passes.
    assert (await service.call("other", "POST", "/sites/4/session", _LOGON)).status == 400
    service.skip[0] = WITHIN + timedelta(seconds=1)
    try:
        assert (await service.call("guessing", "POST", "/sites/4/session", _LOGON)).status == 400
    finally:
        service.skip[0] = timedelta()
