"""HTTP requests to the service: connection pool, timeouts, safe retries, query parameters, polling of jobs."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec
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

from pdm.workqueue.certificates.delegation import DelegationError, sign_request
from pdm.workqueue.certificates.tls_client import ClientCredentialError, refusal_of
from pdm.workqueue.client.errors import (
    CertificateRefusedError,
    ConnectionBrokenError,
    CredentialError,
    InvalidRequestError,
    JobTimeoutError,
    NoAnswerError,
    RefusalWaits,
    TemporaryRefusalError,
    UnexpectedAnswerError,
    UnreachableError,
    error_for_response,
)
from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.wire.credentials import DelegationView
from pdm.workqueue.wire.responses import JobView, WhoamiView

Query = Sequence[tuple[str, str]]


def encode_query(**filters: enum.Enum | datetime | str | float | None) -> Query:
    """Encode the filters that are not None: enumerations by name, timestamps in ISO 8601 UTC.

    Raises:
        ValueError: a timestamp has no time zone.
    """
    return [(name, _encode_value(value)) for name, value in filters.items() if value is not None]


def _encode_value(value: enum.Enum | datetime | str | float) -> str:
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValueError("a timestamp needs a time zone, such as datetime.now(timezone.utc)")
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    return str(value)


_T = TypeVar("_T")

API_ROOT = "/workqueue/api/v1.0"

#: Seconds before the second, third … try of a request whose connection broke.
_RETRY_PAUSES_S = (0.2, 1.0, 3.0)
_MAYBE_DONE_ADVICE = "The request may have been executed nevertheless: check before you repeat it."
_CONNECTION_ERRORS = (
    ResponseNeverReceived,
    RequestTransmissionFailed,
    ResponseFailed,
    PotentialDataLoss,
    ConnectionClosed,
)


class Connection:
    """Sends requests to the service at ``https://HOST:PORT``, which may be silent for `timeout_s`.

    The policy presents the caller's certificate and verifies the service's. `on_wait` is called with a sentence before
    each wait for a service that is temporarily unavailable.
    """

    def __init__(
        self,
        reactor: Any,
        *,
        base_url: str,
        policy: IPolicyForHTTPS,
        timeout_s: float,
        on_wait: Callable[[str], object] = lambda sentence: None,
    ) -> None:
        self._reactor: IReactorTime = reactor
        self._on_wait = on_wait
        self._base_url = base_url.rstrip("/").removesuffix(API_ROOT)
        self._where = urlsplit(self._base_url).netloc
        self._timeout_s = timeout_s
        self._policy = policy
        self._pauses_s: tuple[float, ...] = _RETRY_PAUSES_S
        #: Time of the service at its latest response, as it writes it (``Date``).
        self.server_date: str | None = None
        #: When the latest response began, by the clock of the reactor; None before the first.
        self.answered_at: float | None = None
        self._pool = HTTPConnectionPool(reactor)
        self._pool.maxPersistentPerHost = 8
        self._client = HTTPClient(Agent(reactor, policy, connectTimeout=timeout_s, pool=self._pool))

    async def close(self) -> None:
        await self._pool.closeCachedConnections()

    async def pause(self, seconds: float) -> None:
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
        accept: str = "application/json",
        headers: Mapping[str, str] = MappingProxyType({}),
        write: Callable[[bytes], object] | None = None,
    ) -> bytes:
        """Send a request for a path below the root of the API, and return the body of the response.

        Idempotent requests, which are all but a POST without a `key` (``Idempotency-Key``), are retried if the
        connection breaks. If the service is temporarily unavailable, and says when to retry (``Retry-After``), they are
        retried for a minute. After a timeout only a request with a key is retried, once: it may have been executed, and
        then the retry gets the result.

        With `write` the body of a successful response is passed to it piece by piece, and not returned; such a request
        is not retried once a response has begun.

        Raises:
            WorkqueueClientError: the request failed; its class and text say how.
        """
        sent = Headers({"Accept": [accept], **{name: [value] for name, value in headers.items()}})
        if body is not None:
            sent.setRawHeaders("Content-Type", [content_type])
        if key is not None:
            sent.setRawHeaders("Idempotency-Key", [key])
        sent_before = timed_out = False
        is_idempotent = key is not None or method != "POST"
        send = partial(self._send, method, path, query, body, sent, write)
        if is_idempotent:
            send = partial(RefusalWaits(self._reactor, self._on_wait).over, send)
        for pause in self._pauses_s if is_idempotent and write is None else ():
            try:
                return await send()
            except NoAnswerError as error:
                if key is None:
                    raise
                if timed_out:
                    raise NoAnswerError(error.what, _MAYBE_DONE_ADVICE) from error
                timed_out = sent_before = True
            except TemporaryRefusalError as error:
                if error.retry_after_s is not None:
                    raise
                await self.pause(pause)
            except ConnectionBrokenError:
                sent_before = True
                await self.pause(pause)
            except UnreachableError:
                # A service that was never reached is reported at once; one that has just gone away may be restarting.
                if not sent_before:
                    raise
                await self.pause(pause)
        return await send()

    async def _send(
        self,
        method: str,
        path: str,
        query: Sequence[tuple[str, str]],
        body: bytes | None,
        headers: Headers,
        write: Callable[[bytes], object] | None = None,
    ) -> bytes:
        watch = _SilenceTimeout(self._reactor, self._timeout_s)
        try:
            answer: Deferred[Any] = self._client.request(
                method,
                f"{self._base_url}{API_ROOT}{path}",
                params=list(query),
                data=body,
                headers=headers,
                allow_redirects=False,
                unbuffered=True,
            )
            response: IResponse = await watch.over(answer)
            self.answered_at = self._reactor.seconds()
            self.server_date = (response.headers.getRawHeaders("Date") or [None])[0]
            content = _BodyCollector(watch, write if 200 <= response.code < 300 else None)
            response.deliverBody(content)
            received = await watch.over(content.complete)
        except DNSLookupError as error:
            raise UnreachableError(
                f"host not found: {self._where}", "Check PDM_URL, or the url in client.conf."
            ) from error
        except ConnectError as error:
            raise UnreachableError(
                f"{self._where} cannot be reached ({_first_line(error)})",
                "Check the address, and that the service is running.",
            ) from error
        except _CONNECTION_ERRORS as error:
            raise self._broken(Failure(error), watch) from error
        except (CancelledError, ConnectingCancelledError) as error:
            raise self._broken(Failure(error), watch) from None
        if not 200 <= response.code < 300:
            raise error_for_response(response, received)
        return received

    def _broken(self, failure: Failure, watch: _SilenceTimeout) -> BaseException:
        """The error for a request that got no complete response."""
        if watch.timed_out:
            return NoAnswerError(
                f"{self._where} did not answer within {self._timeout_s:g} s", "Try again later, or ask an operator."
            )
        # A cancellation may be wrapped as the reason of a lost connection.
        causes = [failure, *getattr(failure.value, "reasons", [])]
        if any(cause.check(CancelledError, ConnectingCancelledError) for cause in causes):
            return CancelledError()
        refused = refusal_of(failure, self._policy)
        if refused is not None:
            return CertificateRefusedError(refused.what.rstrip("."), refused.advice)
        return ConnectionBrokenError(
            f"the connection to {self._where} broke ({_first_line(failure.value)})", "Try again in a minute."
        )


class _SilenceTimeout:
    """Cancels a Deferred when no data was received for too long."""

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


class _BodyCollector(Protocol):
    """Collects the body of a response, or passes it on; cancelling `complete` closes the connection."""

    def __init__(self, watch: _SilenceTimeout, write: Callable[[bytes], object] | None) -> None:
        self._watch = watch
        self._write = write
        self._chunks: list[bytes] = []
        self.complete: Deferred[bytes] = Deferred(self._cancel)

    def dataReceived(self, data: bytes) -> None:
        if self.complete.called:
            return
        if self._write is None:
            self._chunks.append(data)
        else:
            try:
                self._write(data)
            except Exception:
                self.complete.errback(Failure())
                self._cancel(self.complete)
        # After writing, which may have taken long.
        self._watch.heard()

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
    """First line of an error's text; of several reasons the last, which is the cause."""
    reasons = getattr(error, "reasons", None)
    if reasons:
        return _first_line(reasons[-1].value)
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


