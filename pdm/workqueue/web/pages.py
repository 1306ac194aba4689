"""Routes of the pages: declare their handlers, decode queries and forms, write pages, files and redirections.

A handler gets its `Visit`, and as keywords the values of the path, ``query`` and ``form``. It returns a `Page`, a
`Redirect` or a `Download`; errors become a page with their status. The address of a page with ``?fragment=NAME`` gives
only those blocks of its template, for ``live.js``.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import quote, unquote

import msgspec
from attrs import field, frozen
from twisted.internet.defer import CancelledError, Deferred

from pdm.workqueue.http.access import Authenticator, Caller
from pdm.workqueue.http.app import (
    REQUEST_PATIENCE_S,
    PageRoute,
    admitted_caller,
    header_values,
    problem_of,
    run_eagerly,
)
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.decoding import invalid_value, url_pairs
from pdm.workqueue.http.endpoint import JsonStream
from pdm.workqueue.http.problems import (
    ApiError,
    InvalidInputError,
    NotAuthenticatedError,
    NotFoundError,
    UnsupportedMediaTypeError,
)
from pdm.workqueue.http.request import ApiRequest, write_problem, write_response, write_stream
from pdm.workqueue.store.outages import begin_request
from pdm.workqueue.telemetry.logging import log_context
from pdm.workqueue.web.rendering import Renderer, static_file

HTML = b"text/html; charset=utf-8"
_FORM = "application/x-www-form-urlencoded"
#: Of each page: nothing is loaded from elsewhere, framed, or sent elsewhere; no script or style stands in a page.
_HEADERS = {
    b"Content-Security-Policy": b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    b"Referrer-Policy": b"no-referrer",
    b"Cross-Origin-Opener-Policy": b"same-origin",
    b"Cross-Origin-Resource-Policy": b"same-origin",
}
#: Cookie with the message of an act, for the view that is shown next.
_MESSAGE_COOKIE = "pdm_message"
_MESSAGE_ATTRIBUTES = "Path=/; HttpOnly; Secure; SameSite=Strict"
_LONGEST_MESSAGE = 500
#: Fields of a form: a selection of files has one for each.
_MAX_FIELDS = 10_000
_FRAGMENT = "fragment"
_MAX_FRAGMENTS = 20
#: Characters of a file name that all systems and headers accept.
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")

_S = TypeVar("_S", bound=msgspec.Struct)


@frozen(eq=False)
class Visit:
    """One request of a page: the parts of the service, the caller, and which fragments are wanted.

    Attributes:
        fragments: names of blocks; empty for the whole page.
    """

    api: ApiContext
    caller: Caller
    fragments: Sequence[str] = ()

    def wants(self, *fragments: str) -> bool:
        """Whether any of these blocks is rendered, and needs its data."""
        return not self.fragments or any(fragment in self.fragments for fragment in fragments)


@frozen(kw_only=True)
class Page:
    """A page: its template, and what it shows.

    Attributes:
        problem: of an act that failed, shown at the top.
    """

    template: str
    context: Mapping[str, Any] = field(factory=dict)
    status: int = 200
    problem: ApiError | None = None


@frozen
class Redirect:
    """The view that is shown after an act, and one line about it."""

    url: str
    message: str = ""


@frozen(kw_only=True)
class Download:
    """A file that the browser saves, in pieces; `name` may be any text."""

    pieces: AsyncGenerator[bytes]
    name: str
    media_type: str


PageHandler = Callable[..., Awaitable[Page | Redirect | Download]]


@frozen(eq=False, kw_only=True)
class PageEndpoint:
    """A page or an act; ``path`` is in the syntax of Klein, ``query`` and ``form`` are structs."""

    method: str
    path: str
    handler: PageHandler
    query: type[msgspec.Struct] | None = None
    form: type[msgspec.Struct] | None = None


def page(
    method: str, path: str, *, query: type[msgspec.Struct] | None = None, form: type[msgspec.Struct] | None = None
) -> Callable[[PageHandler], PageEndpoint]:
    """Declare the route of a handler; the function is replaced by its `PageEndpoint`."""

    def declare(handler: PageHandler) -> PageEndpoint:
        return PageEndpoint(method=method, path=path, handler=handler, query=query, form=form)

    return declare


def decode_fields(pairs: Sequence[tuple[str, str]], type_: type[_S]) -> _S:
    """The fields of a query or a form as a struct; an empty value counts as none.

    Raises:
        InvalidInputError: a field is unknown, given twice or invalid.
    """
    fields = {each.encode_name: each for each in msgspec.structs.fields(type_)}
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name not in fields:
            raise InvalidInputError(f"unknown field {name[:100]!r}; known are {', '.join(fields) or 'none'}", name)
        if not value:
            continue
        if fields[name].default == ():
            values.setdefault(name, []).append(value)
        elif name in values:
            raise InvalidInputError(f"the field {name} is given twice", name)
        else:
            values[name] = value
    try:
        return msgspec.convert(values, type_, strict=False)
    except msgspec.ValidationError as error:
        problem = invalid_value(error, type_, "")
        raise InvalidInputError(problem.detail, (problem.pointer or "").strip(".") or None) from error


def safe_file_name(name: str) -> str:
    """A name under which any system saves a file."""
    return _UNSAFE.sub("_", name).strip("._")[:150] or "download"


@frozen(eq=False)
class PageRouteHandler:
    """Serves one page."""

    endpoint: PageEndpoint
    context: ApiContext
    authenticator: Authenticator
    renderer: Renderer

    def route(self) -> PageRoute:
        endpoint = self.endpoint
        name = f"page {endpoint.method} {endpoint.path}"
        return PageRoute(method=endpoint.method, rule=endpoint.path, name=name, serve=self.serve)

    def serve(self, request: ApiRequest, **path_values: Any) -> Deferred[None] | None:
        """Answer a request, errors included."""
        request.route = (self.serve, path_values)
        request.template = self.endpoint.path
        return run_eagerly(self._serve(request, path_values))

    async def _serve(self, request: ApiRequest, path_values: dict[str, Any]) -> None:
        transactions = begin_request(REQUEST_PATIENCE_S)
        with log_context(request_id=request.request_id) as fields:
            caller: Caller | None = None
            try:
                caller = await admitted_caller(request, self.context, self.authenticator, fields)
                await self._answer(request, caller, path_values)
            except CancelledError:
                raise
            except Exception as error:
                problem, incident = problem_of(error)
                if isinstance(problem, NotAuthenticatedError):
                    write_problem(request, problem)
                    return
                await self._write_problem(request, caller, problem, incident)
            finally:
                transactions.is_over = True

    async def _answer(self, request: ApiRequest, caller: Caller, path_values: dict[str, Any]) -> None:
        endpoint, arguments = self.endpoint, dict(path_values)
        pairs = url_pairs(request.uri.partition(b"?")[2]) if b"?" in request.uri else []
        fragments = [value for name, value in pairs if name == _FRAGMENT][:_MAX_FRAGMENTS]
        pairs = [pair for pair in pairs if pair[0] != _FRAGMENT]
        if endpoint.query is not None:
            arguments["query"] = decode_fields(pairs, endpoint.query)
        elif pairs:
            raise InvalidInputError(f"this page has no parameter {pairs[0][0][:100]!r}", pairs[0][0])
        if endpoint.form is not None:
            arguments["form"] = decode_fields(_form_pairs(request), endpoint.form)
        visit = Visit(self.context, caller, fragments)
        result = await endpoint.handler(visit, **arguments)
        if isinstance(result, Page):
            await self._write_page(request, visit, result)
        elif isinstance(result, Redirect):
            _write_redirect(request, result)
        else:
            set_page_headers(request)
            name = safe_file_name(result.name)
            request.setHeader(b"Content-Disposition", f'attachment; filename="{name}"'.encode("ascii"))
            await write_stream(request, 200, JsonStream(result.pieces, media_type=result.media_type))

    async def _write_page(self, request: ApiRequest, visit: Visit, shown: Page) -> None:
        message = "" if visit.fragments else _take_message(request)
        problem = None if shown.problem is None else shown.problem.problem(request.request_id)
        context = {**shown.context, "caller": visit.caller, "message": message, "problem": problem}
        context |= {"now": self.context.clock(), "path": request.path.decode("ascii", "replace")}
        # A large page takes tens of milliseconds.
        text = await self.context.in_thread(self.renderer.render, shown.template, context, visit.fragments)
        set_page_headers(request)
        write_response(request, shown.status, text.encode("utf-8", "replace"), HTML)

    async def _write_problem(
        self, request: ApiRequest, caller: Caller | None, error: ApiError, incident: str | None
    ) -> None:
        problem = error.problem(request.request_id, incident)
        context = {"caller": caller, "message": "", "problem": problem, "now": self.context.clock(), "path": ""}
        text = await self.context.in_thread(self.renderer.render, "error.html", context, ())
        set_page_headers(request)
        for name, value in error.headers.items():
            request.setHeader(name, value)
        write_response(request, error.status, text.encode("utf-8", "replace"), HTML)


@frozen(eq=False)
class StaticFiles:
    """Serves the stylesheet, the module and the pictures of the pages to everybody: they are the same for all."""

    def route(self) -> PageRoute:
        return PageRoute(method="GET", rule="/web/static/<word:name>", name="page static", serve=self.serve)

    def serve(self, request: ApiRequest, name: str) -> None:
        """Answer a request; an address with the digest of the content is cached for good."""
        request.template = "/web/static/<word:name>"
        found = static_file(name)
        if found is None:
            write_response(request, 404, b"there is no such file\n", b"text/plain; charset=us-ascii")
            return
        set_page_headers(request)
        is_current = request.uri.partition(b"?")[2] == b"v=" + found.digest.encode("ascii")
        request.setHeader(b"Cache-Control", b"max-age=31536000, immutable" if is_current else b"no-cache")
        request.setHeader(b"ETag", f'"{found.digest}"'.encode("ascii"))
        if f'"{found.digest}"' in header_values(request, "If-None-Match"):
            write_response(request, 304, b"")
        else:
            write_response(request, 200, found.content, found.media_type.encode("ascii"))


@page("GET", "/web/<path:rest>")
async def unknown_page(_visit: Visit, rest: str) -> Page:
    """Every other address below ``/web/``."""
    raise NotFoundError(f"there is no page /web/{rest[:200]}")


def routes_of(endpoints: Sequence[PageEndpoint], context: ApiContext, authenticator: Authenticator) -> list[PageRoute]:
    """The routes of a table of pages, with the static files."""
    renderer = Renderer()
    handlers = [PageRouteHandler(each, context, authenticator, renderer) for each in endpoints]
    return [*(handler.route() for handler in handlers), StaticFiles().route()]


def _form_pairs(request: ApiRequest) -> list[tuple[str, str]]:
    for value in header_values(request, "Content-Type"):
        media_type = value.partition(";")[0].strip().lower()
        if media_type != _FORM:
            raise UnsupportedMediaTypeError(f"{_FORM} is expected, not {media_type[:100]}", "Content-Type")
    body = request.body()
    return url_pairs(body, _MAX_FIELDS) if body else []


def set_page_headers(request: ApiRequest) -> None:
    """Set the headers of every page, which keep a browser from loading, framing or sending anything elsewhere."""
    for name, value in _HEADERS.items():
        request.setHeader(name, value)


def _write_redirect(request: ApiRequest, redirect: Redirect) -> None:
    set_page_headers(request)
    request.setHeader(b"Location", redirect.url.encode("ascii"))
    if redirect.message:
        value = quote(redirect.message[:_LONGEST_MESSAGE], safe="")
        cookie = f"{_MESSAGE_COOKIE}={value}; Max-Age=60; {_MESSAGE_ATTRIBUTES}"
        request.responseHeaders.addRawHeader(b"Set-Cookie", cookie.encode("ascii"))
    write_response(request, 303, b"")


def _take_message(request: ApiRequest) -> str:
    """The message of the act before, which is shown once."""
    value = request.getCookie(_MESSAGE_COOKIE.encode("ascii"))
    if not value:
        return ""
    cookie = f"{_MESSAGE_COOKIE}=; Max-Age=0; {_MESSAGE_ATTRIBUTES}"
    request.responseHeaders.addRawHeader(b"Set-Cookie", cookie.encode("ascii"))
    return unquote(value.decode("ascii", "replace"))
