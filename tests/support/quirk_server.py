"""A small WebDAV server over TLS with the quirks of real servers on demand: refuse, fold names, close connections."""

from __future__ import annotations

import contextlib
import http.server
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote_from_bytes, unquote_to_bytes, urlsplit

from tests.support.loopback import HttpHandler, LoopbackServer, tls_server


class Request(NamedTuple):
    """A received request; the path is decoded and keeps its slash."""

    method: str
    path: bytes
    headers: Mapping[str, str]


class Reply(NamedTuple):
    """A response; a status of 0 closes the connection instead."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = {}


#: Answers a request instead of the server; None leaves it to the server.
Rule = Callable[[Request], Reply | None]


def on(method: str, status: int, body: bytes = b"", at: bytes = b"", **headers: str) -> Rule:
    """A rule for each request of a method whose path begins with ``at``."""
    reply = Reply(status, body, {name.replace("_", "-"): value for name, value in headers.items()})
    return lambda request: reply if request.method == method and request.path.startswith(at) else None


class QuirkServer(LoopbackServer):
    """``https://localhost:PORT``, all in memory.

    Args:
        certificate: of the host.
        key: of the certificate.

    Attributes:
        tree: path without a slash at its end → content; None for a directory.
        rules: called in turn before the server answers itself.
        name_of: returns the name under which a name is stored and found.
        written: writes a resource of a multistatus: href, content.
        seen: all requests.
        server: its ``Server`` header.
        hangs_up: whether it closes each connection after a response, without announcing it.
        ignores_expect: whether it sends no ``100 Continue``.
        most_read: bytes of a body that are read before a rule's response closes the connection; None for all.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        outer = self

        class Handler(HttpHandler):
            def serve(self) -> None:
                outer._serve(self)

            def handle_expect_100(self) -> bool:
                # Rules are called before the body is read: an error replaces ``100 Continue``.
                if outer._ruled(self) is None and not outer.ignores_expect:
                    self.send_response_only(100)
                    self.end_headers()
                return True

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server = tls_server(Handler, context, handshake_in_thread=True)
        server.daemon_threads = True
        super().__init__(server, "https")
        self.tree: dict[bytes, bytes | None] = {b"": None, b"/d": None}
        self.rules: list[Rule] = []
        self.name_of: Callable[[bytes], bytes] = lambda path: path
        self.written = written
        self.seen: list[Request] = []
        self.server = "Quirks"
        self.hangs_up = False
        self.ignores_expect = False
        self.most_read: int | None = None

    def methods(self, path: bytes = b"") -> list[str]:
        """Methods of the requests for paths with this prefix."""
        return [request.method for request in self.seen if request.path.startswith(path)]

    def _ruled(self, handler: http.server.BaseHTTPRequestHandler) -> Reply | None:
        request = _request(handler)
        return next((reply for rule in self.rules if (reply := rule(request)) is not None), None)

    def _serve(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        request = _request(handler)
        self.seen.append(request)
        reply = self._ruled(handler)
        asked_first = "100-continue" in request.headers.get("Expect", "") and not self.ignores_expect
        body = b""
        if reply is None or not asked_first:
            length = int(request.headers.get("Content-Length") or 0)
            if reply is not None and self.most_read is not None and self.most_read < length:
                length, handler.close_connection = self.most_read, True
            body = handler.rfile.read(length)
        else:
            # The body was never sent.
            handler.close_connection = True
        reply = reply or self._own(request, body)
        if reply.status == 0:
            handler.close_connection = True
            return
        handler.server_version, handler.sys_version = self.server, ""
        handler.send_response(reply.status)
        for name, value in reply.headers.items():
            handler.send_header(name, value)
        if "Content-Length" not in reply.headers and "Transfer-Encoding" not in reply.headers:
            handler.send_header("Content-Length", str(len(reply.body)))
        handler.end_headers()
        if request.method != "HEAD":
            # A client may close the connection early.
            with contextlib.suppress(OSError):
                handler.wfile.write(reply.body)
        handler.close_connection = handler.close_connection or self.hangs_up

    def _own(self, request: Request, body: bytes) -> Reply:
        path = self.name_of(request.path.rstrip(b"/"))
        there = path in self.tree
        match request.method:
            case "OPTIONS":
                return Reply(200)
            case "PROPFIND" if there:
                return Reply(207, self._listing(path, request.headers.get("Depth", "1")))
            case "GET" | "HEAD" if there and self.tree[path] is not None:
                return Reply(200, self.tree[path] or b"")
            case "PUT":
                self.tree[path] = body
                return Reply(201)
            case "MKCOL":
                if there:
                    return Reply(405)
                if path.rpartition(b"/")[0] not in self.tree:
                    return Reply(409)
                self.tree[path] = None
                return Reply(201)
            case "DELETE" if there:
                for inner in [key for key in self.tree if key == path or key.startswith(path + b"/")]:
                    del self.tree[inner]
                return Reply(204)
            case "MOVE" if there:
                target = unquote_to_bytes(urlsplit(request.headers["Destination"]).path)
                return self._move(path, self.name_of(target.rstrip(b"/")), request.headers.get("Overwrite") != "F")
        return Reply(501 if request.method in ("COPY", "POST") else 404)

    def _move(self, old: bytes, new: bytes, replace: bool) -> Reply:
        if new in self.tree and not replace:
            return Reply(412)
        for inner in [key for key in self.tree if key == old or key.startswith(old + b"/")]:
            self.tree[new + inner[len(old) :]] = self.tree.pop(inner)
        return Reply(201)

    def _listing(self, path: bytes, depth: str) -> bytes:
        found = [path]
        if depth == "1":
            found += [key for key in sorted(self.tree) if key.rpartition(b"/")[0] == path and key != path]
        entries = b"".join(self.written(key, self.tree[key]) for key in found)
        return b'<?xml version="1.0"?>\n<D:multistatus xmlns:D="DAV:">' + entries + b"</D:multistatus>"


def _request(handler: http.server.BaseHTTPRequestHandler) -> Request:
    return Request(handler.command, unquote_to_bytes(handler.path.partition("?")[0]), dict(handler.headers.items()))


def written(path: bytes, content: bytes | None) -> bytes:
    """A response element of a multistatus in the usual form."""
    if content is None:
        href, properties = quote_from_bytes(path) + "/", "<D:resourcetype><D:collection/></D:resourcetype>"
    else:
        href = quote_from_bytes(path)
        properties = f"<D:resourcetype/><D:getcontentlength>{len(content)}</D:getcontentlength>"
    return (
        f"<D:response><D:href>{href}</D:href><D:propstat><D:prop>{properties}</D:prop>"
        "<D:status>HTTP/1.1 200 OK</D:status></D:propstat></D:response>"
    ).encode()
