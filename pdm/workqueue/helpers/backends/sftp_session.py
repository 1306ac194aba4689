"""SFTP protocol, version 3, over the pipes of ssh(1): pipelined requests and their responses."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import struct
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.helpers import lease
from pdm.workqueue.helpers.backends.ssh_command import explain
from pdm.workqueue.helpers.storage import StoppedError, StorageError, Timeouts, start_error

INIT, VERSION, OPEN, CLOSE, READ, WRITE, LSTAT, FSTAT = 1, 2, 3, 4, 5, 6, 7, 8
SETSTAT, OPENDIR, READDIR, REMOVE, MKDIR, RMDIR, REALPATH, STAT, RENAME, READLINK = (
    9,
    11,
    12,
    13,
    14,
    15,
    16,
    17,
    18,
    19,
)
STATUS, HANDLE, DATA, NAME, ATTRS, EXTENDED, EXTENDED_REPLY = 101, 102, 103, 104, 105, 200, 201
OK, EOF, FAILURE = 0, 1, 4
#: What follows the path in an OPEN: flags to read a file, or to create one, and empty attributes.
TO_READ, TO_CREATE = struct.pack(">II", 0x01, 0), struct.pack(">II", 0x02 | 0x08 | 0x20, 0)
#: An extension.
FSYNC = b"fsync@openssh.com"
#: Message of ssh(1) if no SSH server answers.
_NO_SERVER = re.compile(
    r"^ssh: connect to host |Could not resolve hostname|kex_exchange_identification: |during banner exchange",
    re.MULTILINE,
)
#: errno of a status. Those above 8 are of later versions, but servers send them.
_ERRNOS = {
    2: errno.ENOENT,
    3: errno.EACCES,
    5: errno.EINVAL,
    8: errno.EOPNOTSUPP,
    10: errno.ENOENT,
    11: errno.EEXIST,
    12: errno.EROFS,
    14: errno.ENOSPC,
    15: errno.EDQUOT,
    18: errno.ENOTEMPTY,
    19: errno.ENOTDIR,
    20: errno.EINVAL,
    21: errno.ELOOP,
    24: errno.EISDIR,
}
#: "Failure" has no reason. OpenSSH sends no more; other servers end the message with the system's error text.
_TEXTS = {
    **{
        os.strerror(number).lower(): number
        for number in (
            errno.EACCES,
            errno.EDQUOT,
            errno.EEXIST,
            errno.EISDIR,
            errno.ELOOP,
            errno.ENAMETOOLONG,
            errno.ENOENT,
            errno.ENOSPC,
            errno.ENOTDIR,
            errno.ENOTEMPTY,
            errno.EPERM,
            errno.EROFS,
            errno.EXDEV,
        )
    },
    "already exists": errno.EEXIST,
    "file does not exist": errno.ENOENT,
}
_VERSION = 3
#: Extensions of OpenSSH's sftp-server in its order; no other server has these first.
_OPENSSH = (
    b"posix-rename@openssh.com",
    b"statvfs@openssh.com",
    b"fstatvfs@openssh.com",
    b"hardlink@openssh.com",
    b"fsync@openssh.com",
)
#: Bytes shown of data that is not SFTP, and seconds to wait for it.
_SHOWN_NOISE, _NOISE_WAIT_S = 200, 0.5
#: Exit status of ssh(1) for a failed login or a lost connection; any other is that of the remote program.
_SSH_FAILED = 255
#: Exit statuses of a shell for a program that it cannot start.
_NOT_FOUND = (126, 127)
#: Maximum bytes of a packet: OpenSSH sends up to 256 KiB.
_LONGEST_ANSWER = 1024 * 1024
_PIPE = 256 * 1024
_SHORTEST_WAIT_S = 0.001


class StatusError(StorageError):
    """An error status of the server, which is more exact than the errno for it."""

    def __init__(self, status: int, message: str) -> None:
        number = _errno_of(message) if status == FAILURE else _ERRNOS.get(status)
        super().__init__(message, errno=number)
        self.status = status


def _errno_of(message: str) -> int | None:
    text = message.rstrip(". \n").lower()
    return next((number for ending, number in _TEXTS.items() if text.endswith(ending)), None)


class SftpResponse(NamedTuple):
    """A response: its type, and what follows the number of the request."""

    type: int
    body: bytes


class PacketReader:
    """Parses a response; `StorageError` if it is truncated."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    @property
    def left(self) -> int:
        """The rest of the response."""
        return len(self._body) - self._at

    def _unpack(self, form: str) -> int:
        try:
            (value,) = struct.unpack_from(form, self._body, self._at)
        except struct.error:
            raise StorageError("the server's answer is cut short", code=FailureCode.BAD_LISTING) from None
        self._at += struct.calcsize(form)
        return int(value)

    def number(self) -> int:
        return self._unpack(">I")

    def long(self) -> int:
        return self._unpack(">Q")

    def string(self) -> bytes:
        length = self.number()
        if length > self.left:
            raise StorageError("the server's answer is cut short", code=FailureCode.BAD_LISTING)
        self._at += length
        return self._body[self._at - length : self._at]


