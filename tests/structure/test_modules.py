"""Rules of the source tree that ruff, mypy and import-linter do not know."""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "pdm"
#: The client has exceptions of the names of the problems that the server answers with.
_PAIRS = {PACKAGE / "workqueue" / "http" / "problems.py", PACKAGE / "workqueue" / "client" / "errors.py"}
#: Names that users import from where the documentation says.
_PUBLIC = {"WorkqueueClient", "WorkqueueDB", "WorkqueueService", "__init__", "__main__"}


@cache
def modules() -> dict[Path, ast.Module]:
    paths = (path for path in PACKAGE.rglob("*.py") if "migrations" not in path.parts)
    return {path: ast.parse(path.read_text()) for path in paths}


def test_no_two_classes_have_one_name() -> None:
    found: dict[str, list[Path]] = defaultdict(list)
    for path, module in modules().items():
        for node in ast.walk(module):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(path)
    assert {name: where for name, where in found.items() if len(where) > 1 and set(where) != _PAIRS} == {}


def test_no_module_only_re_exports() -> None:
    facades = []
    for path, module in modules().items():
        statements = [node for node in module.body if not isinstance(node, ast.Expr)]
        defines = any(not isinstance(node, ast.Import | ast.ImportFrom) and not _is_all(node) for node in statements)
        if statements and not defines and path.stem not in _PUBLIC:
            facades.append(path.name)
    assert facades == []


def test_names_are_imported_from_the_module_that_defines_them() -> None:
    trees = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): tree for path, tree in modules().items()}
    imported = {
        name: {
            alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
        }
        for name, tree in trees.items()
    }
    detours = [
        f"{name}: {alias.name} from {node.module}"
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.rpartition(".")[2] not in _PUBLIC
        for alias in node.names
        if alias.name in imported.get(node.module, ())
    ]
    assert detours == []


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    """Such a circle breaks at the one import that comes first, which differs from program to program."""
    trees = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): tree for path, tree in modules().items()}
    graph = {
        name: {
            found
            for node in tree.body
            if isinstance(node, ast.ImportFrom) and node.module
            for found in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
            if found in trees
        }
        for name, tree in trees.items()
    }
    TopologicalSorter(graph).prepare()


def _is_all(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
