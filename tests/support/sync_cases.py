"""Cases of what a copy can be asked, as data, and the command of rclone that is asked the same.

A tree is what is in a directory: path → content and time of a file; a path with a slash at its end is a directory.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

from attrs import field, frozen

Tree = Mapping[str, tuple[str, int] | None]

#: Seconds since 1970 UTC; further than any tolerance apart.
OLD, MIDDLE, NEW = 1_500_000_000, 1_600_000_000, 1_700_000_000
_MIDDLE_TEXT = "2020-09-13T12:26:40Z"


@frozen(kw_only=True)
class SyncCase:
    """One case.

    Attributes:
        options: of the COPY.
        rclone: command and flags.
        differs: why the outcome is not that of rclone; empty where it is the same.
        more, less: what is at the destination here and not with rclone (path → content, None for a directory), and the
            reverse.
        fails: whether the job fails though what can be done is done.
    """

    name: str
    source: Tree
    destination: Tree
    options: Mapping[str, Any]
    rclone: tuple[str, ...]
    differs: str = ""
    more: Mapping[str, str | None] = field(factory=dict)
    less: frozenset[str] = frozenset()
    fails: bool = False


#: Every relation of a file at the source to one of the same path at the destination.
SOURCE: Tree = MappingProxyType(
    {
        "same": ("same", OLD),
        "touched": ("touched", NEW),
        "changed": ("changed!", NEW),
        "disguised": ("bbbb", OLD),
        "grown": ("grown longer", NEW),
        "shrunk, older": ("s", OLD),
        "within a second": ("w", NEW),
        "new.root": ("new", NEW),
        "new.tmp": ("temporary", OLD),
        "run 1/data.root": ("data", NEW),
        "run 1/tmp/scratch.root": ("scratch", NEW),
        "run 1/data.tmp": ("t", NEW),
        "tmp/x": ("x", OLD),
        "only tmp/y.tmp": ("y", NEW),
        "größe/ñ": ("n", OLD),
        "empty/": None,
        "both empty/": None,
    }
)
DESTINATION: Tree = MappingProxyType(
    {
        "same": ("same", OLD),
        "touched": ("touched", OLD),
        "changed": ("changed?", OLD),
        "disguised": ("aaaa", OLD),
        "grown": ("grown", OLD),
        "shrunk, older": ("shrunk", NEW),
        "within a second": ("w", NEW - 1),
        "both empty/": None,
        "extra.root": ("extra", NEW),
        "extra.tmp": ("extra temporary", OLD),
        "run 1/extra.root": ("e", OLD),
        "gone/deep/z": ("z", NEW),
        "gone/deep/z.tmp": ("z", OLD),
        "tmp/extra": ("extra", NEW),
        "hollow/": None,
    }
)

_LEVELS: Mapping[str, tuple[str, ...]] = {
    "exists": ("--ignore-existing",),
    "size": ("--size-only",),
    "mtime": ("--modify-window", "1s"),
    "checksum": ("--checksum",),
}


def _rules(*rules: str) -> list[dict[str, str]]:
    return [{"include" if rule[0] == "+" else "exclude": rule[2:]} for rule in rules]


_ONLY_ROOT = "only *.root, without tmp/"
#: Name → options, flags.
_FILTERS: Mapping[str, tuple[Mapping[str, Any], tuple[str, ...]]] = {
    "all": ({}, ()),
    "no *.tmp": ({"filters": _rules("- *.tmp")}, ("--filter", "- *.tmp")),
    "no tmp/": ({"filters": _rules("- tmp/")}, ("--filter", "- tmp/**")),
    "no /tmp/": ({"filters": _rules("- /tmp/")}, ("--filter", "- /tmp/**")),
    _ONLY_ROOT: (
        {"filters": _rules("- tmp/", "+ *.root", "- *")},
        ("--filter", "- tmp/**", "--filter", "+ *.root", "--filter", "- *"),
    ),
    "not run 1, but its data": (
        {"filters": _rules("+ /run ?/data.*", "- /run [0-9]/")},
        ("--filter", "+ /run ?/data.*", "--filter", "- /run [0-9]/**"),
    ),
    "nothing": ({"filters": _rules("- *")}, ("--filter", "- *")),
}
_DELETE: Mapping[bool, tuple[Mapping[str, Any], str]] = {False: ({}, "copy"), True: ({"delete_extra": True}, "sync")}

_EMPTY = frozenset({"empty", "größe", "only tmp"})


def _difference(name: str, delete: bool, dry_run: bool) -> dict[str, Any]:
    if name != _ONLY_ROOT or dry_run:
        return {}
    why = "with rclone, * matches no directory: it makes, and removes, directories in which its filters leave nothing"
    return {"differs": why, "less": _EMPTY, "more": {"hollow": None} if delete else {}}


MATRIX: tuple[SyncCase, ...] = tuple(
    SyncCase(
        name=f"{level}, {name}{', delete' if delete else ''}{', dry run' if dry_run else ''}",
        source=SOURCE,
        destination=DESTINATION,
        options={"sync": level, **_FILTERS[name][0], **_DELETE[delete][0], **({"dry_run": True} if dry_run else {})},
        rclone=(_DELETE[delete][1], *_LEVELS[level], *_FILTERS[name][1], *(("--dry-run",) if dry_run else ())),
        **_difference(name, delete, dry_run),
    )
    for level, name, delete, dry_run in product(_LEVELS, _FILTERS, _DELETE, (False, True))
)

_F: tuple[str, int] = ("f", OLD)
OTHERS: tuple[SyncCase, ...] = (
    SyncCase(
        name="files between two sizes",
        source={"small": ("s", OLD), "medium": ("medium", OLD), "large": ("large" * 9, OLD)},
        destination={},
        options={"sync": "size", "min_size": 2, "max_size": 6},
        rclone=("copy", "--min-size", "2B", "--max-size", "6B"),
    ),
    SyncCase(
        name="files of a time",
        source={"old": ("o", MIDDLE - 5), "later": ("m", MIDDLE + 5), "new": ("n", NEW)},
        destination={},
        options={"sync": "size", "newer_than": _MIDDLE_TEXT},
        rclone=("copy", "--max-age", _MIDDLE_TEXT),
    ),
    SyncCase(
        name="files before a time",
        source={"old": ("o", OLD), "new": ("n", NEW)},
        destination={},
        options={"sync": "size", "older_than": _MIDDLE_TEXT},
        rclone=("copy", "--min-age", _MIDDLE_TEXT),
    ),
    SyncCase(
        name="a file that is too small at the source only",
        source={"f": ("s", OLD)},
        destination={"f": ("larger", OLD)},
        options={"sync": "size", "min_size": 2, "delete_extra": True},
        rclone=("sync", "--size-only", "--min-size", "2B"),
        differs="rclone removes a file that the source has, because its filter leaves the source's one out",
        more={"f": "larger"},
    ),
    SyncCase(
        name="a directory where a file must go, and the reverse",
        source={"f": _F, "d/x": ("x", OLD), "g": ("g", OLD)},
        destination={"f/inner": ("i", OLD), "d": ("not a directory", OLD), "extra": ("e", OLD)},
        options={"sync": "size", "delete_extra": True},
        rclone=("sync", "--size-only"),
        fails=True,
    ),
    SyncCase(
        name="more than may be removed",
        source={"f": _F},
        destination={"a": ("a", OLD), "b": ("b", OLD), "c": ("c", OLD)},
        options={"sync": "size", "delete_extra": True, "max_delete": 2},
        rclone=("sync", "--size-only", "--max-delete", "2"),
        differs="rclone removes as many as may be, and then stops; here none is removed",
        more={"a": "a", "b": "b", "c": "c"},
        fails=True,
    ),
    SyncCase(
        name="as many as may be removed",
        source={"f": _F},
        destination={"a": ("a", OLD), "b": ("b", OLD)},
        options={"sync": "size", "delete_extra": True, "max_delete": 2},
        rclone=("sync", "--size-only", "--max-delete", "2"),
    ),
    SyncCase(
        name="a directory that goes, with a file in it that filters protect",
        source={"f": _F},
        destination={"gone/keep.tmp": ("k", OLD), "gone/x": ("x", OLD), "gone/more/y": ("y", OLD)},
        options={"sync": "size", "delete_extra": True, "filters": _rules("- *.tmp")},
        rclone=("sync", "--size-only", "--filter", "- *.tmp"),
    ),
    SyncCase(
        name="an empty source",
        source={},
        destination={"a": ("a", OLD), "d/b": ("b", OLD)},
        options={"sync": "size", "delete_extra": True},
        rclone=("sync", "--size-only"),
    ),
)

CASES: tuple[SyncCase, ...] = MATRIX + OTHERS


def expected(case: SyncCase, theirs: Mapping[str, str | None]) -> dict[str, str | None]:
    """The destination after a case, by what rclone makes of it."""
    ours = {path: content for path, content in ({**theirs, **case.more}).items() if path not in case.less}
    if bool(case.differs) is (ours == theirs):
        raise AssertionError("the case says that the outcome differs, and it does not; or the reverse")
    return ours


def write_tree(directory: Path, tree: Tree) -> None:
    """Make the files and directories of a tree in a new directory."""
    directory.mkdir(parents=True)
    for name, file in tree.items():
        path = directory / name
        if file is None:
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(file[0])
        os.utime(path, (file[1], file[1]))


def read_tree(directory: Path) -> dict[str, str | None]:
    """Path → content, None for a directory with nothing in it; `directory` need not exist."""
    found: dict[str, str | None] = {}
    for path in directory.rglob("*") if directory.exists() else ():
        if path.is_file():
            found[path.relative_to(directory).as_posix()] = path.read_text()
        elif not any(path.iterdir()):
            found[path.relative_to(directory).as_posix()] = None
    return found


def run_rclone(case: SyncCase, directory: Path) -> dict[str, str | None]:
    """What rclone makes of a case in an empty directory: the destination afterwards."""
    source, destination = directory / "source", directory / "destination"
    write_tree(source, case.source)
    write_tree(destination, case.destination)
    program = shutil.which("rclone") or "rclone"
    common = ("--create-empty-src-dirs", "--retries", "1", "--config", os.devnull)
    command = [program, case.rclone[0], str(source), str(destination), *common, *case.rclone[1:]]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    if bool(done.returncode) != case.fails:
        raise AssertionError(f"{' '.join(command)}: {done.returncode} {done.stderr.decode()}")
    return read_tree(destination)
