"""One HTTP/1.1 connection on h11, and the storage errors for its statuses."""

from __future__ import annotations

import contextlib
import email.utils
import errno
import select
import socket
import ssl
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from http import HTTPStatus

import h11

from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.helpers.backends.propfind import resources
from pdm.workqueue.helpers.storage import StorageError, truncated

_MAX_RETRY_AFTER_S = 7 * 86400.0
_ERRNO_BY_STATUS: Mapping[int, int] = {
    403: errno.EACCES,
    404: errno.ENOENT,
    405: errno.EOPNOTSUPP,
    409: errno.ENOENT,
    410: errno.ENOENT,
    412: errno.EEXIST,
    414: errno.ENAMETOOLONG,
    415: errno.EOPNOTSUPP,
    501: errno.EOPNOTSUPP,
    507: errno.ENOSPC,
}
#: Statuses with a reliable meaning, whatever the text is.
_CODE_BY_STATUS: Mapping[int, FailureCode] = {
    408: FailureCode.TIMEOUT,
    413: FailureCode.TOO_LARGE,
    417: FailureCode.UNSUPPORTED,
    423: FailureCode.LOCKED,
    425: FailureCode.BUSY,
    429: FailureCode.BUSY,
    503: FailureCode.BUSY,
    504: FailureCode.SERVER_ERROR,
}
#: Error texts in bodies; XRootD's are the system's.
_ERRNO_BY_TEXT = (
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


class HttpStatusError(StorageError):
    """The response's status is not a success.

    Attributes:
        status: of HTTP.
    """

    status = 0


def errno_from_text(text: str) -> int | None:
    """The errno for an error text of a server.

    The part before the last semicolon names the file, which may be called ``permission denied``.
    """
    lowered = text.rpartition(";")[2].lower()
    return next((number for words, number in _ERRNO_BY_TEXT if words in lowered), None)


def error_from_response(
    request: str, status: int, reason: str, text: str, retry_after: str | None, size: object
) -> HttpStatusError:
    """The error for a response.

    Args:
        request: method and URL, for the message.
        status: of the response.
        reason: its reason phrase.
        text: the beginning of its body.
        retry_after: its ``Retry-After``.
        size: ``Content-Length`` of the request; None if there was none.
    """
    message = f"{request}: {status} {reason}: {truncated(text, 500)}"
    if status == HTTPStatus.MULTI_STATUS:
        status = _inner_error(text) or status
    code, number = _CODE_BY_STATUS.get(status), None
    if code is None:
        number = errno_from_text(text) or _ERRNO_BY_STATUS.get(status)
    if status == HTTPStatus.UNAUTHORIZED and errno_from_text(text) is None:
        code = FailureCode.CREDENTIAL_REFUSED
    elif number is None and code is None and status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        code = FailureCode.SERVER_ERROR
    if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        message = (
            f"the server, or a proxy before it, takes no request of {size or 'that many'} bytes"
            f" (as set by client_max_body_size of nginx, LimitRequestBody of Apache and the like): {message}"
        )
    error = HttpStatusError(message, errno=number, code=code, retry_after_s=retry_after_seconds(retry_after))
    error.status = status
    return error


def _inner_error(multistatus: str) -> int | None:
    """The first status in a multistatus that is not a success: of the resource that caused the failure."""
    with suppress(StorageError):
        for resource in resources("", [multistatus.encode("utf-8", "replace")]):
            if resource.status >= HTTPStatus.BAD_REQUEST:
                return resource.status
    return None


def retry_after_seconds(retry_after: str | None) -> float | None:
    """``Retry-After``, a number or a date, in seconds from now; None if it is missing or invalid."""
    text = (retry_after or "").strip()
    if text.isascii() and text.isdecimal():
        return min(float(text[:10]), _MAX_RETRY_AFTER_S)
    try:
        then = email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(then - time.time(), 0.0), _MAX_RETRY_AFTER_S)