#: Seconds between two polls: short at first to notice the end of short jobs, longer later to spare the service.
_FIRST_POLL_PAUSE_S, _MAX_POLL_PAUSE_S, _POLL_PAUSE_GROWTH = 0.05, 2.0, 1.3


class JobPoller:
    """Asks for a job until it has ended, and passes each state to `on_progress`.

    The service answers when the status changes, at the latest after the seconds that `fetch_job` gets: so the end of a
    job is seen at once, and its progress from time to time. `outage_s` is how long the service may be unreachable.
    """

    def __init__(
        self,
        reactor: IReactorTime,
        *,
        fetch_job: Callable[[float], Deferred[JobView]],
        on_progress: Callable[[JobView], object],
        outage_s: float,
    ) -> None:
        self._reactor = reactor
        self._fetch_job = fetch_job
        self._on_progress = on_progress
        self._outage_s = outage_s

    async def until_end(self, job_id: int, timeout_s: float | None) -> JobView:
        """The ended job.

        Raises:
            JobTimeoutError: the job did not end in time.
            WorkqueueClientError: the service refused the request, or was unreachable for too long.
        """
        begun = heard = self._reactor.seconds()
        pause, wait_s, may_wait = _FIRST_POLL_PAUSE_S, 0.0, True
        job: JobView | None = None
        status = ""
        while True:
            asked = self._reactor.seconds()
            has_changed = False
            try:
                job = await self._fetch_job(wait_s)
            except (UnreachableError, ConnectionBrokenError, TemporaryRefusalError):
                # A service that has answered before may be restarting.
                if job is None or self._reactor.seconds() - heard > self._outage_s:
                    raise
            except InvalidRequestError:
                if not wait_s:
                    raise
                # An earlier version of the service knows no waiting.
                may_wait = False
            else:
                heard = self._reactor.seconds()
                self._on_progress(job)
                if JobStatus.parse(job.status).is_final:
                    return job
                has_changed, status = job.status != status, job.status
            if timeout_s is not None:
                left = begun + timeout_s - self._reactor.seconds()
                if left <= 0:
                    raise JobTimeoutError(
                        f"job {job_id} had not ended after {timeout_s:g} s",
                        "It continues: wait longer, or cancel it.",
                        job,
                    )
                pause = min(pause, left)
            waited_s = self._reactor.seconds() - asked
            if not has_changed and waited_s < pause:
                # The service is away, or does not wait.
                await deferLater(self._reactor, pause - waited_s)
            wait_s = pause if may_wait else 0.0
            pause = min(pause * _POLL_PAUSE_GROWTH, _MAX_POLL_PAUSE_S)


