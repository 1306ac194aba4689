"""HTTPS client for WebDAV servers: persistent connections, certificate or token, redirects, `StorageError`."""

from __future__ import annotations

import contextlib
import errno
import functools
import http.client
import io
import os
import re
import select
import socket
import ssl
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPResponse
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pdm.workqueue.helpers import lease
from pdm.workqueue.helpers.backends.webdav_responses import error_from_response
from pdm.workqueue.helpers.credentials import check_server, credential_at, trust_at
from pdm.workqueue.helpers.storage import StoppedError, StorageError, Timeouts, truncated

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


_LONGEST_ERROR = 4000
_LEAST_S = 0.05
_NOT_TWICE = frozenset({"PUT", "COPY", "MOVE", "DELETE", "MKCOL"})
#: Redirects are for bytes: where servers of dCache, EOS and XRootD keep them is known to others of their kind.
_FOLLOWED = frozenset({"GET", "HEAD", "PUT", "COPY"})
_REDIRECTS, _MOST_REDIRECTS = (301, 302, 303, 307, 308), 5
#: With these a redirect that adds a slash to a folder's name is followed. A DELETE is not: what was a file when we
#: looked would be a whole tree now.
_SLASHED = frozenset({"PROPFIND", "MKCOL", "MOVE", "COPY", "HEAD", "OPTIONS"})
#: Answers that announce another one; a server that sends no end of them is not waited for.
_MOST_INTERIM = 50
#: Bytes of an answer that nobody needs, read only to keep the connection.
_LARGEST_REST = 1024 * 1024
_AUTHORITY = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?", re.ASCII)
_ASCII = re.compile(r"[\x21-\x7e]+")
#: Seconds for a server to say that it wants the bytes of a file; who says nothing gets them, this time and later.
_CONTINUE_S = 2.0
_INTERIM = re.compile(rb"HTTP/1\.[01] 100\b")
_STATUS_LENGTH = 12
#: Seconds in which a server that does not want us says so.
_HANG_UP_S = 3.0
#: How a connection ends under a server that does not want us, or that dies.
_HUNG_UP = (ssl.SSLEOFError, ConnectionResetError, BrokenPipeError, http.client.RemoteDisconnected)
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{1,16384}", re.ASCII)


class _Server(NamedTuple):
    """Where a connection leads.

    Attributes:
        authority: host, and port.
        known: whether the user has named it; other servers get no credential of any kind.
        trust: folder of the authorities that may vouch for it: those of the site that has named it.
    """

    authority: str
    known: bool
    trust: str | None


class _Incoming(io.RawIOBase):
    """What a server says, of which a piece may have been read already; looks like its socket to `HTTPResponse`.

    Before each piece the time is looked at: one byte a minute would not be the end of our patience otherwise.
    """

    def __init__(self, sock: ssl.SSLSocket, timeout_s: Callable[[], float], begun: bytes = b"") -> None:
        self._sock = sock
        # Keeps the socket open until the body is read, even where its connection is to be closed.
        self._raw = sock.makefile("rb", buffering=0)
        #: Seconds to wait for a piece; raises `TimeoutError` if there is no more time.
        self._timeout_s = timeout_s
        self._begun = begun
        self.least_s = 0.0

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int | None:
        if self._begun:
            view = memoryview(buffer).cast("B")
            count = min(len(self._begun), len(view))
            view[:count] = self._begun[:count]
            self._begun = self._begun[count:]
            return count
        self._sock.settimeout(max(self._timeout_s(), self.least_s))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(HTTPResponse):
    """One that passes over what comes before the answer, but not for ever."""

    def _read_status(self) -> tuple[str, int, str]:
        for _ in range(_MOST_INTERIM):
            version, status, reason = super()._read_status()  # type: ignore[misc]  # not in its stub
            if not http.HTTPStatus.CONTINUE <= status < http.HTTPStatus.OK:
                return version, status, reason
            http.client.parse_headers(self.fp)
        raise http.client.HTTPException("the server announces an answer again and again")


