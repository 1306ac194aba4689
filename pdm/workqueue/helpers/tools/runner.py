"""Run command line tools as child processes: each in a process group of its own, its output read line by line.

A tool that prints nothing, or takes too long, is killed with its group: SIGTERM, then SIGKILL. When the helper dies for
any reason, the kernel kills the tool (``setpriv --pdeathsig``).
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
#: Interval in seconds between checks of the deadline while a tool prints nothing.
_TICK_S = 0.5
_PIECE = 64 * 1024
#: Maximum bytes of a line; tracebacks, listings and replies have no longer lines.
_LONGEST_LINE = 64 * 1024
#: Variables of the helper that tools do not get: they are about the helper's own Python, or name credentials of
#: others.
_OWN_VARIABLES = ("PYTHON", "PDM_", "VIRTUAL_ENV")
#: gfal2's SFTP plugin accepts any host key, and loses bytes; its file plugin has no root directory that limits
#: access.
_REFUSED_SCHEMES = frozenset({"sftp", "file"})
#: An empty home: a tool must not find a proxy or configuration of the service's own account.
_NO_HOME = "/nonexistent"
PACKAGES: Mapping[str, str] = {"globus-url-copy": "globus-gass-copy-progs", "setpriv": "util-linux"}
_GFAL_PACKAGE = "gfal2-util-scripts"


@dataclass
class Deadline:
    """Time limits of a tool.

    Attributes:
        stall_s: seconds without progress.
        until: time (`time.monotonic`) of the total time limit.
        moved_at: time of the last progress.
    """

    stall_s: float
    until: float
    moved_at: float = field(default_factory=time.monotonic)

    def moved(self) -> None:
        """Record progress."""
        self.moved_at = time.monotonic()

    def passed(self) -> StorageError | None:
        """The error if the tool must end now; None otherwise."""
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
        environment: variables in addition to those that every tool gets.
        lines: content of the file ``/dev/fd/LIST`` in the arguments; `LIST` stands for its name.
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
        """The tool itself, without the programs that start it."""
        return next(one for one in self.arguments if one != "stdbuf" and not one.startswith("-"))


#: Placeholder for the list's file name in the arguments of a `ToolCommand`.
LIST = "\0list"


class ToolRunner:
    """Runs one tool at a time, for one thread; `interrupt` may be called from any thread."""

    def __init__(self) -> None:
        #: Readable after `interrupt`.
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._interrupted = threading.Event()

    def interrupt(self) -> None:
        """End the running tool, and all that begin before `resume`, with `StoppedError`; does not block."""
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
            command: the command.
            deadline: its time limit; ``heard`` may extend it.
            heard: called with each line of its output.
            complained: called with each line of its error output, unless both are merged.

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
        """Like `run`, as an iterator: whether a line is error output, and its text. Closing it early ends the tool."""
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
            # In memory: URLs and names of users' files are not written to a disk.
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
                # Before the leader is reaped: until then no other process can get the number of the group.
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
                # Read the rest of the pipe, without waiting for a grandchild that has it open.
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
        """Read what is available; False at the end, or if nothing is available and it must not wait (``once``)."""
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
        """Treat an incomplete line as a line."""
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
    """A file in memory with some lines, positioned at its beginning."""
    descriptor = os.memfd_create("list", os.MFD_CLOEXEC)
    rest = memoryview("".join(f"{line}\n" for line in lines).encode("ascii"))
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    """Environment of a tool: the helper's without its own variables, with settings that make the output parsable."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OWN_VARIABLES)}
    return {
        **kept,
        "LC_ALL": "C.UTF-8",
        # gfal-ls prints local time.
        "TZ": "UTC",
        # Names that are not UTF-8 are printed unchanged.
        "PYTHONIOENCODING": "utf-8:surrogateescape",
        **more,
    }


def tool_environment(urls: Sequence[StorageUrl]) -> dict[str, str]:
    """The credential and the authorities for a tool that works on some URLs.

    Raises:
        StorageError: there is no proxy, and the tool would look for that of the service's own account; or the two ends
            have different authorities, which no tool supports.
    """
    for scheme in {url.scheme for url in urls} & _REFUSED_SCHEMES:
        raise StorageError(
            f"the tools do not support {scheme}://", code=FailureCode.UNSUPPORTED, scope=FailureScope.SERVICE
        )
    proxy = os.environ.get("X509_USER_PROXY", "")
    if not os.access(proxy, os.R_OK):
        raise StorageError(
            "the tools need the user's proxy", code=FailureCode.CREDENTIAL_MISSING, scope=FailureScope.SERVICE
        )
    trusted = {trust_at(url.address) for url in urls}
    if len(trusted) > 1:
        raise StorageError(
            "the two sites have different authorities of their own, which no tool supports",
            code=FailureCode.UNSUPPORTED,
            scope=FailureScope.SERVICE,
        )
    trust = trusted.pop()
    environment = {"X509_USER_PROXY": proxy, "HOME": _NO_HOME}
    if trust is not None:
        environment |= {"X509_CERT_DIR": trust, "XrdSecGSICADIR": trust}
    return environment


def _end(process: subprocess.Popen[bytes], exited: int) -> None:
    """Kill a tool and the processes that it has started."""
    _signal_group(process, signal.SIGTERM)
    with selectors.DefaultSelector() as selector:
        selector.register(exited, selectors.EVENT_READ)
        selector.select(_TERM_GRACE_S)
    _signal_group(process, signal.SIGKILL)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
