"""Klein application: authenticate the caller, decode the request, call the handler, write the response, report faults.

Every route of the endpoint table is served by one `_RouteHandler`. Handlers that need not wait are run synchronously
(`run_eagerly`), and Klein's routing is cached by URL (`ApiResource`).
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextvars import copy_context
from functools import partial
from typing import Any, ClassVar, cast

import msgspec
from attrs import frozen
from klein import Klein
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.resource import IResource, Resource
from twisted.web.server import NOT_DONE_YET
from werkzeug.datastructures import MIMEAccept
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound
from werkzeug.http import parse_accept_header
from werkzeug.routing import BaseConverter, Map

from pdm.workqueue.domain.sites import RestrictionKind
from pdm.workqueue.http.access import Authenticator, Caller
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.decoding import decode_json, decode_query, idempotency_key
from pdm.workqueue.http.endpoint import PATH_PARAMETERS, Allow, Endpoint, JsonStream, Parameter, PlainText
from pdm.workqueue.http.event_streams import EventStream, write_events
from pdm.workqueue.http.problems import (
    ApiError,
    DatabaseOutageError,
    ForbiddenError,
    InternalFaultError,
    InvalidInputError,
    MethodNotAllowedError,
    NotAcceptableError,
    NotFoundError,
    ServiceStoppingError,
)
from pdm.workqueue.http.request import TEXT, ApiRequest, write_problem, write_response, write_stream
from pdm.workqueue.store.errors import DatabaseClosedError, DatabaseUnavailableError
from pdm.workqueue.store.outages import begin_request, request_transactions
from pdm.workqueue.telemetry.logging import log_context, log_incident
from pdm.workqueue.wire.events import EVENT_STREAM
from pdm.workqueue.wire.requests import LARGEST_ID


def run_eagerly(coroutine: Coroutine[Deferred[Any], Any, None]) -> Deferred[None] | None:
    """Run a new coroutine synchronously until its first await.

    A Deferred and its callbacks cost as much as all the rest of a request that is answered from memory.

    Returns:
        None if the coroutine has finished; else a Deferred that fires when it has, and whose cancellation cancels what
        the coroutine awaits.

    Raises:
        Exception: raised by the coroutine before its first await.
    """
    context = copy_context()
    try:
        awaited = context.run(coroutine.send, None)
    except StopIteration:
        return None

    async def resume() -> None:
        nonlocal awaited
        while True:
            try:
                step = partial(coroutine.send, await awaited)
            except BaseException as error:
                step = partial(coroutine.throw, error)
            try:
                awaited = context.run(step)
            except StopIteration:
                return

    return Deferred.fromCoroutine(resume())


_log = Logger()

#: Seconds for which a request waits for a transaction, whatever the database does.
REQUEST_PATIENCE_S = 10.0
#: Methods that banned users may not use; they may still read, cancel and delete.
_FORBIDDEN_WHILE_BANNED = frozenset({"POST", "PUT", "PATCH"})
#: Bytes of a body that is decoded in a thread.
_LARGE_BODY = 256 * 1024
#: Cached routes, and the greatest total length of method, path and host of one.
_MAX_CACHED_ROUTES, _MAX_ROUTE_KEY_LENGTH = 4096, 512


class _Number(BaseConverter):
    """An integer within the range of the database; anything else does not match the route (404)."""

    regex = "[0-9]{1,19}"
    _least: ClassVar[int] = 0

    def to_python(self, value: str) -> int:
        number = int(value)
        if not self._least <= number <= LARGEST_ID:
            # Not a ValidationError: werkzeug would then look for other routes, and answer 405.
            raise NotFound
        return number


class _SignedNumber(_Number):
    regex = "-?[0-9]{1,19}"
    _least = -LARGEST_ID


_CONVERTERS: dict[str, type[BaseConverter]] = {
    Parameter.NUMBER.value: _Number,
    Parameter.SIGNED.value: _SignedNumber,
    Parameter.WORD.value: type("_Word", (BaseConverter,), {"regex": "[^/]{1,100}"}),
}


@frozen
class PageRoute:
    """A route outside the API.

    Attributes:
        rule: its path, in the syntax of Klein: ``/web/jobs/<number:job_id>``.
        serve: answers a request, errors included; gets the values of the path as keywords.
    """

    method: str
    rule: str
    name: str
    serve: Callable[..., Deferred[None] | None]


def build_klein_app(
    endpoints: Iterable[Endpoint],
    root: str,
    context: ApiContext,
    authenticator: Authenticator,
    pages: Iterable[PageRoute] = (),
) -> Klein:
    """Build the Klein application that serves a table of endpoints below a root path, and pages beside it."""
    klein = Klein()
    url_map: Map = klein.url_map
    url_map.converters.update(_CONVERTERS)
    # A redirect would turn a POST into a GET; a path with an extra slash is not found.
    url_map.strict_slashes = False
    url_map.merge_slashes = False
    for endpoint in endpoints:
        handler = _RouteHandler(endpoint, context, authenticator)
        klein.route(root + _rule(endpoint.path), methods=[endpoint.method], endpoint=endpoint.name)(handler.serve)
    for page in pages:
        klein.route(page.rule, methods=[page.method], endpoint=page.name)(page.serve)
    # Klein tries error handlers in order of registration: the last one takes unexpected errors.
    klein.handle_errors(HTTPException)(cast(Any, _answer_routing_error))
    klein.handle_errors(Exception)(cast(Any, _answer_fault))
    return klein


def _rule(path: str) -> str:
    """Convert a path to Klein's syntax: ``/jobs/<number:job_id>``."""
    parts = []
    for part in path.split("/"):
        name = part[1:-1]
        parts.append(f"<{PATH_PARAMETERS[name][0].value}:{name}>" if part.startswith("{") else part)
    return "/".join(parts)


