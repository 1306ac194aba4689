"""Run one command: settings, client, reactor, signals; every failure becomes one line and an exit code."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn

import click
from attrs import evolve
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import react

from pdm.workqueue.certificates.pem import CertificateFilesError, WeakKeyError, is_encrypted, read_identity
from pdm.workqueue.cli.copy_options import TYPED_NAMES, typed_words
from pdm.workqueue.cli.display import print_stderr, print_wrapped
from pdm.workqueue.cli.exit_codes import CommandError, ExitCode
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
from pdm.workqueue.client.settings import ClientSettings, find_settings
from pdm.workqueue.domain.formatting import display_line
from pdm.workqueue.telemetry.clocks import use_monotonic_clock
from pdm.workqueue.WorkqueueClient import WorkqueueClient

_PASSPHRASE_TRIES = 3
#: Seconds after a signal at which a command that has not ended is cancelled once more.
_CANCEL_AGAIN_S = 2.0

#: A command's use of the client; returns the exit code, None for success.
Action = Callable[[WorkqueueClient], Awaitable[int | None]]

_EXIT_CODES: tuple[tuple[type[WorkqueueClientError], ExitCode], ...] = (
    (JobTimeoutError, ExitCode.TIMED_OUT),
    (SettingsError, ExitCode.USAGE),
    (CredentialError, ExitCode.CREDENTIAL),
    (NotFoundError, ExitCode.NOT_FOUND),
    (OutputNotReadyError, ExitCode.NOT_FOUND),
    (UnreachableError, ExitCode.TEMPORARY),
    (ConnectionBrokenError, ExitCode.TEMPORARY),
    (TemporaryRefusalError, ExitCode.TEMPORARY),
)


def print_error(what: str, advice: str = "") -> None:
    """Print an error: ``pdm: what happened. what to do next.``."""
    what = display_line(what).rstrip(".")
    print_wrapped(f"pdm: {what}. {display_line(advice)}".rstrip())


#: Routes named in the service's texts → commands that do the same.
_COMMANDS_FOR_ROUTES = (
    (re.compile(r"GET /jobs/(\d+)/elements"), r"'pdm status \1'"),
    (re.compile(r"GET /users"), "'pdm user list'"),
    (re.compile(r"GET /schedules"), "'pdm schedule list'"),
    (re.compile(r"GET /(jobs|sites|credentials|whoami|nodes)\b"), r"'pdm \1'"),
)
#: Pointer to an invalid value → the option or argument that it comes from.
_OPTION_NAMES = {
    "$.src_filepath": "source path",
    "$.dst_filepath": "destination path",
    "$.protocol": "--protocol",
    "$.priority": "--priority",
    "$.max_tries": "--max-tries",
    "$.label": "--label",
    "$.max_active": "--max-active",
    "$.recurrence": "WHEN",
    "$.timezone": "--timezone",
    "$.after": "--after",
    "$.after_any": "--after-any",
    "$.deadline": "--deadline",
    "?site": "--site",
    "?since": "--since",
    "?label": "--label",
    "?code": "--code",
}


_EXTRA_OPTIONS = "$.extra_opts"


def error_text(error: WorkqueueClientError) -> str:
    """Text of an error, with options and commands instead of keys and routes of the API."""
    what = error.what
    if isinstance(error, RequestRefusedError) and error.pointer is not None:
        what = what.removeprefix(f"{error.pointer}: ")
        # The job of a schedule is typed as any other.
        pointer = error.pointer.replace("$.job.", "$.", 1)
        if pointer.startswith(_EXTRA_OPTIONS):
            key = pointer.removeprefix(_EXTRA_OPTIONS).removeprefix(".")
            what = typed_words(what)
            typed = TYPED_NAMES.get(re.split(r"[.[]", key)[0], f"--option {key}" if key else "")
        else:
            # Of a list, the index is of no use.
            typed = _OPTION_NAMES.get(pointer.partition("[")[0], "")
        what = f"{typed}: {what}" if typed else what
    for pattern, command in _COMMANDS_FOR_ROUTES:
        what = pattern.sub(command, what)
    return what


def exit_code_of(error: WorkqueueClientError) -> ExitCode:
    """The exit code for an error of the client."""
    for kind, code in _EXIT_CODES:
        if isinstance(error, kind):
            return code
    status = getattr(error, "status", None)
    return ExitCode.USAGE if status is not None and 400 <= status < 500 else ExitCode.FAILED


def run(action: Action, client_type: type[WorkqueueClient] = WorkqueueClient) -> NoReturn:
    """Run a command with a client from the environment, and exit with its exit code."""
    try:
        # Before the reactor handles signals, so that ^C at the passphrase prompt ends the command.
        settings = _with_passphrase(find_settings(os.environ, Path.home(), os.getuid()))
    except WorkqueueClientError as error:
        print_error(error.what, error.advice)
        raise SystemExit(exit_code_of(error)) from None
    except click.Abort:
        print_error("interrupted")
        raise SystemExit(ExitCode.INTERRUPTED) from None

    def begin(reactor: Any) -> Deferred[NoReturn]:
        use_monotonic_clock(reactor)
        return Deferred.fromCoroutine(_run(reactor, settings, action, client_type))

    react(begin)


def _with_passphrase(settings: ClientSettings) -> ClientSettings:
    """Add the passphrase of an encrypted key to the settings; prompts for it on a terminal.

    Without a terminal the settings stay unchanged, and reading the key fails later with an explanation.
    """
    path = settings.key or settings.certificate
    try:
        if path is None or settings.certificate is None or not sys.stdin.isatty() or not is_encrypted(path):
            return settings
        for tries_left in reversed(range(_PASSPHRASE_TRIES)):
            answer = click.prompt(
                f"Passphrase of {display_line(str(path))}", hide_input=True, err=True, default="", show_default=False
            )
            try:
                read_identity(settings.certificate, settings.key, answer.encode())
            except WeakKeyError:
                break  # decrypted; the weakness is reported where the key is used
            except CertificateFilesError:
                if not tries_left:
                    raise
                print_stderr("Wrong passphrase.")
                continue
            break
        return evolve(settings, passphrase=answer.encode())
    except CertificateFilesError as error:
        raise CredentialError(str(error).rstrip(".")) from error


async def _run(reactor: Any, settings: ClientSettings, action: Action, client_type: type[WorkqueueClient]) -> NoReturn:
    received = _SignalCanceller(reactor)
    try:
        code = await received.over(_with_client(reactor, settings, action, client_type))
    except CommandError as error:
        if error.what:
            print_error(error.what, error.advice)
        code = error.code
    except WorkqueueClientError as error:
        print_error(error_text(error), error.advice)
        code = exit_code_of(error)
    except CancelledError:
        print_error("interrupted")
        code = ExitCode.INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout has exited ('pdm jobs | head'); the interpreter's final flush must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = ExitCode.FAILED
    raise SystemExit(received.exit_code(code))


async def _with_client(
    reactor: Any, settings: ClientSettings, action: Action, client_type: type[WorkqueueClient]
) -> int:
    client = client_type.from_settings(reactor, settings, on_wait=print_error)
    try:
        code = await action(client)
        sys.stdout.flush()
        return ExitCode.DONE if code is None else code
    finally:
        await client.close()


class _SignalCanceller:
    """Cancels the command on SIGINT and SIGTERM, so that it can report on its job; a second signal kills it."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._signal: int | None = None
        self._command: Deferred[int] | None = None
        # After the reactor has put its own handlers in place.
        reactor.callWhenRunning(self._listen)

    async def over(self, command: Any) -> int:
        self._command = Deferred.fromCoroutine(command)
        try:
            return await self._command
        finally:
            self._command = None

    def exit_code(self, code: int) -> int:
        """The command's exit code, or 128 + signal number if it was interrupted."""
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
            # One that meets the end of a request may be taken for a broken connection, and the request is repeated.
            self._reactor.callLater(_CANCEL_AGAIN_S, self._cancel)
            self._command.cancel()
