"""Options of ``pdm cp`` and ``pdm mv`` that say what is copied and how: the command line of ``extra_opts``."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import click
from msgspec import ValidationError

from pdm.workqueue.cli.display import truncate
from pdm.workqueue.domain.enums import JobType
from pdm.workqueue.domain.paths import text_from_bytes
from pdm.workqueue.wire.options import read_options

_Command = TypeVar("_Command", bound=Callable[..., Any])

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kKMGTP])(i?B?)|B?)")
_POWERS = "KMGTP"
#: Columns of a line that an error shows.
_SHOWN = 40
_DURATION = re.compile(r"(\d{1,9})\s*([smhdw])")
_TYPED_ORDER = f"{__name__}.typed_order"

#: Key of ``extra_opts`` → how it is typed; for messages of the service.
TYPED_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "overwrite": "--overwrite",
        "verify": "--verify",
        "checksum": "--checksum",
        "sync": "--sync",
        "filters": "--include and --exclude",
        "min_size": "--min-size",
        "max_size": "--max-size",
        "newer_than": "--newer-than",
        "older_than": "--older-than",
        "delete_extra": "--delete",
        "max_delete": "--max-delete",
        "preserve": "--preserve",
        "dry_run": "--dry-run",
        "move": "--move",
        "deadline": "--deadline",
        "stage": "--stage",
        "stage_lifetime": "--stage-lifetime",
        "stage_timeout": "--stage-timeout",
        "archive": "--archive",
        "archive_timeout": "--archive-timeout",
        "notify": "--notify",
        "items": "--batch",
        "check": "--at",
        "recursive": "-r",
        "parents": "-p",
        "depth": "--depth",
        "mover": "--mover",
    }
)


class SizeType(click.ParamType[int]):
    """``500``, ``10k``, ``10M``, ``1.5GiB`` (powers of 1024), ``10MB`` (powers of 1000); converts to bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is not a size, such as 500, 10k, 10M or 1.5G.", param, ctx)
        number, prefix, unit = match.groups()
        power = 0 if prefix is None else _POWERS.index(prefix.upper()) + 1
        return int(float(number) * (1000 if unit == "B" else 1024) ** power)


class AgeType(click.ParamType[str]):
    """A timestamp (``2026-03-02``, ``2026-03-02T11:04``; UTC) or a time before the submission (``12h``, ``7d``).

    A time before stays what it is, because a schedule repeats it.
    """

    name = "timestamp"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value).strip()
        if match := _DURATION.fullmatch(text):
            return f"{match[1]}{match[2]}"
        try:
            timestamp = datetime.fromisoformat(text)
        except ValueError:
            self.fail(
                f"{value!r} is neither a timestamp (2026-03-02T11:04) nor a time before now (12h, 7d).", param, ctx
            )
        timestamp = timestamp.astimezone(UTC) if timestamp.tzinfo else timestamp.replace(tzinfo=UTC)
        return timestamp.isoformat().replace("+00:00", "Z")


SIZE = SizeType()
AGE = AgeType()


