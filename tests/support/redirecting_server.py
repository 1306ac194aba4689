"""A small WebDAV server over TLS that can redirect transfers, like dCache and EOS."""

from __future__ import annotations

import http.server
import ssl
import zlib
from pathlib import Path
from typing import NamedTuple

from tests.support.loopback import HttpHandler, LoopbackServer, tls_server

_DIRECTORIES = ("/directory", "/bad")


class Seen(NamedTuple):
    """A received request."""

    method: str
    path: str
    token: str | None
    certificate: bool


class RedirectingServer(LoopbackServer):
    """``https://localhost:PORT``.

    Args:
        certificate: of the host.
        key: of the certificate.
        trust: directory of authorities for client certificates, which it requests.

    Attributes:
        files: path → content.
        elsewhere: method → prefix of the ``Location`` in its response; the path follows.
        seen: all requests.
        broken: prefix of paths of PUT → status of the response; 0 closes the connection instead.
        echoes: whether what it does not have is an error with the request's head.
        wants_first: whether it sends ``100 Continue`` if the client expects it.
    """

    def __init__(self, certificate: Path, key: Path, trust: Path) -> None:
        self.files: dict[str, bytes] = {}
        self.elsewhere: dict[str, str] = {}
        self.broken: dict[str, int] = {}
        self.seen: list[Seen] = []
        self.echoes = False
        self.wants_first = True
        outer = self

        class Handler(HttpHandler):
            def serve(self) -> None:
                outer._serve(self)

            def handle_expect_100(self) -> bool:
                # A redirect replaces ``100 Continue``.
                if outer.wants_first and self.command not in outer.elsewhere:
                    self.send_response_only(100)
                    self.end_headers()
                return True

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        context.load_verify_locations(capath=str(trust))
        context.verify_mode = ssl.CERT_OPTIONAL
        context.verify_flags |= ssl.VERIFY_ALLOW_PROXY_CERTS
        super().__init__(tls_server(Handler, context), "https")

    def _serve(self, request: http.server.BaseHTTPRequestHandler) -> None:
        method, path = request.command, request.path.partition("?")[0]
        certificate = bool(request.connection.getpeercert())
        self.seen.append(Seen(method, request.path, request.headers["Authorization"], certificate))
        if method in self.elsewhere:
            # The body is not read, like in servers that redirect: the connection cannot be reused.
            request.close_connection = True
            _answer(request, 307, Location=self.elsewhere[method] + path)
        elif method == "PUT" and (failing := [self.broken[each] for each in self.broken if path.startswith(each)]):
            request.close_connection = True
            if failing[0]:
                request.rfile.read(int(request.headers["Content-Length"]))
                _answer(request, failing[0])
        elif method == "PUT":
            self.files[path] = request.rfile.read(int(request.headers["Content-Length"]))
            _answer(request, 201)
        elif method == "PROPFIND" and (path in self.files or path in _DIRECTORIES):
            kind = "<D:collection/>" if path in _DIRECTORIES else ""
            size = len(self.files.get(path, b""))
            _answer(
                request,
                207,
                f"<D:multistatus><D:response><D:href>{path}</D:href><D:getcontentlength>{size}</D:getcontentlength>"
                f"<D:resourcetype>{kind}</D:resourcetype></D:response></D:multistatus>".encode(),
            )
        elif method == "COPY":
            self.files[path] = self.files["/" + request.headers["Source"].split("/", 3)[3]]
            _answer(request, 201, b"success: Created\n")
        elif method == "MOVE" and path in self.files:
            self.files["/" + request.headers["Destination"].split("/", 3)[3]] = self.files.pop(path)
            _answer(request, 201)
        elif method in ("GET", "HEAD") and path in self.files:
            _answer(request, 200, self.files[path], Digest=f"adler32={zlib.adler32(self.files[path]):08x}")
        elif method == "DELETE" and self.files.pop(path, None) is not None:
            _answer(request, 204)
        elif self.echoes:
            _answer(request, 500, str(request.headers).encode())
        else:
            _answer(request, 404)


def _answer(request: http.server.BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str) -> None:
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)
