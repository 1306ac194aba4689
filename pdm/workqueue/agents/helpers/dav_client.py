"""HTTPS to WebDAV servers: kept connections, client certificate or token, redirects, errors as storage knows them.

``X509_CERT_DIR`` names the trusted authorities, ``PDM_TRUST`` those for single servers, ``X509_USER_PROXY`` the
client's certificate with its key, ``PDM_CREDENTIALS`` the files with bearer tokens, each for one server only. Where a
server sends its clients on to another for the bytes of a file, that one gets neither: what it needs to know is in the
URL, as dCache, EOS and XRootD have it. With the user's proxy, a server could have us do anything in the user's name at
any other.
"""

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
from collections.abc import Iterator, Mapping
from http.client import HTTPResponse
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pdm.workqueue.agents.helpers import lease
from pdm.workqueue.agents.helpers.endpoints import credential_at, trust_at
from pdm.workqueue.agents.helpers.signing_policies import check_server
from pdm.workqueue.agents.helpers.storage import Patience, StoppedError, StorageError, shortened

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_LONGEST_ERROR = 4000
_LEAST_S = 0.05
_NOT_TWICE = frozenset({"PUT", "COPY", "MOVE", "DELETE", "MKCOL"})
#: Redirects are for bytes: where servers of dCache, EOS and XRootD keep them is known to others of their kind.
_FOLLOWED = frozenset({"GET", "HEAD", "PUT", "COPY"})
_REDIRECTS, _MOST_REDIRECTS = (301, 302, 303, 307, 308), 5
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
    ("too many levels of symbolic links", errno.ELOOP),
    ("read-only", errno.EROFS),
    ("cross-device link", errno.EXDEV),
)


def errno_of(text: str) -> int | None:
    """The error that a sentence of a server tells of.

    What comes before the last semicolon names the file, which may be called ``permission denied``.
    """
    lowered = text.rpartition(";")[2].lower()
    return next((number for words, number in _BY_TEXT if words in lowered), None)


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


class _Begun(io.RawIOBase):
    """What a server says, of which a piece has been read already; looks like its socket to `HTTPResponse`."""

    def __init__(self, sock: ssl.SSLSocket, begun: bytes) -> None:
        self._sock = sock
        self._begun = begun

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        if self._begun:
            view = memoryview(buffer).cast("B")
            count = min(len(self._begun), len(view))
            view[:count] = self._begun[:count]
            self._begun = self._begun[count:]
            return count
        return self._sock.recv_into(buffer)


class Answer:
    """The answer to a request: its head is there, its body is to be read to the end or dropped."""

    def __init__(
        self,
        client: DavClient,
        server: _Server,
        connection: http.client.HTTPSConnection,
        response: HTTPResponse,
        *,
        keep: bool,
    ) -> None:
        self._client = client
        self._server = server
        self._connection = connection
        self._response = response
        self._keep = keep
        self.status = response.status
        self.reason = response.reason

    def header(self, name: str) -> str | None:
        return self._response.getheader(name)

    def read(self, most: int, least_s: float = 0.0) -> bytes:
        """A piece of it, waited for as long as we are patient, or ``least_s``; empty at its end."""
        self._client.set_timeout(self._connection, least_s)
        with self._client.guarded(self._server.authority, self._connection):
            piece = self._response.read1(most)
        if not piece:
            # Without this the connection would not take the next request.
            self._response.close()
            if self._keep:
                self._client.give_back(self._server, self._connection)
            else:
                self.drop()
        return piece

    def finish(self) -> None:
        """Read what is left, which does not matter."""
        while self.read(_LONGEST_ERROR):
            pass

    def cut_off(self) -> None:
        """Have whoever reads it read no more; from any thread."""
        sock = self._connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def drop(self) -> None:
        """End the connection, and with it what is under way there."""
        self._client.forget(self._connection)


