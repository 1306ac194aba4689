"""HTTPS client of storage backends: persistent connections, credentials, redirects, errors as `StorageError`.

The target of a redirect gets none of the user's credentials (`http_servers`); redirects of dCache, EOS and XRootD have
an authorization in the URL.
"""

from __future__ import annotations

import contextlib
import errno
import re
import ssl
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from http import HTTPStatus

import h11

from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers import lease
from pdm.workqueue.helpers.backends.http_connection import HttpConnection
from pdm.workqueue.helpers.backends.http_errors import error_from_response
from pdm.workqueue.helpers.backends.http_plain import ResponseHead
from pdm.workqueue.helpers.backends.http_servers import Server, TlsContexts, authorization, known_server
from pdm.workqueue.helpers.credentials import check_server, trust_at
from pdm.workqueue.helpers.storage import StoppedError, StorageError, Timeouts, truncated

_MAX_ERROR_TEXT = 4000
_MIN_TIMEOUT_S = 0.05
#: Not repeated after a lost connection: the server may have executed them.
_NOT_REPEATABLE = frozenset({"COPY", "MOVE", "DELETE", "MKCOL", "POST"})
#: Methods whose redirects are followed: servers of dCache, EOS and XRootD redirect the transfer of bytes.
_REDIRECTED = frozenset({"GET", "HEAD", "PUT", "COPY"})
REDIRECTS, _MAX_REDIRECTS = (301, 302, 303, 307, 308), 5
#: Methods for which a redirect that adds a slash to a directory's name is followed. Not DELETE: a former file may be
#: a whole tree now.
_SLASH_ADDED = frozenset({"PROPFIND", "MKCOL", "MOVE", "COPY", "HEAD", "OPTIONS"})
#: Maximum bytes of a body that are read to keep the connection.
_MAX_UNUSED_BODY = 1024 * 1024
#: Seconds for a server that has closed a connection to answer on a new one.
_PROBE_S = 3.0
#: Codes of a server that could not be reached.
UNREACHABLE = frozenset({FailureCode.CONNECTION, FailureCode.STALLED, FailureCode.TIMEOUT})
_CREDENTIAL_CODES = frozenset({FailureCode.CREDENTIAL_EXPIRED, FailureCode.CREDENTIAL_REFUSED})
_AUTHORITY = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?", re.ASCII)
_ASCII = re.compile(r"[\x21-\x7e]+")

Headers = Mapping[str, str | bytes]
Body = bytes | Iterator[bytes]


class HttpResponse:
    """The response to a request: its head was received, its body must be read to the end or dropped."""

    def __init__(self, client: HttpClient, server: Server, connection: HttpConnection, head: ResponseHead) -> None:
        self._client = client
        self._connection = connection
        self._headers = head.headers
        self._has_ended = False
        self.server = server
        self.has_sent_body = connection.has_sent_body
        self.status = head.status
        self.reason = head.reason.decode("latin-1")

    def header(self, name: str) -> str | None:
        """The values of a header, joined by commas; None if there is none."""
        values = [value.decode("latin-1") for key, value in self._headers if key == name.lower().encode()]
        return ", ".join(values) if values else None

    def read(self, min_timeout_s: float = 0.0) -> bytes:
        """A chunk of the body, empty at its end; ``min_timeout_s`` as in `HttpConnection.read`."""
        if self._has_ended:
            return b""
        try:
            with self._client.translated_errors(self.server, self._connection):
                chunk = self._connection.read(min_timeout_s)
        except StorageError as error:
            raise self._client.explained(self.server, error) from error.__cause__
        if not chunk:
            self._has_ended = True
            self._client.release(self.server, self._connection)
        return chunk

    def finish(self) -> None:
        """Skip the rest of the body, or close the connection if the rest is long."""
        left = _MAX_UNUSED_BODY
        while left > 0 and (chunk := self.read()):
            left -= len(chunk)
        if left <= 0:
            self.drop()

    def abort(self) -> None:
        """Fail the reading thread; may be called from any thread."""
        self._connection.abort()

    def drop(self) -> None:
        """Close the connection."""
        if not self._has_ended:
            self._client.close(self._connection)