class WebdavResponse:
    """The answer to a request: its head is there, its body is to be read to the end or dropped."""

    def __init__(
        self,
        client: WebdavClient,
        server: _Server,
        connection: http.client.HTTPSConnection,
        response: HTTPResponse,
        incoming: _Incoming,
        *,
        keep: bool,
    ) -> None:
        self._client = client
        self._server = server
        self._connection = connection
        self._response = response
        self._incoming = incoming
        self._keep = keep
        self.status = response.status
        self.reason = response.reason

    def header(self, name: str) -> str | None:
        return self._response.getheader(name)

    def read(self, most: int, least_s: float = 0.0) -> bytes:
        """A piece of it, waited for as long as we are patient, or ``least_s``; empty at its end."""
        self._incoming.least_s = least_s
        try:
            with self._client.guarded(self._server.authority, self._connection):
                piece = self._response.read1(most)
                if not piece and self._response.length:
                    raise http.client.IncompleteRead(b"", self._response.length)
        except StorageError as error:
            raise self._client.explained(self._server, error) from error.__cause__
        if not piece:
            # Without this the connection would not take the next request.
            self._response.close()
            if self._keep:
                self._client.give_back(self._server, self._connection)
            else:
                self.drop()
        return piece

    def finish(self) -> None:
        """Read what is left, which does not matter; too much of it is not worth the connection."""
        left = _LARGEST_REST
        while left > 0 and (piece := self.read(_LONGEST_ERROR)):
            left -= len(piece)
        if left <= 0:
            self.drop()

    def cut_off(self) -> None:
        """Have whoever reads it read no more; from any thread."""
        sock = self._connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def drop(self) -> None:
        """End the connection, and with it what is under way there."""
        self._client.forget(self._connection)


