"""Exit codes of ``pdm``. A module of its own, so that ``pdm --help`` starts without Twisted."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType


class ExitCode(enum.IntEnum):
    """One exit code for each outcome that a script may want to distinguish."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    CREDENTIAL = 4
    TEMPORARY = 5
    PARTIAL = 6
    CANCELLED = 7
    TIMED_OUT = 10
    INTERRUPTED = 130


MEANINGS: Mapping[ExitCode, str] = MappingProxyType(
    {
        ExitCode.DONE: "everything is done and verified (with --no-wait: the job is registered)",
        ExitCode.FAILED: "failed; nothing was done",
        ExitCode.USAGE: "the command or the request is invalid",
        ExitCode.NOT_FOUND: "no such job, site or path",
        ExitCode.CREDENTIAL: "a certificate or delegation is missing, expired or refused",
        ExitCode.TEMPORARY: "temporary error of a server or the network; safe to repeat",
        ExitCode.PARTIAL: "partly done: something failed or was skipped, see 'pdm status'",
        ExitCode.CANCELLED: "the job was cancelled, by its user or because its deadline is over",
        ExitCode.TIMED_OUT: "--timeout expired; the job continues",
        ExitCode.INTERRUPTED: "interrupted by ^C; a submitted job continues (143: the same by SIGTERM)",
    }
)


class CommandError(Exception):
    """Ends a command with an exit code.

    Args:
        code: exit status of the process.
        what: what happened; a sentence without full stop, or empty if it has been printed.
        advice: what to do next; a sentence, or empty.
    """

    def __init__(self, code: int, what: str, advice: str = "") -> None:
        super().__init__(what)
        self.code = code
        self.what = what
        self.advice = advice


def exit_codes_text() -> str:
    """Text of ``pdm help exit-codes``."""
    lines = [f"{code.value:5d}  {MEANINGS[code]}" for code in ExitCode]
    return "\n".join(["Exit status of pdm:", "", *lines])