class DelegationClient:
    """Reads, creates and removes the delegation of one caller, who signs with a certificate and key (PEM files).

    A `key` of None is in the file of the certificate.
    """

    def __init__(
        self, connection: Connection, *, certificate: Path | None, key: Path | None, passphrase: bytes | None = None
    ) -> None:
        self._connection = connection
        self._certificate = certificate
        self._key = key
        self._passphrase = passphrase

    async def fetch(self) -> DelegationView | None:
        """The delegated proxy; None if there is none."""
        answer = await self._connection.request("GET", await self._path())
        return msgspec.json.decode(answer, type=DelegationView | None)

    async def delegate(self, lifetime: timedelta) -> DelegationView:
        """Sign a proxy for the key that the service has generated.

        Raises:
            CredentialError: the certificate or key is missing or unusable.
        """
        if self._certificate is None:
            raise CredentialError(
                "there is no certificate to delegate with", "Set PDM_CERT and PDM_KEY, or X509_USER_PROXY."
            )
        path = await self._path()
        request = await self._connection.request("GET", f"{path}/request")
        try:
            # Blocks for some milliseconds: two small files and one signature.
            proxy = sign_request(request, self._certificate, self._key, lifetime, passphrase=self._passphrase)
        except ClientCredentialError as error:
            raise CredentialError(str(error).rstrip(".")) from error
        except DelegationError as error:
            raise UnexpectedAnswerError(str(error).rstrip("."), "Report this to an operator of the service.") from error
        answer = await self._connection.request(
            "PUT", f"{path}/credential", body=proxy, content_type="application/x-pem-file"
        )
        return msgspec.json.decode(answer, type=DelegationView)

    async def remove(self) -> None:
        await self._connection.request("DELETE", await self._path())

    async def _path(self) -> str:
        me = msgspec.json.decode(await self._connection.request("GET", "/whoami"), type=WhoamiView)
        return f"/delegation/{me.delegation_id}"