class CopyCommand(click.Command):
    """A command that remembers the order in which its options were typed, for `typed_filters`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args(list(args))
        ctx.meta[_TYPED_ORDER] = [parameter.name for parameter in order]
        return super().parse_args(ctx, args)


def copy_options(command: _Command) -> _Command:
    """The options of a copy; the command needs ``cls=CopyCommand``, and passes them to `copy_settings`."""
    decorators = [
        click.option(
            "--overwrite",
            type=click.Choice(["never", "always", "different"]),
            help="Whether to replace existing files (default never; identical ones count as copied).",
        ),
        click.option(
            "--sync",
            type=click.Choice(["exists", "size", "mtime", "checksum"]),
            help="Copy only what is not there yet; what counts as there: a file that exists, or that has the same size,"
            " the same size and time, or the same checksum. Any other file there is replaced.",
        ),
        click.option(
            "--delete",
            "delete_extra",
            is_flag=True,
            help="With --sync: at the end, remove from the destination what the source has not.",
        ),
        click.option(
            "--max-delete",
            type=click.IntRange(min=0),
            help="With --delete: remove nothing at all if it would be more than this (default 100).",
        ),
        click.option(
            "--include",
            multiple=True,
            metavar="PATTERN",
            help="Copy what matches; .gitignore pattern, relative to SOURCE. The first of all patterns that matches"
            " decides; what matches none is copied.",
        ),
        click.option("--exclude", multiple=True, metavar="PATTERN", help="Do not copy what matches."),
        click.option(
            "--filter-from",
            multiple=True,
            metavar="FILE",
            help="Read patterns from a file (- for standard input): a line '+ PATTERN' includes, '- PATTERN' excludes.",
        ),
        click.option("--min-size", type=SIZE, help="Only files of at least this size (500, 10k, 10M, 1.5G)."),
        click.option("--max-size", type=SIZE, help="Only files of at most this size."),
        click.option("--newer-than", type=AGE, help="Only files written since (7d, 2026-03-02)."),
        click.option("--older-than", type=AGE, help="Only files written before (7d, 2026-03-02)."),
        click.option("-n", "--dry-run", is_flag=True, help="Only show what would be copied, replaced and removed."),
        click.option("-p", "--preserve", is_flag=True, help="Keep the time and mode of files, where both sites can."),
        click.option(
            "--checksum",
            type=click.Choice(["ADLER32", "MD5", "SHA256"], case_sensitive=False),
            help="Checksum by which copies are verified (default ADLER32).",
        ),
        click.option("--verify", type=click.Choice(["checksum", "size"]), help="How copies are verified."),
        click.option("--stage", is_flag=True, help="First have files brought to disk that SOURCE has only on tape."),
        click.option("--stage-lifetime", metavar="TIME", help="How long they shall stay on disk (12h; default 1d)."),
        click.option("--stage-timeout", metavar="TIME", help="Files not on disk by then fail (default 2d)."),
        click.option("--archive", is_flag=True, help="Wait until the destination has each file on tape."),
        click.option("--archive-timeout", metavar="TIME", help="Files not on tape by then fail (default 2d)."),
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def copy_settings(given: dict[str, Any], *, move: bool) -> dict[str, Any]:
    """Take the values of `copy_options` out of `given`; the ``extra_opts`` that they are.

    Raises:
        click.UsageError: they contradict each other, or a file of patterns cannot be read.
    """
    filters = typed_filters(
        click.get_current_context(), given.pop("include"), given.pop("exclude"), given.pop("filter_from")
    )
    settings = {
        name: given.pop(name)
        for name in (
            *("overwrite", "sync", "max_delete", "min_size", "max_size", "newer_than", "older_than", "verify"),
            *("stage_lifetime", "stage_timeout", "archive_timeout"),
        )
    }
    settings.update({name: given.pop(name) or None for name in ("delete_extra", "dry_run", "stage", "archive")})
    settings["checksum"] = given.pop("checksum")
    settings["preserve"] = ["mtime", "mode"] if given.pop("preserve") else None
    settings["filters"] = filters or None
    settings["move"] = move or None
    found = {name: value for name, value in settings.items() if value is not None}
    try:
        # As the service does it, but before a pattern or a site is looked up.
        read_options(JobType.COPY, found)
    except ValidationError as error:
        raise click.UsageError(typed_words(str(error))) from error
    return found


def typed_words(text: str) -> str:
    """A text about ``extra_opts`` with the options as they are typed: ``--sync and --overwrite contradict ...``."""
    return _API_WORDS.sub(_typed_word, text)


_KEYS = "|".join(TYPED_NAMES)
#: Keys in a text of the service; one that is also an English word only where it can be nothing else.
_API_WORDS = re.compile(
    rf"(?P<first>{_KEYS}) and (?P<second>{_KEYS})(?= contradict)|(?P<set>{_KEYS})=(?P<value>\w+)"
    rf"|(?P<one>{_KEYS})(?= needs )|(?<= needs )(?P<needed>{_KEYS})|(?<=known are )(?P<known>[\w, ]+)"
    rf"|\b(?P<long>{'|'.join(name for name in TYPED_NAMES if '_' in name)})\b"
)


def _typed_word(found: re.Match[str]) -> str:
    if found["first"]:
        return f"{TYPED_NAMES[found['first']]} and {TYPED_NAMES[found['second']]}"
    if found["set"]:
        return TYPED_NAMES[found["set"]] + ("" if found["value"] == "true" else f" {found['value']}")
    if found["known"]:
        return ", ".join(TYPED_NAMES.get(name, name) for name in found["known"].split(", "))
    return TYPED_NAMES[found["one"] or found["needed"] or found["long"]]


def typed_filters(
    context: click.Context, include: Iterable[str], exclude: Iterable[str], files: Iterable[str]
) -> list[dict[str, str]]:
    """The patterns in the order in which they were typed: ``{"include": PATTERN}`` or ``{"exclude": PATTERN}``."""
    values = {"include": iter(include), "exclude": iter(exclude), "filter_from": iter(files)}
    filters = []
    for name in context.meta[_TYPED_ORDER]:
        if name == "filter_from":
            filters += _read_filters(next(values[name]))
        elif name in values:
            # As paths are read, which patterns are compared with.
            filters.append({name: text_from_bytes(os.fsencode(next(values[name])))})
    return filters


def _read_filters(path: str) -> list[dict[str, str]]:
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise click.UsageError(f"--filter-from {path} cannot be read: {error.strerror}.") from error
    return parse_filters(path, [text_from_bytes(line.removesuffix(b"\r")) for line in content.split(b"\n")])


def parse_filters(name: str, lines: Sequence[str]) -> list[dict[str, str]]:
    """Read lines ``+ PATTERN`` and ``- PATTERN``; blank lines and those that begin with ``#`` are ignored.

    Raises:
        click.UsageError: a line is neither; names its number.
    """
    filters = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        sign, blank, pattern = line[:1], line[1:2], line[2:]
        if sign not in "+-" or blank != " " or not pattern.strip():
            shown = truncate(line[: 2 * _SHOWN], _SHOWN)
            raise click.UsageError(
                f"--filter-from {name}, line {number}: '+ PATTERN' or '- PATTERN' is expected, not {shown!r}."
            )
        filters.append({"include" if sign == "+" else "exclude": pattern})
    return filters
