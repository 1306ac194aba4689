"""Declaration of a route: what decoding, access control, responses, OpenAPI, documentation and tests need of it.

Results are values of a struct type, plain text, or JSON that is streamed in pieces (`JsonStream`, `json_array`).
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from types import MappingProxyType
from typing import Any

import msgspec
from attrs import frozen

from pdm.workqueue.http.problems import ApiError

#: A handler: gets the context, the caller (where one is needed), and as keywords the path's parameters, ``body``,
#: ``query`` and ``key`` (`IdempotencyKey` of a POST). Returns a value of the result type, or `JsonStream` of one.
Handler = Callable[..., Awaitable[object]]


class Allow(enum.Enum):
    """Who may call."""

    #: Whoever connects.
    EVERYBODY = enum.auto()
    #: Users of the service; what they see is theirs, unless they are operators.
    USERS = enum.auto()


class Parameter(enum.Enum):
    """The kinds of parameters in paths."""

    NUMBER = "number"
    SIGNED = "signed"
    WORD = "word"


#: Name in a path → its kind and what it is.
PATH_PARAMETERS: Mapping[str, tuple[Parameter, str]] = MappingProxyType(
    {
        "job_id": (Parameter.NUMBER, "Number of a job."),
        "element_id": (Parameter.NUMBER, "Number of an element in its job; 0 is the first."),
        "attempt": (Parameter.SIGNED, "Number of an attempt, from 1; negative numbers count from the last."),
        "site_id": (Parameter.NUMBER, "Number of a site."),
        "credential_id": (Parameter.NUMBER, "Number of a credential."),
        "user_id": (Parameter.NUMBER, "Number of a user."),
        "delegation_id": (Parameter.WORD, "The caller's delegation id, as GET /whoami tells it."),
    }
)


@frozen
class JsonStream:
    """A result that is JSON already, in pieces.

    Attributes:
        held: so many bytes are collected before the first goes out: what goes wrong until then becomes a status code.
    """

    pieces: AsyncGenerator[bytes]
    held: int = 64 * 1024


@frozen
class PlainText:
    """A result that is plain text."""

    text: str


@frozen(eq=False)
class Endpoint:
    """One route.

    Attributes:
        method: of HTTP.
        path: below the root of the API, parameters in braces.
        summary: one line.
        description: more, for the documentation; the handler's docstring.
        body: struct of the JSON body, `bytes` for one that the handler reads itself, None for none.
        query: struct of the query parameters; None where there are none.
        result: what is given out, as a type; `str` for text, None for nothing.
        status: of a success.
        allow: who may call.
        errors: what may go wrong, besides what may go wrong everywhere.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    description: str
    body: type[msgspec.Struct] | type[bytes] | None
    query: type[msgspec.Struct] | None
    result: Any
    status: int
    allow: Allow
    errors: tuple[type[ApiError], ...]

    @property
    def name(self) -> str:
        """A name in snake case that no other endpoint has."""
        return self.handler.__name__

    @property
    def parameters(self) -> list[str]:
        """The names of the path's parameters, in their order."""
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
) -> Callable[[Handler], Endpoint]:
    """Declare a handler's route; the name of the handler becomes the endpoint's."""

    def declare(handler: Handler) -> Endpoint:
        description = inspect.getdoc(handler) or ""
        return Endpoint(method, path, handler, summary, description, body, query, result, status, allow, errors)

    return declare


def json_items(values: Sequence[msgspec.Struct]) -> bytes:
    """Some items of an array, one or more, without its brackets."""
    return msgspec.json.encode(values)[1:-1]


async def json_array(items: AsyncGenerator[bytes | AsyncGenerator[bytes]]) -> AsyncGenerator[bytes]:
    """The pieces of an array.

    Args:
        items: JSON already; several in one come joined (`json_items`), a long one comes as the pieces of it.
    """
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
