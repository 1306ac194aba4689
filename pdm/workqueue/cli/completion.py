"""Completion in a shell: ``pdm complete SHELL WORD...``, which the scripts in ``etc/completion`` run.

A table of all commands is part of an installed package, so that a completion imports none of them; in a checkout it is
made anew each time. `completion_values` has the values that come from the service.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import click
from attrs import frozen

#: In this package; script/package makes it.
TABLE_NAME = "commands.json"

#: Of a value: ``place``, ``site``, ``job``, ``files``, ``command``, empty for any text, or its choices. None: a flag.
Kind: TypeAlias = str | list[str] | None
#: ``help``, and either ``commands`` (name → node) or ``options`` and ``arguments``.
Node: TypeAlias = dict[str, Any]

_FILE_METAVARS = frozenset({"FILE", "PATH", "DIR", "RECEIPT", "GRIDDIR"})
_FILE_ARGUMENTS = frozenset({"receipt", "directory"})
_JOB_NAMES = frozenset({"job_ids", "job_id", "after", "job", "reference"})
#: Characters that a backslash keeps from bash.
_SPECIAL_IN_BASH = re.compile(r"([^A-Za-z0-9_@%+=:,./-])")
#: Characters of patterns, which pdm itself would expand.
_SPECIAL_IN_PATTERNS = re.compile(r"([*?\[\]])")


@frozen
class Candidate:
    """What a word may become.

    Attributes:
        final: the word ends here; otherwise more may follow (a directory, a site before its colon).
    """

    value: str
    help: str = ""
    final: bool = True


#: Files of this machine, which shells complete best themselves.
LOCAL_FILES = Candidate("", "files")


class CompletionValues(Protocol):
    """Values that the service knows."""

    def sites(self) -> Sequence[tuple[str, str]]:
        """Names and descriptions."""
        ...

    def jobs(self) -> Sequence[tuple[str, str]]:
        """Numbers and summaries of the latest jobs."""
        ...

    def entries(self, site: str, directory: str) -> tuple[str, Sequence[tuple[str, bool]]]:
        """The directory with its default filled in, and names with whether they are directories."""
        ...


def command_table(command: click.Command, ctx: click.Context) -> Node:
    """Describe a command and all below it; imports all of them."""
    line = command.get_short_help_str(100)
    if isinstance(command, click.Group):
        commands: dict[str, Node] = {}
        for name in command.list_commands(ctx):
            each = command.get_command(ctx, name)
            if each is not None and not each.hidden:
                commands[name] = command_table(each, click.Context(each, parent=ctx, info_name=name))
        return {"help": line, "options": _options(command, ctx), "commands": commands}
    arguments = [_kind(each) for each in command.get_params(ctx) if isinstance(each, click.Argument)]
    return {"help": line, "options": _options(command, ctx), "arguments": arguments}


def _options(command: click.Command, ctx: click.Context) -> list[tuple[list[str], str, Kind]]:
    return [
        ([*each.opts, *each.secondary_opts], each.help or "", None if each.is_flag or each.count else _kind(each))
        for each in command.get_params(ctx)
        if isinstance(each, click.Option) and not each.hidden
    ]


def _kind(parameter: click.Parameter) -> Kind:
    if isinstance(parameter.type, click.Choice):
        return [str(choice) for choice in parameter.type.choices]
    metavar = (parameter.metavar or "").strip("[].")
    if parameter.type.name == "SITE:path":
        return "place"
    if metavar == "SITE" or parameter.name == "site":
        return "site"
    if isinstance(parameter.type, click.Path) or metavar in _FILE_METAVARS or parameter.name in _FILE_ARGUMENTS:
        return "files"
    if parameter.name in _JOB_NAMES:
        return "job"
    return "command" if "-- COMMAND" in metavar else ""


def complete(words: Sequence[str], table: Node, values: CompletionValues) -> list[Candidate]:
    """Candidates for the last of `words`; the first is the one after ``pdm``."""
    node, position, literal = table, 0, False
    waiting: Kind = None
    for number, word in enumerate(words[:-1]):
        if waiting is not None:
            waiting = None
        elif word == "--":
            if "command" in node.get("arguments", ()):
                return complete(words[number + 1 :], table, values)
            literal = True
        elif word.startswith("-") and len(word) > 1 and not literal:
            waiting = _kind_after(node, word)
        elif "commands" in node:
            if word not in node["commands"]:
                return []
            node = node["commands"][word]
        else:
            position += 1
    return list(_candidates(node, words[-1], waiting, position, values, options=not literal))


def _kind_after(node: Node, word: str) -> Kind:
    """The kind of the next word if the option in `word` takes it as its value."""
    kinds: Iterator[Kind] = (kind for names, _help, kind in node["options"] if word in names)
    return next(kinds, None)


def _candidates(
    node: Node, word: str, waiting: Kind, position: int, values: CompletionValues, *, options: bool
) -> Iterator[Candidate]:
    if waiting is not None:
        yield from _of_kind(waiting, word, values)
    elif options and word.startswith("--") and "=" in word:
        name, _, typed = word.partition("=")
        for each in _of_kind(_kind_after(node, name), typed, values):
            yield Candidate(f"{name}={each.value}", each.help, each.final) if each is not LOCAL_FILES else each
    elif options and word.startswith("-"):
        for names, text, _kind_of_value in node["options"]:
            for name in names:
                if name.startswith(word) and (len(name) > 2 or len(word) == 2):
                    yield Candidate(name, text)
    elif "commands" in node:
        for name, each in node["commands"].items():
            if name.startswith(word):
                yield Candidate(name, each["help"])
    elif arguments := node["arguments"]:
        yield from _of_kind(arguments[min(position, len(arguments) - 1)], word, values)


def _of_kind(kind: Kind, word: str, values: CompletionValues) -> Iterator[Candidate]:
    if kind == "files":
        yield LOCAL_FILES
    elif kind == "place" and ":" in word:
        yield from _paths(word, values)
    elif kind == "place":
        yield from (Candidate(f"{name}:", text, final=False) for name, text in values.sites() if name.startswith(word))
    elif kind in ("site", "job"):
        known = values.sites() if kind == "site" else values.jobs()
        yield from (Candidate(name, text) for name, text in known if name.startswith(word))
    elif isinstance(kind, list):
        yield from (Candidate(choice) for choice in kind if choice.startswith(word))


def _paths(word: str, values: CompletionValues) -> Iterator[Candidate]:
    site, _, path = word.partition(":")
    parent, slash, typed = path.rpartition("/")
    directory, entries = values.entries(site, f"{parent}{slash}")
    for name, is_directory in entries:
        shown = _SPECIAL_IN_PATTERNS.sub(r"\\\1", name)
        if shown.startswith(typed) and name.isprintable() and (typed.startswith(".") or not name.startswith(".")):
            yield Candidate(f"{site}:{directory}{shown}{'/' if is_directory else ''}", final=not is_directory)


def split_line(line: str) -> tuple[list[str], str]:
    """The words of a command line of bash up to the cursor, unquoted, and the last word as it was typed."""
    words, word, typed, quote, escaped = list[str](), "", "", "", False
    for character in line:
        typed += character
        if escaped:
            word, escaped = word + character, False
        elif character == "\\" and quote != "'":
            escaped = True
        elif quote:
            word, quote = (word, "") if character == quote else (word + character, quote)
        elif character in "'\"":
            quote = character
        elif character.isspace():
            if len(typed) > 1:
                words.append(word)
            word = typed = ""
        else:
            word += character
    return [*words, word], typed


def bash_lines(candidates: Sequence[Candidate], typed: str, breaks: str) -> Iterator[str]:
    """What bash takes as replies: quoted, with a space where the word ends.

    Args:
        typed: the word as it was typed.
        breaks: characters at which bash divides words, besides spaces; it replaces what is after the last one.
    """
    quoted = typed[:1] in {"'", '"'}
    kept = 0 if quoted else max(typed.rfind(each) for each in ":=") + 1 if ":" in breaks else 0
    for each in candidates:
        value = each.value if quoted else _SPECIAL_IN_BASH.sub(r"\\\1", each.value)
        yield value[kept:] + (" " if each.final and not quoted else "")


def read_table() -> Node:
    """The table of the package; in a checkout, made from the commands."""
    try:
        table: Node = json.loads(Path(__file__).with_name(TABLE_NAME).read_bytes())
    except FileNotFoundError:
        from pdm.workqueue.cli.main import pdm

        table = command_table(pdm, click.Context(pdm, info_name="pdm", **pdm.context_settings))
    return table


@click.command(hidden=True, context_settings={"ignore_unknown_options": True})
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish", "table"]))
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def complete_command(shell: str, words: tuple[str, ...]) -> None:
    """Print candidates for the last word: for zsh and fish KIND, WORD and help between tabs.

    WORDS are those after ``pdm``; of bash, the line up to the cursor and ``COMP_WORDBREAKS``. ``table`` prints the
    table of the commands.
    """
    if shell == "table":
        from pdm.workqueue.cli.main import pdm

        print(json.dumps(command_table(pdm, click.Context(pdm, info_name="pdm", **pdm.context_settings)), indent=1))
        return
    from pdm.workqueue.cli.completion_values import ServiceValues

    typed, breaks = "", ""
    if shell == "bash":
        line, breaks = [*words, "", ""][:2]
        split, typed = split_line(line)
        words = tuple(split[1:])
    found = complete(words or ("",), read_table(), ServiceValues.from_environment(os.environ))
    if LOCAL_FILES in found:
        print("files")
    elif shell == "bash":
        print(*bash_lines(found, typed, breaks), sep="\n")
    else:
        for each in found:
            print("final" if each.final else "open", each.value, " ".join(each.help.split()), sep="\t")
    sys.stdout.flush()
    # The thread of a reactor may run; nothing is left to do.
    os._exit(0)