def string(value: bytes) -> bytes:
    """Encode a string."""
    return struct.pack(">I", len(value)) + value


class SftpSession:
    """A connection to one server.

    Args:
        command: ssh(1) with its arguments, which starts the subsystem.
        environment: of ssh(1).
        timeouts: for the login.

    Raises:
        StorageError: the login failed; the message is that of ssh(1).
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], timeouts: Timeouts, wake: int) -> None:
        self.timeouts = timeouts
        self._wake = wake
        self._noise_from = 0
        self._noise = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._noise,
                env=dict(environment),
                bufsize=0,
            )
        except OSError as error:
            self._noise.close()
            raise start_error("ssh", "openssh-client", error) from error
        assert self._process.stdin is not None and self._process.stdout is not None  # noqa: PT018
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        for descriptor in (self._in, self._out):
            os.set_blocking(descriptor, False)
        self._poll = select.poll()
        self._poll.register(self._out, select.POLLIN)
        self._poll.register(wake, select.POLLIN)
        self._writing = False
        self._to_write = bytearray()
        self._received = bytearray()
        self._answers: dict[int, SftpResponse] = {}
        self._forgotten: set[int] = set()
        self._last_id = 0
        self._moved_at = time.monotonic()
        self.closed = False
        self.extensions: dict[bytes, bytes] = {}
        self._greeted = False
        self._greet()

    @property
    def is_openssh(self) -> bool:
        """Whether the server is OpenSSH's, whose MKDIR and RENAME never replace."""
        return tuple(self.extensions)[: len(_OPENSSH)] == _OPENSSH

    def _greet(self) -> None:
        self._to_write += struct.pack(">IBI", 5, INIT, _VERSION)
        self._moved_at = time.monotonic()
        while (packet := self._packet()) is None:
            self._turn()
        if packet[0] != VERSION:
            raise self._not_sftp(packet)
        self._greeted = True
        # The output up to here is the server's banner.
        self._noise_from = os.fstat(self._noise.fileno()).st_size
        reader = PacketReader(packet[5:])
        while reader.left:
            name, value = reader.string(), reader.string()
            self.extensions[name] = value

    def send(self, kind: int, *parts: bytes | memoryview) -> int:
        """Send a request; returns its number."""
        lease.check()
        self._last_id = (self._last_id + 1) & 0xFFFFFFFF
        length = 5 + sum(map(len, parts))
        self._to_write += struct.pack(">IBI", length, kind, self._last_id)
        for part in parts:
            self._to_write += part
        if not self._writing:
            self._write()
        return self._last_id

    def receive(self, request: int) -> SftpResponse:
        """The response to a request.

        Raises:
            StatusError: it is an error status.
            StorageError, StoppedError: no response arrived.
        """
        self._moved_at = time.monotonic()
        while request not in self._answers:
            packet = self._packet()
            if packet is None:
                self._turn()
                continue
            number = int.from_bytes(packet[1:5], "big")
            if number in self._forgotten:
                self._forgotten.discard(number)
            else:
                self._answers[number] = SftpResponse(packet[0], packet[5:])
        answer = self._answers.pop(request)
        if answer.type == STATUS:
            reader = PacketReader(answer.body)
            status = reader.number()
            if status not in (OK, EOF):
                said = reader.string().decode("utf-8", "backslashreplace") if reader.left else f"status {status}"
                raise StatusError(status, said)
        return answer

    def call(self, kind: int, *parts: bytes) -> SftpResponse:
        """Send a request and wait for its response."""
        return self.receive(self.send(kind, *parts))

    def forget(self, requests: Sequence[int]) -> None:
        """Discard the responses to these requests."""
        for request in requests:
            if self._answers.pop(request, None) is None:
                self._forgotten.add(request)

    def is_alive(self) -> bool:
        """Whether the session appears to be open. A session that the server has ended is closed."""
        if self.closed:
            return False
        with contextlib.suppress(BlockingIOError, StorageError):
            self._read()
        return not self.closed

    def close(self) -> None:
        """Close it, even if requests are pending."""
        if self.closed:
            return
        self.closed = True
        self._process.kill()
        with self._process, contextlib.suppress(OSError):
            pass
        self._noise.close()

    # -- the pipes

    def _turn(self) -> None:
        """Wait for the pipes, and read and write what is possible."""
        now = time.monotonic()
        wait_s = min(self._moved_at + self.timeouts.stall_s, self.timeouts.until) - now
        if wait_s <= 0:
            stalled = now < self.timeouts.until
            self.close()
            raise StorageError(
                f"no answer for {self.timeouts.stall_s:g} s" if stalled else "not finished in time",
                code=FailureCode.STALLED if stalled else FailureCode.TIMEOUT,
            )
        if bool(self._to_write) != self._writing:
            self._writing = bool(self._to_write)
            if self._writing:
                self._poll.register(self._in, select.POLLOUT)
            else:
                self._poll.unregister(self._in)
        for descriptor, _ in self._poll.poll(max(wait_s, _SHORTEST_WAIT_S) * 1000):
            if descriptor == self._wake:
                self.close()
                raise StoppedError
            if descriptor == self._in:
                self._write()
            else:
                self._read()

    def _write(self) -> None:
        try:
            count = os.write(self._in, self._to_write)
        except BlockingIOError:
            return
        except OSError:
            # Its standard error has the reason after it has ended.
            self._to_write.clear()
            return
        del self._to_write[:count]
        self._moved_at = time.monotonic()

    def _read(self) -> None:
        try:
            piece = os.read(self._out, _PIPE)
        except BlockingIOError:
            return
        if not piece:
            if self._received and not self._greeted:
                raise self._not_sftp(bytes(self._received))
            raise self._broken("the connection ended")
        self._received += piece
        self._moved_at = time.monotonic()

    def _packet(self) -> bytes | None:
        """The next packet without its length, if it is complete."""
        if len(self._received) < 4:
            return None
        length = int.from_bytes(self._received[:4], "big")
        if not 5 <= length <= _LONGEST_ANSWER:
            raise self._not_sftp(bytes(self._received))
        if len(self._received) < 4 + length:
            return None
        packet = bytes(memoryview(self._received)[4 : 4 + length])
        del self._received[: 4 + length]
        return packet

    def _broken(self, why: str) -> StorageError:
        code: FailureCode | None = None
        unreachable = False
        if not self.closed:
            # ssh(1) ends after its pipe is closed; its last output is the reason.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
            status = self._process.returncode
            self._noise.seek(self._noise_from)
            said = self._noise.read(4000).decode("utf-8", "backslashreplace").strip()
            self.close()
            if not self._greeted and status not in (None, _SSH_FAILED):
                # The login succeeded: the remote program has ended.
                reason = " (the program was not found)" if status in _NOT_FOUND else ""
                why = f"the account cannot use SFTP: what the server runs for it ended with status {status}{reason}"
                code = FailureCode.UNSUPPORTED
            unreachable = not self._greeted and _NO_SERVER.search(said) is not None
            if said:
                said, known = explain(said)
                why, code = f"{why}: {said}", known or code
        return StorageError(why, code=code, lost=code is None, unreachable=unreachable and code is None)

    def _not_sftp(self, came: bytes) -> StorageError:
        """The error for output that is not SFTP, usually of the account's start-up files, which breaks SFTP."""
        if self._greeted:
            self.close()
            return StorageError("the server's answers are not valid SFTP", code=FailureCode.BAD_LISTING, lost=True)
        give_up_at = time.monotonic() + _NOISE_WAIT_S
        while len(came) < _SHOWN_NOISE and (left_s := give_up_at - time.monotonic()) > 0:
            if not self._poll.poll(left_s * 1000):
                break
            try:
                piece = os.read(self._out, _SHOWN_NOISE)
            except BlockingIOError:
                # The wake-up descriptor: the operation must end.
                break
            if not piece:
                break
            came += piece
        self.close()
        # The SFTP server has started behind it; its greeting has zero bytes.
        shown = came.partition(b"\0")[0][:_SHOWN_NOISE].decode("utf-8", "backslashreplace").strip()
        return StorageError(
            f"the server does not speak SFTP, it began with {shown!r}: either a start-up file of the account (.bashrc,"
            " .profile, .cshrc, /etc/profile.d) or a ForceCommand prints this, and must print nothing in sessions"
            " without a terminal; or the account may not use SFTP",
            code=FailureCode.UNSUPPORTED,
        )
