"""The session of ``docs/tour.rst``: commands typed in a terminal of 80 columns, and what they print.

``python -m tests.support.tour_session`` plays it and writes it into the page; a test plays it and compares.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from attrs import frozen

from pdm.testgrid.service import TestService
from tests.support.commands import run_on_terminal

PAGE = Path(__file__).parents[2] / "docs" / "tour.rst"
COLUMNS = 80
_BEGIN, _END = ".. the session begins\n", ".. the session ends\n"
#: Erases the lines of the progress display, from so many lines above on.
_ERASURE = re.compile(r"\r(?:\x1b\[(\d+)A)?\x1b\[J")
#: Of the session, the number of the job that a command has submitted.
_JOB = re.compile(r"^job (\d+) submitted", re.MULTILINE)


@frozen
class Typed:
    """A command of the session; ``{job}`` in it is the number of the latest job. `code` is its exit status."""

    command: str
    code: int = 0


SESSION = (
    Typed("pdm doctor"),
    Typed("pdm ls -l lab:/run7"),
    Typed("pdm du lab:/run7"),
    Typed("pdm cp -r --sync size --exclude '*.tmp' --dry-run lab:/run7/ archive:/run7/", 6),
    Typed("pdm cp -r --sync size --exclude '*.tmp' --label run7 lab:/run7/ archive:/run7/", 6),
    Typed("pdm cp 'lab:/run7/*.root' archive:/", 0),
    Typed("pdm cp lab:/run7/calib archive:/calib", 6),
    Typed("pdm errors {job}"),
    Typed("pdm cp --overwrite different lab:/run7/calib archive:/calib"),
    Typed("pdm receipt {job} -o calib.jsonl"),
    Typed("pdm receipt --verify calib.jsonl"),
    Typed("pdm status {job}"),
    Typed("pdm mkdir -p archive:/run7/old"),
    Typed("pdm mv 'archive:/*.root' archive:/run7/old/"),
    Typed("pdm rm 'archive:/run7/*.dat'", 3),
    Typed("pdm ls -R archive"),
    Typed("pdm cpy lab:/run7 archive:/x", 2),
    Typed("pdm ls achive:/run7", 3),
    Typed("pdm jobs -n 5"),
)


def play(directory: Path) -> str:
    """Play the session at a daemon of its own, on two local directories; what the terminal shows.

    Raises:
        AssertionError: a command exits with another status than in `SESSION`.
    """
    service = _service(directory)
    shown, unlike = [], []
    job = ""
    with service.running():
        for typed in SESSION:
            command = typed.command.replace("{job}", job)
            code, written_text = run_on_terminal(
                ["/bin/sh", "-c", command], service.environment("admin"), columns=COLUMNS, cwd=service.directory
            )
            text = _screen(written_text)
            if code != typed.code:
                unlike.append(f"{command} exits with {code}:\n{text}")
            shown.append(f"$ {command}\n{text}")
            if submitted := _JOB.findall(text):
                job = submitted[-1]
    assert unlike == []
    return "".join(shown)


def _service(directory: Path) -> TestService:
    service = TestService(directory / "instance")
    service.init()
    for path in (service.directory / "sites.d").iterdir():
        path.write_text(path.read_text().replace("local-a", "lab").replace("local-b", "archive"))
    lab, archive = (service.directory / "storage" / name for name in ("a", "b"))
    (lab / "run7" / "calib").mkdir(parents=True)
    for number, size in enumerate((2_100_000, 3_400_000, 250_000)):
        (lab / "run7" / f"run 7 ({number}).root").write_bytes(bytes([number]) * size)
    (lab / "run7" / "calib" / "a.h5").write_bytes(b"a" * 40_000)
    (lab / "run7" / "calib" / "b.h5").write_bytes(b"b" * 50_000)
    (lab / "run7" / "lock.tmp").write_bytes(b"")
    (lab / "run7" / "latest").symlink_to("/data/elsewhere")
    for path in sorted(lab.rglob("*"), reverse=True):
        os.utime(path, (1_772_449_440, 1_772_449_440), follow_symlinks=False)
    (archive / "run7").mkdir()
    (archive / "run7" / "run 7 (0).root").write_bytes(bytes(2_100_000))
    (archive / "calib").mkdir()
    (archive / "calib" / "b.h5").write_bytes(b"another")
    return service


def _screen(text: str) -> str:
    """What is left on a terminal after all erasures."""
    while erasure := _ERASURE.search(text):
        kept = text[: erasure.start()].split("\n")[: -1 - int(erasure[1] or 0)]
        text = "".join(f"{line}\n" for line in kept) + text[erasure.end() :]
    return text


def comparable(session: str) -> list[str]:
    """The commands with what they print, without what differs from run to run.

    That are line ends, places, owners, times and rates.
    """
    owned = re.sub(r"^([dl-][rwx-]{9})  \S+  \S+", r"\1  OWNER  GROUP", session, flags=re.MULTILINE)
    steps = re.sub(r"\S*/instance/storage", "DIRECTORY", owned).split("\n$ ")
    words = (re.sub(r"\d[\d.:-]*( [KMG]iB| B| [smhd]\b)*(/s)?", "N", step) for step in steps)
    return [" ".join(re.sub(r"\s+N(?= failed|$)", "", each).split()) for each in words]


def written() -> str:
    """The session that the page has."""
    text = PAGE.read_text(encoding="utf-8")
    block = text[text.index(_BEGIN) : text.index(_END)]
    return "\n".join(line[3:] for line in block.splitlines()[4:]).strip() + "\n"


def write(session: str) -> None:
    """Put a session into the page."""
    text = PAGE.read_text(encoding="utf-8")
    block = "\n".join(f"   {line}".rstrip() for line in session.splitlines())
    head, tail = text[: text.index(_BEGIN)], text[text.index(_END) :]
    PAGE.write_text(f"{head}{_BEGIN}\n.. code-block:: console\n\n{block}\n\n{tail}", encoding="utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="tour-") as scratch:
        write(play(Path(scratch)))
