"""The page on security names tests for all it says; they are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_PAGE = (_ROOT / "docs" / "security.rst").read_text(encoding="utf-8")
_NAMED = re.compile(r"``(tests/[a-z_/]+\.py)::(test_[a-z0-9_]+)``")


def test_each_line_has_tests_that_exist() -> None:
    table = _PAGE.partition(".. threats begin")[2].partition(".. threats end")[0]
    lines = table.split("   * - ")[2:]
    assert len(lines) > 30
    missing = []
    for line in lines:
        named = _NAMED.findall(line)
        assert named, f"no test for: {line.splitlines()[0]}"
        for file, test in named:
            path = _ROOT / file
            tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
            if test not in {getattr(node, "name", "") for node in ast.walk(tree)}:
                missing.append(f"{file}::{test}")
    assert not missing
