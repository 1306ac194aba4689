"""Logons at servers that do not answer: they end, and leave no process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor as _reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.task import deferLater
from twisted.python.failure import Failure

from pdm.workqueue.certificates.myproxy import LogonUnderWayError, MyProxyError, MyProxyLogons

#: Twisted's stubs know only what all reactors have in common.
reactor: Any = _reactor


class _Silent(Protocol):
    """Accepts a connection and sends nothing; notifies the test of the connection and its end."""

    factory: Any

    def connectionMade(self) -> None:
        self.factory.connected.callback(None)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.factory.lost.callback(None)


class _SilentFactory(Factory):
    protocol = _Silent

    def __init__(self) -> None:
        self.connected: Deferred[None] = Deferred()
        self.lost: Deferred[None] = Deferred()


def _children() -> list[str]:
    listed = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0].decode() for pid in listed]


@pytest_twisted.ensureDeferred
async def test_a_server_that_is_silent_is_given_up(grid_programs: None, tmp_path: Path) -> None:
    silent = _SilentFactory()
    port = reactor.listenTCP(0, silent, interface="127.0.0.1")
    logons = MyProxyLogons(reactor, tmp_path, timeout_s=0.5)
    with pytest.raises(MyProxyError, match="did not answer in time"):
        await logons.fetch(f"localhost:{port.getHost().port}", "me", "a password", 3600)
    await silent.lost
    await port.stopListening()


@pytest_twisted.ensureDeferred
async def test_a_user_logs_on_once_at_a_time(grid_programs: None, tmp_path: Path) -> None:
    silent = _SilentFactory()
    port = reactor.listenTCP(0, silent, interface="127.0.0.1")
    asked: list[object] = []

    async def trust(usual: Path | None, authorities: object) -> Path:
        asked.append(authorities)
        return tmp_path

    logons = MyProxyLogons(reactor, tmp_path / "usual", trust=trust)
    where = f"localhost:{port.getHost().port}"
    fetching = Deferred.fromCoroutine(logons.fetch_for(1, where, "me", "a password", 3600, "a site's own"))
    await silent.connected
    # A site's own authorities vouch for its server.
    assert asked == [["a site's own"]]
    with pytest.raises(LogonUnderWayError):
        await logons.fetch_for(1, where, "me", "another one", 3600)
    # Others are not kept waiting, nor is the user once it is over.
    with pytest.raises(MyProxyError, match="cannot be reached"):
        await logons.fetch_for(2, "localhost:1", "you", "a password", 3600)
    fetching.cancel()
    with pytest.raises(CancelledError):
        await fetching
    with pytest.raises(MyProxyError, match="cannot be reached"):
        await logons.fetch_for(1, "localhost:1", "me", "a password", 3600)
    await silent.lost
    await port.stopListening()


@pytest_twisted.ensureDeferred
async def test_a_client_that_goes_away_ends_its_logon(grid_programs: None, tmp_path: Path) -> None:
    silent = _SilentFactory()
    port = reactor.listenTCP(0, silent, interface="127.0.0.1")
    logons = MyProxyLogons(reactor, tmp_path)
    fetching = Deferred.fromCoroutine(logons.fetch(f"localhost:{port.getHost().port}", "me", "a password", 3600))
    await silent.connected
    fetching.cancel()
    with pytest.raises(CancelledError):
        await fetching
    await silent.lost
    while "myproxy-logon" in _children():
        await deferLater(reactor, 0.02)
    await port.stopListening()