class WebdavClient:
    """The connections of one lane; one thread uses them, any may interrupt."""

    def __init__(self) -> None:
        self.timeouts: Timeouts
        self._idle: dict[_Server, list[http.client.HTTPSConnection]] = {}
        self._busy: set[http.client.HTTPSConnection] = set()
        self._contexts: dict[tuple[str | None, bool], ssl.SSLContext] = {}
        self._kinds: dict[str, str] = {}
        #: Servers that do not say that they want the bytes before they get them.
        self._hasty: set[_Server] = set()
        self.interrupted = False

    def open(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str | bytes] | None = None,
        body: bytes | Iterator[bytes] | None = None,
        good: tuple[int, ...] = (200,),
    ) -> WebdavResponse:
        """Send a request, wherever the server sends it on to.

        Args:
            method: of HTTP.
            url: percent-encoded.
            headers: besides those of the credential.
            body: what is sent with it; an iterator's pieces are sent to the server that takes them, only.
            good: the statuses that are no error.

        Raises:
            StorageError: there was no answer, or a status that is not good.
        """
        self.check_name(url)
        first, at = server_of(url), url
        for _ in range(_MOST_REDIRECTS + 1):
            authority = server_of(at)
            server = _Server(authority, authority == first, trust_at(first))
            answer = self._sent(server, method, at, headers or {}, body)
            if answer.status not in _REDIRECTS:
                break
            if method in _SLASHED and _only_adds_slash(at, answer.header("Location")):
                answer.finish()
                at += "/"
                continue
            if method not in _FOLLOWED:
                break
            at = self._elsewhere(at, answer)
        if answer.status in good:
            return answer
        said = answer.read(_LONGEST_ERROR).decode("utf-8", "backslashreplace").strip()
        answer.drop()
        if answer.status in _REDIRECTS:
            where = truncated(answer.header("Location") or "nowhere", 300)
            raise StorageError(f"{method} {url}: the server sends its clients on to {where}", code="UNSUPPORTED")
        # What comes behind the question mark lets whoever reads it have the file.
        raise error_from_response(
            method,
            at.partition("?")[0],
            answer.status,
            answer.reason,
            said,
            answer.header("Retry-After"),
            str((headers or {}).get("Content-Length", "")) or None,
        )

    def call(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str | bytes] | None = None,
        body: bytes | Iterator[bytes] | None = None,
        good: tuple[int, ...] = (200,),
    ) -> WebdavResponse:
        """The same for an answer of which nothing but the head matters."""
        answer = self.open(method, url, headers, body, good)
        answer.finish()
        return answer

    def is_xrootd(self, url: str) -> bool:
        """Whether a server is XRootD's, as it tells itself."""
        authority = server_of(url)
        if authority not in self._kinds:
            self._sent(server_named(url), "OPTIONS", f"https://{authority}/", {}, None).finish()
        return self._kinds[authority].startswith("xrootd")

    def check_name(self, url: str) -> None:
        """Raise `StorageError` for a name that XRootD would take for another: it cuts paths at ``?``, however encoded.

        Without this the removal of ``data?`` would remove ``data``.
        """
        if "%3f" in url.lower() and self.is_xrootd(url):
            raise StorageError(f"{url}: this server cannot hold names with a question mark", errno=errno.EILSEQ)

    def hang_up(self, url: str) -> None:
        """End the connections with a server on which nothing is under way."""
        self.hang_up_all(server_named(url))

    def interrupt(self) -> None:
        """End what is under way, from any thread."""
        self.interrupted = True
        for connection in list(self._busy):
            sock = connection.sock
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    # -- one request

    def _sent(
        self,
        server: _Server,
        method: str,
        url: str,
        headers: Mapping[str, str | bytes],
        body: bytes | Iterator[bytes] | None,
    ) -> WebdavResponse:
        kept = self._has_kept(server)
        try:
            answer = self._sent_once(server, method, url, headers, body)
        except StorageError as error:
            # A kept connection may have been closed meanwhile: once more, if nothing can have been done by it.
            if not (kept and error.lost) or method in _NOT_TWICE:
                raise self.explained(server, error) from error.__cause__
        else:
            if answer.status != http.HTTPStatus.EXPECTATION_FAILED or server in self._hasty:
                return answer
            # It does not know that one can ask before the bytes are sent; none of them was.
            answer.drop()
            self._hasty.add(server)
        self.hang_up_all(server)
        try:
            return self._sent_once(server, method, url, headers, body)
        except StorageError as error:
            raise self.explained(server, error) from error.__cause__

    def _has_kept(self, server: _Server) -> bool:
        """Whether there is a kept connection; those that the server has closed meanwhile are ended."""
        kept = self._idle.get(server, [])
        for connection in list(kept):
            if not _is_quiet(connection):
                kept.remove(connection)
                connection.close()
        return bool(kept)

    def hang_up_all(self, server: _Server) -> None:
        """End the kept connections with a server."""
        for connection in self._idle.pop(server, []):
            connection.close()

    def explained(self, server: _Server, error: StorageError) -> StorageError:
        """Why a connection ended: the server is away, does not want us, or cannot cope with this one request.

        Only the first is CONNECTION. Some servers end the connection over one path (Apache over a folder that it cannot
        enter, WsgiDAV over a name that is not UTF-8), and are well otherwise: that must not pause the site.
        """
        if not error.lost or error.code != "CONNECTION" or self.interrupted:
            return error
        if not self._answers(server):
            why = self._why_hung_up(server) if isinstance(error.__cause__, _HUNG_UP) else None
            return why or error
        text = f"the server ended the connection at this request, and answers others: {error.message}"
        return StorageError(text, code="SERVER_ERROR", lost=True)

    def _answers(self, server: _Server) -> bool:
        """Whether a server answers a request that asks for nothing, soon."""
        timeout_s = min(self._timeout_s(), _HANG_UP_S)
        connection = http.client.HTTPSConnection(server.authority, context=self._tls(server), timeout=timeout_s)
        try:
            connection.request("OPTIONS", "/")
            return connection.getresponse().status > 0
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _sent_once(
        self,
        server: _Server,
        method: str,
        url: str,
        headers: Mapping[str, str | bytes],
        body: bytes | Iterator[bytes] | None,
    ) -> WebdavResponse:
        lease.check()
        path = _path(url)
        if server.known:
            headers = {**self.credentials(server.authority), **headers}
        connection = self._connected(server)
        try:
            with self.guarded(server.authority, connection):
                if body is None or isinstance(body, bytes):
                    connection.request(method, path, body, headers)
                    incoming, whole = _Incoming(connection.sock, self._time_left_s), True
                else:
                    incoming, whole = self._given(server, connection, method, path, headers, body)
                response = _answer_from(connection, incoming)
        except BaseException:
            self.forget(connection)
            raise
        self._kinds[server.authority] = (response.getheader("Server") or "").lower()
        return WebdavResponse(self, server, connection, response, incoming, keep=whole)

    def _given(
        self,
        server: _Server,
        connection: http.client.HTTPSConnection,
        method: str,
        path: str,
        headers: Mapping[str, str | bytes],
        body: Iterator[bytes],
    ) -> tuple[_Incoming, bool]:
        """Send a request whose bytes are sent when the server wants them: it may refuse, or send us on.

        Returns:
            The answer, of which the beginning may have come; and whether the bytes were sent: else the connection is of
            no more use.
        """
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        asks = server not in self._hasty
        if asks:
            connection.putheader("Expect", "100-continue")
        connection.endheaders()
        sock = connection.sock
        said = self._first_words(sock) if asks else None
        if said is None:
            self._hasty.add(server)
        wanted = said is None or _INTERIM.match(said) is not None
        if wanted:
            for piece in body:
                connection.send(piece)
        # A word that the bytes may come is passed over later.
        return _Incoming(sock, self._time_left_s, said or b""), wanted

    def _first_words(self, sock: ssl.SSLSocket) -> bytes | None:
        """What a server says before it gets the bytes of a file; None if it does not speak, soon."""
        give_up_at = time.monotonic() + min(_CONTINUE_S, self._timeout_s())
        said = b""
        timeout = sock.gettimeout()
        # To wait by a timeout would not do: what makes a socket of TLS readable need not be for us.
        sock.setblocking(False)
        try:
            while len(said) < _STATUS_LENGTH:
                try:
                    piece = sock.recv(_LONGEST_ERROR)
                except ssl.SSLWantReadError:
                    left = give_up_at - time.monotonic()
                    if left <= 0:
                        return said or None
                    select.select([sock], [], [], left)
                    continue
                if not piece:
                    break
                said += piece
            return said
        finally:
            sock.settimeout(timeout)

    def _elsewhere(self, url: str, answer: WebdavResponse) -> str:
        """Where a redirect leads.

        Raises:
            StorageError: we do not go there.
        """
        answer.drop()
        told = answer.header("Location") or ""
        where = urllib.parse.urljoin(url, told).partition("#")[0]
        scheme, _, rest = where.partition("://")
        if scheme != "https" or not _AUTHORITY.fullmatch(rest.partition("/")[0]) or not _ASCII.fullmatch(where):
            raise StorageError(
                f"{url}: the server sends its clients on to {truncated(told, 300)!r}: only https:// is followed",
                code="UNSUPPORTED",
            )
        return where

    def _why_hung_up(self, server: _Server) -> StorageError | None:
        """What a server has against our certificate; None if it has nothing, or cannot be asked.

        It says so after the handshake, and ends the connection: to who is still sending a request its word is lost.
        """
        context, timeout_s = self._tls(server), min(self._timeout_s(), _HANG_UP_S)
        connection = http.client.HTTPSConnection(server.authority, context=context, timeout=timeout_s)
        try:
            connection.connect()
            connection.sock.recv(1)
        except OSError as error:
            why = self._lost(server.authority, error)
            return why if (why.code or "").startswith("CREDENTIAL_") else None
        finally:
            connection.close()
        return None

    def _connected(self, server: _Server) -> http.client.HTTPSConnection:
        if self.interrupted:
            raise StoppedError
        idle = self._idle.get(server)
        connection = idle.pop() if idle else None
        if connection is None or connection.sock is None:
            context = self._tls(server)
            connection = http.client.HTTPSConnection(server.authority, context=context, timeout=self._timeout_s())
        self._busy.add(connection)
        if connection.sock is None:
            try:
                with self.guarded(server.authority, connection):
                    connection.connect()
                    if server.trust:
                        check_server(connection, server.trust)
            except StorageError as error:
                error.unreachable = error.code in ("CONNECTION", "STALLED", "TIMEOUT")
                self.forget(connection)
                raise
            except BaseException:
                self.forget(connection)
                raise
        self.set_timeout(connection)
        return connection

    def give_back(self, server: _Server, connection: http.client.HTTPSConnection) -> None:
        """Keep a connection for the next request."""
        self._busy.discard(connection)
        if connection.sock is not None:
            self._idle.setdefault(server, []).append(connection)

    def forget(self, connection: http.client.HTTPSConnection) -> None:
        """End a connection."""
        self._busy.discard(connection)
        connection.close()

    def _timeout_s(self) -> float:
        left = self.timeouts.until - time.monotonic()
        return max(min(self.timeouts.stall_s, left), _LEAST_S)

    def _time_left_s(self) -> float:
        if time.monotonic() > self.timeouts.until:
            raise TimeoutError("not finished in time")
        return self._timeout_s()

    def set_timeout(self, connection: http.client.HTTPSConnection, least_s: float = 0.0) -> None:
        """Let a connection wait for as long as we are patient, or ``least_s``."""
        if connection.sock is not None:
            connection.sock.settimeout(max(self._timeout_s(), least_s))

    @contextlib.contextmanager
    def guarded(self, authority: str, connection: http.client.HTTPSConnection) -> Iterator[None]:
        """Turn what goes wrong on the way into errors of the storage; the connection is then gone."""
        try:
            yield
        except (OSError, http.client.HTTPException) as error:
            self.forget(connection)
            if self.interrupted:
                raise StoppedError from error
            raise self._lost(authority, error) from error

    def _lost(self, authority: str, error: Exception) -> StorageError:
        text = f"{authority}: {str(error) or type(error).__name__}"
        if isinstance(error, TimeoutError):
            stalled = time.monotonic() < self.timeouts.until
            return StorageError(text, code="STALLED" if stalled else "TIMEOUT")
        if isinstance(error, ssl.SSLCertVerificationError):
            return StorageError(text, code="CERTIFICATE")
        if isinstance(error, ssl.SSLError) and "ALERT" in text.upper():
            if "EXPIRED" in text.upper():
                return StorageError(text, code="CREDENTIAL_EXPIRED", scope="service")
            return StorageError(text, code="CREDENTIAL_REFUSED")
        return StorageError(text, code="CONNECTION", lost=True)

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

    def _tls(self, server: _Server) -> ssl.SSLContext:
        """Trusts its authorities; with the user's proxy for servers that the user has named."""
        kind = server.trust, server.known
        if kind not in self._contexts:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            # Apache asks for a certificate once it knows the path (SSLVerifyClient in a Location or Directory).
            context.post_handshake_auth = True
            try:
                context.load_verify_locations(capath=server.trust or None)
                if server.known and (proxy := os.environ.get("X509_USER_PROXY")):
                    context.load_cert_chain(proxy)
            except (OSError, TypeError) as error:
                raise StorageError(
                    f"the credential or the authorities cannot be read: {error}",
                    code="CREDENTIAL_MISSING",
                    scope="service",
                ) from error
            self._contexts[kind] = context
        return self._contexts[kind]


