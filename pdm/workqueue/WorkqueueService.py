"""The REST service: the Twisted site that serves the table of endpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from klein import Klein
from twisted.logger import Logger
from twisted.web.resource import Resource

from pdm.workqueue.certificates.tls_server import PeerIdentity, peer_identity
from pdm.workqueue.http.access import AccessList, Authenticator
from pdm.workqueue.http.app import ApiResource, PageRoute, build_klein_app
from pdm.workqueue.http.connections import ConnectionLimits, raise_file_limit
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.endpoints import ENDPOINTS, ROOT
from pdm.workqueue.http.fts.resource import FTS_ERRORS, FtsApi, FtsResource
from pdm.workqueue.http.problems import PROBLEM_FORMAT, ErrorFormat, NotAuthenticatedError
from pdm.workqueue.http.request import ApiRequest, ApiSite

__all__ = ["WorkqueueService"]

_log = Logger()


def _no_pages(_context: ApiContext, _authenticator: Authenticator) -> Iterable[PageRoute]:
    return ()


class WorkqueueService:
    """Serves the REST API.

    All routes of ``/workqueue/api/v1.0`` are in `pdm.workqueue.http.endpoints`; OpenAPI and documentation are generated
    from the same table. Usage::

        service = WorkqueueService(context, AccessList.read(settings.users))
        endpoint.listen(tls.wrap(service.site(reactor)))

    Args:
        context: the parts of the service that handlers use.
        access: roles of the users.
        identify: returns the verified identity of a transport's peer; None without a certificate.
        make_pages: makes the routes of the pages for browsers.
        write_access_page: answers a browser without a valid certificate; None for a problem as programs get it.
    """

    #: Common prefix of all paths.
    ROOT = ROOT

    def __init__(
        self,
        context: ApiContext,
        access: AccessList,
        identify: Callable[[Any], PeerIdentity | None] = peer_identity,
        make_pages: Callable[[ApiContext, Authenticator], Iterable[PageRoute]] = _no_pages,
        write_access_page: Callable[[ApiRequest, NotAuthenticatedError], None] | None = None,
    ) -> None:
        self._write_access_page = write_access_page
        self._context = context
        binds = context.settings.tls.signing_policy != "off"
        authenticator = Authenticator(context.database, access, identify, context.clock, binds)
        self._fts = FtsApi(api=context, authenticator=authenticator)
        #: The Klein application.
        self.app: Klein = build_klein_app(ENDPOINTS, ROOT, context, authenticator, make_pages(context, authenticator))

    def resource(self) -> ApiResource:
        """The root resource; it serves only requests of `site`."""
        return ApiResource(self.app)

    def site(self, reactor: Any) -> ApiSite:
        """The site to listen with: limits bodies and connections, logs requests."""
        return self._site(reactor, self.resource(), self._write_access_page)

    def fts_site(self, reactor: Any) -> ApiSite:
        """The site for clients of FTS3, with the same limits."""
        return self._site(reactor, FtsResource(self._fts), None, FTS_ERRORS)

    def _site(
        self,
        reactor: Any,
        resource: Resource,
        write_access_page: Callable[[ApiRequest, NotAuthenticatedError], None] | None,
        error_format: ErrorFormat = PROBLEM_FORMAT,
    ) -> ApiSite:
        settings = self._context.settings
        server = settings.server
        most = raise_file_limit(server.connections)
        if most < server.connections:
            _log.warn(
                "this process can have {most} connections, not {wanted}: raise its limit of open files (LimitNOFILE)",
                most=most,
                wanted=server.connections,
            )
        return ApiSite(
            resource,
            reactor,
            body_limit_bytes=server.body_limit_bytes,
            idle_timeout_s=server.idle_timeout_s,
            limits=ConnectionLimits(
                request_s=server.request_timeout_s,
                most=most,
                most_of_address=server.connections_per_address,
                new_per_s=server.new_connections,
                most_anonymous=server.anonymous_connections,
            ),
            log_reads=settings.logs.level == "debug",
            write_access_page=write_access_page,
            error_format=error_format,
        )
