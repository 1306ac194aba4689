"""Questions to other nodes, and nodes that answer something else, too much, too slowly, or not at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import LoopingCall, deferLater

from pdm.workqueue.certificates.authority import Authority
from pdm.workqueue.certificates.nodes import NodeTls
from pdm.workqueue.certificates.tls_server import ServerTls
from pdm.workqueue.domain.progress import Moving
from pdm.workqueue.execution.cluster import ClusterProgress
from pdm.workqueue.execution.peers import Peers, PeerSilentError, host_of
from pdm.workqueue.execution.progress_board import ProgressBoard
from pdm.workqueue.store.nodes import NodeRecord
from pdm.workqueue.wire.peers import LogPartView, NodeProgressView

reactor: Any = _reactor
_NOW = datetime(2026, 11, 30, tzinfo=UTC)
_GOOD = b'{"incarnation": "other", "jobs": [], "something": "of a later version"}'


class Peer(Protocol):
    """A node that answers each request with what a test has given."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def dataReceived(self, data: bytes) -> None:
        self.node.requests.append(data)
        self.node.answers(self.transport)


class Node:
    """A server with TLS on loopback, and this node's questions to it."""

    def __init__(self, directory: Path) -> None:
        authority = Authority.create("/DC=org/DC=test/CN=Nodes CA")
        host = authority.host(["localhost"], ["127.0.0.1"])
        host.write_certificate(directory / "host.crt")
        host.write_key(directory / "host.key")
        authority.write_trust(directory / "trust")
        self.tls = ServerTls(directory / "host.crt", directory / "host.key", directory / "trust")
        self.requests: list[bytes] = []
        self.answers: Callable[[Any], None] = lambda transport: None
        factory = self.tls.wrap(Factory.forProtocol(lambda: Peer(self)))
        self.port = reactor.listenTCP(0, factory, interface="127.0.0.1")
        self.address = f"https://localhost:{self.port.getHost().port}"
        self.is_shared = True
        self.peers = Peers(
            reactor=reactor,
            database=self,  # type: ignore[arg-type]
            incarnation="this",
            policy=NodeTls(self.tls, None, "if-present").policy,
            root="/api",
            timeout_s=0.4,
        )

    async def read(self, name: str, *_: Any) -> Any:
        """Stands for the database, of which this is another test."""
        await deferLater(reactor, 0)
        records = [
            NodeRecord(id=number, worker=f"w-{name}", name=name, incarnation=name, address=address, lease_until=_NOW)
            for number, (name, address) in enumerate([("this", None), ("other", self.address), ("deaf", None)])
        ]
        return records if name == "list nodes" else {"w-other": "other", "w-deaf": "deaf", "w-dead": "dead"}

    async def ask(self, answer: Any = NodeProgressView, most: int = 10_000) -> Any:
        other, _ = await self.peers.others()
        return await self.peers.ask(other, "/peers/progress", answer, most)

    def answer(self, content: bytes, status: bytes = b"200 OK") -> None:
        head = b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n" % (status, len(content))
        self.answers = lambda transport: transport.write(head + content)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node

    async def stop() -> None:
        await node.peers.stop()
        await node.port.stopListening()

    pytest_twisted.blockon(Deferred.fromCoroutine(stop()))


@pytest_twisted.ensureDeferred
async def test_an_answer_is_kept_for_a_second_and_asked_for_once(node: Node) -> None:
    node.answer(_GOOD)
    asking = [Deferred.fromCoroutine(node.ask()) for _ in range(3)]
    asking[0].cancel()
    asking[0].addErrback(lambda _: None)
    assert [(await each).incarnation for each in asking[1:]] == ["other", "other"]
    assert (await node.ask()).jobs == []
    (request,) = node.requests
    assert request.startswith(b"GET /api/peers/progress HTTP/1.1\r\n")


def _endless(piece: bytes, every_s: float) -> Callable[[Any], None]:
    def answer(transport: Any) -> None:
        transport.write(b"HTTP/1.1 200 OK\r\n")
        writing = LoopingCall(transport.write, piece)
        writing.start(every_s).addErrback(lambda _: None)

        def stop() -> None:
            if writing.running:
                writing.stop()

        reactor.callLater(1.0, stop)

    return answer