async def admitted_caller(
    request: ApiRequest, context: ApiContext, authenticator: Authenticator, fields: dict[str, Any]
) -> Caller:
    """The caller of a request, also noted in the fields of the log.

    Raises:
        NotAuthenticatedError: there is no valid certificate.
        ForbiddenError: the subject is not a user, or is banned and the request changes something.
    """
    caller = await authenticator.authenticate(request.channel.transport)
    request.subject = fields["subject"] = caller.subject
    if request.method.decode("ascii") in _FORBIDDEN_WHILE_BANNED:
        banned = context.site_directory.restriction(RestrictionKind.USER, caller.user_id)
        if banned is not None:
            raise ForbiddenError(f"an operator has banned you: {banned.message}")
    return caller


@frozen
class _RouteHandler:
    endpoint: Endpoint
    context: ApiContext
    authenticator: Authenticator

    def serve(self, request: ApiRequest, **path_values: Any) -> Deferred[None] | None:
        """Answer a request, errors included; synchronously where the handler need not wait."""
        request.route = (self.serve, path_values)
        request.template = self.endpoint.path
        waiting = run_eagerly(self._serve(request, path_values))
        return request.endless if waiting is None else waiting.addCallback(lambda _: request.endless)

    async def _serve(self, request: ApiRequest, path_values: dict[str, Any]) -> None:
        transactions = begin_request(REQUEST_PATIENCE_S)
        with log_context(request_id=request.request_id) as fields:
            try:
                result = await self._call(request, path_values, fields)
                await self._answer(request, result)
            except CancelledError:
                raise
            except Exception as error:
                write_problem(request, *problem_of(error))
            finally:
                transactions.is_over = True

    async def _call(self, request: ApiRequest, path_values: dict[str, Any], fields: dict[str, Any]) -> object:
        endpoint = self.endpoint
        if endpoint.allow is Allow.EVERYBODY:
            return await endpoint.handler(self.context, **path_values)
        if endpoint.allow is Allow.NODES:
            await self._admit_node(request)
            return await endpoint.handler(self.context, **path_values, **self._arguments(request, None))
        caller = await admitted_caller(request, self.context, self.authenticator, fields)
        if len(request.body()) > _LARGE_BODY:
            # Decoding takes seconds.
            arguments = path_values | await self.context.in_thread(self._arguments, request, caller)
        else:
            arguments = path_values | self._arguments(request, caller)
        return await endpoint.handler(self.context, caller, **arguments)

    async def _admit_node(self, request: ApiRequest) -> None:
        transport = request.channel.transport
        self.authenticator.identity(transport)
        if not await self.context.is_node(transport):
            raise ForbiddenError("this is for the nodes of the service: your certificate is not that of a node")

    def _arguments(self, request: ApiRequest, caller: Caller | None) -> dict[str, Any]:
        endpoint = self.endpoint
        arguments: dict[str, Any] = {}
        query = decode_query(request.uri.partition(b"?")[2], endpoint.query)
        if query is not None:
            arguments["query"] = query
        body: msgspec.Struct | None = None
        if endpoint.body is bytes:
            arguments["body"] = request.body()
        elif endpoint.body is not None:
            arguments["body"] = body = decode_json(
                request.body(), header_values(request, "Content-Type"), cast(type[msgspec.Struct], endpoint.body)
            )
        if endpoint.media_types:
            arguments["media_type"] = _accepted_media_type(header_values(request, "Accept"), endpoint.media_types)
        if EVENT_STREAM in endpoint.media_types:
            arguments["last_event_id"] = next(iter(header_values(request, "Last-Event-ID")), None)
        if endpoint.method == "POST" and caller is not None:
            route = f"{endpoint.method} {request.path.decode('ascii', 'replace')}"
            keys = header_values(request, "Idempotency-Key")
            arguments["key"] = idempotency_key(keys, caller.user_id, route, body)
        return arguments

    async def _answer(self, request: ApiRequest, result: object) -> None:
        status = self.endpoint.status
        if isinstance(result, JsonStream):
            await write_stream(request, status, result)
        elif isinstance(result, EventStream):
            await write_events(request, status, result)
        elif isinstance(result, PlainText):
            write_response(request, status, result.text.encode("ascii"), TEXT)
        else:
            write_response(request, status, b"" if status == 204 else msgspec.json.encode(result))


