"""Composition root: build the parts of the service from its settings, connect them, and order their start and stop.

No other module constructs them, except its further parts: `api_assembly`, `node_assembly`, `timed_assembly`, and
`policies` for webhooks and mail. Tests build this assembly too, and replace some of its edges.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from functools import partial
from typing import Any

from attrs import evolve
from twisted.internet.error import CannotListenError
from twisted.logger import Logger

from pdm.workqueue.agents.pool import AgentKind, AgentPool
from pdm.workqueue.agents.process import AgentCommand
from pdm.workqueue.api_assembly import api_context, server_parts
from pdm.workqueue.certificates.files import CredentialFiles, CredentialFilesError, TrustDirectories
from pdm.workqueue.certificates.pem import CertificateFilesError
from pdm.workqueue.certificates.vault import Vault, VaultError
from pdm.workqueue.config.reader import ConfigError
from pdm.workqueue.config.settings import Settings
from pdm.workqueue.domain.credentials import CredentialKind
from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.filters import load_pattern_libraries
from pdm.workqueue.domain.jobs import ClaimToken, JobRecord
from pdm.workqueue.execution.attempts import AttemptContext, Settler
from pdm.workqueue.execution.claimer import Claimer
from pdm.workqueue.execution.credentials import Credentials
from pdm.workqueue.execution.endpoint_checks import EndpointProbes, SiteCheck
from pdm.workqueue.execution.endpoint_health import SiteHealth
from pdm.workqueue.execution.event_feed import EventFeed
from pdm.workqueue.execution.executor import Executor
from pdm.workqueue.execution.giving_back import GivingBack
from pdm.workqueue.execution.lease import ClockWrongError, Lease, LeaseTakenError
from pdm.workqueue.execution.maintenance import missing_software
from pdm.workqueue.execution.preparing import Preparation
from pdm.workqueue.execution.progress_board import ProgressBoard
from pdm.workqueue.execution.service_health import ServiceHealth, ServicePart, check_resources
from pdm.workqueue.execution.signals import SignalListener
from pdm.workqueue.execution.site_directory import SiteDirectory
from pdm.workqueue.execution.streams import Streams
from pdm.workqueue.execution.transfer_services import SERVICES_AT_ONCE, TransferServices
from pdm.workqueue.http.access import AccessList
from pdm.workqueue.http.endpoints.schedules import planned_run
from pdm.workqueue.http.receipts import whole_receipt
from pdm.workqueue.http.waiting import progress_event
from pdm.workqueue.instance_lock import InstanceLockedError, instance_mark, lock_database, lock_instance, worker_name
from pdm.workqueue.logstore.attempt_log import LogRef
from pdm.workqueue.logstore.store import LogStore
from pdm.workqueue.movers import MOVERS, OfferedMovers
from pdm.workqueue.movers.mover import Mover
from pdm.workqueue.node_assembly import connect_lease, node_parts, node_shares, sick_node, subscribe, worker_identity
from pdm.workqueue.policies import (
    breaker_policy,
    database_timeouts,
    execution_limits,
    helper_access,
    helper_command,
    notifications,
    oidc_logins,
    retry_policy,
    server_tls,
    service_limits,
    stream_limits,
    time_limits,
)
from pdm.workqueue.services import OrderedServices
from pdm.workqueue.sites.registry import SiteRegistry
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.errors import DatabaseUnusableError
from pdm.workqueue.telemetry.background import Periodic, run_in_thread, start_background
from pdm.workqueue.telemetry.clocks import ClockWatch, MonotonicUtc, ReactorLag, utc_now
from pdm.workqueue.timed_assembly import timed_parts

PREREQUISITES = "pdm.workqueue.helpers.prerequisites"
#: What `start` steps raise when the operator can correct it; each has a text of one line.
EXPECTED_ERRORS = (
    ConfigError,
    CertificateFilesError,
    CredentialFilesError,
    VaultError,
    InstanceLockedError,
    LeaseTakenError,
    ClockWrongError,
    DatabaseUnusableError,
    CannotListenError,
    OSError,
)


class Assembly:
    """The connected parts of one daemon.

    Args:
        services: gets the parts, in the order of their start.
        monotonic: seconds, by which rates of transfers are measured.
        movers: what jobs and sites may use.
        find_missing: finds what software is missing, with the command of a helper; in a thread.
    """

    _log = Logger()

    def __init__(
        self,
        *,
        reactor: Any,
        settings: Settings,
        services: OrderedServices,
        clock: Callable[[], datetime] = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
        movers: Mapping[JobProtocol, Mover] = MOVERS,
        make_pool: Callable[..., AgentPool] = AgentPool,
        make_claimer: Callable[..., Claimer] = Claimer,
        make_site_check: Callable[..., SiteCheck] = SiteCheck,
        find_missing: Callable[[AgentCommand], Mapping[str, str]] = missing_software,
    ) -> None:
        self._reactor = reactor
        self._settings = settings
        self._missing_software = find_missing
        self._lock_fd: int | None = None
        queue, agents = settings.queue, settings.agents
        incarnation = secrets.token_hex(16)

        self.sites = SiteRegistry.read(settings.sites.folder)
        self.tls = server_tls(settings)
        self.database = Database.open(
            settings.database.url,
            reactor,
            threads=settings.database.threads,
            timeouts=database_timeouts(settings),
        )
        self.database.probed_worker = incarnation
        self.signals = SignalListener(reactor=reactor, database=self.database, by=incarnation)
        name = worker_name(settings.state.folder)
        self.logs = LogStore(
            reactor,
            settings.logs.folder,
            head_bytes=settings.logs.head_bytes,
            tail_bytes=settings.logs.tail_bytes,
            worker=name if self.database.is_shared else None,
        )
        self.lease = Lease(
            reactor=reactor,
            database=self.database,
            worker=worker_identity(settings, name, incarnation),
            clock=clock,
            lease_s=queue.lease_s,
            begun=self._begun,
        )
        self.vault = Vault.open(settings.credentials.key_file)
        self._credential_files = CredentialFiles(settings.credentials.folder)
        credentials = Credentials(database=self.database, vault=self.vault, files=self._credential_files)
        self._check_key = partial(credentials.check_key, incarnation)
        self._trust_directories = TrustDirectories(settings.state.folder / "trust")
        trust_directory = partial(run_in_thread, self._trust_directories.directory_for)
        self.board = ProgressBoard(clock=monotonic)
        health = SiteHealth(policy=breaker_policy(settings), patience_s=settings.sites.patience_s, on_change=self._wake)
        self.site_directory = SiteDirectory(
            reactor=reactor, database=self.database, sites=self.sites, health=health, on_change=self._wake
        )
        self.settler = Settler(
            reactor=reactor,
            database=self.database,
            worker=incarnation,
            clock=clock,
            on_settled=self._settled,
        )
        self.pool = make_pool(
            spawner=reactor,
            timer=reactor,
            command_for=self._command_for,
            most=agents.max_agents + agents.list_agents,
            kept_free=agents.list_agents,
            # Those that wait for an FTS3 keep no place from the others.
            spare=agents.idle_agents + SERVICES_AT_ONCE * settings.fts.jobs,
            idle_s=agents.idle_s,
            unused=credentials.remove_unused,
        )
        self.nodes = node_parts(self, reactor=reactor, settings=settings, clock=clock)
        running = self.nodes.progress.running
        self.feed = EventFeed(reactor=reactor, database=self.database, clock=clock, running=running)
        health.on_state = self.feed.site_changed
        self.streams = Streams(limits=stream_limits(settings), sites=self.sites, clock=MonotonicUtc())
        access = helper_access(settings)
        offered = OfferedMovers(movers, access)
        self.service_health = ServiceHealth(
            reactor=reactor,
            clock=clock,
            database=self.database,
            checks={
                ServicePart.CREDENTIAL_FILES: partial(run_in_thread, self._check_credential_files),
                ServicePart.HELPERS: partial(run_in_thread, check_resources),
                ServicePart.ATTEMPT_LOGS: partial(run_in_thread, self.logs.check),
            },
            on_change=self._work_added,
        )
        self.logs.on_fault = partial(self.service_health.report, ServicePart.ATTEMPT_LOGS)
        context = AttemptContext(
            reactor=reactor,
            clock=clock,
            host=socket.gethostname(),
            policy=retry_policy(settings),
            logs=self.logs,
            board=self.board,
            settler=self.settler,
            cancel_grace_s=agents.cancel_grace_s,
            service_health=self.service_health,
            health=health,
        )
        fts = TransferServices(
            sites=self.sites,
            limits=service_limits(settings),
            policy=breaker_policy(settings),
            clock=clock,
            on_change=self._wake,
        )
        self.site_directory.other_waits = fts.waits
        preparation = Preparation(
            sites=self.sites,
            pool=self.pool,
            credentials=credentials,
            context=context,
            element=time_limits(settings),
            access=access,
            services=fts,
            trust=trust_directory,
        )
        self.executor = Executor(
            database=self.database,
            sites=self.sites,
            pool=self.pool,
            credentials=credentials,
            worker=incarnation,
            context=context,
            limits=execution_limits(settings),
            streams=self.streams,
            preparation=preparation,
            on_capacity=self._capacity_freed,
            on_work=self._work_added,
            add_element=self._add_element,
            scratch=settings.state.folder,
            restricted=self.site_directory.restricted,
            find_missing=self._find_missing,
        )
        site_check = make_site_check(preparation=preparation, pool=self.pool)
        self.probes = EndpointProbes(
            reactor=reactor, clock=clock, sites=self.sites, health=health, check=site_check.check_endpoint
        )
        self.claimer = make_claimer(
            reactor=reactor,
            database=self.database,
            executor=self.executor,
            clock=clock,
            service_health=self.service_health,
            batch_elements=queue.batch_elements,
            batch_bytes=queue.batch_bytes,
            poll_s=queue.poll_interval_s,
            lease=self.lease,
            weights=settings.users.weights,
            is_drained=lambda: self.nodes.drain.is_ordered,
        )
        self.shares = node_shares(self, reactor=reactor, clock=clock)
        self.sick_node = sick_node(self, reactor=reactor)
        self.giving_back = GivingBack(reactor=reactor, executor=self.executor, claimer=self.claimer)
        connect_lease(self)
        self.timed = timed_parts(
            reactor=reactor,
            settings=settings,
            database=self.database,
            clock=clock,
            preparation=preparation,
            incarnation=incarnation,
            planned_run=lambda schedule, owner: planned_run(self.context, schedule, owner, self.users),
            on_cancelled=self.executor.cancel,
            on_work=self._work_added,
            receipt_of=lambda job_id: whole_receipt(self.context, job_id),
        )
        self.notifications = notifications(
            reactor=reactor,
            settings=settings,
            database=self.database,
            clock=clock,
            vault=self.vault,
            incarnation=incarnation,
            file_sites=lambda: [site.id for site in self.sites.all() if self.sites.is_of_file(site.id)],
        )
        self.feed.on_written = self.notifications.events_written
        self.logins = oidc_logins(
            reactor=reactor,
            settings=settings,
            database=self.database,
            clock=clock,
            vault=self.vault,
            sites=self.sites,
            incarnation=incarnation,
            protocols=lambda: self.context.protocols_with(CredentialKind.TOKEN),
            on_token=self.executor.token_stored,
        )
        load_pattern_libraries()
        self.users = AccessList.read(settings.users)
        self.context = api_context(
            self,
            reactor=reactor,
            settings=settings,
            clock=clock,
            offered=offered,
            site_check=site_check,
            trust_directory=trust_directory,
        )
        self.feed.progress_of = partial(progress_event, self.context)
        self.lag = ReactorLag(reactor)
        self.server = server_parts(self, reactor=reactor, settings=settings, clock=clock)
        self._clock_watch = ClockWatch(
            reactor,
            listeners=(
                health.clock_was_set,
                self.claimer.clock_was_set,
                self.timed.clock_was_set,
            ),
        )
        self._tls_refresher = Periodic(reactor, "tls files", settings.tls.crl_refresh_s, self._refresh_tls)
        subscribe(self.signals, self)
        self._add_to(services)

    def _add_to(self, services: OrderedServices) -> None:
        """Add the parts in the order of their start; they stop in reverse."""
        sweep = partial(run_in_thread, self._credential_files.sweep)
        services.add("instance lock", start=self._lock, interruptible=True)
        # Answers while the others start and stop: it says so.
        services.add("admin port", start=self.server.admin_port.start, stop=self.server.admin_port.stop)
        open_database = partial(self.database.start, self._settings.database.start_timeout_s)
        services.add("database", start=open_database, stop=self.database.stop, interruptible=True)
        # Before all that acts on the signals of other nodes: none is missed.
        services.add("signals", start=self.signals.start, stop=self.signals.stop)
        services.add("lease", start=self.lease.start, stop=self.lease.stop, interruptible=True)
        services.add("key of the credentials", start=self._check_key)
        # Removes files that a killed daemon has left.
        services.add("credential files", start=sweep, stop=sweep)
        services.add("trust directories", start=partial(run_in_thread, self._trust_directories.sweep))
        services.add("sites", start=self.site_directory.start, stop=self.site_directory.stop)
        services.add("attempt logs", start=self.logs.start, stop=self.logs.stop)
        # Before the agents, so that it stops after the helpers that check endpoints have ended.
        services.add("endpoint probes", start=self.probes.start, stop=self.probes.stop)
        services.add("agents", start=self.pool.start, stop=self.pool.stop)
        services.add("service health", start=self.service_health.start, stop=self.service_health.stop)
        services.add("settler", stop=self.settler.drained)
        services.add("executor", start=self.executor.start, stop=self.executor.stop)
        self.timed.add_to(services)
        services.add("peers", stop=self.nodes.peers.stop)
        services.add("drain", start=self.nodes.drain.start, stop=self.nodes.drain.stop)
        services.add("shares of limits", start=self.shares.start, stop=self.shares.stop)
        services.add("sick node", start=self.sick_node.start, stop=self.sick_node.stop)
        services.add("giving back", start=self.giving_back.start, stop=self.giving_back.stop)
        services.add("claimer", start=self.claimer.start, stop=self.claimer.stop)
        services.add("clock", start=self._clock_watch.start, stop=self._clock_watch.stop)
        services.add("tls refresh", start=self._tls_refresher.start, stop=self._tls_refresher.stop)
        services.add("retention", start=self.timed.retention.start, stop=self.timed.retention.stop)
        # The daemon starts it when all is ready: the duration of the start is no latency.
        services.add("reactor lag", stop=self.lag.stop)
        services.add("events", start=self.feed.start, stop=self.feed.stop)
        services.add("logins", start=self.logins.start, stop=self.logins.stop)
        services.add("notifications", start=self.notifications.start, stop=self.notifications.stop)
        services.add("FTS door", start=self.server.fts_port.start, stop=self.server.fts_port.stop)
        services.add("listener", start=self.server.api_port.start, stop=self.server.api_port.stop)
        services.add("readiness", start=self.server.readiness.started, stop=self.server.readiness.stop)

    # -- start and stop

    async def _lock(self) -> None:
        # Both descriptors stay open, and so locked, until the process ends.
        self._lock_fd = await run_in_thread(lock_instance, self._settings.state.folder)
        if self.database.file is not None:
            await run_in_thread(lock_database, self.database.file)
        self.lease.worker = evolve(self.lease.worker, instance=instance_mark(self._lock_fd))

    def give_up(self) -> None:
        """Fail all that waits for the database: the stop takes too long."""
        self._log.error("results cannot be written to the database; the stop does not wait for it any longer")
        self.database.give_up()

    # -- callbacks of the parts

    def _begun(self, job: JobRecord, tokens: Collection[ClaimToken]) -> Collection[ClaimToken]:
        by_ref = {LogRef(job.log_uid, token.element_id, token.attempt): token for token in tokens}
        return [by_ref[ref] for ref in self.logs.begun(by_ref)]

    def _wake(self) -> None:
        self.claimer.wake()

    def job_held(self, job: JobRecord) -> None:
        """A request to this daemon has held a job."""
        self.executor.held(job.id)
        if job.hold is not None and job.hold.until is not None:
            self.timed.hold_ends.timer.wake()

    def _capacity_freed(self) -> None:
        self.claimer.capacity_freed()

    async def _add_element(self, *args: Any, **kwargs: Any) -> Any:
        return await self.claimer.add_element(*args, **kwargs)

    def _work_added(self) -> None:
        self.claimer.work_added()

    def _settled(self, has_leftovers: bool, has_waiting: bool) -> None:
        self.claimer.settled(has_waiting=has_waiting)
        if has_leftovers:
            self.executor.clean_up_soon()

    def _check_credential_files(self) -> None:
        self._credential_files.check()
        self._trust_directories.check()

    async def _refresh_tls(self) -> None:
        await self.tls.refresh_if_changed(run_in_thread)
        await self.nodes.tls.refresh_if_changed(run_in_thread)

    def reload(self) -> None:
        """Read sites and TLS files again; errors are logged, and what was in force stays in force."""
        self.sites.reload()
        self.site_directory.health.take_sites(self.sites.all())
        start_background("tls files", self._refresh_tls())

    async def _find_missing(self) -> Mapping[str, str]:
        return await run_in_thread(self._missing_software, self._command_for(AgentKind(PREREQUISITES, "", {})))

    def _command_for(self, kind: AgentKind) -> AgentCommand:
        return helper_command(self._settings, kind, self._lock_fd)
