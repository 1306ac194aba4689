"""Command lines of gfal-stat, gfal-ls, gfal-sum, gfal-mkdir, gfal-rename, gfal-rm and gfal-copy, and their output.

Their exit status is the number of an error, or a signal that arrived after the work was done (SIGABRT, in some of a
hundred runs with GridFTP): it proves nothing.
"""

from __future__ import annotations

import contextlib
import errno
import math
import re
import shutil
import signal
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from pdm.workqueue.domain.enums import ChecksumAlgorithm
from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.checksums import from_hexadecimal
from pdm.workqueue.helpers.gridftp.replies import errno_of_reply
from pdm.workqueue.helpers.storage import FileKind, FileStat, StorageError
from pdm.workqueue.helpers.tools.runner import LIST, Deadline, ToolCommand, ToolRunner

#: The interpreter of Debian's Python bindings; another interpreter that is first on the PATH does not have them.
SYSTEM_PYTHON = "/usr/bin/python3"
#: Timeout option of the tools, longer than ours: a tool that ends itself may leave a file.
_NO_LIMIT_S = 7 * 86400
_ENTRY = re.compile(
    r"(?P<kind>.)(?P<mode>[-rwxsStT]{9}) +\S+ +\S+ +\S+ +(?P<size>[0-9]{1,19})"
    r" (?P<time>[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2})\.[0-9]+ \+0000 (?P<name>.*)\t\Z",
    re.DOTALL,
)
_ENTRY_BEGINS = re.compile(r".[-rwxsStT]{9} +\S+ +\S+ +\S+ +[0-9]")
_KINDS: Mapping[str, FileKind] = {"-": "file", "d": "directory", "l": "link"}
_STAT_KINDS: Mapping[str, FileKind] = {"regular file": "file", "directory": "directory"}
_ERROR = re.compile(r"gfal-[a-z]+ error: (?P<number>[0-9]+) \([^)]*\) - (?P<text>.*)\Z", re.DOTALL)
_MONITOR = re.compile(r"monitor: .* [0-9]+ [0-9]+ (?P<bytes>[0-9]{1,19}) [0-9]+\Z")
_STAT_SIZE = re.compile(r"\s*Size: ([0-9]{1,19})\t(.*)\Z")
_STAT_MODE = re.compile(r"\s*Access: \(([0-7]{1,6})/")
_STAT_TIME = re.compile(r"\s*Modify: ([0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2})")
_SUM = re.compile(r".* ([0-9a-fA-F]+)\s*\Z")
#: Results of gfal-rm for a file, after a tab.
REMOVED, MISSING = "DELETED", "MISSING"
_BITS = "rwxrwxrwx"
#: Maximum lines of a listing that are joined to one entry: a name may contain line ends.
_MOST_PARTS = 256
#: Maximum lines of error output that are kept.
_MOST_ERRORS = 40
#: Signals with which the plugins' destructors crash, after the work is done.
_CRASHES = frozenset({signal.SIGABRT, signal.SIGSEGV})
#: Error numbers with a reliable meaning. Others may be a number of the protocol, or of the library.
_MEANT = frozenset(
    {
        errno.EPERM,
        errno.ENOENT,
        errno.EACCES,
        errno.EEXIST,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENOSPC,
        errno.EROFS,
        errno.ENAMETOOLONG,
        errno.ENOTEMPTY,
        errno.ELOOP,
        errno.EDQUOT,
    }
)
#: Texts whose error number misleads: a missing proxy is ENOENT, a refused login and HTTP's 403 are EEXIST.
_ABOUT_CREDENTIALS = re.compile(
    r"certificate|credential|\b53[0-9][ -]|Login incorrect|GSS|proxy|SSL|Auth(?:entication|orization)? failed",
    re.IGNORECASE,
)
_SRM_STATUS = re.compile(r"\[SRM_[A-Z_]+\]")
_FORBIDDEN = re.compile(r"HTTP (?:401|403)|Permission refused")
#: A line of a server's reply: gfal2 has joined all of them.
_REPLY_LINE = re.compile(r" +(?=[1-5][0-9]{2}[ -])")


