"""``pdm`` and the daemon as forks of a process that has imported their modules.

The imports of ``pdm`` take 0.3 s of CPU time, those of the daemon 1 s, and all tests start hundreds of both. A fork is
a process with its own arguments, environment, streams, signals and exit status. Only ``/proc/PID/cmdline`` and
``environ`` are those of the process that forks, and its parent is that process.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NamedTuple, NoReturn, Self, cast

_PDM = [sys.executable, "-m", "pdm.workqueue.cli"]
_TWISTD = [str(Path(sys.executable).parent / "twistd")]
_REACTOR = "twisted.internet.reactor"
#: Begin of variables that a process reads before, or while, it imports.
_READ_AT_START = ("PYTHON", "LANG", "LC_", "LD_", "TZ", "OPENSSL_", "SSL_")
#: Bytes; longer requests may not fit into one message of a socket.
_LONGEST_REQUEST = 64 * 1024


class _Server(NamedTuple):
    process: subprocess.Popen[bytes]
    requests: socket.socket
    at_start: Mapping[str, str]


class Fork:
    """A fork with the public interface of `subprocess.Popen` that the tests use; its output is text.

    Attributes:
        args: as given.
        returncode: None while it runs.
        stdout: pipe, or None.
        stderr: pipe, or None.
    """

    def __init__(self, args: Sequence[str], channel: socket.socket, outputs: Sequence[IO[str] | None]) -> None:
        self.args = args
        self.pid = int(channel.recv(32))
        self.returncode: int | None = None
        self.stdout, self.stderr = outputs
        self._channel = channel
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (self.stdout, self.stderr):
            if pipe is not None:
                pipe.close()
        self.wait()

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""
        if self._lock.acquire(blocking=False):
            try:
                self._receive(0.0)
            finally:
                self._lock.release()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status once it has ended.

        Raises:
            subprocess.TimeoutExpired: it runs after so many seconds.
        """
        with self._lock:
            self._receive(timeout)
            if self.returncode is None:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            return self.returncode

    def _receive(self, timeout: float | None) -> None:
        if self.returncode is None and select.select([self._channel], [], [], timeout)[0]:
            self.returncode = int(self._channel.recv(32))
            self._channel.close()

    def communicate(self, *, timeout: float | None = None) -> tuple[str, str]:
        """All of its output, once it has ended.

        Raises:
            subprocess.TimeoutExpired: it runs after so many seconds; what it has written is lost.
        """
        texts = ["", ""]

        def read(number: int, pipe: IO[str]) -> None:
            with contextlib.suppress(ValueError):  # closed by ``__exit__``
                texts[number] = pipe.read()

        pipes = [(number, pipe) for number, pipe in enumerate((self.stdout, self.stderr)) if pipe is not None]
        readers = [threading.Thread(target=read, args=each, daemon=True) for each in pipes]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join()
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        """Send a signal; nothing if it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Preloader:
    """Starts ``pdm`` and ``twistd`` as forks, and every other program by `subprocess.Popen`.

    Those two by `subprocess.Popen` as well, if the environment has what only a new interpreter heeds.
    """

    def __init__(self) -> None:
        self._forks = threading.Lock()
        self._server: _Server | None = None

    def __call__(
        self,
        args: Sequence[str],
        *,
        env: Mapping[str, str],
        stdin: int = subprocess.DEVNULL,
        stdout: int | IO[Any] = subprocess.DEVNULL,
        stderr: int | IO[Any] = subprocess.DEVNULL,
        cwd: Path | None = None,
        text: bool = True,
    ) -> subprocess.Popen[str]:
        """Start a program without input whose output is text.

        Args:
            stdout: ``subprocess.PIPE``, ``subprocess.DEVNULL`` or an open file; ``stderr`` too.
        """
        assert stdin == subprocess.DEVNULL and text
        request = json.dumps([[str(each) for each in args], str(cwd or Path.cwd()), dict(env)]).encode()
        if (
            not any(list(args[: len(program)]) == program for program in (_PDM, _TWISTD))
            or len(request) > _LONGEST_REQUEST
            or not self._starts_alike(env)
        ):
            return subprocess.Popen(args, env=env, stdin=stdin, stdout=stdout, stderr=stderr, cwd=cwd, text=True)
        with contextlib.ExitStack() as ours_no_more:
            pipes: list[IO[str] | None] = []
            given = [os.open(os.devnull, os.O_RDONLY)]
            ours_no_more.callback(os.close, given[0])
            for wanted in (stdout, stderr):
                ours, theirs = self._output(wanted, ours_no_more)
                pipes.append(ours)
                given.append(theirs)
            channel, its_end = socket.socketpair()
            ours_no_more.enter_context(its_end)
            with self._forks:
                assert self._server is not None
                socket.send_fds(self._server.requests, [request], [its_end.fileno(), *given])
        # Whoever starts programs of the service needs no more of one than a fork has.
        return cast("subprocess.Popen[str]", Fork(args, channel, pipes))

    @staticmethod
    def _output(wanted: int | IO[Any], until_sent: contextlib.ExitStack) -> tuple[IO[str] | None, int]:
        """Our end of a pipe if there is one, and the descriptor that the fork gets."""
        if not isinstance(wanted, int):
            return None, wanted.fileno()
        if wanted == subprocess.DEVNULL:
            theirs = os.open(os.devnull, os.O_WRONLY)
            until_sent.callback(os.close, theirs)
            return None, theirs
        assert wanted == subprocess.PIPE
        ours, theirs = os.pipe()
        until_sent.callback(os.close, theirs)
        return os.fdopen(ours, encoding="utf-8"), theirs

    def _starts_alike(self, environment: Mapping[str, str]) -> bool:
        with self._forks:
            if self._server is None:
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                with theirs:
                    process = subprocess.Popen(
                        [sys.executable, __file__, str(theirs.fileno())],
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        pass_fds=[theirs.fileno()],
                    )
                self._server = _Server(process, ours, _at_start(environment))
            return _at_start(environment) == self._server.at_start

    def close(self) -> None:
        """End the process that forks, not its forks."""
        with self._forks:
            if self._server is not None:
                self._server.requests.close()
                self._server.process.wait()
                self._server = None


def _at_start(environment: Mapping[str, str]) -> Mapping[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_READ_AT_START)}


# -- in the process that forks


class _LateReactor(ModuleType):
    """Stands for the reactor in modules that import it early: it must be made by the process that uses it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module(_REACTOR), name)


