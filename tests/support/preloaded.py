"""``pdm`` and the daemon as forks of a process that has imported their modules.

The imports of ``pdm`` take 0.3 s of CPU time, those of the daemon 1 s, and all tests start hundreds of both. A fork is
a process with its own arguments, environment, streams, signals and exit status. Only ``/proc/PID/cmdline`` and
``environ`` are those of the process that forks, and its parent is that process.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import selectors
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

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


class Preloaded(subprocess.Popen[str]):
    """``subprocess.Popen`` that forks ``pdm`` and ``twistd``; it starts all other programs as usual.

    Those two as well, if the environment has what only a new interpreter heeds.
    """

    _channel: socket.socket | None = None
    _forks = threading.Lock()
    _server: _Server | None = None

    def _execute_child(self, args: Any, executable: Any, preexec: Any, close: Any, passed: Any, *rest: Any) -> None:
        """Start the program; the arguments are those of CPython's method, in its order."""
        directory, environment = rest[0], rest[1]
        p2c_read, _, _, c2p_write, _, error_write = pipes = rest[5:11]
        request = json.dumps([[str(each) for each in args], str(directory or Path.cwd()), environment]).encode()
        if (
            not any(args[: len(program)] == program for program in (_PDM, _TWISTD))
            or preexec
            or passed
            or len(request) > _LONGEST_REQUEST
            or not self._starts_alike(environment)
        ):
            super()._execute_child(args, executable, preexec, close, passed, *rest)  # type: ignore[misc]
            return
        self._channel, theirs = socket.socketpair()
        streams = [number if fd == -1 else fd for number, fd in enumerate((p2c_read, c2p_write, error_write))]
        with self._forks, theirs:
            assert self._server is not None
            socket.send_fds(self._server.requests, [request], [theirs.fileno(), *streams])
        self.pid = int(self._channel.recv(32))
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    def _internal_poll(self, _deadstate: int | None = None, **_: Any) -> int | None:
        if self._channel is None:
            return super()._internal_poll(_deadstate)  # type: ignore[misc]
        if self.returncode is None and self._waitpid_lock.acquire(blocking=False):  # type: ignore[attr-defined]
            try:
                self._channel.setblocking(False)
                self._end(self._channel)
            except BlockingIOError:
                pass  # it runs
            finally:
                self._waitpid_lock.release()  # type: ignore[attr-defined]
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self._channel is None:
            return super()._wait(timeout)  # type: ignore[misc]
        with self._waitpid_lock:  # type: ignore[attr-defined]
            if self.returncode is None:
                self._channel.settimeout(timeout)
                try:
                    self._end(self._channel)
                except (TimeoutError, BlockingIOError):
                    raise subprocess.TimeoutExpired(self.args, timeout or 0.0) from None
        return self.returncode

    def _end(self, channel: socket.socket) -> None:
        self.returncode = int(channel.recv(32))
        channel.close()

    @classmethod
    def _starts_alike(cls, environment: Mapping[str, str] | None) -> bool:
        with cls._forks:
            if cls._server is None:
                if environment is None:
                    return False
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                with theirs:
                    process = subprocess.Popen(
                        [sys.executable, __file__, str(theirs.fileno())],
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        pass_fds=[theirs.fileno()],
                    )
                cls._server = _Server(process, ours, _at_start(environment))
            return environment is not None and _at_start(environment) == cls._server.at_start

    @classmethod
    def close(cls) -> None:
        """End the process that forks, not its forks."""
        with cls._forks:
            if cls._server is not None:
                cls._server.requests.close()
                cls._server.process.wait()
                cls._server = None


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