@dataclass
class Gfal:
    """Runs the commands of gfal2-util.

    Attributes:
        runner: of the calling thread.
        environment: returns the variables for a tool that works on some URLs.
        log: called with each line that a tool prints, and each command line.
        deadline: makes the time limit of a command.
    """

    runner: ToolRunner
    environment: Callable[[Sequence[StorageUrl]], Mapping[str, str]]
    log: Callable[[str], None]
    deadline: Callable[[], Deadline]
    _errors: list[str] = field(default_factory=list)

    def stat(self, url: StorageUrl) -> FileStat | None:
        """What is at a URL, links followed; None if nothing is."""
        lines: list[str] = []
        try:
            self._run(["gfal-stat", url], [url], lines.append)
        except StorageError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return stat_in(lines)

    def entries(self, url: StorageUrl) -> Generator[tuple[bytes, FileStat], None, None]:
        """The output of ``gfal-ls`` for a directory; raises `StorageError` after its output if it failed.

        A link is reported as its target, and a pipe as a file.
        """
        arguments = ["gfal-ls", "-al", "--time-style", "full-iso", url]
        deadline = self.deadline()
        lines = self.runner.lines(self._command(arguments, [url]), deadline)
        parts: list[str] = []
        self._errors = []
        # If the tool is ended because of its output.
        status = 1
        with contextlib.closing(lines):
            while True:
                try:
                    is_error, line = next(lines)
                except StopIteration as end:
                    status = int(end.value)
                    break
                deadline.moved()
                self.log(line)
                if is_error:
                    self._note_error(line)
                    continue
                parts.append(line)
                found = _ENTRY.match("\n".join(parts))
                if found is None and len(parts) <= _MOST_PARTS and _ENTRY_BEGINS.match(parts[0]):
                    # A name with a line end in it, or the beginning of one.
                    continue
                if found is None:
                    break
                parts = []
                name = found["name"].encode("utf-8", "surrogateescape")
                if name not in (b".", b".."):
                    yield name, _file_stat(found)
        if parts:
            # Even if the tool reports success.
            self._errors = self._errors or [f"gfal-ls printed what is no entry of a directory: {parts[0][:200]!r}"]
            raise self._failure("gfal-ls", status or 1, code=FailureCode.BAD_LISTING)
        self._check("gfal-ls", status)

    def checksum(self, url: StorageUrl, algorithm: ChecksumAlgorithm) -> str:
        """Checksum of a file, in lower-case hexadecimal digits, as its server or gfal-sum computes it."""
        lines: list[str] = []
        self._run(["gfal-sum", url, algorithm], [url], lines.append)
        for line in lines:
            if line.startswith(url) and (found := _SUM.match(line)):
                value = from_hexadecimal(algorithm, found.group(1))
                if value is not None:
                    return value
        raise StorageError(f"gfal-sum prints no {algorithm}: {' '.join(lines)[:200]!r}", code=FailureCode.NO_CHECKSUM)

    def make_directory(self, url: StorageUrl) -> None:
        self._run(["gfal-mkdir", url], [url])

    def rename(self, source: StorageUrl, destination: StorageUrl) -> None:
        """Rename; an existing file is replaced silently."""
        self._run(["gfal-rename", source, destination], [source, destination])

    def remove_directory(self, url: StorageUrl) -> None:
        """Remove a directory **and its content**: the tool has no other way. The caller has checked it."""
        self._run(["gfal-rm", "-r", url], [url])

    def remove_files(self, urls: Sequence[StorageUrl], told: Callable[[str, str], None]) -> StorageError | None:
        """Remove files; the tool ends at the first one that it cannot remove.

        Args:
            urls: of files, all at one server.
            told: called with a URL and `REMOVED`, `MISSING` or the tool's error.

        Returns:
            Its error, if it has reported one.
        """

        def heard(line: str) -> None:
            url, tab, word = line.rpartition("\t")
            if tab:
                told(url, word)

        try:
            # --just-delete: otherwise each file costs a stat, and a directory causes a question on the terminal.
            self._run(["gfal-rm", "--just-delete", "--from-file", LIST], urls[:1], heard, lines=urls)
        except StorageError as error:
            if error.code in ("DEPENDENCY_MISSING", "STALLED", "TIMEOUT"):
                raise
            return error
        return None

    def copy(
        self, source: StorageUrl, temporary: StorageUrl, deadline: Deadline, arrived: Callable[[int], None]
    ) -> None:
        """Copy a file to a new one."""
        moved = 0

        def heard(line: str) -> None:
            nonlocal moved
            if line.startswith("event: "):
                deadline.moved()
            found = _MONITOR.match(line)
            if found is not None and int(found["bytes"]) > moved:
                moved = int(found["bytes"])
                deadline.moved()
                arrived(moved)

        # Without --just-copy it would copy into an existing directory of that name, and log in three times as often.
        # The service has delegated nothing to the servers: its proxy is not for them.
        seconds = str(math.ceil(max(deadline.until - time.monotonic(), 1.0)) + 60)
        options = ["-v", "--just-copy", "--no-delegation", "-t", seconds, "-T", seconds]
        self._run(["gfal-copy", *options, source, temporary], [source, temporary], heard, deadline=deadline)

    def _command(
        self, arguments: Sequence[str], urls: Sequence[StorageUrl], lines: Sequence[str] | None = None
    ) -> ToolCommand:
        shown = [f"(a list of {len(lines or ())} URLs)" if one == LIST else one for one in arguments]
        self.log(f"$ {' '.join(shown)}")
        program = arguments[0]
        limited = list(arguments) if "-t" in arguments else [program, "-t", str(_NO_LIMIT_S), *arguments[1:]]
        return ToolCommand(limited, {**_python(), **self.environment(urls)}, lines)

    def _run(
        self,
        arguments: Sequence[str],
        urls: Sequence[StorageUrl],
        heard: Callable[[str], None] = lambda line: None,
        *,
        deadline: Deadline | None = None,
        lines: Sequence[str] | None = None,
    ) -> None:
        self._errors = []

        def on_line(line: str) -> None:
            self.log(line)
            heard(line)

        def on_error(line: str) -> None:
            self.log(line)
            self._note_error(line)

        command = self._command(arguments, urls, lines)
        self._check(arguments[0], self.runner.run(command, deadline or self.deadline(), on_line, on_error))

    def _note_error(self, line: str) -> None:
        if line.strip() and len(self._errors) < _MOST_ERRORS:
            self._errors.append(line)

    def _check(self, program: str, status: int) -> None:
        """Raise the error that a tool has reported; a crash of its destructors without an error message is none."""
        if status == 0 and not any(_ERROR.match(line) for line in self._errors):
            return
        if -status in _CRASHES and not any(_ERROR.match(line) for line in self._errors):
            self.log(f"{program} died of {signal.Signals(-status).name} at its end: its result is checked")
            return
        raise self._failure(program, status)

    def _failure(self, program: str, status: int, code: FailureCode | None = None) -> StorageError:
        for line in self._errors:
            if found := _ERROR.match(line):
                return error_of(int(found["number"]), found["text"], code)
        said = "; ".join(self._errors[-3:]) or "it said nothing"
        if status < 0:
            name = signal.Signals(-status).name
            return StorageError(
                f"{program} was ended by {name}: {said}", code=code or FailureCode.CRASHED, scope=FailureScope.SERVICE
            )
        if any("UnicodeDecodeError" in line for line in self._errors):
            return StorageError(f"{program} does not support a name that is not UTF-8", code=FailureCode.INVALID_NAME)
        return StorageError(f"{program} ended with status {status}: {said}", code=code)


