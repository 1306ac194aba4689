"""What an error looks like on the wire: ``application/problem+json`` of RFC 9457."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

#: What the ``type`` of a problem begins with; the rest is its stable word.
PROBLEM_TYPE_PREFIX = "urn:pdm:workqueue:problem:"

MEDIA_TYPE = "application/problem+json"


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why a request was not carried out."""

    type: Annotated[str, Meta(description="Stable name of the kind of problem.")]
    title: Annotated[str, Meta(description="The kind of problem in words, the same for all of a kind.")]
    status: Annotated[int, Meta(description="The HTTP status code once more.")]
    detail: Annotated[str, Meta(description="What is wrong with this request, and what to do.")]
    request_id: Annotated[str, Meta(description="Stands on every line of the daemon's log about this request.")]
    pointer: Annotated[
        str | None,
        Meta(description="What is wrong: $.key of the body, ?name of the query, or the name of a header."),
    ] = None
    incident: Annotated[str | None, Meta(description="For a fault of the service: what to tell an operator.")] = None
