"""Pages of the documentation that are written from the program's tables: nothing is missing there."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from msgspec.structs import fields

from pdm.workqueue.cli.exit_codes import ExitCode
from pdm.workqueue.cli.main import pdm
from pdm.workqueue.config.settings import SECTIONS
from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.telemetry.metrics import METRICS

_DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def tables() -> Any:
    """The module that writes the pages, which is no part of a package."""
    pytest.importorskip("sphinx")
    path = str(_DOCS / "_ext")
    sys.path.insert(0, path)
    try:
        return importlib.import_module("reference_tables")
    finally:
        sys.path.remove(path)


def written(directive: Any) -> str:
    """What a directive writes, without its page."""
    return "\n".join(directive.lines(None))


def test_each_page_is_in_the_index() -> None:
    index = (_DOCS / "index.rst").read_text().split()
    pages = {path.stem for path in _DOCS.glob("*.rst")} - {"index"}
    assert pages - set(index) == set()


@pytest.mark.parametrize(
    ("page", "directives"),
    [
        ("commands", ("command-reference", "exit-code-table")),
        ("failures", ("failure-code-table", "problem-table")),
        ("metrics", ("metric-table",)),
        ("settings", ("settings-table",)),
    ],
)
def test_each_table_is_on_a_page(page: str, directives: tuple[str, ...]) -> None:
    text = (_DOCS / f"{page}.rst").read_text()
    assert all(f".. {directive}::\n" in text for directive in directives)


def test_all_commands_and_options_are_there_and_explained(tables: Any) -> None:
    text = written(tables.CommandReference)
    walked = dict(tables.commands(pdm))
    assert len(walked) > 40
    for path, command in walked.items():
        name = " ".join(path)
        assert f".. rubric:: {name}\n" in text
        assert command.help, f"{name} has no help"
        options = text.partition(f".. program:: {name}\n")[2].partition(".. rubric::")[0]
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                assert parameter.help, f"{name} {parameter.opts} has no help"
                assert all(f"{option}" in options for option in parameter.opts), f"{name} {parameter.opts}"


def test_all_codes_metrics_and_settings_are_there(tables: Any) -> None:
    failures, problems = written(tables.FailureCodeTable), written(tables.ProblemTable)
    assert [code for code in FailureCode if f"* - ``{code}``\n" not in failures] == []
    assert [error.word for error in tables.api_errors() if f"* - ``{error.word}``\n" not in problems] == []
    assert "``database-unavailable``" in problems
    exit_codes, metrics = written(tables.ExitCodeTable), written(tables.MetricTable)
    assert [code for code in ExitCode if f"* - ``{code.value}``\n" not in exit_codes] == []
    assert [metric.name for metric in METRICS if f"* - ``{metric.name}``\n" not in metrics] == []
    assert all(metric.meaning.endswith(".") or "; " in metric.meaning for metric in METRICS)
    settings = written(tables.SettingsTable)
    for name, struct in SECTIONS.items():
        section = settings.partition(f".. rubric:: [{name}]\n")[2].partition(".. rubric::")[0]
        keys = [field.encode_name for field in fields(struct)]
        assert [key for key in keys if f"\n``{key}`` (default " not in section] == [], name
