"""A small WebDAV server over TLS that can send its clients elsewhere, as those of dCache and EOS do for bytes."""

from __future__ import annotations

import http.server
import ssl
import threading
import zlib
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

_FOLDERS = ("/folder", "/bad")


class Seen(NamedTuple):
    """A request that came."""

    method: str
    path: str
    token: str | None
    certificate: bool


class RedirectingServer:
    """``https://localhost:PORT``.

    Args:
        certificate: of the host.
        key: of the certificate.
        trust: folder of authorities for certificates of clients, which it asks for.

    Attributes:
        files: path → content.
        elsewhere: method → what the ``Location`` of its answer is put together of: this, and the path.
        seen: all requests.
        broken: what paths of PUT begin with → the status that answers them; 0 ends the connection instead.
        wants_first: whether it says that it wants the bytes of a file, where it is asked.
    """

    def __init__(self, certificate: Path, key: Path, trust: Path) -> None:
        self.files: dict[str, bytes] = {}
        self.elsewhere: dict[str, str] = {}
        self.broken: dict[str, int] = {}
        self.seen: list[Seen] = []
        self.wants_first = True
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def __getattr__(self, name: str) -> object:
                if name.startswith("do_"):
                    return lambda: outer._serve(self)
                raise AttributeError(name)

            def handle_expect_100(self) -> bool:
                # A redirect comes in place of the word that the bytes may come.
                if outer.wants_first and self.command not in outer.elsewhere:
                    self.send_response_only(100)
                    self.end_headers()
                return True

            def log_message(self, *args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        context.load_verify_locations(capath=str(trust))
        context.verify_mode = ssl.CERT_OPTIONAL
        context.verify_flags |= ssl.VERIFY_ALLOW_PROXY_CERTS
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def url(self) -> str:
        return f"https://localhost:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _serve(self, request: http.server.BaseHTTPRequestHandler) -> None:
        method, path = request.command, request.path.partition("?")[0]
        certificate = bool(request.connection.getpeercert())
        self.seen.append(Seen(method, request.path, request.headers["Authorization"], certificate))
        if method in self.elsewhere:
            # The bytes are not read, as at a door that keeps none: the connection is of no more use.
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
        elif method == "PROPFIND" and (path in self.files or path in _FOLDERS):
            kind = "<D:collection/>" if path in _FOLDERS else ""
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
