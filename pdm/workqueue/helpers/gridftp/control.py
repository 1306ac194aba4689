"""Control connection to a GridFTP server with pipelined commands (RFC 959, RFC 2228, GFD.20).

A server processes commands in order and replies in the same order, so sending the next command before the reply to the
last one saves a round trip. Each command has a callback for its reply.
"""

from __future__ import annotations

import base64
import binascii
import collections
import contextlib
import re
import socket
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from pdm.workqueue.helpers import lease
from pdm.workqueue.helpers.credentials import trusting
from pdm.workqueue.helpers.gridftp.data_port import DataPort
from pdm.workqueue.helpers.gridftp.gsi import Gsi, GsiError, SecurityContext
from pdm.workqueue.helpers.gridftp.replies import Reply
from pdm.workqueue.helpers.gridftp.reply_reader import Between, ChannelError, ReplyReader, SilentServerError

#: Default timeout in seconds for the greeting, and for each step of the login.
LOGIN_S = 30.0
#: Bytes of one read. A buffer of 128 KiB or more would be mapped, shrunk and unmapped by each: three system calls.
_PIECE = 64 * 1024
#: Commands without a reply that are sent at most; more wait here. Globus 13 reads all that arrives, and with some 1,300
#: that it has not carried out it stops for ever (1,200 removals of temporary names of earlier attempts).
_MOST_PENDING = 512
_DEFAULT_PORT = 2811
_TOKEN = re.compile(rb"ADAT=([A-Za-z0-9+/=]+)")
#: Maximum messages of a login: a TLS handshake and the delegation of a proxy take about ten.
_MOST_LOGIN_STEPS = 100


#: Called with the reply to a command.
Answered = Callable[[Reply], None]
#: Called with preliminary replies: a transfer begins, and its markers.
Marked = Callable[[Reply], None]


