"""``pdm`` as a process of its own, also on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import termios
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from pdm.testgrid.service import TestService


def pdm(service: TestService, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command as the user admin; it must end with this exit status, and without a traceback."""
    done = service.pdm("admin", *map(str, arguments))
    assert done.returncode == code, f"{arguments}\n{done.stdout}\n{done.stderr}\n{service.tail()}"
    assert "Traceback" not in done.stderr
    return done


def run_on_terminal(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    term: str = "xterm",
    columns: int = 80,
    cwd: Path | None = None,
) -> tuple[int, str]:
    """The exit status of a program, and all that it writes to a terminal of so many columns, erasures included."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    seen: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(ours, 65536):
                seen.append(data)
        except OSError:
            pass  # the other end of the terminal is closed

    reader = threading.Thread(target=read)
    reader.start()
    variables = {**environment, "TERM": term, "PYTHONIOENCODING": "utf-8"}
    variables.pop("COLUMNS", None)
    done = subprocess.run(
        arguments, env=variables, cwd=cwd, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, check=False
    )
    os.close(theirs)
    reader.join(10)
    os.close(ours)
    return done.returncode, b"".join(seen).decode().replace("\r\n", "\n")
