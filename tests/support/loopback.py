"""Parts of our small servers: a free port of loopback, a thread, TLS, and a daemon that has them as sites."""

from __future__ import annotations

import http.server
import socketserver
import ssl
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pdm.testgrid.service import TestService
from pdm.testgrid.storages import TestStorages


class LoopbackServer:
    """A server that runs in a thread within its context.

    Args:
        server: bound to its port.
        scheme: of its URL.
    """

    def __init__(self, server: socketserver.TCPServer, scheme: str) -> None:
        self._server = server
        self._scheme = scheme
        self._thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def url(self) -> str:
        return f"{self._scheme}://localhost:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class HttpHandler(http.server.BaseHTTPRequestHandler):
    """Passes all methods to one function, and writes nothing to standard error."""

    protocol_version = "HTTP/1.1"

    def serve(self) -> None:
        raise NotImplementedError

    def __getattr__(self, name: str) -> object:
        if name.startswith("do_"):
            return self.serve
        raise AttributeError(name)

    def log_message(self, *args: object) -> None:
        pass


def tls_server(
    handler: type[HttpHandler], context: ssl.SSLContext, *, handshake_in_thread: bool = False
) -> http.server.ThreadingHTTPServer:
    """An HTTPS server on a free port; with ``handshake_in_thread`` a failed handshake affects only its connection."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.socket = context.wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=not handshake_in_thread, suppress_ragged_eofs=True
    )
    return server


def grid_of(storages: TestStorages) -> dict[str, Any]:
    """What a daemon needs to know of the storages: their authority, and alice."""
    credentials = storages.credentials
    assert credentials is not None
    alice = credentials.users["alice"]
    return {
        "ca_dir": str(credentials.trust),
        "users": {"alice": {"cert": str(alice.certificate), "key": str(alice.key)}},
    }


def trust_storages(service: TestService, storages: TestStorages) -> None:
    """Have a daemon trust the users of the storages' authority."""
    assert storages.credentials is not None
    trust = service.directory / "certificates" / "trust"
    for file in storages.credentials.trust.iterdir():
        (trust / file.name).write_bytes(file.read_bytes())


def ssh_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """``[ssh]`` of a daemon, from the environment of storages."""
    names = {"key": "PDM_SSH_KEY", "known_hosts": "PDM_SSH_KNOWN_HOSTS", "user": "PDM_SSH_USER"}
    return {key: environment[name] for key, name in names.items()}


def service_of(storages: TestStorages, directory: Path, sites: str, **settings: Mapping[str, str]) -> TestService:
    """A daemon, not started, for alice: it trusts the storages' authority, and has the given sites."""
    grid = grid_of(storages)
    service = TestService(directory, grid)
    service.init(credentials={"trust_dir": grid["ca_dir"]}, **settings)
    trust_storages(service, storages)
    (service.directory / "sites.d" / "sites.conf").write_text(sites)
    return service
