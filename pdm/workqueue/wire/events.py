"""What clients send and receive about events, webhooks and mail."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from pdm.workqueue.domain.notifications import EventKind
from pdm.workqueue.wire.requests import LARGEST_ID

#: The media type of a stream of events.
EVENT_STREAM = "text/event-stream"
#: Events of a page at most, and if the request does not say.
_LONGEST_PAGE, _USUAL_PAGE = 1000, 100

KindName = Annotated[str, Meta(extra_json_schema={"enum": [kind.value for kind in EventKind]})]


class EventView(msgspec.Struct, frozen=True, kw_only=True):
    """Something that has happened to a job or a site."""

    id: Annotated[int | None, Meta(description="Null for ``progress``, which is not stored.")]
    time: datetime
    kind: KindName
    job: Annotated[int | None, Meta(description="Null for ``site``.")]
    data: Annotated[dict[str, Any], Meta(description="Depends on the kind.")]


class EventQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which events; without parameters a stream begins now, and a page with the oldest."""

    kinds: Annotated[
        tuple[str, ...],
        Meta(description="Only these: job, failure, held, resumed, site, progress; repeated, or with commas."),
    ] = ()
    after: Annotated[
        Annotated[int, Meta(ge=0, le=LARGEST_ID)] | None,
        Meta(description="Only those after the event with this id; 0 for all that are stored."),
    ] = None
    limit: Annotated[
        Annotated[int, Meta(ge=1, le=_LONGEST_PAGE)], Meta(description="At most so many; a stream has no limit.")
    ] = _USUAL_PAGE
    order: Annotated[
        Literal["oldest", "newest"],
        Meta(description="Which come first in a page; no choice for a stream."),
    ] = "oldest"


#: Kinds of events that are sent to webhooks.
WebhookKind = Literal["job", "failure", "held", "resumed", "site"]


class NewWebhookBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A URL to which events are to be sent."""

    url: Annotated[
        Annotated[str, Meta(min_length=1, max_length=2000)], Meta(description="``https://HOST[:PORT]/PATH``.")
    ]
    kinds: Annotated[
        Annotated[list[WebhookKind], Meta(min_length=1, max_length=5)],
        Meta(description="Kinds of events."),
    ]
    job: Annotated[
        Annotated[int, Meta(ge=1, le=LARGEST_ID)] | None, Meta(description="Only events of this job; default all jobs.")
    ] = None


class DeliveryView(msgspec.Struct, frozen=True, kw_only=True):
    """One event for a webhook."""

    id: int
    event: Annotated[int, Meta(description="Number of the event; 0 for a test.")]
    kind: str
    job: int | None
    state: Annotated[
        str,
        Meta(
            description="Stable word: WAITING, DELIVERED (answered with a success), or GIVEN_UP.",
            extra_json_schema={"enum": ["WAITING", "DELIVERED", "GIVEN_UP"]},
        ),
    ]
    created_at: datetime
    attempts: Annotated[int, Meta(description="Tries so far.")]
    next_try: Annotated[datetime | None, Meta(description="Null if it has ended.")]
    ended_at: datetime | None
    status: Annotated[int | None, Meta(description="Of HTTP, of the last try; null if there was no answer.")]
    error: Annotated[str | None, Meta(description="Why the last try failed.")]


class WebhookView(msgspec.Struct, frozen=True, kw_only=True):
    """A webhook."""

    id: int
    url: str
    kinds: list[str]
    job: int | None
    created_at: datetime
    waiting: Annotated[int, Meta(description="Events that wait.")]
    failing_since: Annotated[datetime | None, Meta(description="Null if the last event was accepted.")]
    disabled_at: Annotated[datetime | None, Meta(description="Null while events are sent.")]
    disabled_why: str | None
    secret: Annotated[
        str | UnsetType,
        Meta(description="With which messages are signed; shown only in the answer to its creation."),
    ] = UNSET
    deliveries: Annotated[
        list[DeliveryView] | UnsetType,
        Meta(description="The last 100, the newest first; of one webhook, not in arrays."),
    ] = UNSET


class WebhookTestView(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a test message."""

    accepted: bool
    status: Annotated[int | None, Meta(description="Of HTTP; null if there was no answer.")]
    error: Annotated[str | None, Meta(description="Null if it was accepted.")]
    seconds: Annotated[float, Meta(description="That it took.")]
    enabled: Annotated[bool, Meta(description="Whether the webhook, which was disabled, is enabled again.")]


class MailBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is to be mailed, and where."""

    address: Annotated[str, Meta(min_length=3, max_length=254)]
    notify: Annotated[
        Annotated[list[Literal["ended", "failed", "held"]], Meta(min_length=1, max_length=3)],
        Meta(description="``failed``: also jobs that the service has cancelled."),
    ] = msgspec.field(default_factory=lambda: ["failed", "held"])
    per: Annotated[Literal["job", "day"], Meta(description="Mail for each job, or once a day.")] = "job"


class MailCodeBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The code that was mailed."""

    code: Annotated[str, Meta(min_length=1, max_length=40)]


class MailView(msgspec.Struct, frozen=True, kw_only=True):
    """What is mailed to the caller."""

    address: Annotated[str | None, Meta(description="Null for none.")]
    confirmed: bool
    notify: list[str]
    per: Literal["job", "day"]
    sent_at: Annotated[datetime | None, Meta(description="When the last mail was sent.")]
    error: Annotated[str | None, Meta(description="Why the last mail could not be sent.")]
