"""What the exit status of ``pdm`` says."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType


class ExitCode(enum.IntEnum):
    """One number for each thing a script may want to tell apart."""

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
        ExitCode.DONE: "all that was asked is done and proven (with --no-wait: the job is registered)",
        ExitCode.FAILED: "failed; nothing of what was asked is done",
        ExitCode.USAGE: "the command or the request is wrong",
        ExitCode.NOT_FOUND: "no such job, site or path",
        ExitCode.CREDENTIAL: "a certificate or a delegation is needed, or is not accepted",
        ExitCode.TEMPORARY: "server or network trouble that may pass; safe to repeat",
        ExitCode.PARTIAL: "partly done: something failed or was left out, see 'pdm status'",
        ExitCode.CANCELLED: "the job was cancelled",
        ExitCode.TIMED_OUT: "--timeout is over and the job goes on",
        ExitCode.INTERRUPTED: "interrupted by ^C; a job that was submitted goes on (143: ended by TERM, the same)",
    }
)


class CommandError(Exception):
    """Ends a command.

    Args:
        code: the exit status.
        what: what happened, a sentence without its full stop; empty where it has been said.
        advice: what to do, a sentence, or empty.
    """

    def __init__(self, code: int, what: str, advice: str = "") -> None:
        super().__init__(what)
        self.code = code
        self.what = what
        self.advice = advice


def exit_codes_text() -> str:
    """The page of ``pdm help exit-codes``."""
    lines = [f"{code.value:5d}  {MEANINGS[code]}" for code in ExitCode]
    return "\n".join(["Exit status of pdm:", "", *lines])