def error_of(number: int, text: str, code: FailureCode | None = None) -> StorageError:
    """The error for the number and the text of a gfal command: the text takes precedence."""
    text = _REPLY_LINE.sub("\n", text.replace("\\x00", "").strip())
    if _SRM_STATUS.search(text):
        # The text is specific; the number is the library's own.
        return StorageError(text, code=code)
    if _FORBIDDEN.search(text):
        return StorageError(text, errno=errno.EACCES, code=code)
    if (of_reply := errno_of_reply(text)) in _MEANT:
        return StorageError(text, errno=of_reply, code=code)
    if number not in _MEANT or _ABOUT_CREDENTIALS.search(text):
        return StorageError(text, code=code, lost="Connection" in text or "connect" in text)
    return StorageError(text, errno=number, code=code)


def stat_in(lines: Sequence[str]) -> FileStat:
    """Parse the output of gfal-stat."""
    size: int | None = None
    mode: int | None = None
    mtime: int | None = None
    kind: FileKind = "other"
    for line in lines:
        if found := _STAT_SIZE.match(line):
            size = int(found.group(1))
            kind = _STAT_KINDS.get(found.group(2).strip(), "other")
        elif found := _STAT_MODE.match(line):
            mode = int(found.group(1), 8) & 0o7777
        elif found := _STAT_TIME.match(line):
            mtime = _seconds(found.group(1))
    if size is None:
        raise StorageError(f"gfal-stat prints no size: {' '.join(lines)[:200]!r}", code=FailureCode.BAD_LISTING)
    return FileStat(kind, size, mode, mtime)


def _file_stat(entry: re.Match[str]) -> FileStat:
    mode = 0
    for letter, bit in zip(entry["mode"], _BITS, strict=True):
        mode = mode << 1 | (letter in (bit, "s", "t"))
    return FileStat(_KINDS.get(entry["kind"], "other"), int(entry["size"]), mode, _seconds(entry["time"]))


def _seconds(text: str) -> int | None:
    modified = int(datetime.strptime(text, "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC).timestamp())
    # Plugins set 1970 if the server reports no time.
    return modified or None


def _python() -> dict[str, str]:
    """The interpreter that has the bindings: searching for it would start each one that has not."""
    return {"GFAL_PYTHONBIN": SYSTEM_PYTHON} if shutil.which(SYSTEM_PYTHON) else {}
