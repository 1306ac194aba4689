"""Builds the parts of the service out of its settings, joins them, and puts them in the order of start and stop.

Nothing else constructs a collaborator: who wants to know how the service hangs together reads this.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from attrs import evolve
from twisted.internet.defer import maybeDeferred
from twisted.internet.error import CannotListenError
from twisted.internet.threads import deferToThread
from twisted.logger import Logger

import pdm
from pdm.workqueue.agents.pool import AgentKind, AgentPool
from pdm.workqueue.agents.process import AgentCommand
from pdm.workqueue.certificates.files import CredentialFiles, CredentialFilesError, TrustDirectories
from pdm.workqueue.certificates.myproxy import MyProxyLogons
from pdm.workqueue.certificates.pem import CertificateFilesError
from pdm.workqueue.certificates.tls_server import ServerTls
from pdm.workqueue.certificates.vault import Vault, VaultError
from pdm.workqueue.config.reader import ConfigError
from pdm.workqueue.config.settings import DatabaseSettings, Settings
from pdm.workqueue.domain.credentials import CredentialNeed
from pdm.workqueue.domain.enums import JobProtocol, JobType
from pdm.workqueue.domain.pacing import BreakerPolicy
from pdm.workqueue.domain.retry import RetryPolicy
from pdm.workqueue.execution.attempts import AttemptContext, Settler
from pdm.workqueue.execution.batch import Ending
from pdm.workqueue.execution.claimer import Claimer
from pdm.workqueue.execution.credentials import Credentials
from pdm.workqueue.execution.endpoint_checks import EndpointProbes, SiteCheck
from pdm.workqueue.execution.endpoint_health import SiteHealth
from pdm.workqueue.execution.executor import ExecutionLimits, Executor
from pdm.workqueue.execution.lease import Lease, LeaseTakenError
from pdm.workqueue.execution.maintenance import Housekeeping
from pdm.workqueue.execution.monitoring import ProgressBoard, ServiceHealth, ServicePart, check_resources
from pdm.workqueue.execution.preparing import Preparation
from pdm.workqueue.execution.site_directory import SiteDirectory
from pdm.workqueue.execution.streams import StreamLimits, Streams
from pdm.workqueue.http.access import AccessList, LogonThrottle
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.instance_lock import InstanceLockedError, instance_mark, lock_database, lock_instance
from pdm.workqueue.logstore.attempt_log import LogRef
from pdm.workqueue.logstore.store import LogStore
from pdm.workqueue.movers import MOVERS
from pdm.workqueue.movers.mover import Access, credential_need
from pdm.workqueue.services import OrderedServices
from pdm.workqueue.sites.registry import SiteRegistry
from pdm.workqueue.store.credentials import change_key_check, key_check
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.engines import DatabaseTimeouts
from pdm.workqueue.store.errors import DatabaseUnusableError
from pdm.workqueue.store.leases import WorkerIdentity, write_probe
from pdm.workqueue.telemetry.background import Periodic, start_background
from pdm.workqueue.telemetry.clocks import ClockWatch, MonotonicUtc, ReactorLag
from pdm.workqueue.wire.agent_messages import TimeLimits
from pdm.workqueue.WorkqueueService import WorkqueueService

_T = TypeVar("_T")

_BACKLOG = 1024
#: What is kept in the database, sealed, to find a daemon that has another key.
_KEY_CHECK, _KEY_CHECK_CONTEXT = b"key of the credentials", "check of the key"
_PREREQUISITES = "pdm.workqueue.helpers.prerequisites"
#: Seconds that looking for missing programs and libraries may take.
_LONGEST_LOOK_S = 60.0
#: A site that is back is found within so many seconds, however long it was away.
_LONGEST_SITE_PAUSE_S = 120.0
#: What `start` steps raise when the operator can mend it; each has a text of one line.
EXPECTED_ERRORS = (
    ConfigError,
    CertificateFilesError,
    CredentialFilesError,
    VaultError,
    InstanceLockedError,
    LeaseTakenError,
    DatabaseUnusableError,
    CannotListenError,
    OSError,
)
#: Where the helpers' interpreter finds this package.
_PACKAGE_PARENT = str(Path(pdm.__file__).resolve().parent.parent)


class Assembly:
    """The joined parts of one daemon.

    Args:
        reactor: the real one.
        settings: checked.
        services: gets the parts, in order.
    """

    _log = Logger()

    def __init__(self, reactor: Any, settings: Settings, services: OrderedServices) -> None:
        self._reactor = reactor
        self._settings = settings
        self._lock_fd: int | None = None
        self._port: Any = None
        self.url = ""

        queue, agents = settings.queue, settings.agents
        self._database_lock_fd: int | None = None
        worker = secrets.token_hex(16)
        self.sites = SiteRegistry.read(settings.sites.folder)
        self.tls = server_tls(settings)
        self.database = Database.open(
            settings.database.url, reactor, settings.database.threads, _timeouts(settings.database)
        )
        self.logs = LogStore(reactor, settings.logs.folder, settings.logs.head_bytes, settings.logs.tail_bytes)
        self.lease = Lease(
            reactor,
            self.database,
            WorkerIdentity(
                worker_name(settings.state.folder), worker, host=f"{socket.gethostname()}, pid {os.getpid()}"
            ),
            utc_now,
            queue.lease_s,
            lambda job, token: self.logs.is_begun(LogRef(job.log_uid, token.element_id, token.attempt)),
        )
        self.vault = Vault.open(settings.credentials.key_file)
        files = CredentialFiles(settings.credentials.folder)
        credentials = Credentials(self.database, self.vault, files)
        self.board = ProgressBoard()
        patience_s = settings.sites.patience_s
        breakers = BreakerPolicy(
            first_pause_s=queue.first_pause_s,
            longest_pause_s=max(queue.first_pause_s, min(queue.longest_pause_s, _LONGEST_SITE_PAUSE_S)),
        )
        health = SiteHealth(breakers, patience_s, self._wake)
        self.catalogue = SiteDirectory(reactor, self.database, self.sites, health, self._wake)
        trust = TrustDirectories(settings.state.folder / "trust")
        settler = Settler(reactor, self.database, worker, utc_now, self._settled)
        self.pool = AgentPool(
            reactor,
            reactor,
            self._command_for,
            most=agents.max_agents + agents.list_agents,
            kept_free=agents.list_agents,
            spare=agents.idle_agents,
            idle_s=agents.idle_s,
            unused=credentials.remove_unused,
        )
        self.streams = Streams(
            StreamLimits(
                agents.max_agents,
                queue.route_limit,
                queue.route_start,
                queue.route_window_s,
                queue.site_limit_in,
                queue.site_limit_out,
                queue.user_limit,
                queue.job_limit,
            ),
            self.sites,
            MonotonicUtc(),
        )
        limits = TimeLimits(queue.stall_s, queue.total_s, float(queue.least_rate_bytes))
        access = Access(
            trust_dir=settings.credentials.trust_dir,
            ssh_key=settings.ssh.key,
            ssh_known_hosts=settings.ssh.known_hosts,
            ssh_user=settings.ssh.user,
        )
        self.service_health = ServiceHealth(
            reactor,
            utc_now,
            {
                ServicePart.DATABASE: lambda: self.database.run("is the database written", write_probe, worker),
                ServicePart.CREDENTIAL_FILES: partial(in_thread, _check_all, files.check, trust.check),
                ServicePart.HELPERS: partial(in_thread, check_resources),
                ServicePart.ATTEMPT_LOGS: partial(in_thread, self.logs.check),
            },
            self._room,
            lambda: self.logs.errors,
        )
        context = AttemptContext(
            reactor,
            utc_now,
            socket.gethostname(),
            RetryPolicy(queue.first_pause_s, queue.longest_pause_s),
            self.logs,
            self.board,
            settler,
            agents.cancel_grace_s,
            self.service_health,
            health,
        )
        preparation = Preparation(
            self.sites, self.pool, credentials, context, limits, access, trust=partial(in_thread, trust.directory_for)
        )
        self.executor = Executor(
            self.database,
            self.sites,
            self.pool,
            credentials,
            worker,
            context,
            ExecutionLimits(agents.max_agents, agents.list_agents, queue.batch_elements),
            self.streams,
            preparation,
            self._room,
            restricted=self.catalogue.restricted,
            find_missing=self._find_missing,
        )
        site_check = SiteCheck(preparation, self.pool)
        self.probes = EndpointProbes(reactor, utc_now, self.sites, health, site_check.look)
        self.claimer = Claimer(
            reactor,
            self.database,
            self.executor,
            utc_now,
            self.service_health,
            queue.batch_elements,
            queue.batch_bytes,
            queue.poll_interval_s,
            self.lease,
            settings.users.weights,
        )
        self.lease.connect(
            known=lambda: self.executor.attempts() | settler.attempts(),
            claims_over=self.claimer.claims_over,
            on_lost=partial(self.executor.end_all, Ending.LOST),
            on_cancelled=self.executor.cancel,
            on_work=self._wake,
        )
        self.lease.on_renewed.append(self.pool.hold_lease)
        logons = LogonThrottle()
        clock_watch = ClockWatch(reactor, (health.clock_was_set, self.claimer.clock_was_set, logons.clock_was_set))
        self.api = WorkqueueService(
            ApiContext(
                self.database,
                self.sites,
                self.logs,
                self.vault,
                settings,
                utc_now,
                in_thread,
                self._wake,
                self.executor.cancel,
                self.board,
                self.streams.routes,
                lambda protocol: _need_at(protocol, access),
                _supports,
                lambda: self.tls.trust,
                MyProxyLogons(reactor, settings.credentials.trust_dir, trust=partial(in_thread, trust.directory_for)),
                self.catalogue,
                site_check.check,
                _relays_to,
                self.executor.credentials_changed,
                self.executor.continue_change,
                self.executor.resume,
                self.executor.full,
                logons=logons,
                faults=lambda: self.service_health.faults,
                may_claim=lambda: self.service_health.may_claim,
            ),
            AccessList.read(settings.users),
        )
        tls_refresher = Periodic(reactor, "tls files", settings.tls.crl_refresh_s, self._refresh_tls)

        self.lag = ReactorLag(reactor)
        housekeeping = Housekeeping(reactor, self.database, utc_now)

        services.add("instance lock", self._lock, _nothing, interruptible=True)
        services.add("database", self.database.start, self.database.stop)
        services.add("lease", self.lease.start, self.lease.stop, interruptible=True)
        services.add("key of the credentials", self._check_key, _nothing)
        services.add("credential files", lambda: _swept(files), lambda: _swept(files))
        services.add("folders of authorities", partial(in_thread, trust.sweep), _nothing)
        services.add("sites", self.catalogue.start, self.catalogue.stop)
        services.add("attempt logs", self.logs.start, self.logs.stop)
        # Stopped when the helpers that look have ended.
        services.add("probes of endpoints", self.probes.start, self.probes.stop)
        services.add("agents", self.pool.start, self.pool.stop)
        services.add("condition", self.service_health.start, self.service_health.stop)
        services.add("settler", _nothing, settler.drained)
        services.add("executor", self.executor.start, self.executor.stop)
        services.add("claimer", self.claimer.start, self.claimer.stop)
        services.add("clock", clock_watch.start, clock_watch.stop)
        services.add("tls refresh", tls_refresher.start, tls_refresher.stop)
        services.add("housekeeping", housekeeping.start, housekeeping.stop)
        # It begins when all is ready: what the start itself takes holds up nobody.
        services.add("reactor lag", _nothing, self.lag.stop)
        services.add("listener", self._listen, self._close)

    # -- steps

    async def _lock(self) -> None:
        self._lock_fd = await in_thread(lock_instance, self._settings.state.folder)
        if self.database.file is not None:
            self._database_lock_fd = await in_thread(lock_database, self.database.file)
        self.lease.worker = evolve(self.lease.worker, instance=instance_mark(self._lock_fd))

    async def _check_key(self) -> None:
        sealed = self.vault.seal(_KEY_CHECK, _KEY_CHECK_CONTEXT)
        present, may_change = await self.database.run("check the key", key_check, sealed, self.lease.worker.incarnation)
        try:
            self.vault.unseal(present, _KEY_CHECK_CONTEXT)
        except VaultError as error:
            if not may_change:
                raise VaultError(
                    f"the key file {self.vault.path} does not open the credentials in this database, which another "
                    "key has sealed: restore that key file, or copy it from the daemon that shares the database"
                ) from error
            self._log.warn("the key of the credentials was changed while none was stored")
            await self.database.run("change the key", change_key_check, sealed)

    def give_up(self) -> None:
        """The stop takes too long: have the database fail what waits for it."""
        self._log.error("the database does not take what is left; it is given up")
        self.database.give_up()

    def _listen(self) -> None:
        server = self._settings.server
        factory = self.tls.wrap(self.api.site(self._reactor))
        self._port = self._reactor.listenTCP(server.port, factory, _BACKLOG, server.host)
        address: Any = self._port.getHost()
        host = f"[{address.host}]" if ":" in address.host else address.host
        self.url = f"https://{host}:{address.port}"

    async def _close(self) -> None:
        if self._port is not None:
            await maybeDeferred(self._port.stopListening)

    # -- what parts call

    def _wake(self) -> None:
        self.claimer.wake()

    def _room(self) -> None:
        self.claimer.capacity_freed()

    def _settled(self, residue: bool) -> None:
        self.claimer.wake()
        if residue:
            self.executor.clean_up_soon()

    async def _refresh_tls(self) -> None:
        await self.tls.refresh_if_changed(in_thread)

    def reload(self) -> None:
        """Read sites and TLS files again; what is wrong is logged, and what was in force stays."""
        self.sites.reload()
        self.catalogue.health.take_sites(self.sites.all())
        start_background("tls files", self._refresh_tls())

    async def _find_missing(self) -> Mapping[str, str]:
        return await in_thread(missing_software, self._command_for(AgentKind(_PREREQUISITES, "", {})))

    def _command_for(self, kind: AgentKind) -> AgentCommand:
        agents = self._settings.agents
        environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONPATH": _PACKAGE_PARENT, **kind.environment}
        if agents.library_path:
            environment["LD_LIBRARY_PATH"] = agents.library_path
        python = str(agents.python)
        return AgentCommand(
            kind.helper.rpartition(".")[2],
            # The folder tells whose helper it is: of a dead daemon, `lock_instance` ends those that hang.
            [python, "-m", kind.helper, str(self._settings.state.folder)],
            environment,
            lock_fd=self._lock_fd,
        )


async def in_thread(function: Callable[..., _T], /, *arguments: Any) -> _T:
    """The result of a function that runs off the reactor."""
    result: _T = await deferToThread(function, *arguments)
    return result


def missing_software(command: AgentCommand) -> Mapping[str, str]:
    """What is missing for each protocol, by its name; blocks.

    Args:
        command: runs `pdm.workqueue.helpers.prerequisites`.

    Raises:
        OSError: no process could be made.
    """
    try:
        done = subprocess.run(
            command.arguments,
            env=dict(command.environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_LONGEST_LOOK_S,
            check=False,
        )
        if done.returncode == 0:
            found: dict[str, str] = json.loads(done.stdout)
            return found
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    except (FileNotFoundError, PermissionError) as error:
        why = f"{error.strerror}"
    except subprocess.TimeoutExpired:
        why = f"it did not end within {_LONGEST_LOOK_S:g} s"
    # Nothing can be moved without helpers.
    return dict.fromkeys(JobProtocol.__members__, f"the interpreter of the helpers, {command.arguments[0]}: {why}")


def utc_now() -> datetime:
    return datetime.now(UTC)


def worker_name(state_folder: Path) -> str:
    """The name under which this instance claims: the same after each start, and no other instance's.

    That it stays lets a daemon that was killed take back its claims at once, without waiting for its lease to end.
    """
    path = state_folder / "worker-name"
    try:
        name = path.read_text().strip()
    except FileNotFoundError:
        name = ""
    if not name:
        state_folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        name = f"{socket.gethostname()}:{secrets.token_hex(8)}"
        path.write_text(name + "\n")
    return name


def _timeouts(settings: DatabaseSettings) -> DatabaseTimeouts:
    return DatabaseTimeouts(
        settings.connect_timeout_s,
        settings.lock_timeout_s,
        settings.statement_timeout_s,
        settings.idle_timeout_s,
        settings.network_timeout_s,
    )


def server_tls(settings: Settings) -> ServerTls:
    """TLS of the listener, from the files that the settings name.

    Raises:
        ConfigError: a file is missing or wrong.
    """
    tls = settings.tls
    try:
        return ServerTls(tls.certificate, tls.key, tls.trust, tls.crl, signing=tls.signing_policy)
    except CertificateFilesError as error:
        raise ConfigError(f"{settings.source}: [tls]: {error}") from error


def _supports(protocol: JobProtocol, type_: JobType) -> bool:
    return protocol in MOVERS and type_ in MOVERS[protocol].job_types


def _need_at(protocol: JobProtocol, access: Access) -> CredentialNeed | None:
    mover = MOVERS.get(protocol)
    return None if mover is None else credential_need(mover, access)


def _relays_to(protocol: JobProtocol) -> frozenset[JobProtocol]:
    mover = MOVERS.get(protocol)
    return frozenset() if mover is None else mover.relays_to


async def _swept(files: CredentialFiles) -> None:
    """Without the files that a daemon which was killed has left."""
    await in_thread(files.sweep)


def _check_all(*checks: Callable[[], None]) -> None:
    for check in checks:
        check()


def _nothing() -> None:
    """A part that needs no start, or no stop."""
