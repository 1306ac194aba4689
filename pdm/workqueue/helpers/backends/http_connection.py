"""One HTTP/1.1 connection: plain exchanges by itself, all others on h11."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from typing import NamedTuple

import h11

from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.helpers.backends.http_plain import ResponseHead, encoded_request, parsed_response
from pdm.workqueue.helpers.storage import StorageError


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
#: Seconds without a response until a server is reminded of the request.
REMIND_S = 0.5
_MACAROON_REQUEST = "application/macaroon-request"
#: Maximum bytes of a response's head.
_MAX_HEAD = 64 * 1024
_MAX_INTERIM_RESPONSES = 50
#: Seconds to wait for ``100 Continue``.
_CONTINUE_S = 2.0
#: Errors of a connection that the server closes because it refuses the request or dies.
_CLOSED = (ssl.SSLEOFError, ConnectionResetError, BrokenPipeError)
_BLOCKED = (ssl.SSLWantReadError, ssl.SSLWantWriteError)
_TOO_LATE = "no byte was sent or received in time"


class _PlainRequest(NamedTuple):
    """A request of which all bytes are known.

    Attributes:
        method: of HTTP.
        target: path and query.
        fields: names and values of its header.
        body: all of it.
    """

    method: str
    target: str
    fields: list[tuple[bytes, bytes]]
    body: bytes


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
        may_forget: whether the server may need a reminder of a request: XRootD 5.5, which now and then reads a request
            and does not look at it until more bytes arrive.
    """

    def __init__(self, authority: str, context: ssl.SSLContext, timeout_s: Callable[[], float]) -> None:
        self._authority = authority
        self._context = context
        self._timeout_s = timeout_s
        self._protocol = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD)
        self._buffer = memoryview(bytearray(_RECEIVE_SIZE))
        self._response: ResponseHead | None = None
        self._interim_responses = 0
        #: The plain request that has no response so far: h11 knows of it only if the response is not plain.
        self._plain: _PlainRequest | None = None
        #: Bytes of a plain response's body, those that are still to come, and whether other bytes followed it.
        self._content, self._left, self._has_more = b"", 0, False
        #: Whether h11 knows of the last request; whether all of that was sent, and when.
        self._is_by_h11 = True
        self._is_sent = True
        self._sent_at = 0.0
        self._poller: select.poll
        self._may_send = False
        self.has_sent_body = False
        self.ignores_expect = False
        self._sock: ssl.SSLSocket
        self.is_connected = self.is_used = self.may_forget = False
        self._has_reminded = False
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
        self._poller = select.poll()
        self.is_connected = True

    def request(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str | bytes],
        body: bytes | Iterator[bytes] = b"",
        *,
        expect: bool = False,
    ) -> ResponseHead:
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
        fields = self._fields({**headers, "Expect": "100-continue"} if expect else headers)
        head = self._head_by_h11(_PlainRequest(method, target, fields, b""))
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
        fields = self._fields(headers)
        self._is_hurried = is_hurried
        request = _PlainRequest(method, target, fields, body)
        head = encoded_request(method, target, fields)
        if head is None:
            data = self._all_by_h11(request)
        else:
            self._plain, self._is_by_h11 = request, False
            data = head + body
        self._send(data)
        self._sent_at = time.monotonic()

    def _fields(self, headers: Mapping[str, str | bytes]) -> list[tuple[bytes, bytes]]:
        """The header of a request that begins now."""
        self.is_used = True
        self._response, self._interim_responses, self._may_send = None, 0, False
        self.has_sent_body = self.ignores_expect = self._is_hurried = False
        self._plain, self._is_by_h11, self._is_sent = None, True, False
        self._content, self._left, self._has_more = b"", 0, False
        fields = {"Host": self._authority.removesuffix(":443"), "Accept-Encoding": "identity", **headers}
        return [
            (name.encode(), value if isinstance(value, bytes) else value.encode()) for name, value in fields.items()
        ]

    def _head_by_h11(self, request: _PlainRequest) -> bytes:
        if self._protocol.our_state is h11.DONE:
            self._protocol.start_next_cycle()
        event = h11.Request(method=request.method, target=request.target, headers=request.fields)
        return self._protocol.send(event) or b""

    def _all_by_h11(self, request: _PlainRequest) -> bytes:
        head = self._head_by_h11(request)
        data = self._protocol.send(h11.Data(data=request.body)) if request.body else b""
        return head + (data or b"") + (self._protocol.send(h11.EndOfMessage()) or b"")

    def _ask(self) -> ResponseHead | None:
        """Wait for ``100 Continue``; returns the response if the server refuses the body."""
        give_up_at = time.monotonic() + min(_CONTINUE_S, self._timeout_s())
        while self._parse_head() is None and not self._may_send:
            wanted = self._receive()
            if wanted and not self._poll(wanted, max(give_up_at - time.monotonic(), 0.0)):
                self.ignores_expect = True
                break
        return self._response

    def _upload(self, chunks: Iterator[bytes]) -> ResponseHead | None:
        """Send a body; returns the response if the server refuses it before its end."""
        for chunk in chunks:
            if self._poll(select.POLLIN, 0) and (refusal := self._early_refusal()) is not None:
                return refusal
            self.has_sent_body = True
            for data in self._protocol.send_with_data_passthrough(h11.Data(data=chunk)) or ():
                if (refusal := self._send(data)) is not None:
                    return refusal
        refusal = self._send(self._protocol.send(h11.EndOfMessage()) or b"")
        self._sent_at = time.monotonic()
        return refusal

    def _send(self, data: bytes) -> ResponseHead | None:
        """Send bytes; returns the response if the server refuses the request before it has read them."""
        self._is_sent = False
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
        self._is_sent = True
        return None

    def _early_refusal(self) -> ResponseHead | None:
        if self._response is None and not self._receive():
            self._parse_head()
        is_error = self._response is not None and self._response.status >= HTTPStatus.MULTIPLE_CHOICES
        return self._response if is_error else None

    def response(self) -> ResponseHead:
        """The head of the response to a request that was sent, or refused before all of it was sent.

        Without an answer to a request that does no harm twice, a kept connection counts as lost after a while.
        """
        if self._parse_head() is None and (wanted := self._receive()):
            self._remind(wanted)
            waited_s = time.monotonic() - self._sent_at
            if self._is_hurried and self._timeout_s() > 2 * _ANSWER_S:
                if not self._poll(wanted, max(_ANSWER_S - waited_s, 0.0)):
                    raise ConnectionResetError("the server does not answer on a kept connection")
            elif not self._poll(wanted, max(self._timeout_s() - waited_s, 0.0)):
                raise TimeoutError(_TOO_LATE)
        while (response := self._parse_head()) is None:
            self._wait_for_data()
        return response

    def _remind(self, wanted: int) -> None:
        """Send an empty line to a server that may have forgotten the request; it takes no other request after that."""
        if self.may_forget and self._is_sent and not self._has_reminded:
            waited_s = time.monotonic() - self._sent_at
            if not self._poll(wanted, min(max(REMIND_S - waited_s, 0.0), self._timeout_s())):
                self._has_reminded = True
                self._send(b"\r\n")

    def _parse_head(self) -> ResponseHead | None:
        """The response, if its head is complete; interim responses are skipped."""
        while self._response is None and self._is_by_h11:
            event = self._protocol.next_event()
            if isinstance(event, h11.Response):
                self._response = ResponseHead(event.status_code, list(event.headers), event.reason)
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
        if not self._is_by_h11:
            while not self._content and self._left:
                self._wait_for_data(min_timeout_s)
            content, self._content = self._content, b""
            return content
        while (event := self._protocol.next_event()) is h11.NEED_DATA:
            self._wait_for_data(min_timeout_s)
        return event.data if isinstance(event, h11.Data) else b""

    @property
    def is_reusable(self) -> bool:
        """Whether the connection can take another request: all was sent and read, and no further data has arrived."""
        if self._has_reminded:
            return False
        if not self._is_by_h11:
            return self._is_sent and not (self._content or self._left or self._has_more)
        protocol = self._protocol
        return (
            self._is_sent and protocol.our_state is protocol.their_state is h11.DONE and not protocol.trailing_data[0]
        )

    def fileno(self) -> int:
        """Descriptor of the socket, for `select.poll`."""
        return self._sock.fileno()

    @property
    def has_answer(self) -> bool:
        """Whether a response has been received that the socket does not show as bytes to receive."""
        return self._response is not None or self._sock.pending() > 0

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
        if self._is_by_h11:
            # An empty read is the end of the stream.
            self._protocol.receive_data(self._buffer[:count])  # type: ignore[arg-type]  # any buffer will do
        else:
            self._receive_plain(bytes(self._buffer[:count]))
        return 0

    def _receive_plain(self, data: bytes) -> None:
        """Take the first bytes of a response, or bytes of the body of a plain one; empty at the end of the stream."""
        if self._plain is None:
            if self._left and not data:
                raise h11.RemoteProtocolError(f"the server closed the connection {self._left} bytes before the end")
            self._content += data[: self._left]
            self._has_more = self._has_more or len(data) > self._left
            self._left -= min(len(data), self._left)
            return
        request, self._plain = self._plain, None
        found = parsed_response(data, request.method)
        if found is None:
            self._is_by_h11 = True
            self._all_by_h11(request)
            self._protocol.receive_data(data)
        else:
            self._response, self._content, self._has_more = found.head, found.data, found.has_more
            self._left = found.length - len(found.data)

    def _wait_for_data(self, min_timeout_s: float = 0.0) -> None:
        while wanted := self._receive():
            self._wait(wanted, min_timeout_s)

    def _wait(self, events: int, min_timeout_s: float = 0.0) -> int:
        ready = self._poll(events, max(self._timeout_s(), min_timeout_s))
        if not ready:
            raise TimeoutError(_TOO_LATE)
        return ready

    def _poll(self, events: int, seconds: float) -> int:
        """Wait for events of `select.poll`; returns those that occurred, 0 for none."""
        self._poller.register(self._sock, events)
        return next((ready for _, ready in self._poller.poll(seconds * 1000)), 0)


def _events(error: ssl.SSLError) -> int:
    return select.POLLOUT if isinstance(error, ssl.SSLWantWriteError) else select.POLLIN