class ControlChannel:
    """A connection after its login.

    Args:
        gsi: the library and the credential; None for a server without logins (plain FTP).
        address: ``host:port`` of the server.
        login_s: timeout of each step of the login, in seconds.

    Attributes:
        gsi: as given.
        address: as given.
        features: first words of the server's FEAT lines, in capitals.
        waiting: number of commands without a reply.
        heard_at: when data last arrived from the server (`time.monotonic`).
        round_trip_s: shortest time in seconds between a single command and its reply.
        sends_markers: whether the server sends performance markers.
        data_port: what holds for its data connections.
    """

    #: Replies are read at any time.
    reads = True
    holds = False

    def __init__(self, gsi: Gsi | None, address: str, login_s: float = LOGIN_S) -> None:
        self.gsi = gsi
        self._login_s = login_s
        self.address = address
        self.features: dict[str, str] = {}
        self.heard_at = 0.0
        self.round_trip_s = float("inf")
        self.sends_markers = True
        self.data_port = DataPort()
        self._reader = ReplyReader(address)
        self._socket: socket.socket | None = None
        self._unsent = bytearray()
        # Commands that wait for replies to earlier ones.
        self._held_back: collections.deque[bytes] = collections.deque()
        self._answers: collections.deque[tuple[Answered, Between | None, Marked | None]] = collections.deque()
        self._closed = False

    @property
    def waiting(self) -> int:
        return len(self._answers)

    # -- the login, which blocks

    def open(self) -> None:
        """Connect and log in.

        Raises:
            SilentServerError: the server sends nothing.
            ChannelError: it failed, or `close` was called meanwhile.
        """
        host, port = _address(self.address)
        try:
            self._socket = socket.create_connection((host, port), self._login_s)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._closed:
                raise ChannelError("closed")
            self._expect(self._plain_reply(), 220)
            if self.gsi is None:
                self._log_in_plainly()
            else:
                self._reader.context = SecurityContext(self.gsi, host)
                self._log_in(self._reader.context)
            self._read_features(self.ask(b"FEAT"))
            self.data_port.connected(self._socket, authenticates=self.gsi is not None and "DCAU" in self.features)
            self._socket.setblocking(False)
        except TimeoutError:
            self.close()
            raise SilentServerError(self.address, self._login_s) from None
        except GsiError as error:
            self.close()
            raise ChannelError(f"{self.address}: {error}", self.address, refused=True) from error
        except (OSError, UnicodeError) as error:
            never_connected = self._socket is None and not self._closed
            self.close()
            raise ChannelError(f"{self.address}: {error}", self.address, unreachable=never_connected) from error
        except ChannelError:
            self.close()
            raise

    def _log_in_plainly(self) -> None:
        self._send_plain(b"USER anonymous")
        reply = self._plain_reply()
        self._expect(reply, 230, 331)
        if reply.code == 331:
            self._send_plain(b"PASS anonymous@")
            self._expect(self._plain_reply(), 230, 202)

    def _log_in(self, context: SecurityContext) -> None:
        self._send_plain(b"AUTH GSSAPI")
        self._expect(self._plain_reply(), 334)
        token: bytes | None = None
        # The first step reads the trusted authorities.
        with trusting(self.address):
            answer, complete = context.step(token)
        for _ in range(_MOST_LOGIN_STEPS):
            if answer:
                self._send_plain(b"ADAT " + base64.b64encode(answer))
                reply = self._plain_reply()
                if reply.code == 235 and complete:
                    break
                self._expect(reply, 335, 235)
                found = _TOKEN.search(reply.text.encode("ascii", "replace"))
                token = base64.b64decode(found.group(1)) if found else None
            elif complete:
                break
            else:
                raise ChannelError(f"{self.address}: the login cannot continue", self.address)
            answer, complete = context.step(token)
        else:
            raise ChannelError(f"{self.address}: the login needs too many messages", self.address)
        # The server's grid-mapfile names the account.
        self._expect(self.ask(b"USER :globus-mapping:"), 230, 331)
        self._expect(self.ask(b"PASS dummy"), 230, 202)

    def _expect(self, reply: Reply, *codes: int) -> None:
        if reply.code not in codes:
            busy = reply.closes
            why = f"{self.address} refuses the login:\n{reply.text}"
            raise ChannelError(why, self.address, unreachable=busy, refused=not busy)

    def _send_plain(self, line: bytes) -> None:
        self._connected().sendall(line + b"\r\n")

    def _plain_reply(self) -> Reply:
        while True:
            for reply in self._reader.replies(self._between):
                return reply
            self._receive()

    def ask(self, command: bytes) -> Reply:
        """Send one command and wait for its reply; only while no other command is pending.

        Raises:
            ChannelError: no reply arrived in time.
        """
        answers: list[Reply] = []
        self.send(command, answers.append)
        lease.check()
        connection = self._connected()
        blocking = connection.gettimeout()
        connection.settimeout(self._login_s)
        asked_at = time.monotonic()
        try:
            while not answers:
                if self._unsent:
                    connection.sendall(self._unsent)
                    self._unsent.clear()
                self._receive()
                self._dispatch()
        except TimeoutError:
            raise SilentServerError(self.address, self._login_s) from None
        except OSError as error:
            raise ChannelError(f"{self.address}: {error}", self.address) from error
        finally:
            connection.settimeout(blocking)
        self.round_trip_s = min(self.round_trip_s, time.monotonic() - asked_at)
        return answers[0]

    def _read_features(self, reply: Reply) -> None:
        for line in reply.text.splitlines()[1:-1]:
            name, _, rest = line.strip().partition(" ")
            self.features[name.upper()] = rest

    # -- commands and replies, which do not block

    def send(
        self,
        command: bytes,
        answered: Answered,
        between: Between | None = None,
        marked: Marked | None = None,
        *,
        many_lines: bool = False,
    ) -> None:
        """Queue a command; the next call of `flush` sends it.

        Args:
            command: without its line end.
            answered: called with the reply.
            between: called with what is between the first and the last line of a long reply; without it the lines are
                part of the reply.
            marked: called with preliminary replies.
            many_lines: whether the command may contain LF or CR, as names of files do: in a wrapped command only CR LF
                ends a line.

        Raises:
            ValueError: the command contains a line end.
            ChannelError: it cannot be sent.
        """
        context = self._reader.context
        if b"\n" in command or b"\r" in command or b"\0" in command:
            wrapped = context is not None
            if not (many_lines and wrapped) or b"\r\n" in command or b"\0" in command:
                raise ValueError("a command is one line")
        if context is not None:
            try:
                token = context.wrap(command + b"\r\n")
                line = b"MIC %b\r\n" % binascii.b2a_base64(token, newline=False)
            except GsiError as error:
                raise ChannelError(f"{self.address}: {error}", self.address) from error
        elif self.gsi is None:
            line = command + b"\r\n"
        else:
            raise ChannelError(f"{self.address}: not logged in", self.address)
        if not self._answers:
            self.heard_at = time.monotonic()
        if len(self._answers) < _MOST_PENDING:
            self._unsent += line
        else:
            self._held_back.append(line)
        self._answers.append((answered, between, marked))

    @property
    def unsent(self) -> bool:
        """Whether `flush` has something to send."""
        return bool(self._unsent)

    def flush(self) -> None:
        """Send what the connection takes without blocking; raises `ChannelError`."""
        lease.check()
        while self._unsent:
            try:
                sent = self._connected().send(self._unsent)
            except BlockingIOError:
                return
            except OSError as error:
                raise ChannelError(f"{self.address}: {error}", self.address) from error
            del self._unsent[:sent]

    def read(self) -> None:
        """Read what has arrived and pass replies to the callbacks of their commands.

        Raises:
            ChannelError: the connection was closed, or the data is no reply.
        """
        try:
            self._receive()
        except BlockingIOError:
            return
        except OSError as error:
            raise ChannelError(f"{self.address}: {error}", self.address) from error
        self._dispatch()

    def _dispatch(self) -> None:
        for reply in self._reader.replies(self._between):
            if reply.code < 200:
                marked = self._answers[0][2] if self._answers else None
                if marked is not None:
                    marked(reply)
                continue
            if not self._answers:
                raise ChannelError(f"{self.address}: unexpected reply: {reply.text[:200]}", self.address)
            answered, _, _ = self._answers.popleft()
            if self._held_back:
                self._unsent += self._held_back.popleft()
            answered(reply)

    def fileno(self) -> int:
        return self._connected().fileno()

    @property
    def is_dead(self) -> bool:
        """Whether the server has closed the connection, or announced it, while no command was pending.

        Also if it has closed a data connection that was kept.
        """
        if self._socket is None or self.data_port.is_dead:
            return True
        try:
            self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def close(self) -> None:
        """Close the connection; may be called from any thread, and interrupts a wait for it."""
        self._closed = True
        connection, self._socket = self._socket, None
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def dispose(self) -> None:
        """Close, and free the security context; called by the thread that uses the channel."""
        self.close()
        self.data_port.keep(None)
        if self._reader.context is not None:
            self._reader.context.close()
            self._reader.context = None

    # -- the connection

    def _connected(self) -> socket.socket:
        if self._socket is None:
            raise ChannelError(f"{self.address}: the connection is closed", self.address)
        return self._socket

    def _receive(self) -> None:
        piece = self._connected().recv(_PIECE)
        if not piece:
            raise ChannelError(f"{self.address}: the server has closed the connection", self.address)
        self.heard_at = time.monotonic()
        self._reader.feed(piece)

    def _between(self) -> Between | None:
        return self._answers[0][1] if self._answers else None


def greets(address: str, timeout_s: float) -> bool:
    """Whether a server sends a greeting.

    Args:
        address: ``host:port``.
        timeout_s: seconds to wait.
    """
    try:
        with socket.create_connection(_address(address), timeout_s) as connection:
            return bool(connection.recv(1))
    except OSError:
        return False


def _address(address: str) -> tuple[str, int]:
    parts = urlsplit(f"//{address}")
    return parts.hostname or "", parts.port or _DEFAULT_PORT
