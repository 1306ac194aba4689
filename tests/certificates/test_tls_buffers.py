"""Memory of TLS connections: an idle one keeps neither its handshake nor what was sent on it."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import pytest_twisted
from twisted.internet import reactor as _reactor
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.threads import deferToThread

from pdm.workqueue.certificates.tls_buffers import renew_buffers
from pdm.workqueue.certificates.tls_server import ServerTls, peer_identity
from tests.certificates.test_tls_server import ALICE

reactor: Any = _reactor
_LARGE = 1_000_000


class Echo(Protocol):
    """Sends back what it gets, and renews its buffers after each piece."""

    renewed: ClassVar[list[bool]]
    subjects: ClassVar[set[str]]

    def dataReceived(self, data: bytes) -> None:
        transport: Any = self.transport
        transport.write(data)
        identity = peer_identity(transport)
        self.subjects.add("" if identity is None else identity.subject)
        self.renewed.append(renew_buffers(transport))


@pytest.fixture
def echo(serve: Any, pki: Any) -> Iterator[tuple[int, type[Echo]]]:
    tls: ServerTls = serve().tls

    class Here(Echo):
        renewed: ClassVar[list[bool]] = []
        subjects: ClassVar[set[str]] = set()

    port = reactor.listenTCP(0, tls.wrap(Factory.forProtocol(Here)), interface="127.0.0.1")
    yield port.getHost().port, Here
    pytest_twisted.blockon(port.stopListening())


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest_twisted.ensureDeferred
async def test_a_connection_goes_on_with_new_buffers(
    echo: tuple[int, type[Echo]], pki: Any, version: ssl.TLSVersion, tmp_path: Path
) -> None:
    port, server = echo
    pki.alice.write_bundle(tmp_path / "alice.pem")

    def talk() -> bytes:
        context = ssl.create_default_context(capath=str(tmp_path / "trust"))
        context.load_cert_chain(tmp_path / "alice.pem")
        context.minimum_version = context.maximum_version = version
        got = b""
        with (
            socket.create_connection(("127.0.0.1", port), 10) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as tls,
        ):
            for piece in (b"small", b"x" * _LARGE, b"again", b"the end"):
                # In steps, as the other side sends back at once.
                for start in range(0, len(piece), 10_000):
                    part = piece[start : start + 10_000]
                    tls.sendall(part)
                    while part:
                        back = tls.recv(65536)
                        got += back
                        part = part[len(back) :]
        return got

    assert await deferToThread(talk) == b"small" + b"x" * _LARGE + b"againthe end"
    assert server.renewed[-1]
    assert server.subjects == {ALICE}


def test_other_transports_are_left_alone() -> None:
    assert not renew_buffers(object())
