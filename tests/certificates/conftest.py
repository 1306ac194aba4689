"""A small PKI, a real TLS server on loopback, and clients for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from attrs import define, field, frozen
from OpenSSL.crypto import X509
from treq.client import HTTPClient
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.ssl import Certificate, optionsForClientTLS, trustRootFromCertificates
from twisted.logger import ILogObserver, LogEvent, formatEvent, globalLogPublisher
from twisted.web.client import Agent, HTTPConnectionPool
from twisted.web.iweb import IPolicyForHTTPS
from twisted.web.resource import Resource
from twisted.web.server import Request, Site
from zope.interface import implementer, provider

from pdm.workqueue.certificates.authority import Authority, Credential
from pdm.workqueue.certificates.tls_server import ServerTls, peer_identity
from pdm.workqueue.certificates.trust import Trust, read_trust

# mypy does not know the type's further attributes.
reactor: Any = _reactor


@frozen
class Pki:
    """Certificates shared by all tests of the directory, because generating RSA keys takes long."""

    authority: Authority
    stranger_authority: Authority
    host: Credential
    other_host: Credential
    alice: Credential
    alice_proxy: Credential
    bob: Credential
    bob_proxy: Credential
    stranger: Credential


@pytest.fixture(scope="session")
def pki() -> Pki:
    authority = Authority.create("/DC=org/DC=test/CN=Test CA")
    stranger_authority = Authority.create("/DC=org/DC=stranger/CN=Stranger CA")
    alice, bob = authority.user("Alice Jones"), authority.user("Bob")
    return Pki(
        authority=authority,
        stranger_authority=stranger_authority,
        host=authority.host(["localhost"], ["127.0.0.1"]),
        other_host=authority.host(["other.example.org"]),
        alice=alice,
        alice_proxy=alice.proxy(),
        bob=bob,
        bob_proxy=bob.proxy(),
        stranger=stranger_authority.user("Alice Jones"),
    )


@pytest.fixture
def tls_lines() -> Iterator[list[str]]:
    """The daemon's log lines about TLS."""
    lines: list[str] = []

    @provider(ILogObserver)
    def observe(event: LogEvent) -> None:
        text = formatEvent(event)
        if text.startswith("tls "):
            lines.append(text)

    globalLogPublisher.addObserver(observe)
    yield lines
    globalLogPublisher.removeObserver(observe)


class WhoAmI(Resource):
    """Answers with the caller's identity, 401 without one: a minimal API."""

    isLeaf = True  # noqa: N815 - Twisted's name

    def __init__(self) -> None:
        super().__init__()
        self.now = datetime.now(UTC)

    def render_GET(self, request: Request) -> bytes:
        identity = peer_identity(request.channel.transport)
        if identity is None:
            request.setResponseCode(401)
            return b"{}"
        return json.dumps(
            {
                "subject": identity.subject,
                "limited": identity.limited,
                "ends_at": identity.chain_ends_at.isoformat(),
                "expired": identity.chain_ends_at <= self.now,
                "peer": request.getClientAddress().port,
            }
        ).encode()


@implementer(IPolicyForHTTPS)
@frozen
class _Shows:
    """Presents a certificate without checking it, like a foreign client."""

    credential: Credential | None
    trust: Trust

    def creatorForNetloc(self, hostname: bytes, port: int) -> Any:
        shown = (
            {}
            if self.credential is None
            else {
                "certificate": self.credential.certificate,
                "privateKey": self.credential.key,
                "extraCertChain": self.credential.chain,
            }
        )
        roots = trustRootFromCertificates(
            [Certificate(X509.from_cryptography(each)) for each in self.trust.authorities]
        )
        return optionsForClientTLS(hostname.decode(), trustRoot=roots, extraCertificateOptions=shown)


@define
class Server:
    """A service on loopback, with its files."""

    directory: Path
    tls: ServerTls
    port: int
    application: WhoAmI
    refused: list[str]
    _pools: list[HTTPConnectionPool] = field(factory=list)

    def client(self, credential: Credential | None, ca: Path | None = None) -> Callable[..., Any]:
        """A client with a pool of connections: a function that sends a request, and returns status code and body."""
        policy = _Shows(credential, read_trust(ca or self.directory / "trust", "off"))
        pool = HTTPConnectionPool(reactor)
        self._pools.append(pool)
        http = HTTPClient(Agent(reactor, policy, connectTimeout=10, pool=pool))

        async def ask(host: str = "localhost") -> tuple[int, dict[str, Any]]:
            response = await http.get(f"https://{host}:{self.port}/")
            return response.code, json.loads(await response.content())

        return ask

    async def close(self) -> None:
        for pool in self._pools:
            await pool.closeCachedConnections()


@pytest.fixture
def serve(pki: Pki, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts services; their trust directory is ``tmp_path / "trust"``, with the list that `revoked` writes."""
    ports: list[Any] = []
    servers: list[Server] = []

    def start(
        crl: Any = "if-present",
        revoked: tuple[Credential, ...] | None = (),
        host: Credential | None = None,
        trust: Path | None = None,
    ) -> Server:
        directory = tmp_path / "trust"
        pki.authority.write_trust(directory)
        if revoked is not None:
            pki.authority.write_crl(directory, pki.authority.crl([each.serial for each in revoked]))
        shown = host or pki.host
        shown.write_certificate(tmp_path / "host.crt")
        shown.write_key(tmp_path / "host.key")
        refused: list[str] = []
        files = (tmp_path / "host.crt", tmp_path / "host.key", trust or directory)
        tls = ServerTls(*files, crl, refused=refused.append)
        application = WhoAmI()
        port = reactor.listenTCP(0, tls.wrap(Site(application)), interface="127.0.0.1")
        ports.append(port)
        servers.append(Server(tmp_path, tls, port.getHost().port, application, refused))
        return servers[-1]

    yield start

    async def stop() -> None:
        for server in servers:
            await server.close()
        for port in ports:
            await port.stopListening()

    pytest_twisted.blockon(Deferred.fromCoroutine(stop()))


@pytest.fixture
def expired() -> dict[str, timedelta]:
    """Arguments for a certificate that expired an hour ago."""
    return {"start": timedelta(hours=-2), "lifetime": timedelta(hours=1)}
