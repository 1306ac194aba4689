"""HTTP requests with an id and a bounded body, their responses, and the site that creates them.

Small responses are written at once; long ones are streamed with flow control, in bounded memory.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import aclosing
from io import BytesIO
from typing import Any, cast

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IPushProducer
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.http_headers import Headers
from twisted.web.resource import IResource
from twisted.web.server import Request, Site
from werkzeug.datastructures import MIMEAccept
from werkzeug.http import parse_accept_header
from zope.interface import implementer

from pdm.workqueue.certificates.tls_buffers import renew_buffers
from pdm.workqueue.http.access import SAFE_METHODS, foreign_origin
from pdm.workqueue.http.connections import ApiChannel, ConnectionLimiter, ConnectionLimits
from pdm.workqueue.http.endpoint import JsonStream
from pdm.workqueue.http.problems import (
    PROBLEM_FORMAT,
    ApiError,
    BodyTooLargeError,
    ErrorFormat,
    ForeignOriginError,
    NotAuthenticatedError,
    RequestTimeoutError,
    ServiceBusyError,
    raw_error_response,
)
from pdm.workqueue.telemetry.background import Periodic, ReportedError, start_background
from pdm.workqueue.telemetry.logging import log_incident
from pdm.workqueue.telemetry.metrics import HTTP_DURATION, OTHER, HistogramTally
from pdm.workqueue.wire.responses import MEDIA_TYPE

JSON = b"application/json"
TEXT = b"text/plain; charset=us-ascii"
_HTML = "text/html"

_WRITE_SIZE = 64 * 1024
#: Methods that are counted apart.
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

_log = Logger()


def write_response(request: ApiRequest, status: int, body: bytes, content_type: bytes = JSON) -> None:
    """Write a complete response; twisted.web itself omits the body for HEAD."""
    request.setResponseCode(status)
    if body:
        request.setHeader(b"Content-Type", content_type)
    if status != 204:
        request.setHeader(b"Content-Length", b"%d" % len(body))
    request.write(body)


def write_problem(request: ApiRequest, error: ApiError, incident: str | None = None) -> None:
    """Answer with an error in the format of the port; a browser without a certificate gets the site's page about it."""
    write_page = request.write_access_page
    if write_page is not None and isinstance(error, NotAuthenticatedError) and _prefers_html(request):
        write_page(request, error)
        return
    for name, value in error.headers.items():
        request.setHeader(name, value)
    media_type, body = request.error_format
    write_response(request, error.status, body(error, request.request_id, incident), media_type.encode("ascii"))


def _prefers_html(request: ApiRequest) -> bool:
    accept = ", ".join(value.decode("latin-1") for value in request.requestHeaders.getRawHeaders(b"Accept") or ())
    return parse_accept_header(accept, MIMEAccept).best_match([MEDIA_TYPE, _HTML]) == _HTML


async def write_stream(request: ApiRequest, status: int, stream: JsonStream) -> None:
    """Write pieces at the speed of the client.

    Raises:
        Exception: raised by the pieces before the first byte was sent. Later errors abort the connection, so that the
            client cannot take an incomplete response for a complete one.
    """
    collected: list[bytes] = []
    size = 0
    flow: FlowControl | None = None
    media_type = stream.media_type.encode("ascii")
    try:
        async with aclosing(stream.pieces) as source:
            async for piece in source:
                collected.append(piece)
                size += len(piece)
                if size < (stream.buffered_bytes if flow is None else _WRITE_SIZE):
                    continue
                if flow is None:
                    if request.method == b"HEAD":
                        break
                    request.setResponseCode(status)
                    request.setHeader(b"Content-Type", media_type)
                    flow = FlowControl()
                    request.registerProducer(flow, True)
                request.write(b"".join(collected))
                collected, size = [], 0
                await flow.open()
    except CancelledError:
        raise
    except Exception as error:
        if flow is None:
            raise
        if not isinstance(error, ReportedError):
            log_incident(_log, Failure())
        request.abort()
        # The loss of the connection cancels this handler; until then nothing more may be sent.
        await Deferred()
    if flow is None:
        write_response(request, status, b"".join(collected), media_type)
    else:
        request.write(b"".join(collected))
        request.unregisterProducer()


@implementer(IPushProducer)
class FlowControl:
    """Suspends a writer while the client does not read."""

    def __init__(self) -> None:
        self._paused: Deferred[None] | None = None

    @property
    def is_paused(self) -> bool:
        return self._paused is not None

    async def open(self) -> None:
        """Wait until the client reads."""
        while self._paused is not None:
            await self._paused

    def pauseProducing(self) -> None:
        if self._paused is None:
            self._paused = Deferred()

    def resumeProducing(self) -> None:
        paused, self._paused = self._paused, None
        if paused is not None:
            paused.callback(None)

    def stopProducing(self) -> None:
        """Does nothing: when the client disconnects, Klein cancels the handler, which may be waiting here."""


