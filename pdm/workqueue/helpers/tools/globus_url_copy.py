"""globus-url-copy: one process for a list of files, and parsing of its output for each file.

Its output for a list (``-f``), with ``-c`` and without ``-cc`` and ``-pp``, is a block for each file, in order::

    Source: gsiftp://host:port/dir/
    Dest:   gsiftp://host:port/dir/
      a  ->  b                                        (``  a`` where the names are equal; when the transfer starts)
    1228144640 bytes   234.25 MB/sec avg   234.25 MB/sec inst           (every five seconds, ended by a CR)
    continuing on error: globus_ftp_client: ...       (and the server's reply, a line each)

The output proves nothing: the file is verified at its storage afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.gridftp.replies import errno_of_reply
from pdm.workqueue.helpers.storage import StorageError
from pdm.workqueue.helpers.tools.runner import LIST, Deadline, ToolCommand

PROGRAM = "globus-url-copy"
_SOURCE, _DESTINATION = "Source: ", "Dest:   "
_ARROW = "  ->  "
_PERFORMANCE = re.compile(r"\s*([0-9]{1,19}) bytes\s+[0-9.]+ MB/sec avg\s+([0-9.]+) MB/sec inst\s*\Z")
#: Beginnings of an error message; the following lines belong to it.
_ERROR = re.compile(r"(?:continuing on )?error: (.*)\Z")
#: The last message about a list, not about a file.
_COUNTED = re.compile(r"error: There (?:was an error with 1 transfer|were errors with [0-9]+ transfers)\.\Z")
#: A reply of the server, in contrast to an error of the client library.
_REPLY = re.compile(r"the server responded with an error")
#: A refused login, for reasons that concern the server's files and certificates.
_LOGIN = re.compile(r"^53[0-9][ -]", re.MULTILINE)
#: The connection is lost: a new one may work.
_LOST = re.compile(
    r"an end-of-file was reached|Connection reset by peer|Broken pipe|Connection timed out|No route to host"
    r"|^421[ -]|the connection was closed",
    re.MULTILINE,
)
#: Maximum lines of an error that are kept.
_MOST_LINES = 40


@dataclass(frozen=True)
class UrlPair:
    """A file to copy.

    Attributes:
        key: of its item.
        source: URL.
        temporary: URL of the temporary file.
        size: bytes, as listed.
    """

    key: int
    source: StorageUrl
    temporary: StorageUrl
    size: int


@dataclass
class CopyReport:
    """The tool's report about a file.

    Attributes:
        error: text of its error; empty if there is none.
    """

    error: str = ""


@dataclass
class CopyListener:
    """Parses the output for a list.

    Attributes:
        pairs: of the list.
        deadline: extended by each sign of progress, and reset for each file.
        begun: called with the file that begins.
        logged: called with the key of the file and a line about it.
        arrived: called with the key of the file and the number of bytes that have arrived.
        time_for: time limit of a file in seconds.
        reports: reports about started files, by key.
        current: the file that the current lines are about; None before the first.
    """

    pairs: Sequence[UrlPair]
    deadline: Deadline
    begun: Callable[[UrlPair], None]
    logged: Callable[[int, str], None]
    arrived: Callable[[int, int], None]
    reports: dict[int, CopyReport] = field(default_factory=dict)
    current: UrlPair | None = None
    _source: str = ""
    _destination: str = ""
    _is_error: bool = False
    _header: list[str] = field(default_factory=list)
    _bytes: int = 0

    def heard(self, line: str) -> None:
        """Parse a line of output."""
        if line.startswith(_SOURCE):
            self._source, self._destination = line.removeprefix(_SOURCE), ""
            self._header, self._is_error = [line], False
        elif line.startswith(_DESTINATION) and self._header:
            self._destination = line.removeprefix(_DESTINATION)
            self._header.append(line)
        elif line.startswith("  ") and self._header and self._destination:
            self._begin(line)
        elif line.strip():
            self._tell(line)

    def _begin(self, line: str) -> None:
        name, _, new_name = line[2:].partition(_ARROW)
        self.current = self._pair_of(self._destination + (new_name or name))
        self._bytes = 0
        self.reports.setdefault(self.current.key, CopyReport())
        self.begun(self.current)
        self.deadline.moved()
        for text in (*self._header, line):
            self.logged(self.current.key, text)
        self._header = []

    def _pair_of(self, destination: str) -> UrlPair:
        """The pair of a destination; the next of the list if the tool spells the URL differently."""
        begun = self.reports.keys()
        left = [pair for pair in self.pairs if pair.key not in begun]
        return next((pair for pair in left if pair.temporary == destination), (left or list(self.pairs[-1:]))[0])

    def _tell(self, line: str) -> None:
        # Before the first file, an error concerns the whole list.
        key = self.pairs[0].key if self.current is None else self.current.key
        self.logged(key, line.rstrip())
        performance = _PERFORMANCE.match(line)
        if performance is not None:
            total = int(performance.group(1))
            if total > self._bytes:
                self._bytes = total
                self.deadline.moved()
                self.arrived(key, total)
            return
        if _COUNTED.match(line):
            self._is_error = False
            return
        error = _ERROR.match(line)
        self._is_error = self._is_error or error is not None
        report = self.reports.setdefault(key, CopyReport())
        if self._is_error and report.error.count("\n") < _MOST_LINES:
            text = line.rstrip() if error is None else error.group(1)
            report.error += f"\n{text}" if report.error else text

    def outcomes(self, status: int) -> dict[int, StorageError | None]:
        """Errors by key after the tool has ended; files without a key were not started.

        Args:
            status: exit status, or the negative number of a signal.

        Raises:
            StorageError: a signal has ended it.
        """
        if status < 0:
            text = f"{PROGRAM} was ended by signal {-status}"
            raise StorageError(text, code=FailureCode.CRASHED, scope=FailureScope.SERVICE)
        known = self._reported()
        unheard: StorageError | None = None
        if status:
            silent = StorageError(f"{PROGRAM} ended with status {status} and reported nothing about the file")
            unheard = known.get(self.pairs[0].key) or silent
        # A file without a report was not copied, or failed like the whole list.
        return {pair.key: unheard for pair in self.pairs} | known

    def outcomes_so_far(self, error: StorageError) -> dict[int, StorageError | None]:
        """As `outcomes` after the tool was ended in the middle of a file; raises the error before the first one."""
        if self.current is None:
            raise error
        return self._reported() | {self.current.key: error}

    def _reported(self) -> dict[int, StorageError | None]:
        return {key: error_in(report.error) if report.error else None for key, report in self.reports.items()}


def error_in(text: str) -> StorageError:
    """The error in the tool's output about a file.

    The error number is taken from the server's reply only: "No such file or directory" about a file of this machine (a
    missing credential) is not about the file to copy.
    """
    lost = _LOST.search(text) is not None
    number: int | None = None
    if _REPLY.search(text) is not None and not lost and _LOGIN.search(text) is None:
        number = errno_of_reply(text)
    return StorageError(text, errno=number, lost=lost)


def command_for(pairs: Sequence[UrlPair], environment: dict[str, str]) -> ToolCommand:
    """The command that copies a list.

    ``-c`` continues after an error and ``-vb`` reports each file; with ``-pp`` both hang. ``-fast`` keeps the data
    connections between files. Standard output is line buffered (``stdbuf``), so that it keeps its order with error
    output.
    """
    lines = [f'"{pair.source}" "{pair.temporary}"' for pair in pairs]
    arguments = ("stdbuf", "-oL", PROGRAM, "-c", "-fast", "-vb", "-f", LIST)
    return ToolCommand(arguments, environment, lines, is_merged=True, rewrites_lines=True)
