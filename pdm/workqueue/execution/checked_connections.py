"""Connections to addresses that users choose: only those that are permitted are connected to.

The address is checked for each connection, after the name was resolved, on the very address that is connected to: a
name that resolves to something else later leads nowhere else.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Sequence
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from attrs import field, frozen
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.endpoints import HostnameEndpoint, wrapClientTLS
from twisted.internet.error import ConnectError
from twisted.internet.interfaces import (
    IHostnameResolver,
    IHostResolution,
    IReactorPluggableNameResolver,
    IStreamClientEndpoint,
)
from twisted.internet.threads import deferToThreadPool
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool
from twisted.web.client import URI
from twisted.web.iweb import IAgentEndpointFactory, IPolicyForHTTPS
from zope.interface import implementer

from pdm.workqueue.domain.addresses import AddressRange, IpAddress, embedded_address, is_local_address, is_local_host
from pdm.workqueue.execution.bounded_connections import (
    BoundedEndpoint,
    BoundedProtocol,
    ReceiveBudget,
)

#: Bytes that a receiver may send, TLS not counted: a status and some headers.
MOST_RECEIVED = 64 * 1024
#: Names that are resolved at the same time.
RESOLVER_THREADS = 32
_LONGEST_URL = 2000
_URL = re.compile(
    r"https?://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?(?:[/?][\x21\x22\x24-\x5b\x5d-\x7e]*)?"
)
_PORTS = {"https": 443, "http": 80}


class RefusedAddressError(ConnectError):
    """The address belongs to the service's own machine or its link, or the operator has excluded it."""

    def __init__(self, address: str) -> None:
        super().__init__(string=address)  # type: ignore[no-untyped-call]
        self.address = address


@frozen(kw_only=True)
class AddressPolicy:
    """Which addresses receivers may have.

    Attributes:
        allowed: although they are of this machine or its link.
        refused: besides those.
        plain_http: whether ``http`` URLs are accepted.
    """

    allowed: Sequence[AddressRange] = ()
    refused: Sequence[AddressRange] = ()
    plain_http: bool = False

    def is_refused(self, address: IpAddress, port: int) -> bool:
        """Whether nothing is sent to an address."""
        found = embedded_address(address)
        both = (address, found)
        if any(each.has(one, port) for each in self.refused for one in both):
            return True
        if any(each.has(one, port) for each in self.allowed for one in both):
            return False
        return is_local_address(address) or _is_own(found)

    def check_url(self, url: str) -> str:
        """Validate the URL of a receiver without resolving its name.

        Raises:
            ValueError: it is no URL that is accepted; the text says why.
        """
        if len(url) > _LONGEST_URL or not _URL.fullmatch(url):
            raise ValueError(
                "expected https://HOST[:PORT]/PATH in ASCII, without user name, password and fragment"
                " (non-ASCII host names as xn--...)"
            )
        parts = urlsplit(url)
        if parts.scheme != "https" and not self.plain_http:
            raise ValueError("the URL must begin with https:// (the service does not send events unencrypted)")
        host = parts.hostname or ""
        try:
            port = _PORTS[parts.scheme] if parts.port is None else parts.port
            URI.fromBytes(url.encode("ascii"))
        except ValueError as error:
            raise ValueError("its port is not a number from 1 to 65535") from error
        if not 0 < port <= 65535:
            raise ValueError("its port is not a number from 1 to 65535")
        if is_local_host(host, socket.gethostname()) and not self._is_allowed_host(host, port):
            raise ValueError("addresses of the service's own machine or its link are not accepted")
        return url

    def _is_allowed_host(self, host: str, port: int) -> bool:
        """Whether a local host, as written, may have an allowed address; that is checked at each connection."""
        try:
            return not self.is_refused(ipaddress.ip_address(host), port)
        except ValueError:
            return bool(self.allowed)


def _is_own(address: IpAddress) -> bool:
    """Whether an address is one of this machine: only those can be bound."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError:
        return False
    return True


class _DaemonThread(Thread):
    """A thread that does not keep the process alive."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, daemon=True)


class ResolverThreads(ThreadPool):
    """Threads of their own, because name servers of users may hang: they use up none of the reactor's."""

    threadFactory = _DaemonThread  # noqa: N815 - Twisted's name


@implementer(IHostnameResolver)
@frozen
class Resolver:
    """Resolves names with getaddrinfo, in threads; a name that cannot be resolved has no addresses."""

    _reactor: Any
    _threads: ThreadPool
    _look_up: Callable[..., Sequence[Any]]

    def resolveHostName(
        self, resolutionReceiver: Any, hostName: str, portNumber: int = 0, *_: object, **__: object
    ) -> Any:
        resolution = NameLookup(hostName)
        resolutionReceiver.resolutionBegan(resolution)
        looking = deferToThreadPool(
            self._reactor, self._threads, self._look_up, hostName, portNumber, 0, socket.SOCK_STREAM
        )

        def found(results: Sequence[Any] | Failure) -> None:
            for family, _, _, _, address in () if isinstance(results, Failure) else results:
                type_ = {socket.AF_INET: IPv4Address, socket.AF_INET6: IPv6Address}.get(family)
                if type_ is not None:
                    resolutionReceiver.addressResolved(type_("TCP", *address))
            resolutionReceiver.resolutionComplete()

        looking.addBoth(found)
        return resolution


@implementer(IReactorPluggableNameResolver)
@frozen
class CheckedReactor:
    """What an endpoint needs of a reactor; connects only to addresses that the policy accepts."""

    _reactor: Any
    _policy: AddressPolicy
    nameResolver: Any  # noqa: N815 - Twisted's name

    def installNameResolver(self, resolver: Any) -> Any:
        raise NotImplementedError

    def connectTCP(self, host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            # The reactor would resolve it, unchecked.
            raise RefusedAddressError(host) from None
        if self._policy.is_refused(address, port):
            raise RefusedAddressError(host)
        return self._reactor.connectTCP(host, port, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reactor, name)


@implementer(IHostResolution)
@frozen
class NameLookup:
    """A look-up under way; it cannot be cancelled."""

    name: str

    def cancel(self) -> None:
        raise NotImplementedError


@implementer(IAgentEndpointFactory)
@frozen
class CheckedEndpoints:
    """Makes the connections of one message; ``opened`` has those that are open."""

    _reactor: Any
    _tls: IPolicyForHTTPS
    _connect_timeout_s: float
    opened: set[BoundedProtocol] = field(factory=set)

    def endpointForURI(self, uri: URI) -> IStreamClientEndpoint:
        host = uri.host.decode("ascii").removeprefix("[").removesuffix("]")
        endpoint: Any = HostnameEndpoint(self._reactor, host, uri.port, timeout=self._connect_timeout_s)
        if uri.scheme == b"https":
            # The policy is Twisted's interface: it makes the TLS side, and verifies the name.
            endpoint = wrapClientTLS(self._tls.creatorForNetloc(host.encode("ascii"), uri.port), endpoint)
        bounded: IStreamClientEndpoint = BoundedEndpoint(endpoint, lambda: ReceiveBudget(MOST_RECEIVED), self.opened)
        return bounded
