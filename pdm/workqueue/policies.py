"""Convert settings into the limits, policies and TLS of the parts that they configure, and into notifications."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Coroutine
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.web.iweb import IPolicyForHTTPS

import pdm
from pdm.workqueue import __version__
from pdm.workqueue.agents.pool import AgentKind
from pdm.workqueue.agents.process import AgentCommand
from pdm.workqueue.certificates.pem import CertificateFilesError
from pdm.workqueue.certificates.tls_client import ClientCredentialError, client_policy
from pdm.workqueue.certificates.tls_server import ServerTls
from pdm.workqueue.certificates.vault import Vault
from pdm.workqueue.config.reader import ConfigError
from pdm.workqueue.config.settings import Settings
from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.lifecycle import RetryPolicy
from pdm.workqueue.domain.notifications import DeliveryPolicy, check_address
from pdm.workqueue.domain.pacing import BreakerPolicy
from pdm.workqueue.domain.retention import RetentionPolicy
from pdm.workqueue.execution.checked_connections import AddressPolicy
from pdm.workqueue.execution.executor import ExecutionLimits
from pdm.workqueue.execution.issuers import Issuers
from pdm.workqueue.execution.login_secrets import LoginSecrets
from pdm.workqueue.execution.mail import MailSender, Smarthost
from pdm.workqueue.execution.notifications import Notifications
from pdm.workqueue.execution.oidc_logins import OidcLogins
from pdm.workqueue.execution.receivers import Receivers
from pdm.workqueue.execution.streams import StreamLimits
from pdm.workqueue.execution.transfer_services import ServiceLimits
from pdm.workqueue.execution.webhooks import WebhookSender
from pdm.workqueue.movers.mover import Access
from pdm.workqueue.sites.registry import SiteRegistry
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.engines import DatabaseTimeouts
from pdm.workqueue.store.held_elements import Resumed
from pdm.workqueue.wire.agent_requests import TimeLimits

#: Where the helpers' interpreter finds this package.
_PACKAGE_PARENT = str(Path(pdm.__file__).resolve().parent.parent)
#: Upper bound of a breaker's pause: a site that is back is found within so many seconds, however long it was away.
_MAX_BREAKER_PAUSE_S = 120.0


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


def database_timeouts(settings: Settings) -> DatabaseTimeouts:
    """How long PostgreSQL may take."""
    database = settings.database
    return DatabaseTimeouts(
        connect_s=database.connect_timeout_s,
        lock_s=database.lock_timeout_s,
        statement_s=database.statement_timeout_s,
        idle_in_transaction_s=database.idle_timeout_s,
        network_s=database.network_timeout_s,
        # Two thirds of a lease are left when its renewal begins, and a transaction that hangs is cut off after two of
        # these: then there is time for one with a new connection.
        renewal_s=settings.queue.lease_s / 6,
    )


def retry_policy(settings: Settings) -> RetryPolicy:
    """Pauses between the tries of an element."""
    return RetryPolicy(first_pause_s=settings.queue.first_pause_s, longest_pause_s=settings.queue.longest_pause_s)


def breaker_policy(settings: Settings) -> BreakerPolicy:
    """Pauses of an endpoint that cannot be reached."""
    queue = settings.queue
    longest_s = max(queue.first_pause_s, min(queue.longest_pause_s, _MAX_BREAKER_PAUSE_S))
    return BreakerPolicy(first_pause_s=queue.first_pause_s, longest_pause_s=longest_s)


def execution_limits(settings: Settings) -> ExecutionLimits:
    """Batches and listings at once."""
    return ExecutionLimits(
        batches=settings.agents.max_agents,
        listings=settings.agents.list_agents,
        batch_elements=settings.queue.batch_elements,
    )


def stream_limits(settings: Settings) -> StreamLimits:
    """Streams of routes, sites, users and jobs."""
    queue = settings.queue
    return StreamLimits(
        total=settings.agents.max_agents,
        route=queue.route_limit,
        route_start=queue.route_start,
        window_s=queue.route_window_s,
        site_in=queue.site_limit_in,
        site_out=queue.site_limit_out,
        user=queue.user_limit,
        job=queue.job_limit,
    )


def service_limits(settings: Settings) -> ServiceLimits:
    """How much is handed over to FTS3 services."""
    fts = settings.fts
    return ServiceLimits(
        jobs=fts.jobs,
        files=fts.files,
        poll_s=fts.poll_s,
        patience_s=fts.patience_s,
        away_s=settings.sites.patience_s,
    )


def time_limits(settings: Settings) -> TimeLimits:
    """When a helper gives up an element."""
    queue = settings.queue
    return TimeLimits(stall_s=queue.stall_s, total_s=queue.total_s, least_rate=float(queue.least_rate_bytes))


def receiver_addresses(settings: Settings) -> AddressPolicy:
    """Addresses to which webhooks may lead."""
    webhooks = settings.webhooks
    return AddressPolicy(allowed=webhooks.allowed, refused=webhooks.refused, plain_http=webhooks.plain_http)


def receiver_tls(settings: Settings) -> IPolicyForHTTPS:
    """TLS of the requests to receivers of webhooks.

    Raises:
        ConfigError: the file of authorities is missing or wrong.
    """
    return _client_tls(settings, "webhooks", settings.webhooks.ca)


def smarthost(settings: Settings) -> Smarthost | None:
    """The server that takes mail; None if none is configured.

    Raises:
        ConfigError: the sender or the password is missing, or a file is wrong.
    """
    mail = settings.mail
    if not mail.smarthost:
        return None
    where = f"{settings.source}: [mail]"
    try:
        sender = check_address(mail.sender)
        host = mail.smarthost.encode("ascii").decode()
        password = None if mail.password_file is None else mail.password_file.read_text(encoding="ascii").strip()
    except UnicodeError as error:
        raise ConfigError(f"{where}: smarthost and password must be ASCII") from error
    except ValueError as error:
        raise ConfigError(f"{where} sender: {error}") from error
    except OSError as error:
        raise ConfigError(f"{where} password_file: {mail.password_file} cannot be read: {error.strerror}") from error
    if mail.user and not password:
        raise ConfigError(f"{where}: user needs a password_file")
    if mail.user and mail.tls == "none":
        raise ConfigError(f"{where}: user needs tls = starttls or tls, for the password is sent")
    return Smarthost(
        host=host,
        port=mail.port,
        sender=sender,
        tls=mail.tls,
        policy=_client_tls(settings, "mail", mail.ca),
        user=mail.user or None,
        password=password if mail.user else None,
    )


def _client_tls(settings: Settings, section: str, ca: Path | None) -> IPolicyForHTTPS:
    try:
        return client_policy(ca)
    except ClientCredentialError as error:
        raise ConfigError(f"{settings.source}: [{section}] ca: {error}") from error


def notifications(
    *,
    reactor: Any,
    settings: Settings,
    database: Database,
    clock: Callable[[], datetime],
    vault: Vault,
    incarnation: str,
    file_sites: Callable[[], Collection[int]],
) -> Notifications:
    """Webhooks and mail."""
    options = settings.webhooks
    receivers = Receivers(
        reactor=reactor,
        addresses=receiver_addresses(settings),
        tls=receiver_tls(settings),
        timeout_s=options.timeout_s,
        user_agent=f"pdm-workqueue/{__version__}",
    )
    sender = WebhookSender(
        reactor=reactor,
        database=database,
        clock=clock,
        vault=vault,
        receivers=receivers,
        policy=DeliveryPolicy(give_up_s=options.give_up_s, disable_s=options.disable_s),
        incarnation=incarnation,
    )
    mail = MailSender(
        reactor=reactor, database=database, clock=clock, smarthost=smarthost(settings), incarnation=incarnation
    )
    return Notifications(
        reactor=reactor, database=database, clock=clock, file_sites=file_sites, webhooks=sender, mail=mail
    )


def oidc_logins(
    *,
    reactor: Any,
    settings: Settings,
    database: Database,
    clock: Callable[[], datetime],
    vault: Vault,
    sites: SiteRegistry,
    incarnation: str,
    protocols: Callable[[], Collection[JobProtocol]],
    on_token: Callable[[int, int, Resumed], Coroutine[Deferred[Any], Any, None]],
) -> OidcLogins:
    """Logins at token issuers.

    Raises:
        ConfigError: the file of authorities is missing or wrong.
    """
    options = settings.oidc
    requests = Receivers(
        reactor=reactor,
        addresses=AddressPolicy(allowed=options.allowed),
        tls=_client_tls(settings, "oidc", options.ca),
        timeout_s=options.timeout_s,
        user_agent=f"pdm-workqueue/{__version__}",
    )
    return OidcLogins(
        reactor=reactor,
        database=database,
        clock=clock,
        secrets=LoginSecrets(vault),
        issuers=Issuers(requests=requests, vault=vault, clock=clock),
        sites=sites,
        incarnation=incarnation,
        margin_s=options.margin_s,
        protocols=protocols,
        on_token=on_token,
    )


def retention_policy(settings: Settings) -> RetentionPolicy:
    """How long what has ended is kept."""
    given = settings.retention

    def kept(seconds: float) -> timedelta | None:
        return None if math.isinf(seconds) else timedelta(seconds=seconds)

    return RetentionPolicy(
        jobs=kept(given.jobs_s),
        logs=kept(given.logs_s),
        receipts=kept(given.receipts_s),
        events=kept(given.events_s),
        audit=kept(given.audit_s),
        summaries=kept(given.summaries_s),
    )


def helper_access(settings: Settings) -> Access:
    """Files that every helper may read."""
    return Access(
        trust_dir=settings.credentials.trust_dir,
        ssh_key=settings.ssh.key,
        ssh_known_hosts=settings.ssh.known_hosts,
        ssh_user=settings.ssh.user,
    )


def helper_command(settings: Settings, kind: AgentKind, lock_fd: int | None) -> AgentCommand:
    """How to start a helper, which inherits the lock of the state directory."""
    agents = settings.agents
    environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONPATH": _PACKAGE_PARENT, **kind.environment}
    if agents.library_path:
        environment["LD_LIBRARY_PATH"] = agents.library_path
    return AgentCommand(
        kind.helper.rpartition(".")[2],
        # `lock_instance` finds the helpers of a dead daemon by the state directory on their command lines.
        [str(agents.python), "-m", kind.helper, str(settings.state.folder)],
        environment,
        lock_fd=lock_fd,
    )