class HttpClient:
    """The connections of one worker thread; `interrupt` may be called from any thread.

    Attributes:
        timeouts: of the current operation.
        interrupted: whether all operations must end.
    """

    def __init__(self) -> None:
        self.timeouts: Timeouts
        self.interrupted = False
        self._idle: dict[Server, list[HttpConnection]] = {}
        self._busy: set[HttpConnection] = set()
        self._contexts = TlsContexts()
        #: Authority → its ``Server`` header.
        self._products: dict[str, str] = {}
        #: Servers that ignore or refuse ``Expect``: bodies are sent without it.
        self._without_expect: set[Server] = set()

    def open(
        self,
        method: str,
        url: StorageUrl,
        headers: Headers | None = None,
        body: Body = b"",
        ok: tuple[int, ...] = (200,),
    ) -> HttpResponse:
        """Send a request, and follow redirects.

        Args:
            method: of HTTP.
            url: percent-encoded.
            headers: in addition to those of the credential.
            body: an iterator is read only if the server accepts the body.
            ok: statuses that are no error.

        Raises:
            StorageError: there was no response, or a redirect that is not followed.
            HttpStatusError: the status is an error.
        """
        self.check_name(url)
        headers = headers or {}
        first, at = url.authority, url
        for _ in range(_MAX_REDIRECTS + 1):
            authority = at.authority
            response = self._request(Server(authority, authority == first, trust_at(first)), method, at, headers, body)
            if response.status not in REDIRECTS:
                break
            location = response.header("Location") or ""
            if method in _SLASH_ADDED and _only_adds_slash(at, location):
                response.finish()
                at = StorageUrl(at + "/")
                continue
            if method not in _REDIRECTED:
                break
            response.drop()
            if response.has_sent_body:
                # It cannot be sent twice. The next attempt asks the server first.
                self._without_expect.discard(response.server)
                raise StorageError(f"{url}: the server redirects after it took bytes", code=FailureCode.SERVER_ERROR)
            at = _redirected(at, location)
        if response.status in ok:
            return response
        if response.status in REDIRECTS:
            response.drop()
            where = truncated(response.header("Location") or "nowhere", 300)
            raise StorageError(f"{method} {url}: the server redirects to {where}", code=FailureCode.UNSUPPORTED)
        text = ""
        with contextlib.suppress(StorageError):
            text = response.read()[:_MAX_ERROR_TEXT].decode("utf-8", "backslashreplace").strip()
            # Some servers send back what they were sent.
            for value in map(str, (*headers.values(), *authorization(first).values())):
                text = text.replace(value.partition(" ")[2], "***") if value.startswith("Bearer ") else text
            response.finish()
        # Without the query, which may hold a token: a reader of the message could download the file with it.
        request = f"{method} {at.partition('?')[0]}"
        retry_after, size = response.header("Retry-After"), headers.get("Content-Length")
        raise error_from_response(request, response.status, response.reason, text, retry_after, size)

    def call(
        self,
        method: str,
        url: StorageUrl,
        headers: Headers | None = None,
        body: Body = b"",
        ok: tuple[int, ...] = (200,),
    ) -> HttpResponse:
        """Like `open`, for a response of which only the head matters."""
        response = self.open(method, url, headers, body, ok)
        response.finish()
        return response

    def is_xrootd(self, url: StorageUrl) -> bool:
        """Whether a server reports to be XRootD."""
        authority = url.authority
        if authority not in self._products:
            self._request(known_server(url), "OPTIONS", StorageUrl(f"https://{authority}/"), {}, b"").finish()
        return self._products[authority].startswith("xrootd")

    def check_name(self, url: StorageUrl) -> None:
        """Raise `StorageError` for a name with ``?``, where XRootD cuts the path, even if it is encoded.

        Without this the removal of ``data?`` would remove ``data``.
        """
        if "%3f" in url.lower() and self.is_xrootd(url):
            raise StorageError(f"{url}: this server cannot hold names with a question mark", errno=errno.EILSEQ)

    def interrupt(self) -> None:
        """Fail all operations; may be called from any thread."""
        self.interrupted = True
        for connection in list(self._busy):
            connection.abort()

    # -- one request

    def _request(self, server: Server, method: str, url: StorageUrl, headers: Headers, body: Body) -> HttpResponse:
        """Send a request, a second time if the first can have done nothing that the second does not do again."""
        is_repeatable = False
        try:
            connection = self.connected(server)
            is_repeatable = connection.is_used and method not in _NOT_REPEATABLE
            response = self._request_once(server, connection, method, url, headers, body)
        except StorageError as error:
            # The server may have closed a kept connection.
            if not (error.lost and is_repeatable) or connection.has_sent_body:
                raise self.explained(server, error) from error.__cause__
        else:
            is_unexpected = response.status == HTTPStatus.EXPECTATION_FAILED and not isinstance(body, bytes)
            if not is_unexpected or response.has_sent_body:
                return response
            response.drop()
            self._without_expect.add(server)
        self.close_idle(server)
        try:
            return self._request_once(server, self.connected(server), method, url, headers, body)
        except StorageError as error:
            raise self.explained(server, error) from error.__cause__

    def _request_once(
        self, server: Server, connection: HttpConnection, method: str, url: StorageUrl, headers: Headers, body: Body
    ) -> HttpResponse:
        with self.translated_errors(server, connection):
            if server.is_known:
                headers = {**authorization(server.authority), **headers}
            expect = not isinstance(body, bytes) and server not in self._without_expect
            head = connection.request(method, url.encoded_path, headers, body, expect=expect)
        if connection.ignores_expect:
            self._without_expect.add(server)
        return self.responded(server, connection, head)

    def responded(self, server: Server, connection: HttpConnection, head: ResponseHead) -> HttpResponse:
        """The response of a server, with a connection whose body is to be read."""
        response = HttpResponse(self, server, connection, head)
        self._products[server.authority] = (response.header("Server") or "").lower()
        return response

    def explained(self, server: Server, error: StorageError) -> StorageError:
        """The reason for a closed connection: the server is down, refuses the client, or fails at this request.

        Only the first is CONNECTION. Some servers close the connection because of one path (Apache for an unreadable
        directory, WsgiDAV for a name that is not UTF-8) and work otherwise: that must not pause the site.
        """
        if not error.lost or error.code is not FailureCode.CONNECTION or self.interrupted:
            return error
        reason = self._probe(server)
        if reason is None:
            text = f"the server closed the connection at this request, but answers others: {error.message}"
            return StorageError(text, code=FailureCode.SERVER_ERROR, lost=True)
        return reason if reason.code in _CREDENTIAL_CODES else error

    def _probe(self, server: Server) -> StorageError | None:
        """Send a request without effect; returns its error, or None if the server responds in time."""
        connection = HttpConnection(
            server.authority, self._contexts.of(server), lambda: min(self._timeout_s(), _PROBE_S)
        )
        try:
            connection.connect()
            connection.request("OPTIONS", "/", {})
        except (OSError, h11.ProtocolError) as error:
            return self._storage_error(server, error)
        finally:
            connection.close()
        return None

    # -- connections

    def has_idle(self, server: Server) -> bool:
        """Whether there is a kept connection."""
        return bool(self._idle.get(server))

    def connected(self, server: Server) -> HttpConnection:
        """A connection to a server that has no request: a kept one, or a new one."""
        lease.check()
        if self.interrupted:
            raise StoppedError
        idle = self._idle.get(server)
        while idle:
            connection = idle.pop()
            if connection.is_open():
                break
            connection.close()
        else:
            connection = HttpConnection(server.authority, self._contexts.of(server), self._timeout_s)
        self._busy.add(connection)
        connection.may_forget = self._products.get(server.authority, "").startswith("xrootd")
        if not connection.is_connected:
            try:
                with self.translated_errors(server, connection):
                    sock = connection.connect()
                    if server.trust:
                        check_server(sock, server.trust)
            except StorageError as error:
                error.unreachable = error.code in UNREACHABLE
                raise
        return connection

    def release(self, server: Server, connection: HttpConnection) -> None:
        """Keep a connection for the next request, if it is reusable."""
        if connection.is_reusable:
            self._busy.discard(connection)
            self._idle.setdefault(server, []).append(connection)
        else:
            self.close(connection)

    def close(self, connection: HttpConnection) -> None:
        self._busy.discard(connection)
        connection.close()

    def close_idle(self, server: Server) -> None:
        """Close the kept connections to a server."""
        for connection in self._idle.pop(server, []):
            connection.close()

    def _timeout_s(self) -> float:
        if self.interrupted:
            raise StoppedError
        left = self.timeouts.until - time.monotonic()
        if left <= 0:
            raise TimeoutError("not finished in time")
        return max(min(self.timeouts.stall_s, left), _MIN_TIMEOUT_S)

    @contextlib.contextmanager
    def translated_errors(self, server: Server, connection: HttpConnection) -> Iterator[None]:
        """Convert errors of a connection to `StorageError`; any error closes the connection."""
        try:
            yield
        except BaseException as error:
            self.close(connection)
            if not isinstance(error, (OSError, h11.ProtocolError)):
                raise
            if self.interrupted:
                raise StoppedError from error
            raise self._storage_error(server, error) from error

    def _storage_error(self, server: Server, error: Exception) -> StorageError:
        text = f"{server.authority}: {str(error) or type(error).__name__}"
        if isinstance(error, TimeoutError):
            is_stalled = time.monotonic() < self.timeouts.until
            return StorageError(text, code=FailureCode.STALLED if is_stalled else FailureCode.TIMEOUT)
        if isinstance(error, ssl.SSLCertVerificationError):
            return StorageError(text, code=FailureCode.CERTIFICATE)
        if isinstance(error, ssl.SSLError) and "ALERT" in text.upper():
            if "EXPIRED" in text.upper():
                return StorageError(text, code=FailureCode.CREDENTIAL_EXPIRED, scope=FailureScope.SERVICE)
            return StorageError(text, code=FailureCode.CREDENTIAL_REFUSED)
        return StorageError(text, code=FailureCode.CONNECTION, lost=True)


def _redirected(url: StorageUrl, location: str) -> StorageUrl:
    """The target of a redirect.

    Raises:
        StorageError: it is not followed.
    """
    where = urllib.parse.urljoin(url, location).partition("#")[0]
    scheme, _, rest = where.partition("://")
    if scheme != "https" or not _AUTHORITY.fullmatch(rest.partition("/")[0]) or not _ASCII.fullmatch(where):
        text = f"{url}: the server redirects to {truncated(location, 300)!r}: only https:// is followed"
        raise StorageError(text, code=FailureCode.UNSUPPORTED)
    return StorageUrl(where)


def _only_adds_slash(url: StorageUrl, location: str) -> bool:
    """Whether a redirect only adds a slash to the path; host and scheme may be those behind a proxy."""
    try:
        path = urllib.parse.urlsplit(urllib.parse.urljoin(url, location)).path
    except ValueError:
        return False
    asked = urllib.parse.unquote_to_bytes(url.encoded_path.partition("?")[0])
    return not asked.endswith(b"/") and urllib.parse.unquote_to_bytes(path) == asked + b"/"
