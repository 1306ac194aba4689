"""Events, as the service gives them out."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from pdm.workqueue.domain.events import EventKind
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
