"""Requests to the receivers of webhooks: users choose the URLs, so nothing about a receiver is trusted.

Only permitted addresses are connected to (`checked_connections`). Redirects are not followed; what is received is
bounded in size and time, and none of it is shown to the user but the status.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from io import BytesIO
from types import MappingProxyType
from typing import Any, TypeVar

from attrs import define, field, frozen
from twisted.internet import error as connection_errors
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectError, ConnectingCancelledError, DNSLookupError
from twisted.internet.protocol import Protocol
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool
from twisted.web.client import Agent, FileBodyProducer, ResponseDone, ResponseFailed, ResponseNeverReceived
from twisted.web.http import PotentialDataLoss
from twisted.web.http_headers import Headers
from twisted.web.iweb import IPolicyForHTTPS

from pdm.workqueue.certificates.tls_client import refusal_reason
from pdm.workqueue.domain.notifications import SendResult
from pdm.workqueue.execution.bounded_connections import (
    BoundedProtocol,
    TooMuchReceivedError,
    end_connections,
)
from pdm.workqueue.execution.checked_connections import (
    MOST_RECEIVED,
    RESOLVER_THREADS,
    AddressPolicy,
    CheckedEndpoints,
    CheckedReactor,
    RefusedAddressError,
    Resolver,
    ResolverThreads,
)

_T = TypeVar("_T")
_BAD_CERTIFICATE = "its TLS certificate is not trusted: expired, of an unknown authority, or for another host"


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
    _threads: ThreadPool = field(factory=lambda: ResolverThreads(0, RESOLVER_THREADS, name="resolve receivers"))

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
                raise UnansweredError(f"it answered with more than {MOST_RECEIVED} bytes") from error
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
        resolver = Resolver(self.reactor, self._threads, self.look_up)
        checked = CheckedReactor(self.reactor, self.addresses, resolver)
        endpoints = CheckedEndpoints(checked, self.tls, self.timeout_s)
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
            return f"it answered with more than {MOST_RECEIVED} bytes before the end of its headers"
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
