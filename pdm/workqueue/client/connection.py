"""Requests to the service: one kept connection pool, timeouts, safe repetition, and failures in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

from treq.client import HTTPClient
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectError, ConnectingCancelledError, ConnectionClosed, DNSLookupError
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.task import deferLater
from twisted.python.failure import Failure
from twisted.web.client import (
    Agent,
    HTTPConnectionPool,
    RequestTransmissionFailed,
    ResponseDone,
    ResponseFailed,
    ResponseNeverReceived,
)
from twisted.web.http import PotentialDataLoss
from twisted.web.http_headers import Headers
from twisted.web.iweb import IPolicyForHTTPS, IResponse

from pdm.workqueue.certificates.client_tls import refusal_of
from pdm.workqueue.client.errors import (
    CertificateRefusedError,
    ConnectionBrokenError,
    NoAnswerError,
    TemporaryRefusalError,
    UnreachableError,
)
from pdm.workqueue.client.refusals import refusal

_T = TypeVar("_T")

API = "/workqueue/api/v1.0"

#: Seconds before the second, third ... try of a request whose connection broke.
_PAUSES_S = (0.2, 1.0, 3.0)
_MAYBE_DONE = "What it asked for may have been done all the same: look before you ask for it again."
#: The service may ask for a longer pause than ours, up to this.
_LONGEST_PAUSE_S = 10.0
_BROKEN = (
    ResponseNeverReceived,
    RequestTransmissionFailed,
    ResponseFailed,
    PotentialDataLoss,
    ConnectionClosed,
)


class Connection:
    """Sends requests to one service.

    Args:
        reactor: connects and keeps time.
        base_url: ``https://HOST:PORT``.
        policy: the caller's certificate, and whom the caller trusts.
        timeout_s: how many seconds the service may be silent.
    """

    def __init__(self, reactor: Any, base_url: str, policy: IPolicyForHTTPS, timeout_s: float) -> None:
        self._reactor: IReactorTime = reactor
        self._base_url = base_url.rstrip("/").removesuffix(API)
        self._where = urlsplit(self._base_url).netloc
        self._timeout_s = timeout_s
        self._policy = policy
        self._pauses_s: tuple[float, ...] = _PAUSES_S
        self._pool = HTTPConnectionPool(reactor)
        self._pool.maxPersistentPerHost = 8
        self._client = HTTPClient(Agent(reactor, policy, connectTimeout=timeout_s, pool=self._pool))

    async def close(self) -> None:
        """Close the kept connections."""
        await self._pool.closeCachedConnections()

    async def pause(self, seconds: float) -> None:
        """Let time pass."""
        await deferLater(self._reactor, seconds)

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: Sequence[tuple[str, str]] = (),
        body: bytes | None = None,
        content_type: str = "application/json",
        key: str | None = None,
    ) -> bytes:
        """Send a request and return the body of the answer.

        When the connection breaks, or the service says "not now", a request that changes nothing when repeated is
        sent again: each but a POST without a key. One that is not answered in time is sent again only if it has a key,
        and once: what it asked for may have been done, and the repetition finds that.

        Args:
            method: of HTTP.
            path: below the root of the API, with its leading slash.
            query: parameters of the URL.
            body: what to send.
            content_type: of the body.
            key: the ``Idempotency-Key`` of a POST; the same in each repetition, so that the service acts once.

        Raises:
            WorkqueueClientError: the class says what happened.
        """
        headers = Headers({"Accept": ["application/json"]})
        if body is not None:
            headers.setRawHeaders("Content-Type", [content_type])
        if key is not None:
            headers.setRawHeaders("Idempotency-Key", [key])
        sent_before = timed_out = False
        for pause in self._pauses_s if key is not None or method != "POST" else ():
            try:
                return await self._send(method, path, query, body, headers)
            except NoAnswerError as error:
                if key is None:
                    raise
                if timed_out:
                    raise NoAnswerError(error.what, _MAYBE_DONE) from error
                timed_out = sent_before = True
            except TemporaryRefusalError as error:
                asked_s = error.retry_after_s or 0.0
                if asked_s > _LONGEST_PAUSE_S:
                    raise
                await self.pause(max(pause, asked_s))
            except ConnectionBrokenError:
                sent_before = True
                await self.pause(pause)
            except UnreachableError:
                # A service that was never there is reported at once; one that just went away may be restarting.
                if not sent_before:
                    raise
                await self.pause(pause)
        return await self._send(method, path, query, body, headers)

    async def _send(
        self,
        method: str,
        path: str,
        query: Sequence[tuple[str, str]],
        body: bytes | None,
        headers: Headers,
    ) -> bytes:
        watch = _Silence(self._reactor, self._timeout_s)
        try:
            answer: Deferred[Any] = self._client.request(
                method,
                f"{self._base_url}{API}{path}",
                params=list(query),
                data=body,
                headers=headers,
                allow_redirects=False,
                unbuffered=True,
            )
            response: IResponse = await watch.over(answer)
            content = _Body(watch)
            response.deliverBody(content)
            received = await watch.over(content.complete)
        except DNSLookupError as error:
            raise UnreachableError(
                f"{self._where} is not a known host", "Check PDM_URL, or the url in client.conf."
            ) from error
        except ConnectError as error:
            raise UnreachableError(
                f"{self._where} cannot be reached ({_first_line(error)})", "Check the address, and that it is up."
            ) from error
        except _BROKEN as error:
            raise self._broken(Failure(error), watch) from error
        except (CancelledError, ConnectingCancelledError) as error:
            raise self._broken(Failure(error), watch) from None
        if not 200 <= response.code < 300:
            raise refusal(response, received)
        return received

    def _broken(self, failure: Failure, watch: _Silence) -> BaseException:
        """What a request that did not come to its end means."""
        if watch.timed_out:
            return NoAnswerError(
                f"{self._where} did not answer within {self._timeout_s:g} s", "Try again later, or ask an operator."
            )
        # Cancelling may arrive as itself or wrapped as the reason of a lost connection.
        causes = [failure, *getattr(failure.value, "reasons", [])]
        if any(cause.check(CancelledError, ConnectingCancelledError) for cause in causes):
            return CancelledError()
        refused = refusal_of(failure, self._policy)
        if refused is not None:
            return CertificateRefusedError(refused.what.rstrip("."), refused.advice)
        return ConnectionBrokenError(
            f"the connection to {self._where} broke ({_first_line(failure.value)})", "Try again in a minute."
        )


class _Silence:
    """Cancels what it watches over when nothing was heard for too long."""

    def __init__(self, reactor: IReactorTime, longest_s: float) -> None:
        self._reactor = reactor
        self._longest_s = longest_s
        self._call: IDelayedCall | None = None
        self.timed_out = False

    def heard(self) -> None:
        if self._call is not None and self._call.active():
            self._call.reset(self._longest_s)

    async def over(self, watched: Deferred[_T]) -> _T:
        self._call = self._reactor.callLater(self._longest_s, self._give_up, watched)
        try:
            return await watched
        finally:
            if self._call.active():
                self._call.cancel()

    def _give_up(self, watched: Deferred[Any]) -> None:
        self.timed_out = True
        watched.cancel()


class _Body(Protocol):
    """Collects the body of an answer; cancelling `complete` ends the connection."""

    def __init__(self, watch: _Silence) -> None:
        self._watch = watch
        self._chunks: list[bytes] = []
        self.complete: Deferred[bytes] = Deferred(self._cancel)

    def dataReceived(self, data: bytes) -> None:
        self._watch.heard()
        self._chunks.append(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self.complete.called:
            return
        if reason.check(ResponseDone):
            self.complete.callback(b"".join(self._chunks))
        else:
            self.complete.errback(reason)

    def _cancel(self, _complete: Deferred[bytes]) -> None:
        if self.transport is not None:
            self.transport.loseConnection()


def _first_line(error: BaseException | None) -> str:
    """What an error says, short enough for one line; of a bundle of reasons the last, which is the cause."""
    reasons = getattr(error, "reasons", None)
    if reasons:
        return _first_line(reasons[-1].value)
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