class DavClient:
    """The connections of one lane; one thread uses them, any may interrupt."""

    def __init__(self) -> None:
        self.patience: Patience
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
    ) -> Answer:
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
        first, at = _server(url), url
        for _ in range(_MOST_REDIRECTS + 1):
            authority = _server(at)
            server = _Server(authority, authority == first, trust_at(first))
            answer = self._sent(server, method, at, headers or {}, body)
            if answer.status not in _REDIRECTS or method not in _FOLLOWED:
                break
            at = self._elsewhere(at, answer)
        if answer.status in good:
            return answer
        said = answer.read(_LONGEST_ERROR).decode("utf-8", "backslashreplace").strip()
        answer.drop()
        if answer.status in _REDIRECTS:
            where = shortened(answer.header("Location") or "nowhere", 300)
            raise StorageError(f"{method} {url}: the server sends its clients on to {where}", code="UNSUPPORTED")
        # What comes behind the question mark lets whoever reads it have the file.
        raise self._refusal(method, at.partition("?")[0], answer.status, answer.reason, said)

    def call(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str | bytes] | None = None,
        body: bytes | Iterator[bytes] | None = None,
        good: tuple[int, ...] = (200,),
    ) -> Answer:
        """The same for an answer of which nothing but the head matters."""
        answer = self.open(method, url, headers, body, good)
        answer.finish()
        return answer

    def is_xrootd(self, url: str) -> bool:
        """Whether a server is XRootD's, as it tells itself."""
        authority = _server(url)
        if authority not in self._kinds:
            self._sent(_named(url), "OPTIONS", f"https://{authority}/", {}, None).finish()
        return self._kinds[authority].startswith("xrootd")

    def check_name(self, url: str) -> None:
        """Raise `StorageError` for a name that XRootD would take for another: it cuts paths at ``?``, however encoded.

        Without this the removal of ``data?`` would remove ``data``.
        """
        if "%3f" in url.lower() and self.is_xrootd(url):
            raise StorageError(f"{url}: this server cannot hold names with a question mark", errno=errno.EILSEQ)

    def hang_up(self, url: str) -> None:
        """End the connections with a server on which nothing is under way."""
        for connection in self._idle.pop(_named(url), []):
            connection.close()

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
    ) -> Answer:
        kept = bool(self._idle.get(server))
        try:
            return self._sent_once(server, method, url, headers, body)
        except StorageError as trouble:
            if not kept and isinstance(trouble.__cause__, _HUNG_UP) and (why := self._why_hung_up(server)):
                raise why from trouble
            # A kept connection may have been closed meanwhile: once more, if nothing can have been done by it.
            if not (kept and trouble.lost) or method in _NOT_TWICE:
                raise
            self._idle.pop(server, None)
            return self._sent_once(server, method, url, headers, body)

    def _sent_once(
        self,
        server: _Server,
        method: str,
        url: str,
        headers: Mapping[str, str | bytes],
        body: bytes | Iterator[bytes] | None,
    ) -> Answer:
        lease.check()
        path = _path(url)
        if server.known:
            headers = {**self.credentials(server.authority), **headers}
        connection = self._connected(server)
        try:
            with self.guarded(server.authority, connection):
                if body is None or isinstance(body, bytes):
                    connection.request(method, path, body, headers)
                    response, whole = connection.getresponse(), True
                else:
                    response, whole = self._given(server, connection, method, path, headers, body)
        except BaseException:
            self.forget(connection)
            raise
        self._kinds[server.authority] = (response.getheader("Server") or "").lower()
        return Answer(self, server, connection, response, keep=whole)

    def _given(
        self,
        server: _Server,
        connection: http.client.HTTPSConnection,
        method: str,
        path: str,
        headers: Mapping[str, str | bytes],
        body: Iterator[bytes],
    ) -> tuple[HTTPResponse, bool]:
        """The answer to a request whose bytes are sent when the server wants them: it may refuse, or send us on.

        Returns:
            The answer, and whether the bytes were sent: else the connection is of no more use.
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
        begun = functools.partial(HTTPResponse, _Begun(sock, said or b""))  # type: ignore[arg-type]  # only makefile
        connection.response_class = lambda sock, method: begun(method=method)  # type: ignore[assignment]  # what is begun has its socket
        try:
            # A word that the bytes may come is passed over by itself.
            return connection.getresponse(), wanted
        finally:
            del connection.response_class

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

    def _elsewhere(self, url: str, answer: Answer) -> str:
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
                f"{url}: the server sends its clients on to {shortened(told, 300)!r}: only https:// is followed",
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
            except StorageError as trouble:
                trouble.unreachable = trouble.code in ("CONNECTION", "STALLED", "TIMEOUT")
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
        left = self.patience.until - time.monotonic()
        return max(min(self.patience.stall_s, left), _LEAST_S)

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

    def _tls(self, server: _Server) -> ssl.SSLContext:
        """Trusts its authorities; with the user's proxy for servers that the user has named."""
        kind = server.trust, server.known
        if kind not in self._contexts:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
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


def _named(url: str) -> _Server:
    """The server that the user has named by a URL."""
    authority = _server(url)
    return _Server(authority, True, trust_at(authority))


def _server(url: str) -> str:
    return url.partition("://")[2].partition("/")[0]


def _path(url: str) -> str:
    return "/" + url.partition("://")[2].partition("/")[2]