def _accepted_media_type(accept: Sequence[str], offered: Sequence[str]) -> str:
    """The media type of a response by the Accept headers of a request; the first one offered if there are none.

    Raises:
        NotAcceptableError: the client accepts none of those offered.
    """
    if not accept:
        return offered[0]
    found = parse_accept_header(", ".join(accept), MIMEAccept).best_match(offered)
    if found is None:
        raise NotAcceptableError(f"this is given out as {' or '.join(offered)}", "Accept")
    return found


def header_values(request: ApiRequest, name: str) -> Sequence[str]:
    return [value.decode("latin-1") for value in request.requestHeaders.getRawHeaders(name.encode("ascii")) or ()]


def problem_of(error: Exception) -> tuple[ApiError, str | None]:
    """The problem to answer with when a handler has raised an exception, and its incident; logs faults of the service.

    To be called while the exception is handled.
    """
    if isinstance(error, DatabaseClosedError):
        return ServiceStoppingError(), None
    if isinstance(error, DatabaseUnavailableError):
        request = request_transactions()
        return DatabaseOutageError(may_be_done=error.may_be_done or (request is not None and request.has_written)), None
    if isinstance(error, ApiError):
        if error.status >= 500:
            _log.error("{word}: {detail}", word=error.word, detail=error.detail)
        return error, None
    return _incident(Failure())


def _incident(failure: Failure) -> tuple[ApiError, str]:
    incident = log_incident(_log, failure)
    text = f"the service failed, not your request: report incident {incident} to an operator"
    return InternalFaultError(text), incident


def _answer_routing_error(request: ApiRequest, failure: Failure) -> None:
    error = failure.value
    if isinstance(error, MethodNotAllowed):
        # werkzeug adds HEAD to GET; OPTIONS is answered here.
        allowed = ", ".join(sorted({*(error.valid_methods or ()), "OPTIONS"}))
        if request.method == b"OPTIONS":
            request.setHeader("Allow", allowed)
            write_response(request, 204, b"")
            return
        method = request.method.decode("ascii", "replace")
        text = f"{method} is not allowed at this address; allowed: {allowed}"
        write_problem(request, MethodNotAllowedError(text, None, {"Allow": allowed}))
        return
    write_problem(request, NotFoundError("the API has no such address; GET /openapi.json lists all"))


def _answer_fault(request: ApiRequest, failure: Failure) -> None:
    with log_context(request_id=request.request_id):
        write_problem(request, *_incident(failure))


class ApiResource(Resource):
    """Klein's resource with a cache of its routing, and with JSON for the errors that Klein would answer as HTML.

    Klein's routing costs as much as all the rest of an answer from memory.
    """

    isLeaf = True  # noqa: N815 - Twisted's name

    def __init__(self, klein: Klein) -> None:
        super().__init__()
        self._render: Callable[[Any], Any] = IResource(klein.resource()).render
        self._routes: dict[tuple[bytes, bytes, bytes | None], Any] = {}

    def render(self, request: ApiRequest) -> Any:
        # All that Klein's routing depends on.
        key = (request.method, request.path, request.getHeader(b"Host"))
        route = self._routes.get(key)
        if route is not None:
            _serve_cached_route(request, *route)
            return NOT_DONE_YET
        result = self._find(request)
        if request.route is not None and sum(len(part or b"") for part in key) <= _MAX_ROUTE_KEY_LENGTH:
            if len(self._routes) >= _MAX_CACHED_ROUTES:
                self._routes.clear()
            self._routes[key] = request.route
        return result

    def _find(self, request: ApiRequest) -> Any:
        try:
            if b"%" in request.path or not request.path.isascii():
                b"/".join(request.postpath or ()).decode("utf-8")
            request.method.decode("ascii")
            request.getRequestHostname().decode("ascii")
            return self._render(request)
        except (UnicodeDecodeError, HTTPException):
            # werkzeug raises an HTTPException for an invalid Host header.
            write_problem(request, InvalidInputError("the URL, the method or the Host header is not valid text"))
            request.finish()
            return NOT_DONE_YET


def _serve_cached_route(
    request: ApiRequest, serve: Callable[..., Deferred[None] | None], path_values: dict[str, Any]
) -> None:
    """Serve a request as Klein does after its routing."""
    try:
        waiting = serve(request, **path_values)
    except Exception:
        _answer_fault(request, Failure())
        waiting = None
    if waiting is None:
        request.finish()
        return

    def failed(failure: Failure) -> None:
        if not request.gone:
            _answer_fault(request, failure)
            request.finish()

    request.notifyFinish().addErrback(lambda _: waiting.cancel())
    waiting.addCallbacks(lambda _: request.finish(), failed)
    waiting.addErrback(lambda failure: _log.failure("the response could not be finished", failure))