def _answer_from(connection: http.client.HTTPSConnection, incoming: _Incoming) -> HTTPResponse:
    """The answer to the request that was sent, read through ``incoming``."""
    begun = functools.partial(_Response, incoming)  # type: ignore[arg-type]  # only its makefile is used
    connection.response_class = lambda _sock, method: begun(method=method)  # type: ignore[assignment]  # it has its socket
    try:
        return connection.getresponse()
    finally:
        del connection.response_class


def _is_quiet(connection: http.client.HTTPSConnection) -> bool:
    """Whether a kept connection is open, and nothing came that nobody has asked for."""
    sock = connection.sock
    if sock is None:
        return False
    if not select.select([sock], [], [], 0)[0]:
        return True
    sock.setblocking(False)
    try:
        sock.recv(1)
    except ssl.SSLWantReadError:
        # TLS has spoken for itself, with a session ticket for example.
        return True
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            sock.setblocking(True)
    return False


def _only_adds_slash(url: str, location: str | None) -> bool:
    """Whether a redirect leads to the same path with a slash; its host and scheme may be those behind a proxy."""
    try:
        path = urllib.parse.urlsplit(urllib.parse.urljoin(url, location or "")).path
    except ValueError:
        return False
    asked = _path(url).partition("?")[0]
    return (
        not asked.endswith("/") and urllib.parse.unquote_to_bytes(path) == urllib.parse.unquote_to_bytes(asked) + b"/"
    )


def server_named(url: str) -> _Server:
    """The server that the user has named by a URL."""
    authority = server_of(url)
    return _Server(authority, True, trust_at(authority))


def server_of(url: str) -> str:
    """Host and port of a URL."""
    return url.partition("://")[2].partition("/")[0]


def _path(url: str) -> str:
    return "/" + url.partition("://")[2].partition("/")[2]
