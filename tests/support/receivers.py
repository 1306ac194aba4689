"""Receivers of webhooks on loopback, over real TLS, that behave as tests want."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

from attrs import define, field
from twisted.internet import reactor as _reactor
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.ssl import CertificateOptions
from twisted.web.http import Request
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site

from pdm.workqueue.certificates.authority import Credential

reactor: Any = _reactor


@define(eq=False)
class Message:
    """A request that has come."""

    headers: dict[str, str]
    body: str

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Receiver(Resource):
    """Answers each message as `answer` says: a status, ``hang``, or a status and headers."""

    isLeaf = True  # noqa: N815 - Twisted's name

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Message] = []
        self.answer: Callable[[Message], Any] = lambda message: 204
        self.hanging: list[Request] = []
        self._ports: list[Any] = []

    def listen(self, credential: Credential | None, port: int = 0) -> int:
        """Serve HTTPS, or HTTP without a credential; returns the port."""
        return self._listening(Site(self), credential, port)

    def listen_raw(self, credential: Credential, first: bytes, again: bytes) -> int:
        """Serve what is no proper HTTP: some bytes, and others for as long as they are taken."""

        class Raw(Protocol):
            answered = False

            def dataReceived(self, data: bytes) -> None:
                if self.answered:
                    return
                self.answered = True
                transport: Any = self.transport
                transport.write(first)
                if again:
                    transport.registerProducer(self, False)
                else:
                    transport.loseConnection()

            def resumeProducing(self) -> None:
                transport: Any = self.transport
                transport.write(again)

            def stopProducing(self) -> None: ...

        factory = Factory.forProtocol(Raw)
        factory.noisy = False
        return self._listening(factory, credential, 0)

    def _listening(self, factory: Any, credential: Credential | None, number: int) -> int:
        factory.noisy = False
        if credential is None:
            port = reactor.listenTCP(number, factory, interface="127.0.0.1")
        else:
            # pyOpenSSL takes these; the types of Twisted do not know it yet.
            key: Any = credential.key
            certificate: Any = credential.certificate
            options = CertificateOptions(privateKey=key, certificate=certificate)
            port = reactor.listenSSL(number, factory, options, interface="127.0.0.1")
        self._ports.append(port)
        return int(port.getHost().port)

    async def close(self) -> None:
        while self._ports:
            await self._ports.pop().stopListening()

    def render_POST(self, request: Any) -> Any:
        headers = {
            name.decode().lower(): values[0].decode() for name, values in request.requestHeaders.getAllRawHeaders()
        }
        message = Message(headers, request.content.read().decode())
        self.messages.append(message)
        answer = self.answer(message)
        if answer == "hang":
            self.hanging.append(request)
            return NOT_DONE_YET
        status, more = answer if isinstance(answer, tuple) else (answer, {})
        request.setResponseCode(status)
        for name, value in more.items():
            request.setHeader(name, value)
        return b"a secret of the receiver" if status != 204 else b""

    def render_GET(self, request: Any) -> bytes:
        self.messages.append(Message({}, ""))
        return b""


@define
class Names:
    """Stands for getaddrinfo: the addresses of names, one list after the other; others are resolved."""

    addresses: dict[str, list[list[str]]] = field(factory=dict)

    def __call__(self, host: str, port: int, *more: Any) -> list[Any]:
        if host not in self.addresses:
            return list(socket.getaddrinfo(host, port, *more))
        rounds = self.addresses[host]
        found = rounds.pop(0) if len(rounds) > 1 else rounds[0]
        return [each for address in found for each in socket.getaddrinfo(address, port, *more)]
