"""What an operator can set: one struct for each section of ``workqueue.conf``.

The default of every key stands here and, with a sentence, in ``etc/workqueue.conf``; a test keeps the two equal.
Attributes carry their unit in the name (``_s`` seconds, ``_bytes`` bytes); the keys of the file carry it in the
value (``30s``, ``1MiB``), so a key is the attribute without it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, field

from pdm.workqueue.config.access_settings import (
    CredentialSettings,
    IssuerSettings,
    SshSettings,
    TlsSettings,
    UserSettings,
)
from pdm.workqueue.config.values import (
    DAY_S,
    AddressRanges,
    Count,
    Duration,
    DurationOrForever,
    DurationOrZero,
    FilePath,
    NodeAddress,
    NodeName,
    OptionalDuration,
    OptionalPath,
    Port,
    Size,
    StatePath,
    StreamCount,
    Text,
    kind,
)


class ServerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where and how the REST API is served.

    Attributes:
        host: address (or name of an address) to listen on; ``0.0.0.0`` or ``::`` for all.
        port: TCP port; 0 takes a free one, the ready line says which.
        body_limit_bytes: longest request body; a longer one is answered 413.
        idle_timeout_s: a kept connection that is silent for so long is closed.
        request_timeout_s: how long a request may take to come, the handshake of a new connection included.
        connections: at once; when there are more, those that are silent for the longest make room.
        connections_per_address: at once.
        new_connections: of one address in a second, on average; 0 for no limit.
        anonymous_connections: at once without a client certificate; when there are more, the oldest make room.
    """

    host: Text = "127.0.0.1"
    port: Port = 8443
    body_limit_bytes: Size = field(default=1024**2, name="body_limit")
    idle_timeout_s: Duration = field(default=300.0, name="idle_timeout")
    request_timeout_s: Duration = field(default=60.0, name="request_timeout")
    connections: Count = 5000
    connections_per_address: Count = 2500
    new_connections: Annotated[int, Meta(ge=0, le=1_000_000)] = 100
    anonymous_connections: Count = 250


class AdminSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Health and metrics for monitoring: plain HTTP, without authentication.

    Attributes:
        host: address (or name of an address) to listen on.
        port: TCP port; 0 for none.
    """

    host: Text = "127.0.0.1"
    port: Port = 0


class FtsSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The door for clients of FTS3, and copies that are handed over to an FTS3.

    Attributes:
        host: address (or name of an address) to listen on; ``0.0.0.0`` or ``::`` for all. ``[tls]`` has the certificate
            and the authorities.
        port: TCP port; 0 for none. FTS3 has 8446.
        jobs: jobs of this daemon at one FTS3 that sites name, at once.
        files: files of such a job.
        poll_s: seconds between two requests for the states of a job, at most.
        patience_s: files whose state at the FTS3 has not changed for so long are cancelled there, and fail.
    """

    host: Text = "127.0.0.1"
    port: Port = 0
    jobs: Annotated[int, Meta(ge=1, le=1000)] = 4
    files: Annotated[int, Meta(ge=1, le=1000)] = 1000
    poll_s: Duration = field(default=15.0, name="poll")
    patience_s: Duration = field(default=DAY_S, name="patience")


class DatabaseSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where jobs are kept.

    Attributes:
        url: SQLAlchemy URL; after reading never empty (empty in the file: ``workqueue.sqlite`` in the state directory).
        threads: threads (and connections) for database work.
        connect_timeout_s: until a connection to PostgreSQL is made.
        lock_timeout_s: to wait for a row that another session of PostgreSQL holds.
        statement_timeout_s: for one statement of PostgreSQL.
        idle_timeout_s: PostgreSQL ends a session that has begun a transaction and is silent for so long.
        network_timeout_s: a connection whose other end does not acknowledge what was sent for so long is dead.
        start_timeout_s: when the service starts, how long to wait for a database that is away.
        stop_timeout_s: when the service stops, how long to wait for the database to store results.
    """

    url: str = ""
    threads: Annotated[int, Meta(ge=1, le=64)] = 4
    connect_timeout_s: Duration = field(default=5.0, name="connect_timeout")
    lock_timeout_s: Duration = field(default=10.0, name="lock_timeout")
    statement_timeout_s: Duration = field(default=60.0, name="statement_timeout")
    idle_timeout_s: Duration = field(default=10.0, name="idle_timeout")
    network_timeout_s: Duration = field(default=10.0, name="network_timeout")
    start_timeout_s: Duration = field(default=60.0, name="start_timeout")
    stop_timeout_s: Duration = field(default=20.0, name="stop_timeout")


class StateSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``folder``: what the daemon writes; database, keys and logs are below it by default."""

    folder: FilePath = Path("var")


class LogSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The daemon's own log, and the logs of attempts.

    Attributes:
        folder: logs of attempts, ``<uid[:2]>/<uid>/<element>/attempt<K>.log``.
        file: the daemon's own log; standard error without it.
        format: ``text`` for people, ``json`` for collectors: one object a line.
        level: the least level written.
        head_bytes: how much of the beginning of an attempt's log is kept.
        tail_bytes: how much of its end.
    """

    folder: StatePath = Path("logs")
    file: OptionalPath = None
    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warn", "error"] = "info"
    head_bytes: Size = field(default=1024**2, name="head")
    tail_bytes: Size = field(default=64 * 1024, name="tail")


class SiteSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where sites are described, and what happens when one cannot be reached.

    Attributes:
        folder: the files ``*.conf`` that describe sites.
        local_addresses: whether users' sites may lead to this machine and its link, as operators' sites may.
        patience_s: jobs wait for a site that cannot be reached for so long; then failures count as tries again.
    """

    folder: FilePath = Path("sites.d")
    patience_s: DurationOrZero = field(default=DAY_S, name="patience")
    local_addresses: bool = False


class AgentSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The helper processes that move the bytes.

    Attributes:
        max_agents: helpers that copy, remove, rename and make directories at once.
        list_agents: helpers more, for listings alone, so that ``pdm ls`` never waits behind copies.
        idle_agents: helpers more that may live without work, so that users who take turns need not log in anew.
        idle_s: a helper without work for so long is ended.
        python: interpreter of the helpers, which has msgspec. After reading never None (nothing in the file: the
            daemon's own).
        library_path: ``LD_LIBRARY_PATH`` of the helpers, for grid tools installed outside the system's directories.
        cancel_grace_s: how long a helper may take to obey a cancellation; then it is killed.
    """

    max_agents: Annotated[int, Meta(ge=1, le=1000)] = 4
    list_agents: Annotated[int, Meta(ge=1, le=1000)] = 1
    idle_agents: Annotated[int, Meta(ge=0, le=1000)] = 12
    idle_s: Duration = field(default=60.0, name="idle")
    python: OptionalPath = None
    library_path: str = ""
    cancel_grace_s: Duration = field(default=0.8, name="cancel_grace")


class QueueSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How elements are claimed and retried.

    Attributes:
        lease_s: a daemon that does not renew its lease for so long loses its elements.
        poll_interval_s: how often the database is polled for work that no event has announced.
        batch_elements: most elements handed to a helper at once; how many it is, is found by how long they take.
        batch_bytes: most bytes of a batch; a larger file goes alone.
        first_pause_s: before the second try of an element; doubles with each try.
        longest_pause_s: upper bound of that pause.
        stall_s: an element without any progress for so long has STALLED.
        total_s: an element may take so long, and the time its size needs at `least_rate_bytes`.
        least_rate_bytes: bytes per second that a transfer must average.
        route_start: streams of work with which a route (from one site to another) begins; how many it gets is found by
            what they bring.
        route_window_s: seconds of work after which that is decided anew.
        route_limit: streams of a route at most; like all limits, `AgentSettings.max_agents` permitting.
        site_limit_in: streams into a site at most, if its description says nothing else.
        site_limit_out: streams out of a site at most, likewise.
        user_limit: streams of a user at most.
        job_limit: streams with elements of one job at most.
    """

    lease_s: Annotated[float, kind("duration", ge=1, le=DAY_S)] = field(default=15.0, name="lease")
    poll_interval_s: Duration = field(default=5.0, name="poll_interval")
    batch_elements: Annotated[int, Meta(ge=1, le=10_000)] = 500
    batch_bytes: Size = 256 * 1024**2
    first_pause_s: Duration = field(default=5.0, name="first_pause")
    longest_pause_s: Duration = field(default=600.0, name="longest_pause")
    stall_s: Duration = field(default=120.0, name="stall")
    total_s: Duration = field(default=600.0, name="total")
    least_rate_bytes: Size = field(default=500_000, name="least_rate")
    route_start: StreamCount = 2
    route_window_s: Duration = field(default=5.0, name="route_window")
    route_limit: StreamCount = 1000
    site_limit_in: StreamCount = 1000
    site_limit_out: StreamCount = 1000
    user_limit: StreamCount = 1000
    job_limit: StreamCount = 1000


class EventSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``keep_s``: earlier name of ``[retention] events``; None where that is used."""

    keep_s: OptionalDuration = field(default=None, name="keep")


class RetentionSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long what has ended is kept.

    Attributes:
        jobs_s: after their end, with elements, listings and logs.
        logs_s: after the end of their job.
        receipts_s: after the end of their job, although that is purged.
        events_s: for readers that resume; webhooks and mail need some hours.
        audit_s: records of actions.
        summaries_s: of purged jobs.
    """

    jobs_s: Annotated[float, kind("duration-or-forever", ge=7 * DAY_S)] = field(default=math.inf, name="jobs")
    logs_s: Annotated[float, kind("duration-or-forever", ge=DAY_S)] = field(default=math.inf, name="logs")
    receipts_s: DurationOrForever = field(default=math.inf, name="receipts")
    events_s: Annotated[float, kind("duration-or-forever", ge=3600)] = field(default=30 * DAY_S, name="events")
    audit_s: Annotated[float, kind("duration-or-forever", ge=DAY_S)] = field(default=math.inf, name="audit")
    summaries_s: DurationOrForever = field(default=math.inf, name="summaries")


class WebhookSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How events are sent to the webhooks of users.

    Attributes:
        plain_http: whether receivers may have ``http`` URLs.
        allowed: addresses, networks and ports of receivers, although they are of this machine or its link.
        refused: other networks to which nothing is sent.
        ca: PEM file or hashed directory of the authorities of receivers; those of the system without it.
        timeout_s: for one message, from the resolution of the name to the end of the answer.
        give_up_s: for how long an event is tried that is not accepted.
        disable_s: a webhook that accepts nothing for so long is disabled.
    """

    plain_http: bool = False
    allowed: AddressRanges = ()
    refused: AddressRanges = ()
    ca: OptionalPath = None
    timeout_s: Annotated[float, kind("duration", gt=0, le=120)] = field(default=15.0, name="timeout")
    give_up_s: Duration = field(default=DAY_S, name="give_up")
    disable_s: Duration = field(default=3 * DAY_S, name="disable")


class MailSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How mail is sent to users.

    Attributes:
        smarthost: name of the server that takes mail; empty: no mail is sent.
        port: of it.
        sender: address from which mail comes; needed with a smarthost.
        tls: ``starttls``, ``tls`` (from the first byte), or ``none``.
        ca: PEM file or hashed directory of its authority; those of the system without it.
        user: to log in with; empty for none.
        password_file: with the password of that user.
    """

    smarthost: str = ""
    port: Annotated[int, Meta(ge=1, le=65535)] = 587
    sender: str = ""
    tls: Literal["starttls", "tls", "none"] = "starttls"
    ca: OptionalPath = None
    user: str = ""
    password_file: OptionalPath = None


class TapeSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the tape APIs of sites are polled.

    Attributes:
        poll_s: until the first poll of a request; each poll without a change lengthens it by half.
        longest_poll_s: upper bound of that.
        timeout_s: for one request to an API.
        stage_timeout_s: files of a copy that are not on disk by then fail, where the copy says nothing else.
        archive_timeout_s: copies that are not on tape by then fail, likewise.
        lifetime_s: for which staged files are to stay on disk, likewise.
    """

    poll_s: Annotated[float, kind("duration", ge=0.1, le=DAY_S)] = field(default=10.0, name="poll")
    longest_poll_s: Annotated[float, kind("duration", ge=0.1, le=DAY_S)] = field(default=300.0, name="longest_poll")
    timeout_s: Annotated[float, kind("duration", ge=0.1, le=600)] = field(default=60.0, name="timeout")
    stage_timeout_s: Duration = field(default=2 * DAY_S, name="stage_timeout")
    archive_timeout_s: Duration = field(default=2 * DAY_S, name="archive_timeout")
    lifetime_s: Duration = field(default=DAY_S, name="lifetime")


class NodeSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """This daemon among others that use its database.

    Attributes:
        name: for people; the host name if empty.
        address: URL under which the other nodes reach it; empty: they do not ask it.
        peers_trust: PEM file or hashed directory of the authorities of the nodes' host certificates; those of `[tls]`
            without it.
    """

    name: NodeName = ""
    address: NodeAddress = ""
    peers_trust: OptionalPath = None


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole configuration; every path is absolute once read.

    Attributes:
        source: the file it was read from.
    """

    source: Path
    server: ServerSettings = ServerSettings()
    admin: AdminSettings = AdminSettings()
    fts: FtsSettings = FtsSettings()
    tls: TlsSettings = TlsSettings()
    users: UserSettings = UserSettings()
    database: DatabaseSettings = DatabaseSettings()
    state: StateSettings = StateSettings()
    logs: LogSettings = LogSettings()
    sites: SiteSettings = SiteSettings()
    agents: AgentSettings = AgentSettings()
    queue: QueueSettings = QueueSettings()
    credentials: CredentialSettings = CredentialSettings()
    ssh: SshSettings = SshSettings()
    events: EventSettings = EventSettings()
    retention: RetentionSettings = RetentionSettings()
    webhooks: WebhookSettings = WebhookSettings()
    mail: MailSettings = MailSettings()
    tape: TapeSettings = TapeSettings()
    oidc: IssuerSettings = IssuerSettings()
    node: NodeSettings = NodeSettings()


#: Section name → its struct.
SECTIONS: dict[str, type[msgspec.Struct]] = {
    "server": ServerSettings,
    "admin": AdminSettings,
    "fts": FtsSettings,
    "tls": TlsSettings,
    "users": UserSettings,
    "database": DatabaseSettings,
    "state": StateSettings,
    "logs": LogSettings,
    "sites": SiteSettings,
    "agents": AgentSettings,
    "queue": QueueSettings,
    "credentials": CredentialSettings,
    "ssh": SshSettings,
    "events": EventSettings,
    "retention": RetentionSettings,
    "webhooks": WebhookSettings,
    "mail": MailSettings,
    "tape": TapeSettings,
    "oidc": IssuerSettings,
    "node": NodeSettings,
}