#: Bytes of a body from a client without a certificate, which gets an error from every route that takes a body.
_MAX_ANONYMOUS_BODY = 16384
#: Seconds between two searches for slow connections.
_SWEEP_INTERVAL_S = 5.0

#: Where a body may have many items, and how long it may then be: 100,000 items with 600 bytes each.
_TAKES_ITEMS = (b"/copy", b"/jobs")
_MAX_ITEMS_BODY = 64 * 1024**2
#: Bodies beyond the usual limit that are held at once.
_MAX_LARGE_BODIES = 2

#: Headers of every response. A page of another site can neither read nor embed one, nor learn its address.
_HEADERS = (
    (b"Cache-Control", [b"no-store"]),
    (b"X-Content-Type-Options", [b"nosniff"]),
    (b"Referrer-Policy", [b"no-referrer"]),
    (b"Cross-Origin-Resource-Policy", [b"same-origin"]),
)


class ApiRequest(Request):
    """A request.

    Attributes:
        request_id: identifies it in the log and in problems.
        subject: of the caller, once authenticated.
        route: its handler and path values, once routed.
        template: the path of its route, with the names of its parameters: for metrics.
        endless: fires at the end of a response that continues after its handler has returned; else None.
        write_access_page: answers a browser without a certificate with a page; None if there is none.
        error_format: of the port.
    """

    channel: ApiChannel

    # An object with more than 25 attributes in its dictionary takes a kilobyte more, and a stream keeps it for hours.
    # Some of these are twisted.web's, which it sets in `__init__`.
    __slots__ = (
        "_adapterCache",
        "_begun",
        "_body",
        "_hostname",
        "_is_large",
        "_parsePOSTFormSubmission",
        "_received",
        "_refused",
        "_served",
        "_site",
        "cookies",
        "endless",
        "notifications",
        "received_cookies",
        "requestHeaders",
        "request_id",
        "responseHeaders",
        "route",
        "subject",
        "template",
        "write_access_page",
    )

    def __init__(self, channel: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(channel, *args, **kwargs)
        self.request_id = f"{random.getrandbits(64):016x}"
        self.subject: str | None = None
        self.route: tuple[Callable[..., Deferred[None] | None], dict[str, Any]] | None = None
        self.template = OTHER
        self.endless: Deferred[None] | None = None
        self._site: ApiSite = channel.site
        self._begun = time.perf_counter()
        self._received = 0
        self._refused = False
        self._served = False
        self._is_large = False
        self._body = BytesIO()
        self._hostname: bytes | None = None
        self.write_access_page = channel.site.write_access_page
        self.error_format = channel.site.error_format

    # -- called by Klein, twice each

    def isSecure(self) -> bool:
        # The API is served over TLS only; the inherited check costs more than decoding the request.
        return True

    def getRequestHostname(self) -> bytes:
        if self._hostname is None:
            self._hostname = super().getRequestHostname()
        return self._hostname

    # -- receiving the body

    def gotLength(self, length: int | None) -> None:
        self.content = self._body
        if length is not None:
            self._check_length(length)

    def handleContentChunk(self, data: bytes) -> None:
        if self._refused:
            return
        self._received += len(data)
        self._check_length(self._received)
        if not self._refused:
            self._body.write(data)

    def _check_length(self, length: int) -> None:
        if length > self._site.body_limit and not self._may_be_large(length):
            return
        if length > _MAX_ANONYMOUS_BODY and not self.channel.identified:
            self._refuse(NotAuthenticatedError("no client certificate was presented; a request with a body needs one"))

    def _may_be_large(self, length: int) -> bool:
        """Whether a body beyond the usual limit is received: of a submission with many items, a few at a time."""
        limit = self._site.body_limit
        if self.channel._path.endswith(_TAKES_ITEMS) and self.channel.identified:
            limit = max(limit, _MAX_ITEMS_BODY)
        if length > limit:
            self._refuse(BodyTooLargeError(limit))
        elif not self._is_large and self._site.large_bodies >= _MAX_LARGE_BODIES:
            self._refuse(ServiceBusyError())
        elif not self._is_large:
            self._is_large = True
            self._site.large_bodies += 1
            self.notifyFinish().addBoth(self._large_ended)
        return not self._refused

    def _large_ended(self, _: object) -> None:
        self._site.large_bodies -= 1

    def refuse_slow(self) -> None:
        """Answer with a timeout."""
        if not self._refused:
            self._refuse(RequestTimeoutError(self._site.connections.limits.request_s))

    def _refuse(self, error: ApiError) -> None:
        """Answer at once, and discard the rest of the request."""
        self._refused = True
        self._body.truncate(0)
        # Otherwise the channel would answer 100 Continue.
        self.requestHeaders.removeHeader("Expect")
        self._connection().write(raw_error_response(error, self.request_id, self.error_format))
        _log.info("{title}: {status}", title=error.title, status=error.status, request_id=self.request_id)
        self.channel.refuse()

    def process(self) -> None:
        if self._refused:
            return
        self._served = True
        headers = self.responseHeaders
        headers.setRawHeaders(b"X-Request-Id", [self.request_id.encode()])
        for name, values in _HEADERS:
            headers.setRawHeaders(name, values)
        self.channel.when_read(self._process)

    def _process(self) -> None:
        evidence = None if self.method in SAFE_METHODS else foreign_origin(self.requestHeaders)
        if evidence is None:
            super().process()
        else:
            write_problem(self, ForeignOriginError(evidence))
            self.finish()

    def body(self) -> bytes:
        return self._body.getvalue()

    def begin_endless(self, over: Deferred[None]) -> None:
        """The head of a response without end was written: free what only the head needs.

        ``over`` fires when it ends all the same; the handler may return before.
        """
        self.endless = over
        self.requestHeaders = Headers()
        self.responseHeaders = Headers()
        self.channel.streaming()

    def free_buffers(self) -> None:
        """Free what earlier data have taken in TLS."""
        if self.channel is not None:
            renew_buffers(self._connection())

    # -- completion

    @property
    def gone(self) -> bool:
        """Whether the connection was lost."""
        return self.channel is None

    def abort(self) -> None:
        """Close the connection at once."""
        if self.channel is not None:
            self._connection().abortConnection()

    def _connection(self) -> Any:
        return self.channel.transport

    def connectionLost(self, reason: Failure) -> None:
        super().connectionLost(reason)
        if self._served:
            self._log_end(reason)

    def finish(self) -> None:
        super().finish()
        self._log_end(None)

    def _log_end(self, result: Failure | None) -> None:
        seconds, method = time.perf_counter() - self._begun, self.method.decode("ascii", "replace")
        label = method if method in _METHODS else OTHER
        self._site.durations.observe((self.template, label, self.code if result is None else 0), seconds)
        # Clients that poll must not flood the log: successful reads are logged at the level debug.
        quiet = self.method in (b"GET", b"HEAD") and self.code < 400 and result is None
        if quiet and not self._site.log_reads:
            return
        write = _log.debug if quiet else _log.info
        uri = self.uri.decode("ascii", "replace")
        write(
            "{method} {uri} {end} {ms} ms",
            method=method,
            uri=uri,
            path=uri.partition("?")[0],
            status=self.code if result is None else None,
            end=self.code if result is None else "client disconnected",
            ms=round(seconds * 1000, 1),
            request_id=self.request_id,
            subject=self.subject,
        )


class ApiSite(Site):
    """Serves the API; `log_reads` logs successful reads too, at the level debug."""

    displayTracebacks = False  # noqa: N815 - Twisted's name
    protocol = cast(Any, ApiChannel)

    def __init__(
        self,
        resource: IResource,
        reactor: Any,
        *,
        body_limit_bytes: int,
        idle_timeout_s: float,
        limits: ConnectionLimits,
        log_reads: bool,
        write_access_page: Callable[[ApiRequest, NotAuthenticatedError], None] | None = None,
        error_format: ErrorFormat = PROBLEM_FORMAT,
    ) -> None:
        super().__init__(
            resource,
            requestFactory=ApiRequest,
            timeout=idle_timeout_s,
            reactor=reactor,
            # `http.decoding` refuses form data with an explanation.
            parsePOSTFormSubmission=False,
        )
        self.body_limit = body_limit_bytes
        self.log_reads = log_reads
        self.write_access_page = write_access_page
        self.error_format = error_format
        #: Of requests, by template, method and status.
        self.durations: HistogramTally[tuple[str, str, int]] = HistogramTally(HTTP_DURATION, (OTHER, OTHER, 0))
        #: Number of bodies beyond the limit that are received or answered.
        self.large_bodies = 0
        self.connections = ConnectionLimiter(limits, reactor.seconds)
        self._sweeper = Periodic(
            reactor, "close slow connections", min(limits.request_s / 4, _SWEEP_INTERVAL_S), self.connections.sweep
        )

    def startFactory(self) -> None:
        super().startFactory()
        self._sweeper.start()

    def stopFactory(self) -> None:
        # The sweep is synchronous.
        start_background("stop closing slow connections", self._sweeper.stop())
        super().stopFactory()

    def buildProtocol(self, addr: Any) -> Any:
        """A channel for a new connection; None, so that Twisted closes it, beyond the limits."""
        address = getattr(addr, "host", "")
        if not self.connections.admit(address):
            return None
        channel = super().buildProtocol(addr)
        channel.connections = self.connections
        channel.address = address
        channel.error_format = self.error_format
        return channel

    def log(self, request: object) -> None:
        """Does nothing: `ApiRequest` logs itself, with more fields."""
