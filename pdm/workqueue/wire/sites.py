"""Sites, routes between them and users: the bodies of requests, and what the service answers. Times are UTC."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType, field

from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.wire.requests import LARGEST_ID
from pdm.workqueue.wire.responses import FailureView, ProtocolName

_Url = Annotated[str, Meta(min_length=1, max_length=2000)]
SiteName = Annotated[
    str,
    Meta(min_length=1, max_length=64, description="A letter first, then letters, digits, dots, dashes, underscores."),
]
Description = Annotated[str, Meta(max_length=500, description="One line.")]
Directory = Annotated[str, Meta(min_length=1, max_length=4096, description="Where relative paths begin.")]
Endpoints = Annotated[
    dict[
        Annotated[str, Meta(max_length=20)],
        _Url | Annotated[list[_Url], Meta(min_length=1, max_length=20)],
    ],
    Meta(
        min_length=1,
        max_length=20,
        description="Protocol → URL, or several URLs of one storage, the preferred one first. Protocols: "
        + ", ".join(JobProtocol.__members__)
        + "; FILE is for operators.",
    ),
]
Streams = Annotated[
    Annotated[int, Meta(ge=1, le=1_000_000)] | None,
    Meta(description="Streams of work at once, at most; never more than are for all sites. Null for as many."),
]
Authorities = Annotated[
    str,
    Meta(
        max_length=65536,
        description="PEM of authorities that are trusted for this site only, besides the usual ones; empty for none.",
    ),
]


MyProxy = Annotated[
    Annotated[str, Meta(min_length=1, max_length=300)] | None,
    Meta(description="HOST:PORT of the MyProxy server at which its users log on; null for none."),
]
FtsUrl = Annotated[
    Annotated[str, Meta(min_length=1, max_length=300)] | None,
    Meta(description="https://HOST:PORT of the FTS3 that carries out copies from and to it; null for none."),
]
SiteMover = Annotated[
    Literal["native", "tools"],
    Meta(description="Who carries out its jobs: the service's own clients, or globus-url-copy and gfal (tools)."),
]


TapeUrl = Annotated[
    Annotated[str, Meta(min_length=1, max_length=500)] | None,
    Meta(
        description="URL of its WLCG tape REST API, such as https://tape.example.org:8444/api/v1; null where its HTTPS"
        " endpoint names it, or where it has none."
    ),
]


class OidcBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The issuer of a site's tokens, and the client that the service is registered as."""

    issuer: Annotated[
        Annotated[str, Meta(min_length=1, max_length=500)] | None,
        Meta(description="URL of the only issuer whose tokens are accepted; null for any."),
    ] = None
    client_id: Annotated[
        Annotated[str, Meta(min_length=1, max_length=300)] | None,
        Meta(description="Null where users cannot log in."),
    ] = None
    client_secret: Annotated[
        Annotated[str, Meta(min_length=1, max_length=300)] | None,
        Meta(
            description="Stored encrypted, never shown. Without it, a change keeps the secret of the same issuer and"
            " client."
        ),
    ] = None
    scope: Annotated[
        Annotated[str, Meta(min_length=1, max_length=1000)] | None,
        Meta(description="That a login asks for; openid offline_access by default."),
    ] = None
    audience: Annotated[
        list[Annotated[str, Meta(min_length=1, max_length=300)]],
        Meta(max_length=10, description="Of tokens, besides the addresses of the endpoints. For operators."),
    ] = []
    base_path: Annotated[
        Annotated[str, Meta(min_length=1, max_length=4096)] | None,
        Meta(description="Directory that the paths of scopes are relative to; null: the root, or the endpoint's path."),
    ] = None
    exchange: Annotated[
        bool, Meta(description="Whether access tokens are exchanged for such with the audience and scope (RFC 8693).")
    ] = False

    def __repr__(self) -> str:
        return f"OidcBody(issuer={self.issuer!r}, client_id={self.client_id!r})"


class OidcView(msgspec.Struct, frozen=True, kw_only=True):
    """What a site says about tokens."""

    issuer: str | None
    client_id: str | None
    has_secret: bool
    scope: str
    audience: list[str]
    base_path: str | None
    exchange: bool


SiteOidc = Annotated[OidcBody | None, Meta(description="Its tokens, and how users log in; null for nothing.")]


class SiteBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A new site. ``public``: whether everybody sees and uses it; else only who makes it."""

    name: SiteName
    endpoints: Endpoints
    description: Description | None = None
    default_folder: Directory | None = None
    public: bool = False
    limit_in: Streams = None
    limit_out: Streams = None
    authorities: Authorities | None = None
    myproxy: MyProxy = None
    mover: SiteMover | None = None
    tape: TapeUrl = None
    fts: FtsUrl = None
    oidc: SiteOidc = None


class SiteChanges(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What shall be different; what is left out stays."""

    name: SiteName | UnsetType = UNSET
    endpoints: Endpoints | UnsetType = UNSET
    description: Description | UnsetType = UNSET
    default_folder: Directory | UnsetType = UNSET
    public: bool | UnsetType = UNSET
    limit_in: Streams | UnsetType = UNSET
    limit_out: Streams | UnsetType = UNSET
    authorities: Authorities | UnsetType = UNSET
    myproxy: MyProxy | UnsetType = UNSET
    mover: SiteMover | UnsetType = UNSET
    tape: TapeUrl | UnsetType = UNSET
    fts: FtsUrl | UnsetType = UNSET
    oidc: SiteOidc | UnsetType = UNSET


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why a site is drained, or a user banned."""

    message: Annotated[str, Meta(min_length=1, max_length=500, description="One line, which users see.")]


class PageQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of a list."""

    limit: Annotated[Annotated[int, Meta(ge=1, le=1000)] | None, Meta(description="At most so many; 500.")] = None
    after: Annotated[
        Annotated[int, Meta(ge=0, le=LARGEST_ID)] | None, Meta(description="Only those with a larger id.")
    ] = None


