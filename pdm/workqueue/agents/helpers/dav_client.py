"""HTTPS to WebDAV servers: one kept connection a server, client certificate or token, errors as storage knows them.

``X509_CERT_DIR`` names the trusted authorities, ``PDM_TRUST`` those for single servers, ``X509_USER_PROXY`` the
client's certificate with its key, ``PDM_CREDENTIALS`` the files with bearer tokens, each for one server only.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import re
import socket
import ssl
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pdm.workqueue.agents.helpers.endpoints import credential_at, trust_at
from pdm.workqueue.agents.helpers.storage import Patience, StoppedError, StorageError, shortened

_LONGEST_ERROR = 4000
_LEAST_S = 0.05
_NOT_TWICE = frozenset({"PUT", "COPY", "MOVE", "DELETE", "MKCOL"})
#: Seconds in which a server that does not want us says so.
_HANG_UP_S = 3.0
#: How a connection ends under a server that does not want us, or that dies.
_HUNG_UP = (ssl.SSLEOFError, ConnectionResetError, BrokenPipeError, http.client.RemoteDisconnected)
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{1,16384}", re.ASCII)
_BY_STATUS = {
    403: errno.EACCES,
    404: errno.ENOENT,
    405: errno.EOPNOTSUPP,
    409: errno.ENOENT,
    412: errno.EEXIST,
    414: errno.ENAMETOOLONG,
    501: errno.EOPNOTSUPP,
    507: errno.ENOSPC,
}
#: What servers write into the body of any status; XRootD says so in the words of the system.
_BY_TEXT = (
    ("no space left", errno.ENOSPC),
    ("quota exceeded", errno.EDQUOT),
    ("permission denied", errno.EACCES),
    ("operation not permitted", errno.EACCES),
    ("no such file", errno.ENOENT),
    ("not empty", errno.ENOTEMPTY),
    ("not a directory", errno.ENOTDIR),
    ("is a directory", errno.EISDIR),
    ("file exists", errno.EEXIST),
    ("name too long", errno.ENAMETOOLONG),
    ("read-only", errno.EROFS),
)


def errno_of(text: str) -> int | None:
    """The error that a sentence of a server tells of.

    What comes before the last semicolon names the file, which may be called ``permission denied``.
    """
    lowered = text.rpartition(";")[2].lower()
    return next((number for words, number in _BY_TEXT if words in lowered), None)


class DavClient:
    """The connections of one lane; one thread uses them, any may interrupt."""

    def __init__(self) -> None:
        self.patience: Patience
        self._connections: dict[str, http.client.HTTPSConnection] = {}
        #: Folder of authorities → what is checked with it.
        self._contexts: dict[str | None, ssl.SSLContext] = {}
        self._busy: http.client.HTTPSConnection | None = None
        self._servers: dict[str, str] = {}
        self.interrupted = False

    def open(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str | bytes] | None = None,
        body: bytes | Iterable[bytes] | None = None,
        good: tuple[int, ...] = (200,),
    ) -> http.client.HTTPResponse:
        """Send a request; the answer is to be read to its end, or closed by `drop`.

        Args:
            method: of HTTP.
            url: percent-encoded.
            headers: besides those of the credential.
            body: what is sent with it.
            good: the statuses that are no error.

        Raises:
            StorageError: there was no answer, or a status that is not good.
        """
        self.check_name(url)
        authority, path = _parts(url)
        kept = authority in self._connections
        try:
            answer = self._ask(authority, method, path, headers or {}, body)
        except StorageError as trouble:
            # A kept connection may have been closed meanwhile: once more, if nothing can have been done by it.
            if not kept and isinstance(trouble.__cause__, _HUNG_UP) and (why := self._why_hung_up(authority)):
                raise why from trouble
            if not (kept and trouble.lost) or method in _NOT_TWICE:
                raise
            answer = self._ask(authority, method, path, headers or {}, body)
        if answer.status not in good:
            with self._guarded(authority):
                said = answer.read(_LONGEST_ERROR).decode("utf-8", "backslashreplace").strip()
            self.drop(url)
            raise self._refusal(method, url, answer.status, answer.reason, said)
        return answer

    def read(self, url: str, answer: http.client.HTTPResponse, most: int, least_s: float = 0.0) -> bytes:
        """A piece of an answer, waited for as long as we are patient, or ``least_s``; empty at its end."""
        self._set_timeout(_parts(url)[0], least_s)
        with self._guarded(_parts(url)[0]):
            piece = answer.read1(most)
            if not piece:
                # Without this the connection would not take the next request.
                answer.close()
            return piece

    def call(self, method: str, url: str, **named: Any) -> http.client.HTTPResponse:
        """Send a request and read its answer, of which nothing but the head matters."""
        answer = self.open(method, url, **named)
        while self.read(url, answer, _LONGEST_ERROR):
            pass
        return answer

    def is_xrootd(self, url: str) -> bool:
        """Whether a server is XRootD's, as it tells itself."""
        authority, _ = _parts(url)
        if authority not in self._servers:
            self._ask(authority, "OPTIONS", "/", {}, None).read()
        return self._servers[authority].startswith("xrootd")

    def check_name(self, url: str) -> None:
        """Raise `StorageError` for a name that XRootD would take for another: it cuts paths at ``?``, however encoded.

        Without this the removal of ``data?`` would remove ``data``.
        """
        if "%3f" in url.lower() and self.is_xrootd(url):
            raise StorageError(f"{url}: this server cannot hold names with a question mark", errno=errno.EILSEQ)

    def drop(self, url: str) -> None:
        """End the connection with a server, and with it what is under way there."""
        connection = self._connections.pop(_parts(url)[0], None)
        if connection is not None:
            connection.close()

    def interrupt(self) -> None:
        """End what is under way, from any thread."""
        self.interrupted = True
        busy = self._busy
        sock = None if busy is None else busy.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    # -- one request

    def _ask(
        self,
        authority: str,
        method: str,
        path: str,
        headers: Mapping[str, str | bytes],
        body: bytes | Iterable[bytes] | None,
    ) -> http.client.HTTPResponse:
        connection = self._connected(authority)
        with self._guarded(authority):
            connection.request(method, path, body, {**self.credentials(authority), **headers})
            answer = connection.getresponse()
        self._servers[authority] = (answer.getheader("Server") or "").lower()
        return answer

    def _why_hung_up(self, authority: str) -> StorageError | None:
        """What a server has against our certificate; None if it has nothing, or cannot be asked.

        It says so after the handshake, and ends the connection: to who is still sending a request its word is lost.
        """
        connection = http.client.HTTPSConnection(
            authority, context=self._tls(authority), timeout=min(self._timeout_s(), _HANG_UP_S)
        )
        try:
            connection.connect()
            connection.sock.recv(1)
        except OSError as error:
            why = self._lost(authority, error)
            return why if (why.code or "").startswith("CREDENTIAL_") else None
        finally:
            connection.close()
        return None

    def _connected(self, authority: str) -> http.client.HTTPSConnection:
        if self.interrupted:
            raise StoppedError
        connection = self._connections.get(authority)
        if connection is None or connection.sock is None:
            connection = http.client.HTTPSConnection(authority, context=self._tls(authority), timeout=self._timeout_s())
            self._connections[authority] = connection
            with self._guarded(authority):
                connection.connect()
        self._set_timeout(authority)
        return connection

    def _timeout_s(self) -> float:
        left = self.patience.until - time.monotonic()
        return max(min(self.patience.stall_s, left), _LEAST_S)

    def _set_timeout(self, authority: str, least_s: float = 0.0) -> None:
        connection = self._connections.get(authority)
        if connection is not None and connection.sock is not None:
            connection.sock.settimeout(max(self._timeout_s(), least_s))

    @contextlib.contextmanager
    def _guarded(self, authority: str) -> Any:
        """Turn what goes wrong on the way into errors of the storage; the connection is then gone."""
        self._busy = self._connections.get(authority)
        try:
            yield
        except (OSError, http.client.HTTPException) as error:
            connection = self._connections.pop(authority, None)
            if connection is not None:
                connection.close()
            if self.interrupted:
                raise StoppedError from error
            raise self._lost(authority, error) from error
        finally:
            self._busy = None

    def _lost(self, authority: str, error: Exception) -> StorageError:
        text = f"{authority}: {str(error) or type(error).__name__}"
        if isinstance(error, TimeoutError):
            stalled = time.monotonic() < self.patience.until
            return StorageError(text, code="STALLED" if stalled else "TIMEOUT")
        if isinstance(error, ssl.SSLCertVerificationError):
            return StorageError(text, code="CERTIFICATE")
        if isinstance(error, ssl.SSLError) and "ALERT" in text.upper():
            if "EXPIRED" in text.upper():
                return StorageError(text, code="CREDENTIAL_EXPIRED", scope="service")
            return StorageError(text, code="CREDENTIAL_REFUSED")
        return StorageError(text, code="CONNECTION", lost=True)

    @staticmethod
    def _refusal(method: str, url: str, status: int, reason: str, said: str) -> StorageError:
        text = f"{method} {url}: {status} {reason}: {shortened(said, 500)}"
        if status == http.HTTPStatus.UNAUTHORIZED and errno_of(said) is None:
            return StorageError(text, code="CREDENTIAL_REFUSED")
        if status in (http.HTTPStatus.BAD_GATEWAY, http.HTTPStatus.SERVICE_UNAVAILABLE):
            return StorageError(text, code="CONNECTION")
        return StorageError(text, errno=errno_of(said) or _BY_STATUS.get(status))

    # -- who we are

    @staticmethod
    def credentials(authority: str) -> dict[str, str]:
        """The headers that tell a server who asks; another server's token never goes there."""
        given = credential_at(("https", "davs"), authority)
        if given is None:
            return {}
        try:
            token = Path(given.file).read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:
            raise StorageError(
                f"the token cannot be read: {type(error).__name__}", code="CREDENTIAL_MISSING", scope="service"
            ) from error
        if not _TOKEN.fullmatch(token):
            raise StorageError("that is no bearer token", code="CREDENTIAL_MISSING", scope="service")
        return {"Authorization": f"Bearer {token}"}

    def _tls(self, authority: str) -> ssl.SSLContext:
        trust = trust_at(authority)
        if trust not in self._contexts:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            try:
                context.load_verify_locations(capath=trust or None)
                if proxy := os.environ.get("X509_USER_PROXY"):
                    context.load_cert_chain(proxy)
            except (OSError, TypeError) as error:
                raise StorageError(
                    f"the credential or the authorities cannot be read: {error}",
                    code="CREDENTIAL_MISSING",
                    scope="service",
                ) from error
            self._contexts[trust] = context
        return self._contexts[trust]


def _parts(url: str) -> tuple[str, str]:
    authority, slash, path = url.partition("://")[2].partition("/")
    return authority, slash + path or "/"
