"""One command's life: settings, client, reactor, signals, and every failure as one line and a truthful exit status."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn

import click
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import react

from pdm.workqueue.cli.exit_codes import CommandError, ExitCode
from pdm.workqueue.cli.text import shown_line
from pdm.workqueue.client.errors import (
    ConnectionBrokenError,
    CredentialError,
    JobTimeoutError,
    NotFoundError,
    OutputNotReadyError,
    RequestRefusedError,
    SettingsError,
    TemporaryRefusalError,
    UnreachableError,
    WorkqueueClientError,
)
from pdm.workqueue.client.settings import find_settings
from pdm.workqueue.WorkqueueClient import WorkqueueClient

#: What a command does with the client; it returns the exit status.
Action = Callable[[WorkqueueClient], Awaitable[int]]

_CODES: tuple[tuple[type[WorkqueueClientError], ExitCode], ...] = (
    (JobTimeoutError, ExitCode.TIMED_OUT),
    (SettingsError, ExitCode.USAGE),
    (CredentialError, ExitCode.CREDENTIAL),
    (NotFoundError, ExitCode.NOT_FOUND),
    (OutputNotReadyError, ExitCode.NOT_FOUND),
    (UnreachableError, ExitCode.TEMPORARY),
    (ConnectionBrokenError, ExitCode.TEMPORARY),
    (TemporaryRefusalError, ExitCode.TEMPORARY),
)


def say(line: str) -> None:
    """A line for people, on stderr: stdout has data only."""
    click.echo(line, err=True)


def complain(what: str, advice: str = "") -> None:
    """Tell people about an error: ``pdm: what. what to do.``."""
    what = shown_line(what).rstrip(".")
    say(f"pdm: {what}. {shown_line(advice)}".rstrip())


#: What the service's words name of its API → the command that does the same.
_COMMANDS = (
    (re.compile(r"GET /jobs/(\d+)/elements"), r"'pdm status \1'"),
    (re.compile(r"GET /users"), "'pdm user list'"),
    (re.compile(r"GET /(jobs|sites|credentials|whoami)\b"), r"'pdm \1'"),
)
#: The place in a request that is wrong → what was typed there; other places need no name.
_TYPED = {
    "$.src_filepath": "source path",
    "$.dst_filepath": "destination path",
    "$.protocol": "--protocol",
    "$.priority": "--priority",
    "$.max_tries": "--max-tries",
    "$.label": "--label",
    "?site": "--site",
    "?since": "--since",
    "?label": "--label",
}


def words_of(error: WorkqueueClientError) -> str:
    """What happened, in the words of this command line: its options and commands, no keys and routes of the API."""
    what = error.what
    if isinstance(error, RequestRefusedError) and error.pointer is not None:
        what = what.removeprefix(f"{error.pointer}: ")
        key = error.pointer.removeprefix("$.extra_opts.")
        typed = f"--option {key}" if key != error.pointer else _TYPED.get(error.pointer)
        what = what if typed is None else f"{typed}: {what}"
    for pattern, command in _COMMANDS:
        what = pattern.sub(command, what)
    return what


def exit_code_of(error: WorkqueueClientError) -> ExitCode:
    """The exit status for an error of the client."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    status = getattr(error, "status", None)
    return ExitCode.USAGE if status is not None and 400 <= status < 500 else ExitCode.FAILED


def run(action: Action) -> NoReturn:
    """Carry out a command with a client made from the environment, and leave the process with its exit status."""
    react(lambda reactor: Deferred.fromCoroutine(_run(reactor, action)))


async def _run(reactor: Any, action: Action) -> NoReturn:
    received = _SignalsCancel(reactor)
    try:
        code = await received.over(_with_client(reactor, action))
    except CommandError as error:
        if error.what:
            complain(error.what, error.advice)
        code = error.code
    except WorkqueueClientError as error:
        complain(words_of(error), error.advice)
        code = exit_code_of(error)
    except CancelledError:
        complain("interrupted")
        code = ExitCode.INTERRUPTED
    except BrokenPipeError:
        # Who read our stdout has seen enough ('pdm jobs | head'); the interpreter's last flush must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = ExitCode.FAILED
    raise SystemExit(received.exit_code(code))


async def _with_client(reactor: Any, action: Action) -> int:
    settings = find_settings(os.environ, Path.home(), os.getuid())
    client = WorkqueueClient.from_settings(reactor, settings)
    try:
        code = await action(client)
        sys.stdout.flush()
        return code
    finally:
        await client.close()


class _SignalsCancel:
    """Makes ^C and TERM cancel the command, so that it can say what becomes of its job; a second one kills."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._signal: int | None = None
        self._command: Deferred[int] | None = None
        # After the reactor has put its own handlers in place.
        reactor.callWhenRunning(self._listen)

    async def over(self, command: Any) -> int:
        self._command = Deferred.fromCoroutine(command)
        return await self._command

    def exit_code(self, code: int) -> int:
        """The command's exit status, or of an interrupted one the usual 128 + signal number."""
        if self._signal is not None and code == ExitCode.INTERRUPTED:
            return 128 + self._signal
        return code

    def _listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._received)

    def _received(self, number: int, _frame: Any) -> None:
        self._signal = number
        signal.signal(number, signal.SIG_DFL)
        self._reactor.callFromThread(self._cancel)

    def _cancel(self) -> None:
        if self._command is not None:
            self._command.cancel()
