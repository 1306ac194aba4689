"""What clients send about sites and users, and what operators read."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.wire.requests import LARGEST_ID

_Url = Annotated[str, Meta(min_length=1, max_length=2000)]
SiteName = Annotated[
    str,
    Meta(min_length=1, max_length=64, description="A letter first, then letters, digits, dots, dashes, underscores."),
]
Description = Annotated[str, Meta(max_length=500, description="One line.")]
Folder = Annotated[str, Meta(min_length=1, max_length=4096, description="Where relative paths begin.")]
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
SiteMover = Annotated[
    Literal["native", "tools"],
    Meta(description="Who carries out its jobs: the service's own clients, or globus-url-copy and gfal (tools)."),
]


class SiteBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A new site. ``public``: whether everybody sees and uses it; else only who makes it."""

    name: SiteName
    endpoints: Endpoints
    description: Description | None = None
    default_folder: Folder | None = None
    public: bool = False
    limit_in: Streams = None
    limit_out: Streams = None
    authorities: Authorities | None = None
    myproxy: MyProxy = None
    mover: SiteMover | None = None


class SiteChanges(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What shall be different; what is left out stays."""

    name: SiteName | UnsetType = UNSET
    endpoints: Endpoints | UnsetType = UNSET
    description: Description | UnsetType = UNSET
    default_folder: Folder | UnsetType = UNSET
    public: bool | UnsetType = UNSET
    limit_in: Streams | UnsetType = UNSET
    limit_out: Streams | UnsetType = UNSET
    authorities: Authorities | UnsetType = UNSET
    myproxy: MyProxy | UnsetType = UNSET
    mover: SiteMover | UnsetType = UNSET


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why a site is drained, or a user banned."""

    message: Annotated[str, Meta(min_length=1, max_length=500, description="One line, which users see.")]


class PageQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of a list."""

    limit: Annotated[Annotated[int, Meta(ge=1, le=1000)] | None, Meta(description="At most so many; 500.")] = None
    after: Annotated[
        Annotated[int, Meta(ge=0, le=LARGEST_ID)] | None, Meta(description="Only those with a larger id.")
    ] = None


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
