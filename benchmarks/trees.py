"""Trees of files for both sides of a comparison, and the proof that a copy is one."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen
from figures import BenchmarkError

_PIECE = 1024 * 1024
_COMPARED_AT_ONCE = 4 * _PIECE


@frozen
class Kind:
    """Sizes of a kind of tree: files, directories, KiB of a file, rounds; each for a full and a quick run."""

    files: tuple[int, int]
    folders: tuple[int, int]
    kib: tuple[int, int]
    rounds: tuple[int, int]

    def complete(self, options: argparse.Namespace) -> None:
        """Set the sizes that the options leave open: 0, of directories -1."""
        options.files = options.files or self.files[options.quick]
        options.folders = self.folders[options.quick] if options.folders < 0 else options.folders
        options.kib = options.kib or self.kib[options.quick]
        options.rounds = options.rounds or self.rounds[options.quick]


def make_tree(root: Path, files: int, folders: int, size: int) -> list[Path]:
    """Make ``files`` files of ``size`` bytes, all different, spread over ``folders`` directories.

    Args:
        root: made here.
        files: at least one.
        folders: directories, how many; 0 puts the files into the root itself.
        size: bytes of each.

    Returns:
        The files, below the root.
    """
    root.mkdir(parents=True)
    random = os.urandom(min(size, _PIECE))
    made = []
    for number in range(files):
        directory = root / f"d{number * folders // files:04d}" if folders else root
        directory.mkdir(exist_ok=True)
        path = directory / f"f{number:06d}"
        _write(path, number, size, random)
        made.append(path.relative_to(root))
    return made


def _write(path: Path, number: int, size: int, random: bytes) -> None:
    """Random bytes that no other file, and no other piece of this one, has."""
    with path.open("wb") as file:
        for piece in range(0, size, _PIECE):
            label = b"%016x%016x" % (number, piece)
            length = min(_PIECE, size - piece)
            file.write((label + random[len(label) :])[:length])


def make_directories_like(source: Path, destination: Path) -> None:
    """Make the directories of a tree, without files."""
    destination.mkdir(parents=True, exist_ok=True)
    for directory, names, _ in os.walk(source):
        for name in names:
            (destination / Path(directory).relative_to(source) / name).mkdir(exist_ok=True)


def sizes(root: Path) -> dict[str, int]:
    """Each file below a directory with its size; a directory without files is named with a slash."""
    return dict(_walk(root))


def _walk(root: Path) -> Iterator[tuple[str, int]]:
    for directory, names, files in os.walk(root):
        below = Path(directory).relative_to(root)
        if not names and not files:
            yield f"{below}/", 0
        for name in files:
            yield str(below / name), (Path(directory) / name).stat(follow_symlinks=False).st_size


def require_same(source: Path, destination: Path) -> None:
    """Fail unless two trees have the same names, sizes and bytes.

    Raises:
        BenchmarkError: they differ; the text says where.
    """
    wanted, found = sizes(source), sizes(destination)
    if wanted != found:
        odd = sorted(set(wanted.items()) ^ set(found.items()))[:3]
        raise BenchmarkError(f"{destination} is not {source}: {len(odd)} and more differ: {odd}")
    for name, size in wanted.items():
        if not name.endswith("/") and not _same_bytes(source / name, destination / name, size):
            raise BenchmarkError(f"{destination / name} has other bytes than {source / name}")


def require_listing(
    entries: Mapping[str, Sequence[Mapping[str, Any]]], source: Path, wanted: Mapping[str, int]
) -> None:
    """Fail unless a listing has the files of a tree.

    Args:
        entries: as the API gives them, by directory.
        source: the tree.
        wanted: `sizes` of it.

    Raises:
        BenchmarkError: it has others; the text says which.
    """
    found = {
        str(Path(directory, entry["name"]).relative_to(source)): entry["size"]
        for directory, of_directory in entries.items()
        for entry in of_directory
        if entry["type"] == "file"
    }
    if found != wanted:
        odd = sorted(set(found.items()) ^ set(wanted.items()))[:3]
        raise BenchmarkError(f"the listing has {len(found)} files instead of {len(wanted)}: {odd}")


def _same_bytes(one: Path, other: Path, size: int) -> bool:
    with one.open("rb", buffering=0) as left, other.open("rb", buffering=0) as right:
        for _ in range(0, size, _COMPARED_AT_ONCE):
            if left.read(_COMPARED_AT_ONCE) != right.read(_COMPARED_AT_ONCE):
                return False
    return True


#: Elements whose attempt has ended with a line that says how.
_ENDED = re.compile(rb"^\S+ (\d+)\.\d+ outcome=", re.MULTILINE)


def require_logs(logs: Path, uid: str, elements: int) -> None:
    """Fail unless each element of a job has a log that came to its end.

    Args:
        logs: directory of all logs of attempts.
        uid: of the job.
        elements: how many the job has.

    Raises:
        BenchmarkError: a log is missing or has no last line.
    """
    files = list((logs / uid[:2] / uid).glob("log*"))
    ended = {int(number) for file in files for number in _ENDED.findall(file.read_bytes())}
    for number in range(elements):
        if number not in ended:
            raise BenchmarkError(f"element {number} has no log that came to its end: {files}")


def logs_taken(logs: Path, uid: str) -> dict[str, float]:
    """What the logs of a job take on disk, with their directories: MiB and inodes."""
    directory = logs / uid[:2] / uid
    found = [path.stat() for path in (directory.parent, directory, *directory.rglob("*"))]
    return {"MiB": sum(status.st_blocks for status in found) * 512 / _PIECE, "inodes": len(found)}
