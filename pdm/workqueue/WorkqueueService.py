"""The REST service: joins the table of endpoints, the callers' identities and what handlers use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from klein import Klein
from twisted.logger import Logger

from pdm.workqueue.certificates.tls_server import PeerIdentity, peer_identity
from pdm.workqueue.http.access import AccessList, Authenticator
from pdm.workqueue.http.app import ApiResource, build_klein_app
from pdm.workqueue.http.connections import ConnectionLimits, raise_file_limit
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.endpoints import ENDPOINTS, ROOT
from pdm.workqueue.http.request import ApiSite

__all__ = ["WorkqueueService"]

_log = Logger()


class WorkqueueService:
    """The service's door for HTTP.

    Every route of ``/workqueue/api/v1.0`` stands in `pdm.workqueue.http.endpoints`; OpenAPI and documentation are made
    from the same table. How the daemon uses it::

        service = WorkqueueService(context, AccessList.read(settings.users))
        endpoint.listen(tls.wrap(service.site(reactor)))

    Args:
        context: what handlers use.
        access: who may call.
        identify: tells who is at the other end of a connection (its transport); None for nobody.
    """

    #: Path below which the API lives.
    ROOT = ROOT

    def __init__(
        self,
        context: ApiContext,
        access: AccessList,
        identify: Callable[[Any], PeerIdentity | None] = peer_identity,
    ) -> None:
        self._context = context
        binds = context.settings.tls.signing_policy != "off"
        authenticator = Authenticator(context.database, access, identify, context.clock, binds)
        #: The Klein application.
        self.app: Klein = build_klein_app(ENDPOINTS, ROOT, context, authenticator)

    def resource(self) -> ApiResource:
        """The root resource; its requests must be those of `site`."""
        return ApiResource(self.app)

    def site(self, reactor: Any) -> ApiSite:
        """The site to listen with: bounds bodies, closes silent connections, logs requests."""
        settings = self._context.settings
        server = settings.server
        most = raise_file_limit(server.connections)
        if most < server.connections:
            _log.warn(
                "this process may have {most} connections, not {wanted}: raise its limit of open files (LimitNOFILE)",
                most=most,
                wanted=server.connections,
            )
        return ApiSite(
            self.resource(),
            reactor,
            server.body_limit_bytes,
            server.idle_timeout_s,
            ConnectionLimits(
                server.request_timeout_s,
                most,
                server.connections_per_address,
                server.new_connections,
                server.anonymous_connections,
            ),
            log_reads=settings.logs.level == "debug",
        )
