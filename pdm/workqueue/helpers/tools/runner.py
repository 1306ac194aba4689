"""Run command line tools as child processes: each in a process group of its own, its output read line by line.

A tool that prints nothing, or takes too long, is ended with its group: SIGTERM, then SIGKILL. A tool also ends with the
helper, whatever ends that: the kernel sends it SIGKILL (``setpriv --pdeathsig``).
"""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers import lease
from pdm.workqueue.helpers.credentials import trust_at
from pdm.workqueue.helpers.storage import StoppedError, StorageError, start_error

#: Seconds between SIGTERM and SIGKILL. A cancelled tool must be gone within a second.
_TERM_GRACE_S = 0.3
#: Seconds between two looks at the clock while a tool prints nothing.
_TICK_S = 0.5
_PIECE = 64 * 1024
#: Bytes of a line that are kept; tools print a traceback, a listing or a reply of a server, never more in a line.
_LONGEST_LINE = 64 * 1024
#: Variables of the helper that no tool may see: they are about the helper's own Python, or name credentials of others.
_OWN_VARIABLES = ("PYTHON", "PDM_", "VIRTUAL_ENV")
#: gfal2 writes to SFTP servers whatever their host key is, and loses bytes; and the service's own disk has roots.
_REFUSED_SCHEMES = frozenset({"sftp", "file"})
#: Names no home: nothing of the service's own account is to be found by a tool, no proxy and no configuration.
_NO_HOME = "/nonexistent"
PACKAGES: Mapping[str, str] = {"globus-url-copy": "globus-gass-copy-progs", "setpriv": "util-linux"}
_GFAL_PACKAGE = "gfal2-util-scripts"


@dataclass
class Deadline:
    """How long a tool may go on.

    Attributes:
        stall_s: seconds without a sign of progress.
        until: time (`time.monotonic`) at which it has taken too long in any case.
        moved_at: when the last sign of progress came.
    """

    stall_s: float
    until: float
    moved_at: float = field(default_factory=time.monotonic)

    def moved(self) -> None:
        """Note a sign of progress."""
        self.moved_at = time.monotonic()

    def passed(self) -> StorageError | None:
        """Why the tool must end now; None if it may go on."""
        now = time.monotonic()
        if now > self.until:
            return StorageError("not finished in time", code=FailureCode.TIMEOUT)
        if now - self.moved_at > self.stall_s:
            return StorageError(f"no progress for {self.stall_s:.0f} s", code=FailureCode.STALLED)
        return None


@dataclass(frozen=True)
class ToolCommand:
    """A command line.

    Attributes:
        arguments: program and arguments.
        environment: variables besides those that every tool gets.
        lines: what the file ``/dev/fd/LIST`` of the arguments holds; `LIST` stands for its name.
        is_merged: whether both outputs share one pipe, so that their order is kept.
        rewrites_lines: whether a carriage return ends a line, as in the progress of globus-url-copy; else it may be
            part of a file's name.
    """

    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    lines: Sequence[str] | None = None
    is_merged: bool = False
    rewrites_lines: bool = False

    @property
    def program(self) -> str:
        """The tool; what starts it for us is none."""
        return next(one for one in self.arguments if one != "stdbuf" and not one.startswith("-"))


#: Place of the list's file name in the arguments of a `ToolCommand`.
LIST = "\0list"


