"""A worker process with an XRootD client (`xroot_worker`), and the storage errors for its errors.

One thread uses a session; another interrupts it through a descriptor that becomes readable.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import re
import select
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.helpers import lease
from pdm.workqueue.helpers.backends.http_errors import errno_from_text
from pdm.workqueue.helpers.storage import StoppedError, StorageError, Timeouts, internal_error, start_error, truncated

#: Debian's package of the bindings, for the interpreter here.
PACKAGE, SYSTEM_PYTHON = "python3-xrootd", "/usr/bin/python3"
_WORKER = Path(__file__).with_name("xroot_worker.py")
_HEAD = struct.Struct(">cI")
_LONGEST_FRAME = 16 * 1024 * 1024
_PIPE = 256 * 1024
_LEAST_S = 0.05
#: Minimum seconds for the first response: it includes a login, for which keys are generated.
_LOGIN_S = 15.0
_MOST_NOISE = 64 * 1024
#: Timeout in seconds of the check for the bindings.
_LONGEST_LOOK_S = 30.0
#: errno of the server's error numbers; an error text takes precedence.
_BY_NUMBER = {
    3000: errno.EINVAL,
    3002: errno.ENAMETOOLONG,
    3003: errno.EBUSY,
    3007: errno.EIO,
    3009: errno.ENOSPC,
    3010: errno.EACCES,
    3011: errno.ENOENT,
    3013: errno.EOPNOTSUPP,
    3015: errno.EISDIR,
    3016: errno.EISDIR,
    3018: errno.EEXIST,
    3021: errno.EDQUOT,
    3025: errno.EROFS,
}
_SAID_BY_SERVER, _AUTHENTICATION, _TLS, _NOT_VALID, _NOT_FOUND = 400, (203, 204), 110, (201, 303), 304
_ON_THE_WAY = range(100, 300)
#: Errors of name resolution and connecting.
_NO_SERVER = (101, 108)
_AUTHENTICATION_NUMBER = 3030
_EXPIRED = re.compile(r"expired certificates|[Pp]roxy.{0,40}expired|certificate has expired")
_REFUSED = re.compile(r"Authentication with \w{1,20} failed: ")
_UNTRUSTED = re.compile(
    r"GetCA: certificate not found|cannot verify server certificate|Unable to verify server hostname"
)
#: The library must not retry for minutes, follow metalink files, or log in with another credential than this proxy.
#: The server's name is that of the URL, not one from DNS.
_SETTINGS = {
    "XRD_CONNECTIONRETRY": "1",
    "XRD_CONNECTIONWINDOW": "15",
    "XRD_STREAMERRORWINDOW": "0",
    "XRD_READRECOVERY": "0",
    "XRD_WRITERECOVERY": "0",
    "XRD_OPENRECOVERY": "0",
    "XRD_METALINKPROCESSING": "0",
    "XRD_LOGLEVEL": "Error",
    "XRD_PLUGIN": "",
    "XRD_PLUGINCONFDIR": "/nonexistent",
    "XrdSecPROTOCOL": "gsi",
    "XrdSecDEBUG": "1",
    "XrdSecGSICREATEPROXY": "0",
    "XrdSecGSITRUSTDNS": "0",
    "XrdSecGSIUSERCERT": "/nonexistent",
    "XrdSecGSIUSERKEY": "/nonexistent",
    "HOME": "/nonexistent",
}
_PASSED_ON = ("PATH", "LANG", "LD_LIBRARY_PATH", "X509_USER_PROXY")
_NOWHERE = "/nonexistent"


class XrootdError(StorageError):
    """A request failed.

    Attributes:
        number: the server's error number; 0 if there is none.
    """

    number = 0


def interpreter() -> str:
    """A Python interpreter with XRootD's bindings: the current one, or the system's."""
    return sys.executable if importlib.util.find_spec("pyxrootd") else SYSTEM_PYTHON


def missing_software() -> str | None:
    """Why no worker can be started here, as a message for an operator; None if one can."""
    python, install = interpreter(), f"install the package {PACKAGE}"
    try:
        # The worker's first import.
        done = subprocess.run(
            [python, "-I", "-c", "from pyxrootd import client; from XRootD.client import flags"],
            capture_output=True,
            text=True,
            timeout=_LONGEST_LOOK_S,
            check=False,
        )
    except (FileNotFoundError, PermissionError) as error:
        return f"{python} cannot be run ({error.strerror}): {install}"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return f"{python} cannot load XRootD's Python bindings ({last[:200]}): {install}"
    return None


def environment(trust: str | None, *, delegates: bool) -> Mapping[str, str]:
    """Environment of a worker.

    Args:
        trust: directory of the authorities trusted for its server.
        delegates: whether a server that requests a proxy gets one.

    Raises:
        StorageError: there is no proxy; the library would look for another, or crash.
    """
    given = {name: os.environ[name] for name in _PASSED_ON if os.environ.get(name)}
    proxy = given.get("X509_USER_PROXY", "")
    if not os.access(proxy, os.R_OK):
        raise StorageError(
            "XROOT needs the user's proxy", code=FailureCode.CREDENTIAL_MISSING, scope=FailureScope.SERVICE
        )
    return {
        **given,
        **_SETTINGS,
        "XrdSecGSIUSERPROXY": proxy,
        "X509_CERT_DIR": trust or _NOWHERE,
        "XrdSecGSICADIR": trust or _NOWHERE,
        "XrdSecGSIDELEGPROXY": "1" if delegates else "0",
    }


class XrootdSession:
    """A worker process.

    Args:
        wake: becomes readable when the operation must end.
        trust: directory of the authorities trusted for its server.
        delegates: whether a server that requests a proxy gets one.
    """

    def __init__(self, wake: int, trust: str | None, *, delegates: bool) -> None:
        self.timeouts: Timeouts
        #: Whether a request is running: the session cannot take another one.
        self.busy = False
        #: Directory entries that it has listed.
        self.listed = 0
        self._wake = wake
        self._noise = tempfile.TemporaryFile(mode="ab+")  # noqa: SIM115 - `close` closes it
        try:
            self._process = subprocess.Popen(
                [interpreter(), "-I", str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._noise,
                env=dict(environment(trust, delegates=delegates)),
                bufsize=0,
            )
        except (OSError, StorageError) as error:
            self._noise.close()
            if isinstance(error, StorageError):
                raise
            raise start_error(interpreter(), PACKAGE, error) from error
        assert self._process.stdin is not None and self._process.stdout is not None  # noqa: PT018
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        self._waiting = bytearray()
        self._logged_in = False
        self._said_before = 0

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None and not self._noise.closed

    def close(self) -> None:
        """Kill the process, and with it a running request."""
        self._process.kill()
        with contextlib.suppress(OSError), self._process:
            pass
        self._noise.close()

    def call(self, op: str, **arguments: Any) -> Any:
        """Send a request that has one response."""
        self.begin(op, **arguments)
        kind, content = self.next()
        while kind != b"A":
            kind, content = self.next()
        return self.answer(content)

    def begin(self, op: str, **arguments: Any) -> None:
        """Send a request; `next` returns its frames, the last one of kind ``A``."""
        if os.fstat(self._noise.fileno()).st_size > _MOST_NOISE:
            self._noise.truncate(0)
        self._said_before = os.fstat(self._noise.fileno()).st_size
        self.busy = True
        self.send(b"R", json.dumps({"op": op, **arguments}).encode("ascii"))

    def answer(self, content: bytes) -> Any:
        """The content of the last frame of a request.

        Raises:
            StorageError: the request failed.
        """
        self.busy = False
        self._logged_in = True
        told = json.loads(content)
        if told["ok"]:
            return told["value"]
        raise self._error(told)

    def send(self, kind: bytes, content: bytes) -> None:
        """Send a frame."""
        lease.check()
        rest = memoryview(_HEAD.pack(kind, len(content)) + content)
        while rest:
            self._wait(writing=True)
            try:
                rest = rest[os.write(self._in, rest[:_PIPE]) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise self._gone() from None

    def next(self, wait_s: float | None = None) -> tuple[bytes, bytes]:
        """The next frame; an empty one if none arrived within ``wait_s``."""
        while True:
            if len(self._waiting) >= _HEAD.size:
                kind, length = _HEAD.unpack_from(self._waiting)
                if length > _LONGEST_FRAME:
                    self.close()
                    raise internal_error("the worker's answers are out of sequence")
                end = _HEAD.size + length
                if len(self._waiting) >= end:
                    content = bytes(self._waiting[_HEAD.size : end])
                    del self._waiting[:end]
                    return kind, content
            if not self._wait(writing=False, wait_s=wait_s):
                return b"", b""
            try:
                piece = os.read(self._out, _PIPE)
            except BlockingIOError:
                continue
            if not piece:
                raise self._gone()
            self._waiting += piece

    def has_answer(self) -> bool:
        """Whether a frame can be read without blocking."""
        return bool(self._waiting) or bool(select.select([self._out], [], [], 0)[0])

    def _wait(self, *, writing: bool, wait_s: float | None = None) -> bool:
        """Wait until the pipe is readable or writable; False after ``wait_s``.

        Raises:
            StorageError: a timeout; the session is closed.
            StoppedError: the operation must end.
        """
        left = self.timeouts.until - time.monotonic()
        longest = max(min(max(self.timeouts.stall_s, 0.0 if self._logged_in else _LOGIN_S), left), _LEAST_S)
        if wait_s is not None:
            longest = wait_s
        wanted = [self._in] if writing else []
        readable, writable, _ = select.select([self._wake, *([] if writing else [self._out])], wanted, [], longest)
        if self._wake in readable:
            raise StoppedError
        if readable or writable:
            return True
        if wait_s is not None:
            return False
        self.close()
        stalled = time.monotonic() < self.timeouts.until
        raise StorageError(
            "the server did not answer in time", code=FailureCode.STALLED if stalled else FailureCode.TIMEOUT
        )

    def _gone(self) -> StorageError:
        noise = self._said()
        self.close()
        if "No module named" in noise:
            text = f"XRootD's Python bindings are missing: install the package {PACKAGE}"
            return StorageError(text, code=FailureCode.DEPENDENCY_MISSING, scope=FailureScope.SERVICE)
        return internal_error(f"the worker ended: {truncated(noise.strip(), 500)}")

    def _said(self) -> str:
        end = self._noise.seek(0, os.SEEK_END)
        self._noise.seek(max(end - _MOST_NOISE, self._said_before))
        return self._noise.read().decode("utf-8", "backslashreplace")

    def _error(self, told: dict[str, Any]) -> StorageError:
        text = truncated(str(told["message"]), 1000)
        code, number = told.get("code"), told.get("errno") or 0
        if told.get("what"):
            known = FailureCode(told["what"])
            return XrootdError(text, code=known, scope=FailureScope.SERVICE if known is FailureCode.INTERNAL else None)
        if code in _AUTHENTICATION or (code == _SAID_BY_SERVER and number == _AUTHENTICATION_NUMBER):
            return self._refused(text)
        if code == _TLS:
            return XrootdError(text, code=FailureCode.CERTIFICATE)
        if code in _NOT_VALID:
            return XrootdError(text, code=FailureCode.BAD_LISTING)
        if code in _ON_THE_WAY:
            return XrootdError(text, code=FailureCode.CONNECTION, lost=True, unreachable=code in _NO_SERVER)
        # Servers' messages begin with names, which any user may have chosen.
        error = XrootdError(text, errno=errno_from_text(text.rpartition(";")[2]) or _BY_NUMBER.get(number))
        error.number = number
        return error

    def _refused(self, text: str) -> StorageError:
        noise = self._said()
        reasons = [line for line in noise.splitlines() if re.search(r"[Ss]ecgsi: |secgsi_|failed: ", line)]
        if reasons:
            text = f"{text}: {truncated(reasons[-1], 300)}"
        if _EXPIRED.search(noise):
            return XrootdError(text, code=FailureCode.CREDENTIAL_EXPIRED, scope=FailureScope.SERVICE)
        # A server may have several authorities, of which some are unknown here: its own message comes first.
        untrusted = not _REFUSED.search(noise) and _UNTRUSTED.search(noise)
        return XrootdError(text, code=FailureCode.CERTIFICATE if untrusted else FailureCode.CREDENTIAL_REFUSED)


def frames(session: XrootdSession, kind: bytes) -> Iterator[bytes]:
    """The contents of the frames of a kind up to the response, whose error is raised."""
    while True:
        found, content = session.next()
        if found == b"A":
            session.answer(content)
            return
        if found == kind:
            yield content
