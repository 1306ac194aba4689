"""The everyday session: twelve commands that every user runs, against any server.

Each command is the job that ``pdm`` would submit, sent to a real daemon by REST: starting ``pdm`` for each would take
longer than the rest. Nothing here reads the disk of the server under test: LIST jobs show its content, and copying it
back verifies it. So the same session runs against any protocol.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from attrs import frozen

from pdm.testgrid.processes import GridError
from pdm.testgrid.service import TestService

#: Names that every storage allows and that servers have mistaken: blanks, per cent signs, non-ASCII letters.
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
#: Timeout of a job; at a server that hangs, the step fails with the job's error.
JOB_TIMEOUT_S = 60.0
_LONGEST_DETAIL = 600
_LISTED_TYPES = ("file", "directory")


@frozen
class SessionEnd:
    """One end of the copies.

    Attributes:
        site: number of the site.
        protocol: by which the site is read.
        path: directory at the site that exists and that the session may fill.
    """

    site: int
    protocol: str
    path: str

    def at(self, below: str = "") -> str:
        """The path at the site of what is below the directory."""
        return f"{self.path.rstrip('/')}/{below}".rstrip("/") or "/"


class Step(NamedTuple):
    """Result of one command.

    Attributes:
        name: of the step.
        ok: whether the command succeeded with the expected result.
        detail: what was wrong; empty if nothing was.
    """

    name: str
    ok: bool
    detail: str


class _StepError(Exception):
    """The result of the step is wrong."""


def everyday_session(
    service: TestService,
    user: str,
    remote: SessionEnd,
    local: SessionEnd,
    local_directory: Path,
    tree: Mapping[str, bytes] = TREE,
    give: Callable[[Path], object] = lambda _: None,
) -> list[Step]:
    """Run the twelve commands; a step that fails does not end the session.

    Args:
        service: a daemon that knows both sites.
        user: of the daemon, who submits the jobs.
        remote: the site under test.
        local: a site of this machine, a FILE or an SSH site, as the other end of the copies.
        local_directory: the same directory as ``local.path``, on disk.
        tree: relative path → content of the files that are copied.
        give: changes the owner of a directory to the account of the local site.

    Returns:
        The steps in order, always twelve.
    """
    session = _Session(service, user, remote, local, local_directory, tree, give)
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
        service: TestService,
        user: str,
        remote: SessionEnd,
        local: SessionEnd,
        local_directory: Path,
        tree: Mapping[str, bytes],
        give: Callable[[Path], object],
    ) -> None:
        self._service = service
        self._user = user
        self._remote = remote
        self._local = local
        self._directory = local_directory
        self._tree = dict(tree)
        self._give = give
        self._source = local_directory / "source"

    def steps(self) -> list[tuple[str, Callable[[], None]]]:
        for path, content in self._tree.items():
            (self._source / path).parent.mkdir(parents=True, exist_ok=True)
            (self._source / path).write_bytes(content)
        (self._source / "empty directory").mkdir()
        self._give(self._directory)
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
        self._make("a/b c/d")
        # The second time the directory exists, which is no error.
        self._make("a/b c/d")
        self._expect("a", {"b c": None, "b c/d": None})

    def _copy_file(self) -> None:
        name = next(iter(self._tree))
        self._copy(self._local, f"source/{name}", self._remote, f"a/b c/{name}")
        self._expect("a", self._one_file())

    def _copy_tree(self) -> None:
        self._copy(self._local, "source", self._remote, "tree")
        self._expect("tree", self._sizes())

    def _copy_again(self) -> None:
        # Identical files count as copied.
        self._copy(self._local, "source", self._remote, "tree")
        self._expect("tree", self._sizes())

    def _overwrite(self) -> None:
        name, content = next(iter(self._tree.items()))
        # The same length: only the bytes show whether it was overwritten, and `_copy_back` compares them.
        self._tree[name] = content[::-1]
        (self._source / name).write_bytes(self._tree[name])
        try:
            self._copy(self._local, f"source/{name}", self._remote, f"tree/{name}")
        except _StepError as error:
            if "EXISTS" not in str(error):
                raise
        else:
            raise _StepError("overwritten without being asked")
        self._copy(self._local, f"source/{name}", self._remote, f"tree/{name}", overwrite="always")
        self._expect("tree", self._sizes())

    def _list(self) -> None:
        self._expect("", {"a": None, **_below("a", self._one_file()), "tree": None, **_below("tree", self._sizes())})

    def _copy_back(self) -> None:
        self._copy(self._remote, "tree", self._local, "back")
        self._compare("back")

    def _copy_within(self) -> None:
        self._copy(self._remote, "tree", self._remote, "copy")
        self._expect("copy", self._sizes())

    def _move_tree(self) -> None:
        self._move("copy", "moved tree")
        self._expect("moved tree", self._sizes())
        self._expect_nothing("copy")

    def _move_file(self) -> None:
        name = next(iter(self._tree))
        self._move(f"moved tree/{name}", "moved tree/new näme")
        sizes = self._sizes()
        sizes["new näme"] = sizes.pop(name)
        self._expect("moved tree", sizes)

    def _remove_file(self) -> None:
        self._remove("moved tree/new näme")
        sizes = self._sizes()
        del sizes[next(iter(self._tree))]
        self._expect("moved tree", sizes)

    def _remove_tree(self) -> None:
        for name in ("moved tree", "tree", "a"):
            self._remove(name, recursive=True)
        # Nothing is left, not even a temporary file.
        self._expect("", {})

    # -- what should be there

    def _sizes(self) -> dict[str, int | None]:
        """Relative path → size of all entries of the tree; None for directories."""
        found: dict[str, int | None] = {"empty directory": None}
        for path, content in self._tree.items():
            found[path] = len(content)
            found.update((str(directory), None) for directory in Path(path).parents if str(directory) != ".")
        return found

    def _one_file(self) -> dict[str, int | None]:
        name, content = next(iter(self._tree.items()))
        return {"b c": None, "b c/d": None, f"b c/{name}": len(content)}

    def _expect(self, path: str, wanted: Mapping[str, int | None]) -> None:
        found = self._listed(path)
        if found != wanted:
            missing, more = wanted.items() - found.items(), found.items() - wanted.items()
            raise _StepError(f"{path or 'the directory'} has {sorted(more)[:5]} and should have {sorted(missing)[:5]}")

    def _expect_nothing(self, path: str) -> None:
        try:
            found = self._listed(path)
        except _StepError as error:
            if "NOT_FOUND" not in str(error):
                raise
        else:
            raise _StepError(f"{path} is still there, with {sorted(found)[:5]}")

    def _listed(self, path: str) -> dict[str, int | None]:
        job = self._run("list", self._remote, path)
        (output,) = self._get(f"/jobs/{job['id']}/output")
        directories: dict[str, list[dict[str, Any]]] = output["entries"]
        # The keys are paths at the site; the shortest is the listed directory itself, whatever its name at the site
        # is.
        top = min(directories, key=len, default="").rstrip("/")
        found: dict[str, int | None] = {}
        for directory, entries in directories.items():
            for entry in entries:
                if entry["type"] not in _LISTED_TYPES:
                    raise _StepError(f"{entry['name']} is listed as {entry['type']}")
                below = f"{directory.rstrip('/')}/{entry['name']}"[len(top) + 1 :]
                found[below] = entry["size"] if entry["type"] == "file" else None
        return found

    def _compare(self, name: str) -> None:
        back = self._directory / name
        found = {os.path.relpath(path, back): path.read_bytes() if path.is_file() else None for path in back.rglob("*")}
        wanted: dict[str, bytes | None] = {path: self._tree.get(path) for path in self._sizes()}
        if found != wanted:
            unlike = sorted(path for path in found.keys() | wanted.keys() if found.get(path, 0) != wanted.get(path, 0))
            raise _StepError(f"what came back is not what was sent: {unlike[:5]}")

    # -- commands

    def _make(self, path: str) -> None:
        self._run("mkdir", self._remote, path, extra_opts={"parents": True})

    def _copy(self, source: SessionEnd, path: str, destination: SessionEnd, to: str, **options: object) -> None:
        self._run(
            "copy", source, path, dst_siteid=destination.site, dst_filepath=destination.at(to), extra_opts=options
        )

    def _move(self, path: str, to: str) -> None:
        self._run("rename", self._remote, path, dst_filepath=self._remote.at(to))

    def _remove(self, path: str, **options: object) -> None:
        self._run("remove", self._remote, path, extra_opts=options)

    def _run(self, type_: str, end: SessionEnd, path: str, **fields: object) -> dict[str, Any]:
        """Submit a job and wait for its end; `_StepError` with the failures if it is not DONE."""
        where = {"src_siteid": end.site, "src_filepath": end.at(path), "protocol": end.protocol}
        try:
            submitted = self._service.submit(self._user, type_, **where, **fields)
            job = self._service.wait_for(self._user, submitted["id"], timeout_s=JOB_TIMEOUT_S)
        except GridError as error:
            raise _StepError(f"{type_} {path}: {error}") from error
        if job["status"] != "DONE":
            elements = self._get(f"/jobs/{job['id']}/elements")
            failures = [
                f"{each['src_filepath']}: {failure['code']} / {failure['scope']}: {failure['message']}"
                for each in elements
                if (failure := each["error"])
            ]
            raise _StepError(f"{type_} {path}: {job['status']}: {'; '.join(failures[:3])}")
        return job

    def _get(self, path: str) -> Any:
        _, found = self._service.call(self._user, "GET", path)
        return found


def _below(directory: str, entries: Mapping[str, int | None]) -> dict[str, int | None]:
    return {f"{directory}/{path}": size for path, size in entries.items()}
