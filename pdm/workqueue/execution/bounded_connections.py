"""Connections to other servers of which no more is read than is wanted: an answer cannot fill the memory."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from attrs import define, field, frozen
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IProtocol, IProtocolFactory, IStreamClientEndpoint
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.python.failure import Failure
from zope.interface import implementer


class TooMuchReceivedError(Exception):
    """The server has sent more bytes than are read."""


@define(eq=False)
class ReceiveBudget:
    """Bytes that may still be received, TLS not counted."""

    left: int


class BoundedProtocol(ProtocolWrapper):
    """Ends a connection that exceeds its budget."""

    exceeded = False

    def dataReceived(self, data: bytes) -> None:
        factory: Any = self.factory
        factory.budget.left -= len(data)
        if factory.budget.left < 0:
            self.exceeded = True
            transport: Any = self.transport
            transport.abortConnection()
        else:
            super().dataReceived(data)  # type: ignore[no-untyped-call]

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        factory: Any = self.factory
        factory.opened.discard(self)
        lost = Failure(TooMuchReceivedError()) if self.exceeded else reason
        super().connectionLost(lost)  # type: ignore[no-untyped-call]


class _BoundedFactory(WrappingFactory):
    protocol = BoundedProtocol
    # It logs each connection otherwise.
    noisy = False

    def __init__(self, wrapped: IProtocolFactory, budget: ReceiveBudget, opened: set[BoundedProtocol]) -> None:
        super().__init__(wrapped)  # type: ignore[no-untyped-call]
        self.budget = budget
        self.opened = opened

    def registerProtocol(self, p: Any) -> None: ...

    def unregisterProtocol(self, p: Any) -> None: ...


@implementer(IStreamClientEndpoint)
@frozen
class BoundedEndpoint:
    """Makes connections that are bounded.

    Attributes:
        budget: of a new connection.
        opened: connections that are open.
    """

    endpoint: Any
    budget: Callable[[], ReceiveBudget]
    opened: set[BoundedProtocol] = field(factory=set)

    def connect(self, factory: IProtocolFactory) -> Deferred[IProtocol]:
        connecting: Deferred[Any] = self.endpoint.connect(_BoundedFactory(factory, self.budget(), self.opened))
        return connecting.addCallback(self._connected)

    def _connected(self, protocol: BoundedProtocol) -> Any:
        self.opened.add(protocol)
        return protocol.wrappedProtocol


def end_connections(opened: Collection[BoundedProtocol]) -> None:
    """End connections at once: a server that does not end its side must not keep them."""
    for protocol in list(opened):
        transport: Any = protocol.transport
        transport.abortConnection()
