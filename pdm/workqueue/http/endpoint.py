"""Declarations of routes: method, path, body, query, result and errors of each handler, and results in pieces."""

from __future__ import annotations

import enum
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from types import MappingProxyType
from typing import Any

import msgspec
from attrs import frozen

from pdm.workqueue.http.problems import ApiError, JobNotFoundError, JobPurgedError

#: A handler: gets the context, the caller (if it is a user), and as keywords the path parameters, ``body``,
#: ``query``, ``key`` (`IdempotencyKey` of a POST), ``media_type`` (where the endpoint has several) and
#: ``last_event_id`` (where it gives out events). Returns a value of the result type, or a `JsonStream` of one.
Handler = Callable[..., Awaitable[object]]


class Allow(enum.Enum):
    """Clients that may call an endpoint."""

    #: All clients, also without a certificate.
    EVERYBODY = enum.auto()
    #: Users of the service, who see only what is their own unless they are operators.
    USERS = enum.auto()
    #: The other daemons that use the database; no user, and no operator.
    NODES = enum.auto()


class Parameter(enum.Enum):
    """Kinds of path parameters."""

    NUMBER = "number"
    SIGNED = "signed"
    WORD = "word"


#: Name in a path → its kind and description.
PATH_PARAMETERS: Mapping[str, tuple[Parameter, str]] = MappingProxyType(
    {
        "job_id": (Parameter.NUMBER, "Number of a job."),
        "element_id": (Parameter.NUMBER, "Number of an element in its job; 0 is the first."),
        "attempt": (Parameter.SIGNED, "Number of an attempt, from 1; negative numbers count from the last."),
        "schedule_id": (Parameter.NUMBER, "Number of a schedule."),
        "site_id": (Parameter.NUMBER, "Number of a site."),
        "webhook_id": (Parameter.NUMBER, "Number of a webhook."),
        "credential_id": (Parameter.NUMBER, "Number of a credential."),
        "user_id": (Parameter.NUMBER, "Number of a user."),
        "log_uid": (Parameter.WORD, "The ``log_uid`` of a job."),
        "node": (Parameter.WORD, "Name of a node, as in GET /nodes."),
        "delegation_id": (Parameter.WORD, "The caller's delegation id, as given by GET /whoami."),
    }
)


@frozen
class JsonStream:
    """A result as pieces, of encoded JSON unless `media_type` says otherwise.

    An error before the first `buffered_bytes` are complete becomes a status code; later it aborts the connection.
    """

    pieces: AsyncGenerator[bytes]
    buffered_bytes: int = 64 * 1024
    media_type: str = "application/json"


@frozen
class PlainText:
    """A plain-text result."""

    text: str


@frozen(eq=False, kw_only=True)
class Endpoint:
    """One route; `path` is below the root of the API, with parameters in braces."""

    method: str
    path: str
    handler: Handler
    summary: str
    #: The handler's docstring, for OpenAPI and the documentation.
    description: str
    #: Struct of the JSON body; `bytes` for a raw body, None for no body.
    body: type[msgspec.Struct] | type[bytes] | None
    query: type[msgspec.Struct] | None
    #: Type of the response; `str` for plain text, None for an empty one.
    result: Any
    #: Status code of a success.
    status: int
    allow: Allow
    #: Errors of this endpoint, besides those of all endpoints.
    errors: tuple[type[ApiError], ...]
    #: Media types of the response, the default first: the handler gets the one that the client accepts. Empty for JSON.
    media_types: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """A unique name in snake case."""
        return self.handler.__name__

    @property
    def parameters(self) -> list[str]:
        """Names of the path parameters, in order."""
        return [part[1:-1] for part in self.path.split("/") if part.startswith("{")]


def endpoint(
    method: str,
    path: str,
    *,
    summary: str,
    result: Any,
    body: type[msgspec.Struct] | type[bytes] | None = None,
    query: type[msgspec.Struct] | None = None,
    status: int = 200,
    allow: Allow = Allow.USERS,
    errors: tuple[type[ApiError], ...] = (),
    media_types: tuple[str, ...] = (),
) -> Callable[[Handler], Endpoint]:
    """Declare the route of a handler; the function is replaced by its `Endpoint`.

    Where a job may not exist, it may also be purged.
    """
    if JobNotFoundError in errors:
        errors = (*errors, JobPurgedError)

    def declare(handler: Handler) -> Endpoint:
        return Endpoint(
            method=method,
            path=path,
            handler=handler,
            summary=summary,
            description=inspect.getdoc(handler) or "",
            body=body,
            query=query,
            result=result,
            status=status,
            allow=allow,
            errors=errors,
            media_types=media_types,
        )

    return declare


def json_items(values: Sequence[msgspec.Struct]) -> bytes:
    """Encode one or more items of an array, without its brackets."""
    return msgspec.json.encode(values)[1:-1]


async def json_array(items: AsyncGenerator[bytes | AsyncGenerator[bytes]]) -> AsyncGenerator[bytes]:
    """Pieces of an array; each item is encoded JSON, several items (`json_items`), or the pieces of a large item."""
    separator = b"["
    async with aclosing(items) as source:
        async for item in source:
            if isinstance(item, bytes):
                yield separator + item
            else:
                yield separator
                async with aclosing(item) as pieces:
                    async for piece in pieces:
                        yield piece
            separator = b","
    yield b"[]" if separator == b"[" else b"]"
