"""Requests to the receivers of webhooks: users choose the URLs, so nothing about a receiver is trusted.

The address is checked for each connection, after the name was resolved, on the very address that is connected to: a
name that resolves to something else a moment later leads nowhere else. Redirects are not followed; what is received is
bounded in size and time, and none of it is shown to the user but the status.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from io import BytesIO
from threading import Thread
from types import MappingProxyType
from typing import Any, TypeVar
from urllib.parse import urlsplit

from attrs import define, field, frozen
from twisted.internet import error as connection_errors
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import HostnameEndpoint, wrapClientTLS
from twisted.internet.error import ConnectError, ConnectingCancelledError, DNSLookupError
from twisted.internet.interfaces import (
    IHostnameResolver,
    IHostResolution,
    IReactorPluggableNameResolver,
    IStreamClientEndpoint,
)
from twisted.internet.protocol import Protocol
from twisted.internet.threads import deferToThreadPool
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool
from twisted.web.client import URI, Agent, FileBodyProducer, ResponseDone, ResponseFailed, ResponseNeverReceived
from twisted.web.http import PotentialDataLoss
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgentEndpointFactory, IPolicyForHTTPS
from zope.interface import implementer

from pdm.workqueue.certificates.tls_client import refusal_reason
from pdm.workqueue.domain.addresses import AddressRange, IpAddress, embedded_address, is_local_address, is_local_host
from pdm.workqueue.domain.webhooks import SendResult
from pdm.workqueue.execution.bounded_connections import (
    BoundedEndpoint,
    BoundedProtocol,
    ReceiveBudget,
    TooMuchReceivedError,
    end_connections,
)

#: Bytes that a receiver may send, TLS not counted: a status and some headers.
_MOST_RECEIVED = 64 * 1024
_T = TypeVar("_T")
#: Names that are resolved at the same time.
_RESOLVER_THREADS = 32
_LONGEST_URL = 2000
_URL = re.compile(
    r"https?://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?(?:[/?][\x21\x22\x24-\x5b\x5d-\x7e]*)?"
)
_PORTS = {"https": 443, "http": 80}
_BAD_CERTIFICATE = "its TLS certificate is not trusted: expired, of an unknown authority, or for another host"


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
        """Validate the URL of a receiver, as far as it can be without resolving its name.

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


class _ResolverThreads(ThreadPool):
    """Threads of their own, because name servers of users may hang: they use up none of the reactor's."""

    threadFactory = _DaemonThread  # noqa: N815 - Twisted's name


@implementer(IHostnameResolver)
@frozen
class _Resolver:
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
class _CheckedReactor:
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
class _CheckedEndpoints:
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
        bounded: IStreamClientEndpoint = BoundedEndpoint(endpoint, lambda: ReceiveBudget(_MOST_RECEIVED), self.opened)
        return bounded


class _Discard(Protocol):
    """Reads the rest of a response, which is bounded, and drops it."""

    def __init__(self, ended: Deferred[None]) -> None:
        self._ended: Deferred[None] | None = ended

    def dataReceived(self, data: bytes) -> None: ...

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        if self._ended is not None:
            ended, self._ended = self._ended, None
            ended.callback(None)


class _Collect(Protocol):
    """Keeps the body of a response, which is bounded; ``ended`` fires with it."""

    def __init__(self, ended: Deferred[bytes]) -> None:
        self._ended: Deferred[bytes] | None = ended
        self._pieces: list[bytes] = []

    def dataReceived(self, data: bytes) -> None:
        self._pieces.append(data)

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        if self._ended is None:
            return
        ended, self._ended = self._ended, None
        if reason.check(ResponseDone, PotentialDataLoss):
            ended.callback(b"".join(self._pieces))
        else:
            ended.errback(reason)


class UnansweredError(Exception):
    """A server has not answered; the text, of a sentence about it, says why."""


@frozen
class HttpAnswer:
    """A complete answer; redirects are not followed."""

    status: int
    body: bytes
    content_type: str