def _preload() -> None:
    gc.disable()
    sys.modules[_REACTOR] = _LateReactor(_REACTOR)
    main = importlib.import_module("pdm.workqueue.cli.main")
    for module in {module for module, _, _ in (where[0].partition(":") for where in main._COMMANDS.values())}:
        importlib.import_module(f"pdm.workqueue.cli.{module}")
    for name in ("pdm.workqueue.assembly", "pdm.workqueue.daemon", "twisted.scripts.twistd"):
        importlib.import_module(name)
    del sys.modules[_REACTOR]
    sys.modules["twisted.internet"].__dict__.pop("reactor", None)
    gc.freeze()
    gc.enable()


def _serve(requests: socket.socket) -> Callable[[], object]:
    """Fork for each request, and report how each fork ends; returns in a fork only: what that is to run."""
    waiting = selectors.DefaultSelector()
    waiting.register(requests, selectors.EVENT_READ)
    while True:
        for key, _ in waiting.select():
            if key.fileobj is not requests:
                pid, channel = key.data
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                waiting.unregister(key.fileobj)
                os.close(key.fd)
                with channel:
                    channel.sendall(str(status).encode())
                continue
            request, fds, _, _ = socket.recv_fds(requests, _LONGEST_REQUEST, 4)
            if not fds:
                # The tests have ended.
                sys.exit()
            if pid := os.fork():
                channel = socket.socket(fileno=fds[0])
                for fd in fds[1:]:
                    os.close(fd)
                channel.sendall(str(pid).encode())
                waiting.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, channel))
                continue
            for other in waiting.get_map().values():
                os.close(other.fd)
                if other.data:
                    other.data[1].close()
            requests.detach()
            waiting.close()
            return _become(request, fds)


def _become(request: bytes, fds: list[int]) -> Callable[[], object]:
    arguments, directory, environment = json.loads(request)
    for number, fd in enumerate(fds[1:]):
        os.dup2(fd, number)
    for fd in fds:
        os.close(fd)
    # Anew, for the first ones remember what kind of file they were.
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        first = getattr(sys, name)
        stream = open(  # noqa: SIM115
            number, mode, 1 if number == 2 else -1, encoding=first.encoding, errors=first.errors, closefd=False
        )
        setattr(sys, name, stream)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    program = _PDM if arguments[: len(_PDM)] == _PDM else _TWISTD
    sys.argv[:] = [arguments[0], *arguments[len(program) :]]
    name = "pdm.workqueue.cli.main" if program is _PDM else "twisted.scripts.twistd"
    module = sys.modules[name]
    run: Callable[[], object] = module.main if program is _PDM else module.run
    return run


def _run(program: Callable[[], object]) -> NoReturn:
    """As an interpreter does, but without freeing each object: that would copy all memory that is shared."""
    status = 1
    try:
        program()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
    except BaseException:
        sys.excepthook(*sys.exc_info())
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            status = 120
    os._exit(status)


if __name__ == "__main__":
    _preload()
    _run(_serve(socket.socket(fileno=int(sys.argv[1]))))