def exactly(pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
    """The pieces, which must have the size that was announced."""
    left = size
    for piece in pieces:
        left -= len(piece)
        if left < 0:
            break
        yield piece
    if left:
        raise StorageError(
            "the source is not as long as it was when it was listed",
            code=FailureCode.SIZE_CHANGED,
            scope=FailureScope.SOURCE,
        )


#: Bytes that are received before they are parsed. TLS returns at most 16 KiB at a time.
_RECEIVE_SIZE = 256 * 1024
#: After a shorter read, hardly more data is available.
_MIN_RECORD = 4 * 1024
#: Seconds for an answer where a new connection can be tried: a busy XRootD 5.5 forgets some handshakes, and some
#: requests on kept connections.
_ANSWER_S = 10.0
#: Methods of requests that may be sent again while the first one may still be carried out; POST asks for a macaroon.
_HURRIED = frozenset({"GET", "HEAD", "OPTIONS", "POST", "PROPFIND"})
_MACAROON_REQUEST = "application/macaroon-request"
#: Maximum bytes of a response's head.
_MAX_HEAD = 64 * 1024
_MAX_INTERIM_RESPONSES = 50
#: Seconds to wait for ``100 Continue``.
_CONTINUE_S = 2.0
#: Errors of a connection that the server closes because it refuses the request or dies.
_CLOSED = (ssl.SSLEOFError, ConnectionResetError, BrokenPipeError)
_BLOCKED = (ssl.SSLWantReadError, ssl.SSLWantWriteError)


class HttpConnection:
    """A connection for consecutive requests: one thread uses it, `abort` may be called from any thread.

    All methods may raise `OSError` and `h11.ProtocolError`; the connection cannot be used afterwards.

    Args:
        authority: host, and port.
        context: of TLS.
        timeout_s: returns the seconds to wait for the next byte; raises `TimeoutError` if no time is left.

    Attributes:
        is_connected: whether `connect` has connected it.
        is_used: whether it has had a request.
        has_sent_body: whether a part of the last request's body was sent.
        ignores_expect: whether the server did not react to ``Expect: 100-continue``.
    """

    def __init__(self, authority: str, context: ssl.SSLContext, timeout_s: Callable[[], float]) -> None:
        self._authority = authority
        self._context = context
        self._timeout_s = timeout_s
        self._protocol = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD)
        self._buffer = memoryview(bytearray(_RECEIVE_SIZE))
        self._response: h11.Response | None = None
        self._interim_responses = 0
        self._may_send = False
        self.has_sent_body = False
        self.ignores_expect = False
        self._sock: ssl.SSLSocket
        self.is_connected = self.is_used = False
        #: Whether no answer soon means that the server has forgotten the request.
        self._is_hurried = False

    def connect(self) -> ssl.SSLSocket:
        """Connect, and make the TLS handshake; returns the socket, for its certificates.

        A handshake without an answer is begun again on a new connection: a busy XRootD 5.5 forgets some connections.
        """
        url = urllib.parse.urlsplit(f"//{self._authority}")
        try:
            address = url.hostname or "", url.port or 443
        except ValueError as error:
            raise OSError(str(error)) from error
        self._open_socket(address)
        timeout_s = self._timeout_s()
        is_repeatable = timeout_s > 2 * _ANSWER_S
        try:
            self._sock.settimeout(_ANSWER_S if is_repeatable else timeout_s)
            self._sock.do_handshake()
        except TimeoutError:
            if not is_repeatable:
                raise
            self.close()
            self._open_socket(address)
            self._sock.settimeout(timeout_s - _ANSWER_S)
            self._sock.do_handshake()
        self._sock.setblocking(False)
        return self._sock

    def _open_socket(self, address: tuple[str, int]) -> None:
        plain = socket.create_connection(address, self._timeout_s())
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = self._context.wrap_socket(plain, server_hostname=address[0], do_handshake_on_connect=False)
        self.is_connected = True

    def request(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str | bytes],
        body: bytes | Iterator[bytes] = b"",
        *,
        expect: bool = False,
    ) -> h11.Response:
        """Send a request and return the head of the response.

        Args:
            method: of HTTP.
            target: path and query.
            headers: with ``Content-Length`` if the body is an iterator.
            body: an iterator is not read to its end if the server responds with an error.
            expect: whether to wait for ``100 Continue`` before an iterator is read.
        """
        if isinstance(body, bytes):
            self.begin(method, target, headers, body)
            return self.response()
        head = self._head(method, target, {**headers, "Expect": "100-continue"} if expect else headers)
        refusal = self._send(head) or (self._ask() if expect else None) or self._upload(body)
        return refusal or self.response()

    def begin(self, method: str, target: str, headers: Mapping[str, str | bytes], body: bytes = b"") -> None:
        """Send a request; `response` is to be called next."""
        if body:
            headers = {**headers, "Content-Length": str(len(body))}
        # Before it gives a digest a server reads the whole file.
        is_hurried = self.is_used and method in _HURRIED and "Want-Digest" not in headers
        if method == "POST":
            # Others carry out work: a server of S3 joins the parts of an object, for example.
            is_hurried = is_hurried and headers.get("Content-Type") == _MACAROON_REQUEST
        head = self._head(method, target, headers)
        self._is_hurried = is_hurried
        data = self._protocol.send(h11.Data(data=body)) if body else b""
        self._send(head + (data or b"") + (self._protocol.send(h11.EndOfMessage()) or b""))

    def _head(self, method: str, target: str, headers: Mapping[str, str | bytes]) -> bytes:
        """Begin a request, and return the bytes of its head."""
        if self._protocol.our_state is h11.DONE:
            self._protocol.start_next_cycle()
        self.is_used = True
        self._response, self._interim_responses, self._may_send = None, 0, False
        self.has_sent_body = self.ignores_expect = self._is_hurried = False
        fields = {"Host": self._authority.removesuffix(":443"), "Accept-Encoding": "identity", **headers}
        encoded = [
            (name.encode(), value if isinstance(value, bytes) else value.encode()) for name, value in fields.items()
        ]
        return self._protocol.send(h11.Request(method=method, target=target, headers=encoded)) or b""

    def _ask(self) -> h11.Response | None:
        """Wait for ``100 Continue``; returns the response if the server refuses the body."""
        give_up_at = time.monotonic() + min(_CONTINUE_S, self._timeout_s())
        while self._parse_head() is None and not self._may_send:
            wanted = self._receive()
            if wanted and not self._poll(wanted, max(give_up_at - time.monotonic(), 0.0)):
                self.ignores_expect = True
                break
        return self._response

    def _upload(self, chunks: Iterator[bytes]) -> h11.Response | None:
        """Send a body; returns the response if the server refuses it before its end."""
        for chunk in chunks:
            if self._poll(select.POLLIN, 0) and (refusal := self._early_refusal()) is not None:
                return refusal
            self.has_sent_body = True
            for data in self._protocol.send_with_data_passthrough(h11.Data(data=chunk)) or ():
                if (refusal := self._send(data)) is not None:
                    return refusal
        return self._send(self._protocol.send(h11.EndOfMessage()))

    def _send(self, data: bytes) -> h11.Response | None:
        """Send bytes; returns the response if the server refuses the request before it has read them."""
        view = memoryview(data)
        while view:
            try:
                view = view[self._sock.send(view) :]
            except _BLOCKED as error:
                # After an early success nothing more is received, so that the buffer stays bounded.
                ready = self._wait(_events(error) | (select.POLLIN if self._response is None else 0))
                if ready != select.POLLOUT and (refusal := self._early_refusal()) is not None:
                    return refusal
            except _CLOSED:
                # The reason may have arrived before: as a response, or as a TLS alert, which is raised here.
                if (refusal := self._early_refusal()) is not None:
                    return refusal
                raise
        return None

    def _early_refusal(self) -> h11.Response | None:
        if self._response is None and not self._receive():
            self._parse_head()
        is_error = self._response is not None and self._response.status_code >= HTTPStatus.MULTIPLE_CHOICES
        return self._response if is_error else None

    def response(self) -> h11.Response:
        """The head of the response to a request that was sent, or refused before all of it was sent.

        Without an answer to a request that does no harm twice, a kept connection counts as lost after a while.
        """
        if self._response is None and not self._sock.pending():
            is_hurried = self._is_hurried and self._timeout_s() > 2 * _ANSWER_S
            if is_hurried and not self._poll(select.POLLIN, _ANSWER_S):
                raise ConnectionResetError("the server does not answer on a kept connection")
            self._wait(select.POLLIN)
        while (response := self._parse_head()) is None:
            self._wait_for_data()
        return response

    def _parse_head(self) -> h11.Response | None:
        """The response, if its head is complete; interim responses are skipped."""
        while self._response is None:
            event = self._protocol.next_event()
            if isinstance(event, h11.Response):
                self._response = event
            elif isinstance(event, h11.InformationalResponse):
                self._may_send = self._may_send or event.status_code == HTTPStatus.CONTINUE
                self._interim_responses += 1
                if self._interim_responses > _MAX_INTERIM_RESPONSES:
                    raise h11.RemoteProtocolError("the server sends too many interim responses")
            else:
                return None
        return self._response

    def read(self, min_timeout_s: float = 0.0) -> bytes:
        """A chunk of the response's body, empty at its end; not to be called again then.

        Args:
            min_timeout_s: seconds to wait at least, if the timeouts are shorter.
        """
        while (event := self._protocol.next_event()) is h11.NEED_DATA:
            self._wait_for_data(min_timeout_s)
        return event.data if isinstance(event, h11.Data) else b""

    @property
    def is_reusable(self) -> bool:
        """Whether the connection can take another request: all was sent and read, and no further data has arrived."""
        protocol = self._protocol
        return protocol.our_state is protocol.their_state is h11.DONE and not protocol.trailing_data[0]

    def has_data(self, wait_s: float) -> bool:
        """Whether there is something to receive before so many seconds have passed."""
        return self._sock.pending() > 0 or bool(self._poll(select.POLLIN, wait_s))

    def is_open(self) -> bool:
        """Whether the server has kept the connection open since the last response, and has sent nothing."""
        if not self._poll(select.POLLIN, 0):
            return True
        try:
            self._sock.recv(1)
        except ssl.SSLWantReadError:
            # A TLS record without data, for example a session ticket.
            return True
        except OSError:
            pass
        return False

    def abort(self) -> None:
        """Fail the current operation; may be called from any thread."""
        if self.is_connected:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        if self.is_connected:
            self._sock.close()

    # -- the socket

    def _receive(self) -> int:
        """Receive without blocking: returns 0, or the events of `select.poll` to wait for."""
        count = 0
        try:
            while received := self._sock.recv_into(self._buffer[count:]):
                count += received
                if received < _MIN_RECORD or count == _RECEIVE_SIZE:
                    break
        except _BLOCKED as error:
            if not count:
                return _events(error)
        except OSError:
            if not count:
                raise
        if not count and self._response is None:
            raise ConnectionResetError("the server closed the connection without a response")
        # An empty read is the end of the stream.
        self._protocol.receive_data(self._buffer[:count])  # type: ignore[arg-type]  # any buffer will do
        return 0

    def _wait_for_data(self, min_timeout_s: float = 0.0) -> None:
        while wanted := self._receive():
            self._wait(wanted, min_timeout_s)

    def _wait(self, events: int, min_timeout_s: float = 0.0) -> int:
        ready = self._poll(events, max(self._timeout_s(), min_timeout_s))
        if not ready:
            raise TimeoutError("no byte was sent or received in time")
        return ready

    def _poll(self, events: int, seconds: float) -> int:
        """Wait for events of `select.poll`; returns those that occurred, 0 for none."""
        poll = select.poll()
        poll.register(self._sock, events)
        return next((ready for _, ready in poll.poll(seconds * 1000)), 0)


def _events(error: ssl.SSLError) -> int:
    return select.POLLOUT if isinstance(error, ssl.SSLWantWriteError) else select.POLLIN
