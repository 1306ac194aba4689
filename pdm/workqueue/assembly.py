"""Builds the parts of the service out of its settings, joins them, and puts them in the order of start and stop.

Nothing else constructs a collaborator: who wants to know how the service hangs together reads this.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from twisted.internet.defer import maybeDeferred
from twisted.internet.error import CannotListenError
from twisted.internet.threads import deferToThread
from twisted.logger import Logger

import pdm
from pdm.workqueue.agents.pool import AgentKind, AgentPool
from pdm.workqueue.agents.process import AgentCommand
from pdm.workqueue.certificates.credential_files import CredentialFiles, CredentialFilesError
from pdm.workqueue.certificates.myproxy import MyProxyLogons
from pdm.workqueue.certificates.pem_files import CertificateFilesError
from pdm.workqueue.certificates.server_tls import ServerTls
from pdm.workqueue.certificates.site_trust import TrustFolders
from pdm.workqueue.certificates.vault import Vault, VaultError
from pdm.workqueue.config.ini import ConfigError
from pdm.workqueue.config.settings import Settings
from pdm.workqueue.domain.breaker import BreakerPolicy
from pdm.workqueue.domain.credentials import Need
from pdm.workqueue.domain.enums import JobProtocol, JobType
from pdm.workqueue.domain.retry import RetryPolicy
from pdm.workqueue.execution.attempt import AttemptTools
from pdm.workqueue.execution.catalogue import Catalogue
from pdm.workqueue.execution.checking import SiteCheck
from pdm.workqueue.execution.claimer import Claimer
from pdm.workqueue.execution.credentials import Credentials
from pdm.workqueue.execution.executor import ExecutionLimits, Executor
from pdm.workqueue.execution.health import SiteHealth
from pdm.workqueue.execution.housekeeping import Housekeeping
from pdm.workqueue.execution.preparing import Preparation
from pdm.workqueue.execution.progress import ProgressBoard
from pdm.workqueue.execution.settler import Settler
from pdm.workqueue.execution.streams import StreamLimits, Streams
from pdm.workqueue.http.access import AccessList
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.instance_lock import InstanceLockedError, lock_instance
from pdm.workqueue.logstore.files import LogStore
from pdm.workqueue.movers import MOVERS
from pdm.workqueue.movers.mover import Access, need_of
from pdm.workqueue.services import OrderedServices
from pdm.workqueue.sites.registry import SiteRegistry
from pdm.workqueue.store.database import Database, DatabaseUnusableError
from pdm.workqueue.telemetry.background import Periodic, start_background
from pdm.workqueue.telemetry.reactor_lag import ReactorLag
from pdm.workqueue.wire.agent_messages import Limits
from pdm.workqueue.WorkqueueService import WorkqueueService

_T = TypeVar("_T")

_BACKLOG = 1024
#: A site that is back is found within so many seconds, however long it was away.
_LONGEST_SITE_PAUSE_S = 120.0
#: What `start` steps raise when the operator can mend it; each has a text of one line.
EXPECTED = (
    ConfigError,
    CertificateFilesError,
    CredentialFilesError,
    VaultError,
    InstanceLockedError,
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
        worker = worker_name(settings.state.folder)
        self.sites = SiteRegistry.read(settings.sites.folder)
        self.tls = server_tls(settings)
        self.database = Database.open(settings.database.url, reactor, threads=settings.database.threads)
        self.logs = LogStore(reactor, settings.logs.folder, settings.logs.head_bytes, settings.logs.tail_bytes)
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
        self.catalogue = Catalogue(reactor, self.database, self.sites, health, self._wake)
        trust = TrustFolders(settings.state.folder / "trust")
        settler = Settler(reactor, self.database, worker, utc_now, self._settled)
        self.pool = AgentPool(
            reactor,
            reactor,
            self._command_for,
            most=agents.max_agents + agents.list_agents,
            kept_free=agents.list_agents,
            spare=agents.idle_agents,
            idle_s=agents.idle_s,
            unused=credentials.released,
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
            utc_now,
        )
        limits = Limits(queue.stall_s, queue.total_s, float(queue.least_rate_bytes))
        access = Access(
            trust_dir=settings.credentials.trust_dir,
            ssh_key=settings.ssh.key,
            ssh_known_hosts=settings.ssh.known_hosts,
            ssh_user=settings.ssh.user,
        )
        tools = AttemptTools(
            reactor,
            utc_now,
            socket.gethostname(),
            RetryPolicy(queue.first_pause_s, queue.longest_pause_s),
            self.logs,
            self.board,
            settler,
            agents.cancel_grace_s,
            health,
        )
        preparation = Preparation(
            self.sites, self.pool, credentials, tools, limits, access, trust=partial(in_thread, trust.folder_for)
        )
        self.executor = Executor(
            self.database,
            self.sites,
            self.pool,
            credentials,
            worker,
            tools,
            ExecutionLimits(agents.max_agents, agents.list_agents, queue.batch_elements),
            self.streams,
            preparation,
            self._room,
            restricted=self.catalogue.restricted,
        )
        self.claimer = Claimer(
            reactor,
            self.database,
            self.executor,
            worker,
            utc_now,
            queue.batch_elements,
            queue.batch_bytes,
            queue.poll_interval_s,
            queue.lease_s,
            settings.users.weights,
        )
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
                MyProxyLogons(reactor, settings.credentials.trust_dir, trust=partial(in_thread, trust.folder_for)),
                self.catalogue,
                SiteCheck(preparation, self.pool).check,
                _relays_to,
                self.executor.credentials_changed,
                self.executor.steer_on,
                self.executor.resume,
                self.executor.full,
            ),
            AccessList.read(settings.users),
        )
        tls_refresher = Periodic(reactor, "tls files", settings.tls.crl_refresh_s, self._refresh_tls)

        self.lag = ReactorLag(reactor)
        housekeeping = Housekeeping(reactor, self.database, utc_now)

        services.add("instance lock", self._lock, _nothing)
        services.add("database", self.database.start, self.database.stop)
        services.add("credential files", lambda: _swept(files), lambda: _swept(files))
        services.add("folders of authorities", partial(in_thread, trust.sweep), _nothing)
        services.add("sites", self.catalogue.start, self.catalogue.stop)
        services.add("attempt logs", self.logs.start, self.logs.stop)
        services.add("agents", self.pool.start, self.pool.stop)
        services.add("settler", _nothing, settler.drained)
        services.add("executor", self.executor.start, self.executor.stop)
        services.add("claimer", self.claimer.start, self.claimer.stop)
        services.add("tls refresh", tls_refresher.start, tls_refresher.stop)
        services.add("housekeeping", housekeeping.start, housekeeping.stop)
        # It begins when all is ready: what the start itself takes holds up nobody.
        services.add("reactor lag", _nothing, self.lag.stop)
        services.add("listener", self._listen, self._close)

    # -- steps

    async def _lock(self) -> None:
        self._lock_fd = await in_thread(lock_instance, self._settings.state.folder)

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
        self.claimer.wake_for_room()

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

    def _command_for(self, kind: AgentKind) -> AgentCommand:
        agents = self._settings.agents
        environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONPATH": _PACKAGE_PARENT, **kind.environment}
        if agents.library_path:
            environment["LD_LIBRARY_PATH"] = agents.library_path
        python = str(agents.python)
        return AgentCommand(
            kind.helper.rpartition(".")[2], [python, "-m", kind.helper], environment, lock_fd=self._lock_fd
        )


async def in_thread(function: Callable[..., _T], /, *arguments: Any) -> _T:
    """The result of a function that runs off the reactor."""
    result: _T = await deferToThread(function, *arguments)
    return result


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


def server_tls(settings: Settings) -> ServerTls:
    """TLS of the listener, from the files that the settings name.

    Raises:
        ConfigError: a file is missing or wrong.
    """
    tls = settings.tls
    try:
        return ServerTls(tls.certificate, tls.key, tls.trust, tls.crl)
    except CertificateFilesError as error:
        raise ConfigError(f"{settings.source}: [tls]: {error}") from error


def _supports(protocol: JobProtocol, type_: JobType) -> bool:
    return protocol in MOVERS and type_ in MOVERS[protocol].job_types


def _need_at(protocol: JobProtocol, access: Access) -> Need | None:
    mover = MOVERS.get(protocol)
    return None if mover is None else need_of(mover, access)


def _relays_to(protocol: JobProtocol) -> frozenset[JobProtocol]:
    mover = MOVERS.get(protocol)
    return frozenset() if mover is None else mover.relays_to


async def _swept(files: CredentialFiles) -> None:
    """Without the files that a daemon which was killed has left."""
    await in_thread(files.sweep)


def _nothing() -> None:
    """A part that needs no start, or no stop."""