_HEADER = b"X: %b\r\n" % (b"x" * 8000)
_SILENCES: dict[str, Callable[[Any], None]] = {
    "nothing": lambda transport: None,
    "end of the connection": lambda transport: transport.loseConnection(),
    "endless headers": _endless(_HEADER * 20, 0.001),
    "endless body": _endless(b"\r\n" + b"x" * 100_000, 0.001),
    "drop by drop": _endless(b"X: x\r\n", 0.05),
    "no HTTP": lambda transport: transport.write(b"SSH-2.0-OpenSSH\r\n" * 3),
}
_ANSWERS = {
    "no JSON": b"\xff\xfe",
    "another type": b'{"incarnation": 1, "jobs": {}}',
    "less": b'{"jobs": []}',
    "a negative number": b'{"incarnation": "o", "jobs": [{"job": -1, "running": 1, "moving": 1, "losses": 0,'
    b' "instant": null, "files_per_second": null}]}',
    "an infinite rate": b'{"incarnation": "o", "jobs": [{"job": 1, "running": 1, "moving": 1, "losses": 0,'
    b' "instant": 1e999, "files_per_second": null}]}',
    "a number without end": b'{"incarnation": "o", "jobs": [{"job": ' + b"9" * 5000 + b"}]}",
    "depth": b'{"incarnation": "o", "jobs": ' + b"[" * 9000,
    "too long": b'{"incarnation": "%b", "jobs": []}' % (b"o" * 100_000),
}


@pytest.mark.parametrize("what", [*_SILENCES, *_ANSWERS, "403", "302"])
@pytest_twisted.ensureDeferred
async def test_what_is_no_answer_is_silence(node: Node, what: str) -> None:
    if what in _SILENCES:
        node.answers = _SILENCES[what]
    else:
        status = {"403": b"403 Forbidden", "302": b"302 Found\r\nLocation: https://localhost:1/"}.get(what, b"200 OK")
        node.answer(_ANSWERS.get(what, _GOOD), status)
    began = time.monotonic()
    with pytest.raises(PeerSilentError) as caught:
        await node.ask()
    assert str(caught.value) == "on node other, which does not answer"
    assert time.monotonic() - began < 2
    # For a while it is not asked again.
    count = len(node.requests)
    node.answer(_GOOD)
    with pytest.raises(PeerSilentError):
        await node.ask()
    assert len(node.requests) == count


@pytest_twisted.ensureDeferred
async def test_a_large_answer_after_another_is_not_cut_off(node: Node) -> None:
    """The bytes that may come are counted for each answer, on one connection."""
    content = b'{"found": true, "text": "%b"}' % (b"x" * 300_000)
    node.answer(content)
    other, _ = await node.peers.others()
    for number in range(5):
        part = await node.peers.ask(other, f"/peers/logs/{number}", LogPartView, 310_000)
        assert len(part.text or "") == 300_000


@pytest_twisted.ensureDeferred
async def test_another_servers_certificate_is_silence(node: Node, tmp_path: Path) -> None:
    node.answer(_GOOD)
    node.address = node.address.replace("localhost", "127.0.0.2")
    with pytest.raises(PeerSilentError):
        await node.ask()
    assert node.requests == []


@pytest_twisted.ensureDeferred
async def test_progress_of_a_job_names_the_nodes_that_do_not_answer(node: Node) -> None:
    progress = ClusterProgress(board=ProgressBoard(), peers=node.peers)
    node.answer(b'{"incarnation": "other", "jobs": [{"job": 7, "running": 2, "moving": 50, "losses": 0,'
                b' "instant": 10.5, "files_per_second": null}]}')  # fmt: skip
    seen = await progress.of_job(_job(7, proven=100))
    assert seen.moving is not None
    assert (seen.moving.transferred, seen.moving.instant, seen.moving.files_per_second) == (50, 10.5, None)
    assert list(seen.silent) == [
        "on node deaf, which has no address for other nodes",
        "on node dead, whose lease has ended",
    ]
    # One of them has ended and is proven: what was shown does not go back.
    node.peers._answers.clear()
    node.answer(b'{"incarnation": "other", "jobs": [{"job": 7, "running": 1, "moving": 20, "losses": 0,'
                b' "instant": 10.5, "files_per_second": null}]}')  # fmt: skip
    assert (await progress.of_job(_job(7, proven=110))).moving == _moving(40)
    node.peers._answers.clear()
    node.answer(b'{"incarnation": "other", "jobs": [{"job": 7, "running": 1, "moving": 5, "losses": 1,'
                b' "instant": 10.5, "files_per_second": null}]}')  # fmt: skip
    assert (await progress.of_job(_job(7, proven=110))).moving == _moving(5)


def _moving(transferred: int) -> Moving:
    return Moving(transferred, 10.5, None)


def _job(number: int, proven: int) -> Any:
    class Counters:
        running = 4

    class Job:
        id = number
        bytes_done = proven
        counters = Counters

    return Job


def test_hosts_of_addresses() -> None:
    assert host_of("https://Node1.Example.ORG:8443") == "node1.example.org"
    assert host_of("https://[2001:DB8::0:1]:8443") == "2001:db8::1"
    assert [host_of(each) for each in (None, "", "node1", "https://[::1")] == [""] * 4
