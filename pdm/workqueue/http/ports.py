"""The ports of the service: HTTPS with client certificates and proxies, and plain HTTP for monitoring (admin port).

It needs no certificate and shows no users; by default it is off, and listens on the loopback address. Requests have no
body; slow clients are disconnected.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from typing import Any

import msgspec
from attrs import define, frozen
from twisted.internet.defer import CancelledError, maybeDeferred
from twisted.internet.interfaces import IProtocolFactory
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET

from pdm.workqueue import __version__
from pdm.workqueue.config.settings import AdminSettings
from pdm.workqueue.execution.readiness import Readiness
from pdm.workqueue.http.connections import ConnectionLimits
from pdm.workqueue.http.metrics import ServiceMetrics
from pdm.workqueue.http.problems import ApiError, InternalFaultError, MethodNotAllowedError, NotFoundError
from pdm.workqueue.http.request import JSON, ApiRequest, ApiSite, write_problem, write_response
from pdm.workqueue.telemetry.background import start_background
from pdm.workqueue.telemetry.logging import log_incident

_log = Logger()
_BACKLOG = 1024


def listening_url(scheme: str, port: Any) -> str:
    """The URL of a port that listens: scheme, host and number."""
    address = port.getHost()
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"{scheme}://{host}:{address.port}"


@define(eq=False, kw_only=True)
class HttpsPort:
    """Serves one API.

    Attributes:
        what: the API, for the log.
        port: its number; 0 for any that is free, None to serve nothing.
        make_site: makes the site to listen with.
        wrap: adds TLS.
        site: that listens; None before the start.
        url: where it listens; empty if it does not.
    """

    reactor: Any
    what: str
    host: str
    port: int | None
    make_site: Callable[[Any], ApiSite]
    wrap: Callable[[Any], IProtocolFactory]
    site: ApiSite | None = None
    url: str = ""
    _listening: Any = None

    def start(self) -> None:
        """Listen, if a port is configured.

        Raises:
            CannotListenError: the port cannot be used.
        """
        if self.port is None:
            return
        self.site = self.make_site(self.reactor)
        self._listening = self.reactor.listenTCP(self.port, self.wrap(self.site), _BACKLOG, self.host)
        self.url = listening_url("https", self._listening)
        _log.info("{what} is served at {url}", what=self.what, url=self.url)

    async def stop(self) -> None:
        if self._listening is not None:
            await maybeDeferred(self._listening.stopListening)


#: Bytes of a body, which no request here needs.
_BODY_LIMIT = 1024
_IDLE_TIMEOUT_S, _REQUEST_TIMEOUT_S = 120.0, 10.0
_CONNECTIONS = 64


@frozen
class AdminAnswer:
    """The answer to a request of the admin port."""

    status: int
    body: bytes
    media_type: bytes = JSON


@define(eq=False, kw_only=True)
class AdminPort:
    """Serves the admin port.

    Attributes:
        started_at: when the daemon was started, UTC.
    """

    reactor: Any
    settings: AdminSettings
    readiness: Readiness
    metrics: ServiceMetrics
    started_at: datetime
    _port: Any = None
    #: Where it listens; empty if it does not.
    url: str = ""

    def start(self) -> None:
        """Listen, if a port is configured.

        Raises:
            CannotListenError: the port cannot be used.
        """
        if not self.settings.port:
            return
        site = ApiSite(
            _AdminResource(self),
            self.reactor,
            body_limit_bytes=_BODY_LIMIT,
            idle_timeout_s=_IDLE_TIMEOUT_S,
            limits=ConnectionLimits(
                request_s=_REQUEST_TIMEOUT_S,
                most=_CONNECTIONS,
                most_of_address=_CONNECTIONS,
                new_per_s=0,
                most_anonymous=_CONNECTIONS,
            ),
            log_reads=False,
        )
        self._port = self.reactor.listenTCP(self.settings.port, site, interface=self.settings.host)
        self.url = listening_url("http", self._port)
        _log.info("health and metrics at {url}", url=self.url)

    async def stop(self) -> None:
        if self._port is not None:
            await maybeDeferred(self._port.stopListening)

    # -- addresses

    async def healthz(self, request: ApiRequest) -> AdminAnswer:
        """This process runs, and its reactor answers."""
        return AdminAnswer(200, msgspec.json.encode({"status": "ok", "version": __version__, "pid": os.getpid()}))

    async def readyz(self, request: ApiRequest) -> AdminAnswer:
        """This daemon can do its work; else the status is 503, and the answer has the reasons."""
        reasons = await self.readiness.reasons()
        body = {"status": "not ready" if reasons else "ready", "reasons": reasons}
        return AdminAnswer(503 if reasons else 200, msgspec.json.encode(body))

    async def show_metrics(self, request: ApiRequest) -> AdminAnswer:
        """All metrics, for Prometheus."""
        accept = ", ".join(value.decode("latin-1") for value in request.requestHeaders.getRawHeaders(b"Accept") or ())
        text, media_type = await self.metrics.text(accept)
        return AdminAnswer(200, text, media_type.encode("ascii"))

    async def version(self, request: ApiRequest) -> AdminAnswer:
        """Versions of the service and of Python, and when it was started."""
        started = self.started_at.replace(microsecond=0)
        body = {"version": __version__, "python": platform.python_version(), "started_at": started}
        return AdminAnswer(200, msgspec.json.encode(body))


#: Path → what answers it.
ADMIN_PATHS: Mapping[bytes, Callable[[AdminPort, ApiRequest], Awaitable[AdminAnswer]]] = {
    b"/healthz": AdminPort.healthz,
    b"/readyz": AdminPort.readyz,
    b"/metrics": AdminPort.show_metrics,
    b"/version": AdminPort.version,
}


class _AdminResource(Resource):
    isLeaf = True  # noqa: N815 - Twisted's name

    def __init__(self, port: AdminPort) -> None:
        super().__init__()
        self._admin_port = port

    def render(self, request: ApiRequest) -> int:
        start_background("answer a request at the admin port", self._serve(request))
        return NOT_DONE_YET

    async def _serve(self, request: ApiRequest) -> None:
        try:
            answer = await self._answer(request)
        except CancelledError:
            raise
        except ApiError as problem:
            error, incident = problem, None
        except Exception:
            incident = log_incident(_log, Failure())
            error = InternalFaultError(f"the log of the daemon has more, beside incident {incident}")
        else:
            if not request.gone:
                write_response(request, answer.status, answer.body, answer.media_type)
                request.finish()
            return
        if not request.gone:
            write_problem(request, error, incident)
            request.finish()

    async def _answer(self, request: ApiRequest) -> AdminAnswer:
        handler = ADMIN_PATHS.get(request.path)
        if handler is None:
            paths = ", ".join(path.decode("ascii") for path in ADMIN_PATHS)
            raise NotFoundError(f"the admin port has {paths}")
        if request.method not in (b"GET", b"HEAD"):
            raise MethodNotAllowedError("allowed: GET, HEAD", None, {"Allow": "GET, HEAD"})
        return await handler(self._admin_port, request)
