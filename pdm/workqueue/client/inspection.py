"""What a client can find out about its server: version, health, end of its certificate, difference of the clocks."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import msgspec
from attrs import frozen
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import HostnameEndpoint, wrapClientTLS
from twisted.internet.interfaces import IHandshakeListener
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.web.iweb import IPolicyForHTTPS
from zope.interface import implementer

from pdm.workqueue.client.connection import Connection
from pdm.workqueue.wire.responses import HealthView

_DEFAULT_PORT = 443


@frozen
class ServerFacts:
    """What a server says of itself, and shows.

    Attributes:
        health: its version, and faults of its parts.
        certificate_valid_until: UTC.
        clock_offset_s: seconds by which its clock is ahead of this machine's, to about a second; None if unknown.
    """

    url: str
    health: HealthView
    certificate_valid_until: datetime
    clock_offset_s: float | None


async def inspect_server(reactor: Any, url: str, policy: IPolicyForHTTPS, connection: Connection) -> ServerFacts:
    """Ask the server at ``https://HOST:PORT`` for its health, and look at its certificate.

    Raises:
        WorkqueueClientError: it cannot be reached, or is not trusted.
    """
    asked = datetime.now(UTC)
    # The request comes first, because its errors say what is wrong.
    answer = await connection.request("GET", "/health")
    answered = datetime.now(UTC)
    return ServerFacts(
        url,
        msgspec.json.decode(answer, type=HealthView),
        await _certificate_end(reactor, url, policy),
        _offset(connection.server_date, asked, answered),
    )


def _offset(server_date: str | None, asked: datetime, answered: datetime) -> float | None:
    """Seconds between the server's clock and this one, of which neither the way nor the rounding is counted."""
    try:
        date = parsedate_to_datetime(server_date or "")
    except ValueError:
        return None
    if date < asked.replace(microsecond=0):
        return (date - asked).total_seconds()
    return max((date - answered).total_seconds(), 0.0)


async def _certificate_end(reactor: Any, url: str, policy: IPolicyForHTTPS) -> datetime:
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or _DEFAULT_PORT
    found: Deferred[datetime] = Deferred()
    endpoint = wrapClientTLS(policy.creatorForNetloc(host.encode(), port), HostnameEndpoint(reactor, host, port))
    protocol: Any = await endpoint.connect(Factory.forProtocol(lambda: _Handshake(found.callback)))
    try:
        return await found
    finally:
        protocol.transport.loseConnection()


@implementer(IHandshakeListener)
class _Handshake(Protocol):
    """Reports when the certificate expires that the server has shown."""

    def __init__(self, report: Callable[[datetime | Failure], None]) -> None:
        self._report: Callable[[datetime | Failure], None] | None = report

    def handshakeCompleted(self) -> None:
        transport: Any = self.transport
        self._done(transport.getPeerCertificate().to_cryptography().not_valid_after_utc)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._done(reason)

    def _done(self, result: datetime | Failure) -> None:
        if self._report is not None:
            report, self._report = self._report, None
            report(result)