class EndpointView(msgspec.Struct, frozen=True, kw_only=True):
    """State of an endpoint of a site in this daemon."""

    protocol: ProtocolName
    url: str
    state: Annotated[
        str,
        Meta(
            description="closed: it is used; open: it is left alone for a while; half-open: it is being probed.",
            extra_json_schema={"enum": ["closed", "open", "half-open"]},
        ),
    ]
    failures: Annotated[int, Meta(description="Connections that failed, in a row.")]
    failing_since: datetime | None
    next_try: Annotated[datetime | None, Meta(description="When it is tried again.")]
    reason: Annotated[str, Meta(description="What the last failure said.")]


class SiteView(msgspec.Struct, frozen=True, kw_only=True):
    """A site; ``endpoints`` maps each protocol that it offers to a URL, ``alternatives`` to further ones."""

    id: int
    name: str
    description: str
    default_folder: str
    protocols: list[ProtocolName]
    endpoints: dict[str, str]
    alternatives: dict[str, list[str]] = {}
    owner: Annotated[int | None, Meta(description="User who has made it; null for a site of the service itself.")] = (
        None
    )
    public: Annotated[bool, Meta(description="Whether everybody sees and uses it; else its owner only.")] = True
    limit_in: int | None = None
    limit_out: int | None = None
    authorities: Annotated[list[str], Meta(description="Subjects of the authorities trusted for this site only.")] = []
    myproxy: Annotated[str | None, Meta(description="HOST:PORT of the MyProxy server at which its users log on.")] = (
        None
    )
    mover: Annotated[
        str,
        Meta(
            description="Who carries out its jobs: the service's own clients, or globus-url-copy and gfal (tools).",
            extra_json_schema={"enum": ["native", "tools"]},
        ),
    ] = "native"
    tape: Annotated[str | None, Meta(description="URL of its tape API; null where its HTTPS endpoint names it.")] = None
    fts: Annotated[str | None, Meta(description="FTS3 that carries out copies from and to it.")] = None
    oidc: OidcView | None = None
    state: Annotated[
        str,
        Meta(
            description="ok; paused: some protocol of it cannot be reached; drained: an operator lets nothing start.",
            extra_json_schema={"enum": ["ok", "paused", "drained"]},
        ),
    ] = "ok"
    reason: Annotated[str | None, Meta(description="Why it is not ok.")] = None
    health: Annotated[list[EndpointView] | UnsetType, Meta(description="Of one site; not in arrays.")] = UNSET

    def __repr__(self) -> str:
        return f"<SiteView {self.id} {self.name} {self.state}: {', '.join(self.protocols)}>"


class CheckView(msgspec.Struct, frozen=True, kw_only=True):
    """Result of the check of an endpoint; null for steps that were not reached."""

    protocol: ProtocolName
    url: str
    ok: bool
    reachable: bool | None
    login: bool | None
    listing: bool | None
    seconds: float
    failure: FailureView | None = field(name="error")


class RouteView(msgspec.Struct, frozen=True, kw_only=True):
    """Work from one site to another by one daemon, in streams: helpers that run one batch after the other.

    A stream more is tried while it brings more throughput; failures of connections halve them. Listings are not
    counted.
    """

    source: Annotated[int, Meta(description="Number of a site.")]
    destination: Annotated[int | None, Meta(description="Number of a site; null where only the source is changed.")]
    running: Annotated[int, Meta(description="Streams at present.")]
    limit: Annotated[int, Meta(description="Streams that there may be at present.")]
    least: Annotated[int, Meta(description="The limit never goes below it.")]
    most: Annotated[int, Meta(description="Nor above: what configuration and sites allow.")]
    throughput: Annotated[float | None, Meta(description="Of all streams together, when it was measured last.")]
    unit: Annotated[str | None, Meta(description="Of the throughput: bytes/s, or elements/s where they are small.")]
    reason: Annotated[str, Meta(description="Of the latest decision about the limit, a sentence.")]
    decided_at: Annotated[datetime, Meta(description="When that was.")]
    changed_at: Annotated[datetime, Meta(description="When the limit changed last.")]
    node: Annotated[str | None, Meta(description="Name of the node, where several may share the work.")] = None


class UserView(msgspec.Struct, frozen=True, kw_only=True):
    """A user, as operators see them."""

    id: int
    subject: str
    role: str
    registered_at: datetime
    banned: Annotated[str | None, Meta(description="Why the user is banned; null if not.")]


class AuditView(msgspec.Struct, frozen=True, kw_only=True):
    """Who did what."""

    id: int
    at: datetime
    subject: str
    action: Annotated[str, Meta(description="site.create, site.change, site.remove, site.drain, user.ban, ...")]
    target: Annotated[str, Meta(description="site N or user N.")]
    details: str