class ToolRunner:
    """Runs one tool at a time, for one thread; `interrupt` may be called by any."""

    def __init__(self) -> None:
        #: Readable while what runs must end.
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._interrupted = threading.Event()

    def interrupt(self) -> None:
        """Make the running tool, and every one before `resume`, end with `StoppedError`; returns at once."""
        self._interrupted.set()
        os.eventfd_write(self._wake, 1)

    def resume(self) -> None:
        self._interrupted.clear()
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def run(
        self,
        command: ToolCommand,
        deadline: Deadline,
        heard: Callable[[str], None],
        complained: Callable[[str], None] | None = None,
    ) -> int:
        """Run a tool until it ends.

        Args:
            command: what is run.
            deadline: when it is ended; ``heard`` may put it off.
            heard: called with each line of its output.
            complained: the same for its error output, where that is not merged into the other.

        Returns:
            Its exit status; negative for the signal that ended it.

        Raises:
            StoppedError: `interrupt` was called.
            StorageError: the tool cannot be started (DEPENDENCY_MISSING), or its time was over (STALLED, TIMEOUT).
        """
        output = self.lines(command, deadline)
        with contextlib.closing(output):
            while True:
                try:
                    is_error, line = next(output)
                except StopIteration as end:
                    return int(end.value)
                (complained if is_error and complained is not None else heard)(line)

    def lines(self, command: ToolCommand, deadline: Deadline) -> Generator[tuple[bool, str], None, int]:
        """As `run`, line by line: whether it is of the error output, and its text. Closed early, it ends the tool."""
        if self._interrupted.is_set():
            raise StoppedError
        lease.check()
        with self._started(command) as process:
            yield from self._followed(process, deadline, command.rewrites_lines)
        return process.returncode

    @contextlib.contextmanager
    def _started(self, command: ToolCommand) -> Iterator[subprocess.Popen[bytes]]:
        descriptors: list[int] = []
        arguments = list(command.arguments)
        if command.lines is not None:
            # In memory: URLs and names of users' files are left on no disk.
            descriptors.append(_file_of(command.lines))
            arguments = [f"/dev/fd/{descriptors[0]}" if one == LIST else one for one in arguments]
        try:
            setpriv = _path_of("setpriv")
            _path_of(command.program)
            try:
                process = subprocess.Popen(
                    [setpriv, "--pdeathsig", "KILL", "--", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT if command.is_merged else subprocess.PIPE,
                    bufsize=0,
                    env=_environment(command.environment),
                    pass_fds=descriptors,
                    process_group=0,
                )
            except OSError as error:
                raise start_error(command.program, package_of(command.program), error) from error
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        with process:
            try:
                yield process
            finally:
                # Before the leader is reaped, for until then nothing else can have the number of the group.
                _signal_group(process, signal.SIGKILL)

    def _followed(
        self, process: subprocess.Popen[bytes], deadline: Deadline, rewrites_lines: bool
    ) -> Generator[tuple[bool, str], None, None]:
        pipes = [pipe.fileno() for pipe in (process.stdout, process.stderr) if pipe is not None]
        outputs = {pipe: _Output(pipe != pipes[0], rewrites_lines) for pipe in pipes}
        exited = os.pidfd_open(process.pid)
        try:
            with selectors.DefaultSelector() as selector:
                for descriptor in (*outputs, exited, self._wake):
                    selector.register(descriptor, selectors.EVENT_READ)
                for descriptor in outputs:
                    os.set_blocking(descriptor, False)
                has_exited = False
                while not has_exited:
                    ready = {key.fd for key, _ in selector.select(_TICK_S)}
                    has_exited = exited in ready
                    for descriptor in sorted(ready & outputs.keys()):
                        if not outputs[descriptor].read(descriptor):
                            selector.unregister(descriptor)
                        yield from outputs[descriptor].taken()
                    why = StoppedError() if self._interrupted.is_set() else deadline.passed()
                    if why is not None and not has_exited:
                        _end(process, exited)
                        raise why
            for descriptor, output in outputs.items():
                # What is in the pipe; a grandchild that still holds it open is not waited for.
                while output.read(descriptor, once=True):
                    yield from output.taken()
                output.end()
                yield from output.taken()
        finally:
            os.close(exited)


class _Output:
    """The lines of one pipe."""

    def __init__(self, is_error: bool, rewrites_lines: bool) -> None:
        self._is_error = is_error
        self._rewrites_lines = rewrites_lines
        self._lines: list[bytes] = []
        self._rest = b""

    def read(self, descriptor: int, *, once: bool = False) -> bool:
        """Read what is there; False at the end, or if there is nothing and nothing is waited for (``once``)."""
        try:
            piece = os.read(descriptor, _PIECE)
        except BlockingIOError:
            return not once
        text = self._rest + piece
        *lines, self._rest = (text.replace(b"\r", b"\n") if self._rewrites_lines else text).split(b"\n")
        self._lines += lines
        if len(self._rest) > _LONGEST_LINE:
            self.end()
        return bool(piece)

    def end(self) -> None:
        """Take what is no whole line for one."""
        if self._rest:
            self._lines.append(self._rest)
            self._rest = b""

    def taken(self) -> Iterator[tuple[bool, str]]:
        """The lines since the last call."""
        lines, self._lines = self._lines, []
        for line in lines:
            yield self._is_error, line.decode("utf-8", "surrogateescape")


def _path_of(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        raise start_error(program, package_of(program), FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))
    return path


def package_of(program: str) -> str:
    """The Debian package of a program."""
    return _GFAL_PACKAGE if program.startswith("gfal-") else PACKAGES[program]


def _file_of(lines: Sequence[str]) -> int:
    """A file in memory with some lines, to be read from its beginning."""
    descriptor = os.memfd_create("list", os.MFD_CLOEXEC)
    rest = memoryview("".join(f"{line}\n" for line in lines).encode("ascii"))
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    """Variables of a tool: those of the helper but for its own, and what makes the output one that can be read."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OWN_VARIABLES)}
    return {
        **kept,
        "LC_ALL": "C.UTF-8",
        # gfal-ls prints local time.
        "TZ": "UTC",
        # Names that are not UTF-8 come out as they are.
        "PYTHONIOENCODING": "utf-8:surrogateescape",
        **more,
    }


def tool_environment(urls: Sequence[StorageUrl]) -> dict[str, str]:
    """The credential and the authorities for a tool that works at some URLs.

    Raises:
        StorageError: there is no proxy, and the tool would look for that of the service's own account; or the two ends
            have unlike authorities, of which no tool can be told.
    """
    for scheme in {url.scheme for url in urls} & _REFUSED_SCHEMES:
        raise StorageError(
            f"{scheme}:// is not for the tools", code=FailureCode.UNSUPPORTED, scope=FailureScope.SERVICE
        )
    proxy = os.environ.get("X509_USER_PROXY", "")
    if not os.access(proxy, os.R_OK):
        raise StorageError(
            "the tools need the user's proxy", code=FailureCode.CREDENTIAL_MISSING, scope=FailureScope.SERVICE
        )
    trusted = {trust_at(url.address) for url in urls}
    if len(trusted) > 1:
        raise StorageError(
            "the two sites have unlike authorities of their own: no tool can be told of both",
            code=FailureCode.UNSUPPORTED,
            scope=FailureScope.SERVICE,
        )
    trust = trusted.pop()
    environment = {"X509_USER_PROXY": proxy, "HOME": _NO_HOME}
    if trust is not None:
        environment |= {"X509_CERT_DIR": trust, "XrdSecGSICADIR": trust}
    return environment


def _end(process: subprocess.Popen[bytes], exited: int) -> None:
    """End a tool and all that it started."""
    _signal_group(process, signal.SIGTERM)
    with selectors.DefaultSelector() as selector:
        selector.register(exited, selectors.EVENT_READ)
        selector.select(_TERM_GRACE_S)
    _signal_group(process, signal.SIGKILL)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