@define(eq=False, kw_only=True)
class Receivers:
    """Sends messages to receivers.

    Attributes:
        tls: verifies their certificates.
        timeout_s: for one message, from the resolution of the name to the end of the response.
    """

    reactor: Any
    addresses: AddressPolicy
    tls: IPolicyForHTTPS
    timeout_s: float
    user_agent: str
    look_up: Callable[..., Sequence[Any]] = socket.getaddrinfo
    _threads: ThreadPool = field(factory=lambda: _ResolverThreads(0, _RESOLVER_THREADS, name="resolve receivers"))

    def start(self) -> None:
        self._threads.start()

    def stop(self) -> None:
        """End idle threads. A look-up that hangs is not waited for: its thread ends with the process."""
        if not self._threads.joined and not self._threads.working:
            self._threads.stop()

    async def send(self, url: str, body: bytes, headers: dict[str, str]) -> SendResult:
        """POST a message, and say what came of it."""
        begun = self.reactor.seconds()
        try:
            found = await self._timed(self._post(url, body, headers))
        except UnansweredError as error:
            found = SendResult(error=str(error))
        elapsed_s = self.reactor.seconds() - begun
        return SendResult(
            status=found.status, error=found.error, retry_after_s=found.retry_after_s, elapsed_s=elapsed_s
        )

    async def ask(
        self, url: str, body: bytes | None = None, headers: Mapping[str, str] = MappingProxyType({})
    ) -> HttpAnswer:
        """POST a body, or GET without one, and return the whole answer.

        Raises:
            UnansweredError: there is none, or it is too large.
        """
        return await self._timed(self._ask(url, body, headers))

    async def _timed(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Await a request for `timeout_s` at most.

        Raises:
            UnansweredError: it failed.
        """
        sending = Deferred.fromCoroutine(work)
        timed_out: list[None] = []
        timer = self.reactor.callLater(self.timeout_s, partial(self._cut_off, sending, timed_out))
        try:
            return await sending
        except UnansweredError:
            raise
        except Exception as error:
            if isinstance(error, CancelledError) and not timed_out:
                raise
            raise UnansweredError(self._words(error, timed_out=bool(timed_out))) from error
        finally:
            if timer.active():
                timer.cancel()

    @staticmethod
    def _cut_off(sending: Deferred[Any], timed_out: list[None]) -> None:
        timed_out.append(None)
        sending.cancel()

    async def _ask(self, url: str, body: bytes | None, headers: Mapping[str, str]) -> HttpAnswer:
        try:
            self.addresses.check_url(url)
        except ValueError as error:
            raise UnansweredError(f"its URL is not accepted: {error}") from error
        method, producer = ("GET", None) if body is None else ("POST", FileBodyProducer(BytesIO(body)))
        response, opened = await self._request(method, url, headers, producer)
        try:
            whole: Deferred[bytes] = Deferred()
            response.deliverBody(_Collect(whole))
            content_type = response.headers.getRawHeaders("content-type", [""])[0]
            return HttpAnswer(int(response.code), await whole, content_type.partition(";")[0].strip().lower())
        except (TooMuchReceivedError, ResponseFailed) as error:
            if isinstance(error, TooMuchReceivedError) or any(
                isinstance(each.value, TooMuchReceivedError) for each in error.reasons
            ):
                raise UnansweredError(f"it answered with more than {_MOST_RECEIVED} bytes") from error
            raise
        finally:
            end_connections(opened)

    async def _request(
        self, method: str, url: str, headers: Mapping[str, str], body: FileBodyProducer | None
    ) -> tuple[Any, set[BoundedProtocol]]:
        """Send a request on a connection of its own; returns the response, and the connections to be ended."""
        sent = Headers({"User-Agent": [self.user_agent]})
        for name, value in headers.items():
            sent.setRawHeaders(name, [value])
        resolver = _Resolver(self.reactor, self._threads, self.look_up)
        checked = _CheckedReactor(self.reactor, self.addresses, resolver)
        endpoints = _CheckedEndpoints(checked, self.tls, self.timeout_s)
        # Without a pool: each message has a connection of its own, whose address is checked.
        agent = Agent.usingEndpointFactory(self.reactor, endpoints, pool=None)
        try:
            response: Any = await agent.request(method.encode(), url.encode("ascii"), sent, body)
        except BaseException:
            end_connections(endpoints.opened)
            raise
        return response, endpoints.opened

    async def _post(self, url: str, body: bytes, headers: dict[str, str]) -> SendResult:
        try:
            self.addresses.check_url(url)
        except ValueError as error:
            # The configuration has changed since it was stored.
            return SendResult(error=f"its URL is not accepted any more: {error}")
        headers = {"Content-Type": "application/json", **headers}
        response, opened = await self._request("POST", url, headers, FileBodyProducer(BytesIO(body)))
        try:
            return await self._outcome(response)
        finally:
            end_connections(opened)

    async def _outcome(self, response: Any) -> SendResult:
        status = int(response.code)
        retry_after_s = _seconds(response.headers.getRawHeaders("retry-after"))
        if not 200 <= status < 300:
            what = "a redirect, which is not followed" if 300 <= status < 400 else "not a success"
            return SendResult(status=status, error=f"it answered {status}, {what}", retry_after_s=retry_after_s)
        # The message is accepted; the end of the response is awaited to close the connection in order.
        ended: Deferred[None] = Deferred()
        response.deliverBody(_Discard(ended))
        with contextlib.suppress(CancelledError):
            await ended
        return SendResult(status=status)

    def _words(self, error: Exception, *, timed_out: bool) -> str:
        """Why no answer came."""
        causes = [error, *(each.value for each in getattr(error, "reasons", ()) or ())]
        if any(isinstance(each, RefusedAddressError) for each in causes):
            return "its address is of the service's own machine or its link, or excluded by the operator"
        if any(isinstance(each, TooMuchReceivedError) for each in causes):
            return f"it answered with more than {_MOST_RECEIVED} bytes before the end of its headers"
        if refusal_reason(Failure(error)) is not None:
            return _BAD_CERTIFICATE
        if timed_out or isinstance(error, connection_errors.TimeoutError | CancelledError | ConnectingCancelledError):
            return f"it did not answer within {self.timeout_s:g} s"
        if isinstance(error, DNSLookupError):
            return "its name cannot be resolved"
        if isinstance(error, connection_errors.ConnectionRefusedError):
            return "it refused the connection"
        if isinstance(error, ConnectError):
            return "it cannot be reached"
        if isinstance(error, ResponseNeverReceived | ResponseFailed):
            return "it closed the connection without a complete answer"
        return f"sending failed ({type(error).__name__})"


def _seconds(values: Sequence[str] | None) -> float:
    """The seconds of a ``Retry-After``; 0 for none, and for dates."""
    text = values[0].strip() if values else ""
    return float(text) if text.isascii() and text.isdigit() and len(text) < 8 else 0.0
