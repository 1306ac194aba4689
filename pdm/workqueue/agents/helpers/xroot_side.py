"""XRootD servers as a storage, by the programs xrdfs and xrdcp; ``X509_USER_PROXY`` and ``X509_CERT_DIR`` are theirs.

Two servers copy by themselves, with the user's proxy delegated to the destination. Each operation is a process with a
login of its own, about a quarter of a second: the price of programs that say plainly what they did.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import IO
from urllib.parse import unquote_to_bytes

from pdm.workqueue.agents.helpers.dav_client import errno_of
from pdm.workqueue.agents.helpers.side import Pieces, Side
from pdm.workqueue.agents.helpers.storage import (
    Arrived,
    Entries,
    StoppedError,
    StorageError,
    Thing,
    bare_url,
    parent_url,
    scoped,
    shortened,
)

_PIECE = 256 * 1024
_HOST = re.compile(rb"(?:[A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_LINE = re.compile(
    rb"([d-])([r-][w-][x-][r-][w-][x-][r-][w-][x-]) +\S+ +\S+ +([0-9]{1,19}) "
    rb"([0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}) (/.*)",
    re.DOTALL,
)
_FIELD = re.compile(r"^(Size|MTime|Flags|Mode): +(.*)$", re.MULTILINE)
_CODE = re.compile(r"\[(3[0-9]{3})\]")
_BY_CODE = {
    3009: errno.ENOSPC,
    3010: errno.EACCES,
    3011: errno.ENOENT,
    3013: errno.EOPNOTSUPP,
    3016: errno.EISDIR,
    3018: errno.EEXIST,
    3025: errno.EROFS,
}
#: What the programs shall not do: try for minutes what does not answer at once.
_SETTINGS = {
    "XRD_CONNECTIONRETRY": "1",
    "XRD_CONNECTIONWINDOW": "15",
    "XRD_STREAMERRORWINDOW": "0",
    "XRD_LOGLEVEL": "Error",
    "LANG": "C.UTF-8",
}


class XrootSide(Side):
    """One lane: one program at a time, or two where a copy is streamed from one server to another."""

    def __init__(self) -> None:
        super().__init__()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._no_third_party: set[tuple[bytes, bytes]] = set()

    # -- names

    def look(self, url: str) -> Thing | None:
        host, path = _place(url)
        try:
            printed = self._call("xrdfs", host, b"stat", path).decode("utf-8", "backslashreplace")
        except StorageError as trouble:
            if trouble.errno == errno.ENOENT:
                return None
            raise
        fields = dict(_FIELD.findall(printed))
        try:
            is_directory = "IsDir" in fields["Flags"]
            size, mtime = int(fields["Size"]), _moment(fields["MTime"])
        except (KeyError, ValueError) as error:
            raise StorageError(f"{url}: xrdfs prints what is no status", code="BAD_LISTING") from error
        mode = stat.S_IMODE(int(fields["Mode"], 8)) if fields.get("Mode", "").isdecimal() else None
        kind = "directory" if is_directory else "other" if "Other" in fields["Flags"] else "file"
        return Thing(kind, size if kind == "file" else 0, mode, mtime)

    def entries(self, url: str) -> Entries:
        host, path = _place(bare_url(url))
        there = self.look(url)
        if there is None:
            raise StorageError(f"{url} is not there", errno=errno.ENOENT)
        if there.kind != "directory":
            raise StorageError(f"{url} is not a directory", errno=errno.ENOTDIR)
        folder = path.rstrip(b"/") + b"/"
        for line in self._call("xrdfs", host, b"ls", b"-l", path).splitlines():
            found = _LINE.fullmatch(line)
            if found is None or not found.group(5).startswith(folder):
                # A name with a line end, most likely: to guess would be to lie.
                raise StorageError(f"{url}: a name here cannot be told from the server's listing", code="BAD_LISTING")
            kind = "directory" if found.group(1) == b"d" else "file"
            size = int(found.group(3)) if kind == "file" else 0
            yield found.group(5)[len(folder) :], Thing(kind, size, None, _moment(found.group(4).decode()))

    def make_directory(self, url: str) -> None:
        # The server says that it has made what was there before.
        if self.look(url) is not None:
            raise StorageError(f"{url} is there", errno=errno.EEXIST)
        above = self.look(parent_url(url))
        if above is not None and above.kind != "directory":
            raise StorageError(f"{parent_url(url)} is not a directory", errno=errno.ENOTDIR)
        host, path = _place(url)
        self._call("xrdfs", host, b"mkdir", path)

    def remove(self, url: str, *, directory: bool) -> None:
        there = self.look(url)
        if there is None:
            raise StorageError(f"{url} is not there", errno=errno.ENOENT)
        if there.kind == "directory" and not directory:
            raise StorageError(f"{url} is a directory", errno=errno.EISDIR)
        if there.kind != "directory" and directory:
            raise StorageError(f"{url} is not a directory", errno=errno.ENOTDIR)
        host, path = _place(url)
        self._call("xrdfs", host, b"rmdir" if directory else b"rm", path)

    def rename(self, source: str, destination: str, *, replace: bool) -> None:
        # It replaces whatever is there, and does not ask.
        if not replace and self.look(destination) is not None:
            raise StorageError(f"{destination} is there", errno=errno.EEXIST)
        host, old = _place(source)
        self._call("xrdfs", host, b"mv", old, _place(destination)[1])

    def size(self, url: str) -> int:
        there = self.look(url)
        if there is None:
            raise StorageError(f"{url} is not there", errno=errno.ENOENT)
        return there.size

    def checksum(self, url: str) -> str:
        host, path = _place(url)
        try:
            kind, _, digest = self._call("xrdfs", host, b"query", b"checksum", path).decode("ascii", "replace").partition(" ")
        except StorageError as trouble:
            if trouble.errno != errno.EOPNOTSUPP:
                raise
            return super().checksum(url)
        digest = digest.strip().lower()
        if kind != "adler32" or not re.fullmatch(r"[0-9a-f]{1,8}", digest):
            return super().checksum(url)
        return digest.rjust(8, "0")

    # -- bytes

    def read(self, url: str) -> Pieces:
        _place(url)
        there = self.look(url)
        if there is not None and there.kind == "directory":
            raise StorageError(f"{url} is a directory", errno=errno.EISDIR)
        with self._started(["xrdcp", "--silent", _url(url), b"-"], stdout=True) as (process, noise):
            assert process.stdout is not None
            while piece := self._read(process.stdout):
                yield piece
            self._ended(process, noise)

    def write(self, url: str, pieces: Iterator[bytes], size: int) -> None:
        _place(url)
        with self._started(["xrdcp", "--silent", b"-", _url(url)], stdin=True) as (process, noise):
            assert process.stdin is not None
            try:
                for piece in pieces:
                    self._write(process.stdin, piece)
                process.stdin.close()
            except BrokenPipeError:
                # It says why in a moment.
                self._ended(process, noise)
                raise StorageError("xrdcp ended early", code="CONNECTION", lost=True) from None
            self._ended(process, noise)

    def transfer(self, source: str, temporary: str, size: int, checksum: bool, arrived: Arrived) -> str | None:
        pair = (_place(source)[0], _place(temporary)[0])
        if pair not in self._no_third_party:
            # It speaks of a missing source only after it has tried for seconds.
            there = scoped("source", self.look, source)
            if there is None or there.kind == "directory":
                number = errno.ENOENT if there is None else errno.EISDIR
                raise StorageError(f"{source}: {os.strerror(number)}", errno=number, scope="source")
            try:
                self._call("xrdcp", b"--silent", b"--tpc", b"delegate", b"only", _url(source), _url(temporary), whole=True)
            except StorageError as trouble:
                if "(source)" in trouble.message and trouble.errno is not None:
                    raise trouble.at("source")
                if trouble.code != "CREDENTIAL_REFUSED" and trouble.errno != errno.EOPNOTSUPP:
                    raise self._blamed(source, trouble) from trouble
                # A server without delegation, or without third-party copies: through here.
                self._no_third_party.add(pair)
                with contextlib.suppress(StorageError):
                    self.remove(temporary, directory=False)
            else:
                return None
        return super().transfer(source, temporary, size, checksum, arrived)

    def _blamed(self, source: str, trouble: StorageError) -> StorageError:
        """Whose fault a failed third-party copy is: a source that does not answer now is at fault."""
        try:
            with contextlib.closing(self.read(source)) as pieces:
                next(pieces, None)
        except StorageError as told:
            return told.at("source")
        return trouble.at("destination")

    # -- programs

    def _call(self, program: str, *arguments: bytes, whole: bool = False) -> bytes:
        """Run a program to its end; ``whole``: it may take the time of a whole file, not of an answer."""
        with self._started([program, *arguments], stdout=True) as (process, noise):
            try:
                printed, _ = process.communicate(timeout=self._wait_s(whole=whole))
            except subprocess.TimeoutExpired:
                raise self._too_long() from None
            self._ended(process, noise)
            return printed

    @contextlib.contextmanager
    def _started(
        self, command: list[str | bytes], *, stdin: bool = False, stdout: bool = False
    ) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
        self.check()
        with tempfile.TemporaryFile() as noise:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
                    stdout=subprocess.PIPE if stdout else subprocess.DEVNULL,
                    stderr=noise,
                    env={**_SETTINGS, **os.environ},
                    bufsize=0,
                )
            except OSError as error:
                raise StorageError(
                    f"{command[0]!r} cannot be started ({error}): install xrootd-client", code="INTERNAL", scope="service"
                ) from error
            self._running.add(process)
            try:
                yield process, noise
            finally:
                self._running.discard(process)
                process.kill()
                with contextlib.suppress(BrokenPipeError), process:
                    pass

    def _ended(self, process: subprocess.Popen[bytes], noise: IO[bytes]) -> None:
        """Wait for the end of a program; raise `StorageError` if it has failed."""
        try:
            status = process.wait(self._wait_s())
        except subprocess.TimeoutExpired:
            raise self._too_long() from None
        if self._interrupted:
            raise StoppedError
        if status:
            noise.seek(0)
            raise _trouble(noise.read(16_000).decode("utf-8", "backslashreplace"), status)

    def _read(self, pipe: IO[bytes]) -> bytes:
        if not select.select([pipe], [], [], self._wait_s())[0]:
            raise self._too_long()
        return os.read(pipe.fileno(), _PIECE)

    def _write(self, pipe: IO[bytes], piece: bytes) -> None:
        os.set_blocking(pipe.fileno(), False)
        rest = memoryview(piece)
        while rest:
            if not select.select([], [pipe], [], self._wait_s())[1]:
                raise self._too_long()
            with contextlib.suppress(BlockingIOError):
                rest = rest[os.write(pipe.fileno(), rest) :]

    def _wait_s(self, *, whole: bool = False) -> float:
        left = max(self.patience.until - time.monotonic(), 0.0)
        return left if whole else min(self.patience.stall_s, left)

    def _too_long(self) -> StorageError:
        if self._interrupted:
            raise StoppedError
        stalled = time.monotonic() < self.patience.until
        return StorageError("the server did not answer in time", code="STALLED" if stalled else "TIMEOUT")

    def interrupt(self) -> None:
        super().interrupt()
        for process in list(self._running):
            process.kill()


def _trouble(said: str, status: int) -> StorageError:
    lines = [line for line in said.splitlines() if line.strip()]
    text = shortened(lines[-1] if lines else f"exit status {status}", 1000)
    if "Auth failed" in said:
        return StorageError(text, code="CREDENTIAL_REFUSED")
    code = _CODE.search(text)
    number = errno_of(text) or (_BY_CODE.get(int(code.group(1))) if code else None)
    if number is None and re.search(r"[Cc]onnection error|[Ii]nvalid address|[Ss]ocket|[Ss]tream|[Oo]peration expired", text):
        return StorageError(text, code="CONNECTION", lost=True)
    return StorageError(text, errno=number)


def _place(url: str) -> tuple[bytes, bytes]:
    """Host with port, and path, of ``root://host:port//path``, as arguments of programs."""
    authority, _, path = url.partition("://")[2].partition("/")
    host, raw = authority.encode(), unquote_to_bytes(path)
    if not _HOST.fullmatch(host):
        raise StorageError(f"{authority} is no HOST:PORT", code="UNSUPPORTED")
    if b"?" in raw or any(byte < 0x20 for byte in raw):  # noqa: PLR2004
        raise StorageError(f"{url}: XRootD cannot be told such a name", errno=errno.EILSEQ)
    return host, b"/" + raw.lstrip(b"/")


def _url(url: str) -> bytes:
    """The URL as xrdcp takes it: names as they are."""
    host, path = _place(url)
    return b"root" + (b"s" if url.startswith("roots:") else b"") + b"://" + host + b"/" + path


def _moment(text: str) -> int:
    return int(datetime.strptime(text, "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC).timestamp())
