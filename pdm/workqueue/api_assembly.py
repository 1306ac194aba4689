"""Second part of the composition root: the ports of the daemon, and what request handlers use of its parts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from pdm.workqueue.certificates.myproxy import MyProxyLogons
from pdm.workqueue.certificates.signatures import service_name, sign_detached
from pdm.workqueue.config.settings import Settings
from pdm.workqueue.execution.endpoint_checks import SiteCheck
from pdm.workqueue.execution.readiness import Readiness
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.metrics import ServiceMetrics
from pdm.workqueue.http.ports import AdminPort, HttpsPort
from pdm.workqueue.movers import OfferedMovers
from pdm.workqueue.telemetry.background import run_in_thread
from pdm.workqueue.web import page_routes
from pdm.workqueue.web.credentials import AccessPage
from pdm.workqueue.WorkqueueService import WorkqueueService

if TYPE_CHECKING:
    from pdm.workqueue.assembly import Assembly


def api_context(
    parts: Assembly,
    *,
    reactor: Any,
    settings: Settings,
    clock: Callable[[], datetime],
    offered: OfferedMovers,
    site_check: SiteCheck,
    trust_directory: Callable[[Path | None, Collection[str]], Awaitable[Path]],
) -> ApiContext:
    """The context of request handlers.

    ``trust_directory``: `TrustDirectories.directory_for` in a thread. All other arguments are those of the assembly.
    """
    executor = parts.executor
    return ApiContext(
        database=parts.database,
        sites=parts.sites,
        logs=parts.nodes.logs,
        vault=parts.vault,
        settings=settings,
        clock=clock,
        in_thread=run_in_thread,
        wake=parts.claimer.wake,
        reactor=reactor,
        add_element=parts.claimer.add_element,
        cancelled=executor.cancel,
        cancel_elements=executor.cancel_elements,
        progress=parts.board,
        cluster=parts.nodes.progress,
        is_node=parts.nodes.is_node,
        drain_changed=parts.nodes.nodes_changed,
        routes=parts.streams.routes,
        credential_need=offered.credential_need,
        supports=offered.supports,
        trust=lambda: parts.tls.trust,
        myproxy=MyProxyLogons(reactor, settings.credentials.trust_dir, trust=trust_directory),
        logins=parts.logins,
        site_directory=parts.site_directory,
        feed=parts.feed,
        check_site=site_check.check,
        notifications=parts.notifications,
        service_name=lambda: service_name(parts.tls.identity),
        sign=lambda payload: run_in_thread(sign_detached, parts.tls.identity, payload),
        relays_to=offered.relays_to,
        credentials_changed=executor.credentials_changed,
        job_retried=executor.changes.continue_change,
        deadline_added=parts.timed.deadlines.timer.wake,
        held=parts.job_held,
        schedules_changed=parts.timed.scheduler.timer.wake,
        resume=executor.changes.resume,
        full=lambda job, listing: [*parts.nodes.wait_reasons(), *executor.reached_limits(job, listing)],
        faults=lambda: parts.service_health.faults,
        may_claim=lambda: parts.service_health.may_claim,
    )


@frozen(kw_only=True)
class ServerParts:
    """What serves requests.

    Attributes:
        api_port: of the REST API and the pages.
        fts_port: of the REST API of FTS3.
        admin_port: of health and metrics.
    """

    api_port: HttpsPort
    fts_port: HttpsPort
    admin_port: AdminPort
    readiness: Readiness


def server_parts(parts: Assembly, *, reactor: Any, settings: Settings, clock: Callable[[], datetime]) -> ServerParts:
    """The ports of the daemon and what answers there."""
    server, fts, tls = settings.server, settings.fts, parts.tls
    api = WorkqueueService(parts.context, parts.users, make_pages=page_routes, write_access_page=AccessPage().write)
    api_port = HttpsPort(
        reactor=reactor, what="the REST API", host=server.host, port=server.port, make_site=api.site, wrap=tls.wrap
    )
    readiness = Readiness(executor=parts.executor, lease=parts.lease)
    metrics = ServiceMetrics(
        api=parts.context,
        executor=parts.executor,
        lease=parts.lease,
        lag=parts.lag,
        tls=tls,
        api_site=lambda: api_port.site,
    )
    return ServerParts(
        api_port=api_port,
        fts_port=HttpsPort(
            reactor=reactor,
            what="the REST API of FTS3",
            host=fts.host,
            port=fts.port or None,
            make_site=api.fts_site,
            wrap=tls.wrap,
        ),
        admin_port=AdminPort(
            reactor=reactor, settings=settings.admin, readiness=readiness, metrics=metrics, started_at=clock()
        ),
        readiness=readiness,
    )
