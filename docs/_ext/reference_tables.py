"""Reference pages that are written from the program's own tables.

``command-reference`` lists the commands of ``pdm`` with their options, ``exit-code-table`` the exit codes,
``failure-code-table`` what can go wrong with an element, ``problem-table`` the errors of the REST API,
``metric-table`` the metrics, ``settings-table`` the keys of ``workqueue.conf``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import click
from endpoint_table import GeneratedDirective
from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata

from pdm.workqueue.cli import exit_codes
from pdm.workqueue.cli.main import pdm
from pdm.workqueue.config.settings import SECTIONS
from pdm.workqueue.domain.enums import JobType
from pdm.workqueue.domain.failures import MEANINGS, FailureCode, Remedy, hint_for
from pdm.workqueue.http import problems
from pdm.workqueue.http.problems import ApiError
from pdm.workqueue.telemetry.metrics import METRICS, Metric

CONFIGURATION = Path(__file__).parents[2] / "etc" / "workqueue.conf"
_REMEDIES = {
    Remedy.GIVE_UP: "The element fails at once: the same again would fail again.",
    Remedy.RETRY: "The element is tried again after a pause, up to its number of tries.",
    Remedy.HOLD: "The element is HELD, without using up a try, until the cause is removed.",
}
_SPECIAL = re.compile(r"([\\*`|_<>])")
#: A key of the configuration file with its default, which is commented out.
_KEY = re.compile(r"#([a-z_]+) = ?(.*)")


class CommandReference(GeneratedDirective):
    """All commands, in the order of ``pdm --help``."""

    def lines(self) -> Iterable[str]:
        return command_lines()


class ExitCodeTable(GeneratedDirective):
    """All exit codes."""

    def lines(self) -> Iterable[str]:
        return _table(
            ("Code", "Meaning"),
            ((f"``{code.value}``", _plain(exit_codes.MEANINGS[code])) for code in exit_codes.ExitCode),
            "10 90",
        )


class FailureCodeTable(GeneratedDirective):
    """All codes of failures."""

    def lines(self) -> Iterable[str]:
        rows = ((f"``{code}``", _REMEDIES[MEANINGS[code].remedy], _hints(code)) for code in FailureCode)
        return _table(("Code", "What the queue does", "What to do"), rows, "22 30 48")


class ProblemTable(GeneratedDirective):
    """All errors of the REST API."""

    def lines(self) -> Iterable[str]:
        rows = ((f"``{error.word}``", str(error.status), _plain(error.title)) for error in api_errors())
        return _table(("Type", "Status", "Title"), rows, "30 10 60")


class MetricTable(GeneratedDirective):
    """All metrics, in the order of the catalogue."""

    def lines(self) -> Iterable[str]:
        return _table(("Metric", "Type", "Labels", "Meaning"), map(_metric_row, METRICS), "32 12 18 38")


class SettingsTable(GeneratedDirective):
    """All sections of the configuration file, with the comments that stand there."""

    def lines(self) -> Iterable[str]:
        return settings_lines(CONFIGURATION.read_text(encoding="utf-8"))


def commands(command: click.Command, path: Sequence[str] = ("pdm",)) -> Iterator[tuple[Sequence[str], click.Command]]:
    """A command and those below it, each with the words by which it is called."""
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=path[-1])
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            if below is not None and not below.hidden:
                yield from commands(below, (*path, name))


def command_lines() -> Iterator[str]:
    """All commands."""
    for path, command in commands(pdm):
        name = " ".join(path)
        context: click.Context | None = None
        for word in path:
            context = click.Context(command, info_name=word, parent=context)
        assert context is not None
        yield from (f".. _command-{'-'.join(path)}:", "", f".. rubric:: {name}", "")
        usage = " ".join(piece for piece in command.collect_usage_pieces(context) if piece)
        yield from (f"``{name} {usage}``", "")
        yield from _help(inspect.cleandoc(command.help or ""))
        yield from (f".. program:: {name}", "")
        for parameter in command.get_params(context):
            record = parameter.get_help_record(context)
            if record is not None:
                yield from (f".. option:: {record[0]}", "", f"   {_plain(record[1])}", "")


def _help(text: str) -> Iterator[str]:
    """The help text of a command; click marks paragraphs that are not wrapped."""
    for paragraph in text.split("\n\n"):
        lines = paragraph.strip("\n").split("\n")
        if lines[0].strip() == "\b":
            yield from ("::", "", *(f"   {line}" for line in lines[1:]), "")
        else:
            yield from (_plain(" ".join(line.strip() for line in lines)), "")


def _hints(code: FailureCode) -> str:
    usual = hint_for(code, JobType.LIST)
    others = {type_: hint_for(code, type_) for type_ in JobType if hint_for(code, type_) != usual}
    return _plain(" ".join([usual, *(f"({type_.name}) {hint}" for type_, hint in others.items())]))


def api_errors() -> list[type[ApiError]]:
    """The kinds of errors of the REST API, by status."""
    found = [
        each
        for each in vars(problems).values()
        if isinstance(each, type) and issubclass(each, ApiError) and each is not ApiError
    ]
    return sorted(found, key=lambda error: (error.status, error.word))


def _metric_row(metric: Metric) -> Sequence[str]:
    meaning = metric.meaning + (" Of the whole service: the same on each node." if metric.shared else "")
    if metric.buckets:
        meaning += f" Buckets: {', '.join(f'{bound:g}' for bound in metric.buckets)}."
    labels = ", ".join(f"``{label}``" for label in metric.labels)
    return f"``{metric.name}``", metric.kind.value, labels, _plain(meaning)


def settings_lines(text: str) -> Iterator[str]:
    """Each section with its keys: their defaults, and the comments before them."""
    for section in text.split("\n[")[1:]:
        name, _, body = section.partition("]")
        summary = (SECTIONS[name].__doc__ or "").partition("\n")[0]
        yield from (f".. _settings-{name}:", "", f".. rubric:: [{name}]", "", _plain(summary.replace("``", "")), "")
        comment: list[str] = []
        after_key = False
        for line in body.splitlines():
            key = _KEY.fullmatch(line)
            if key is not None:
                default = f"``{key[2]}``" if key[2] else "none"
                yield f"``{key[1]}`` (default {default})"
                yield from (f"   {_plain(' '.join(comment))}", "")
                after_key = True
            elif line.startswith("#"):
                if after_key:
                    comment, after_key = [], False
                comment.append(line.removeprefix("#").strip())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], widths: str) -> Iterator[str]:
    yield from (".. list-table::", "   :header-rows: 1", f"   :widths: {widths}", "")
    for row in (head, *rows):
        for number, cell in enumerate(row):
            yield f"   {'* -' if number == 0 else '  -'} {cell}"
    yield ""


def _plain(text: str) -> str:
    """Text without markup."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def setup(app: Sphinx) -> ExtensionMetadata:
    app.add_directive("command-reference", CommandReference)
    app.add_directive("exit-code-table", ExitCodeTable)
    app.add_directive("failure-code-table", FailureCodeTable)
    app.add_directive("problem-table", ProblemTable)
    app.add_directive("metric-table", MetricTable)
    app.add_directive("settings-table", SettingsTable)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
