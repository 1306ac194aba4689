"""Rules of the source tree that ruff, mypy and import-linter do not know."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

from attrs import frozen

PACKAGE = Path(__file__).parents[2] / "pdm"
#: The client has exceptions of the names of the problems that the server answers with.
_PAIRS = {PACKAGE / "workqueue" / "http" / "problems.py", PACKAGE / "workqueue" / "client" / "errors.py"}
#: Names that users import from where the documentation says.
_PUBLIC = {"WorkqueueClient", "WorkqueueDB", "WorkqueueService", "__init__", "__main__"}


@frozen
class Module:
    """What is known of a module; its syntax tree is not kept, for each test would wait until it is scanned for garbage.

    Attributes:
        imports: of its body.
        all_imports: those within functions and conditions too.
        defines: whether it has more than imports, ``__all__`` and texts.
    """

    path: Path
    classes: list[str]
    imports: list[tuple[str, list[ast.alias]]]
    all_imports: list[tuple[str, list[ast.alias]]]
    defines: bool

    @property
    def name(self) -> str:
        return ".".join(self.path.relative_to(PACKAGE.parent).with_suffix("").parts)


@cache
def modules() -> list[Module]:
    return [_read(path) for path in PACKAGE.rglob("*.py") if "migrations" not in path.parts]


def _read(path: Path) -> Module:
    body = ast.parse(path.read_text()).body
    nodes = [inner for outer in body for inner in ast.walk(outer)]
    statements = [node for node in body if not isinstance(node, ast.Expr)]
    return Module(
        path,
        [node.name for node in nodes if isinstance(node, ast.ClassDef)],
        _imports(body),
        _imports(nodes),
        not statements
        or any(not isinstance(node, ast.Import | ast.ImportFrom) and not _is_all(node) for node in statements),
    )


def _imports(nodes: Sequence[ast.AST]) -> list[tuple[str, list[ast.alias]]]:
    return [(node.module, node.names) for node in nodes if isinstance(node, ast.ImportFrom) and node.module]


def test_no_two_classes_have_one_name() -> None:
    found: dict[str, list[Path]] = defaultdict(list)
    for module in modules():
        for name in module.classes:
            found[name].append(module.path)
    assert {name: where for name, where in found.items() if len(where) > 1 and set(where) != _PAIRS} == {}


def test_no_module_only_re_exports() -> None:
    assert [each.name for each in modules() if not each.defines and each.path.stem not in _PUBLIC] == []


def test_names_are_imported_from_the_module_that_defines_them() -> None:
    imported = {
        module.name: {alias.asname or alias.name for _, names in module.imports for alias in names}
        for module in modules()
    }
    detours = [
        f"{module.name}: {alias.name} from {source}"
        for module in modules()
        for source, names in module.all_imports
        if source.rpartition(".")[2] not in _PUBLIC
        for alias in names
        if alias.name in imported.get(source, ())
    ]
    assert detours == []


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    """Such a circle breaks at the one import that comes first, which differs from program to program."""
    known = {module.name for module in modules()}
    graph = {
        module.name: {
            found
            for source, names in module.imports
            for found in (source, *(f"{source}.{alias.name}" for alias in names))
            if found in known
        }
        for module in modules()
    }
    TopologicalSorter(graph).prepare()


def _is_all(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
