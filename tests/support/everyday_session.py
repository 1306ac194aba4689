"""The everyday session: twelve ``pdm`` commands that every user runs, against a server of any make.

Nothing here looks at the disk of the server under test: what is there is asked for by ``pdm ls`` and proven by bringing
it back. So the same session runs against any protocol.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from attrs import frozen

#: Names that are legal at every storage and that servers have mistaken: blanks, per cent signs, non-ASCII letters.
TREE: Mapping[str, bytes] = {
    "data.bin": bytes(range(256)) * 5000,
    "empty file": b"",
    "100% #1 & more.txt": b"per cent\n",
    "häuser/größe.txt": "größer".encode(),
    "deep/er/est/a+b.txt": b"deep",
    "many/1": b"1",
    "many/2": b"22",
    "many/3": b"333",
}
#: The command lasts no longer than this; a server that hangs fails the step with what the service says of it.
COMMAND_TIMEOUT_S = 60.0
_LONGEST_DETAIL = 600
_LISTED_TYPES = ("file", "directory")


class RunPdm(Protocol):
    """Runs ``pdm`` with arguments as a user of a daemon, as `TestService.pdm` does."""

    def __call__(self, *arguments: str, timeout_s: float) -> subprocess.CompletedProcess[str]: ...


@frozen
class SessionEnd:
    """One end of the copies.

    Attributes:
        site: name or number of the site.
        protocol: by which the site is read, as ``--protocol`` takes it.
        path: folder at the site that exists and that the session may fill.
    """

    site: str | int
    protocol: str
    path: str

    def place(self, below: str = "") -> str:
        """The argument of ``pdm`` for a path below the folder."""
        return f"{self.site}:{self.path.rstrip('/')}/{below}".rstrip("/")


class Step(NamedTuple):
    """What became of one command.

    Attributes:
        name: of the step.
        ok: whether the command ended well, and what is there is what should be there.
        detail: what was wrong; empty if nothing was.
    """

    name: str
    ok: bool
    detail: str


class _StepError(Exception):
    """The step is not what it should be."""


def everyday_session(
    run: RunPdm,
    remote: SessionEnd,
    local: SessionEnd,
    local_folder: Path,
    tree: Mapping[str, bytes] = TREE,
    give: Callable[[Path], object] = lambda _: None,
) -> list[Step]:
    """Run the twelve commands; a step that fails does not end the session.

    Args:
        run: runs ``pdm`` with arguments.
        remote: the site under test.
        local: a site of this machine, a FILE or an SSH site, which is the other end of the copies.
        local_folder: the same folder as ``local.path``, on disk.
        tree: relative path → content of the files that are copied.
        give: lets the account of the local site own a folder of the disk.

    Returns:
        The steps in their order, always twelve.
    """
    session = _Session(run, remote, local, local_folder, tree, give)
    return [_step(name, action) for name, action in session.steps()]


def failed_steps(steps: Sequence[Step]) -> list[str]:
    """The steps that failed, with their details: ``assert failed_steps(...) == []`` shows them."""
    return [f"{step.name}: {step.detail}" for step in steps if not step.ok]


def _step(name: str, action: Callable[[], None]) -> Step:
    try:
        action()
    except _StepError as error:
        return Step(name, ok=False, detail=str(error)[-_LONGEST_DETAIL:])
    return Step(name, ok=True, detail="")


class _Session:
    def __init__(
        self,
        run: RunPdm,
        remote: SessionEnd,
        local: SessionEnd,
        local_folder: Path,
        tree: Mapping[str, bytes],
        give: Callable[[Path], object],
    ) -> None:
        self._run = run
        self._remote = remote
        self._local = local
        self._folder = local_folder
        self._tree = dict(tree)
        self._give = give
        self._source = local_folder / "source"

    def steps(self) -> list[tuple[str, Callable[[], None]]]:
        for path, content in self._tree.items():
            (self._source / path).parent.mkdir(parents=True, exist_ok=True)
            (self._source / path).write_bytes(content)
        (self._source / "empty folder").mkdir()
        self._give(self._folder)
        return [
            ("mkdir -p", self._make_parents),
            ("cp file", self._copy_file),
            ("cp tree", self._copy_tree),
            ("cp again", self._copy_again),
            ("cp --overwrite", self._overwrite),
            ("ls -R", self._list),
            ("cp back and compare", self._copy_back),
            ("cp within", self._copy_within),
            ("mv tree", self._move_tree),
            ("mv file", self._move_file),
            ("rm", self._remove_file),
            ("rm -r", self._remove_tree),
        ]

    # -- the steps

    def _make_parents(self) -> None:
        self._pdm("mkdir", "-p", self._remote.place("a/b c/d"), by=self._remote)
        # The second time it is there, and that is fine.
        self._pdm("mkdir", "-p", self._remote.place("a/b c/d"), by=self._remote)
        self._expect("a", {"b c": None, "b c/d": None})

    def _copy_file(self) -> None:
        name = next(iter(self._tree))
        self._pdm("cp", self._local.place(f"source/{name}"), self._remote.place(f"a/b c/{name}"), by=self._local)
        self._expect("a", {"b c": None, "b c/d": None, f"b c/{name}": len(self._tree[name])})

    def _copy_tree(self) -> None:
        self._pdm("cp", self._local.place("source"), self._remote.place("tree"), by=self._local)
        self._expect("tree", self._sizes())

    def _copy_again(self) -> None:
        self._pdm("cp", self._local.place("source"), self._remote.place("tree"), by=self._local)
        self._expect("tree", self._sizes())

    def _overwrite(self) -> None:
        name, content = next(iter(self._tree.items()))
        # As long as before: only the bytes tell whether it was overwritten, and `_copy_back` compares them.
        self._tree[name] = content[::-1]
        (self._source / name).write_bytes(self._tree[name])
        source, destination = self._local.place(f"source/{name}"), self._remote.place(f"tree/{name}")
        refused = self._call("cp", source, destination, by=self._local)
        if refused.returncode == 0 or "EXISTS" not in refused.stderr + refused.stdout:
            raise _StepError(f"overwritten without being asked: {_shown(refused)}")
        self._pdm("cp", "--overwrite", "always", source, destination, by=self._local)
        self._expect("tree", self._sizes())

    def _list(self) -> None:
        self._expect("", {"a": None, **_below("a", self._one_file()), "tree": None, **_below("tree", self._sizes())})

    def _copy_back(self) -> None:
        self._pdm("cp", self._remote.place("tree"), self._local.place("back"), by=self._remote)
        self._compare("back")

    def _copy_within(self) -> None:
        self._pdm("cp", self._remote.place("tree"), self._remote.place("copy"), by=self._remote)
        self._expect("copy", self._sizes())

    def _move_tree(self) -> None:
        self._pdm("mv", self._remote.place("copy"), self._remote.place("moved tree"), by=self._remote)
        self._expect("moved tree", self._sizes())
        self._expect_nothing("copy")

    def _move_file(self) -> None:
        name = next(iter(self._tree))
        old, new = self._remote.place(f"moved tree/{name}"), self._remote.place("moved tree/new näme")
        self._pdm("mv", old, new, by=self._remote)
        sizes = self._sizes()
        sizes["new näme"] = sizes.pop(name)
        self._expect("moved tree", sizes)

    def _remove_file(self) -> None:
        self._pdm("rm", self._remote.place("moved tree/new näme"), by=self._remote)
        sizes = self._sizes()
        del sizes[next(iter(self._tree))]
        self._expect("moved tree", sizes)

    def _remove_tree(self) -> None:
        for name in ("moved tree", "tree", "a"):
            self._pdm("rm", "-r", self._remote.place(name), by=self._remote)
        # Nothing is left, no temporary file either.
        self._expect("", {})

    # -- what should be there

    def _sizes(self) -> dict[str, int | None]:
        """Relative path → size of all that is in the tree; None for folders."""
        found: dict[str, int | None] = {"empty folder": None}
        for path, content in self._tree.items():
            found[path] = len(content)
            found.update((str(folder), None) for folder in Path(path).parents if str(folder) != ".")
        return found

    def _one_file(self) -> dict[str, int | None]:
        name, content = next(iter(self._tree.items()))
        return {"b c": None, "b c/d": None, f"b c/{name}": len(content)}

    def _expect(self, path: str, wanted: Mapping[str, int | None]) -> None:
        found = self._listed(path)
        if found != wanted:
            missing, more = wanted.items() - found.items(), found.items() - wanted.items()
            raise _StepError(f"{path or 'the folder'} has {sorted(more)[:5]} and should have {sorted(missing)[:5]}")

    def _expect_nothing(self, path: str) -> None:
        done = self._call("ls", self._remote.place(path), by=self._remote)
        if done.returncode == 0 or "NOT_FOUND" not in done.stderr:
            raise _StepError(f"{path} is still there: {_shown(done)}")

    def _listed(self, path: str) -> dict[str, int | None]:
        done = self._pdm("ls", "-R", "-F", "json", self._remote.place(path), by=self._remote)
        folders: dict[str, list[dict[str, object]]] = json.loads(done.stdout)
        # The keys are paths at the site; the shortest is the listed folder itself, whatever the site calls it.
        top = min(folders, key=len, default="").rstrip("/")
        found: dict[str, int | None] = {}
        for folder, entries in folders.items():
            for entry in entries:
                if entry["type"] not in _LISTED_TYPES:
                    raise _StepError(f"{entry['name']} is listed as {entry['type']}")
                below = f"{folder.rstrip('/')}/{entry['name']}"[len(top) + 1 :]
                size = entry["size"]
                found[below] = size if entry["type"] == "file" and isinstance(size, int) else None
        return found

    def _compare(self, name: str) -> None:
        back = self._folder / name
        found = {os.path.relpath(path, back): path.read_bytes() if path.is_file() else None for path in back.rglob("*")}
        wanted: dict[str, bytes | None] = {path: self._tree.get(path) for path in self._sizes()}
        if found != wanted:
            unlike = sorted(path for path in found.keys() | wanted.keys() if found.get(path, 0) != wanted.get(path, 0))
            raise _StepError(f"what came back is not what was sent: {unlike[:5]}")

    # -- commands

    def _pdm(self, *arguments: str, by: SessionEnd) -> subprocess.CompletedProcess[str]:
        done = self._call(*arguments, by=by)
        if done.returncode:
            raise _StepError(f"pdm {' '.join(arguments)}: {_shown(done)}")
        return done

    def _call(self, command: str, *arguments: str, by: SessionEnd) -> subprocess.CompletedProcess[str]:
        protocol = f"--protocol={by.protocol}"
        timeout = f"--timeout={COMMAND_TIMEOUT_S:g}s"
        return self._run(command, protocol, timeout, *arguments, timeout_s=2 * COMMAND_TIMEOUT_S)


def _below(folder: str, entries: Mapping[str, int | None]) -> dict[str, int | None]:
    return {f"{folder}/{path}": size for path, size in entries.items()}


def _shown(done: subprocess.CompletedProcess[str]) -> str:
    return f"exit status {done.returncode}: {done.stderr.strip() or done.stdout.strip()}"
