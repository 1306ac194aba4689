"""Pairs of paths to copy in one job: from a file (``cp --batch``), or from a receipt (``cp --redo``)."""

from __future__ import annotations

import os
import shlex
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import msgspec
from attrs import frozen
from twisted.internet.defer import Deferred

from pdm.workqueue.cli.arguments import ResolvedSitePath, SitePath
from pdm.workqueue.cli.display import display_name, print_stderr
from pdm.workqueue.cli.exit_codes import CommandError, ExitCode
from pdm.workqueue.cli.receipts import open_receipt, verified
from pdm.workqueue.client.errors import InvalidRequestError, SettingsError
from pdm.workqueue.client.receipts import Receipt, ReceiptInvalidError, read_receipt
from pdm.workqueue.client.settings import find_settings
from pdm.workqueue.domain.enums import JobType
from pdm.workqueue.domain.paths import joined, text_from_bytes
from pdm.workqueue.wire.options import MOST_ITEMS, CopyOptions, read_options
from pdm.workqueue.wire.receipts import ALREADY_THERE, DONE, ReceiptElement, ReceiptSite
from pdm.workqueue.wire.responses import JobView
from pdm.workqueue.WorkqueueClient import SubmitOptions, WorkqueueClient

#: A line is two paths in quotes; longer ones have none that a site takes.
_LONGEST_LINE = 64 * 1024
_FINISHED = frozenset({DONE, ALREADY_THERE})

#: Registers a job, given the common options.
SubmitFunction = Callable[[SubmitOptions], Deferred[JobView]]


@frozen
class PathPairs:
    """Pairs of paths, in the order of their file.

    Attributes:
        lines: number of the line of each pair.
    """

    pairs: Sequence[tuple[str, str]]
    lines: Sequence[int]

    def items(self, source: str, destination: str) -> list[dict[str, str]]:
        """The items of a request; relative paths are below two directories."""
        return [{"src": _below(source, src), "dst": _below(destination, dst)} for src, dst in self.pairs]

    def line_of(self, pointer: str | None) -> int | None:
        """The line that a pointer of the service means; None if it means none."""
        index = (pointer or "").removeprefix("$.extra_opts.items[").partition("]")[0]
        return self.lines[int(index)] if index.isdecimal() and int(index) < len(self.lines) else None


def _below(directory: str, path: str) -> str:
    return path if path.startswith(("/", "~")) else joined(directory, path)


def read_pairs(name: str, *, null: bool) -> PathPairs:
    """Read pairs of paths: ``SRC DST`` a line, quoted as for a shell; with `null` each path is followed by a NUL.

    Empty lines, and those that begin with ``#``, are skipped.

    Raises:
        CommandError: a line is not valid, or two have one destination; the text has their numbers.
    """
    with open_receipt(name) as file:
        found = list(_null_pairs(file) if null else _quoted_pairs(file))
    if not found:
        raise CommandError(ExitCode.USAGE, f"{display_name(name)} has no pairs of paths")
    by_destination: dict[str, int] = {}
    for line, (_, destination) in found:
        other = by_destination.setdefault(destination, line)
        if other != line and not destination.endswith("/"):
            raise CommandError(ExitCode.USAGE, f"lines {other} and {line} have the same destination")
    return PathPairs([pair for _, pair in found], array("q", (line for line, _ in found)))


def _quoted_pairs(file: BinaryIO) -> Iterator[tuple[int, tuple[str, str]]]:
    number = 0
    while raw := file.readline(_LONGEST_LINE + 1):
        number += 1
        line = os.fsdecode(raw).strip()
        if not line or line.startswith("#"):
            continue
        try:
            words = shlex.split(line)
        except ValueError as error:
            raise CommandError(ExitCode.USAGE, f"line {number}: {str(error).lower()}") from error
        if len(raw) > _LONGEST_LINE or len(words) != 2 or not all(words):
            raise CommandError(
                ExitCode.USAGE,
                f"line {number}: two paths are expected, SRC and DST, not {len(words)}",
                "Put a path with blanks in quotes.",
            )
        yield number, (_text(words[0]), _text(words[1]))


def _null_pairs(file: BinaryIO) -> Iterator[tuple[int, tuple[str, str]]]:
    parts = file.read().split(b"\0")
    if parts.pop() or len(parts) % 2 or not all(parts):
        raise CommandError(ExitCode.USAGE, "pairs of paths are expected, SRC and DST, each followed by a NUL")
    for at in range(0, len(parts), 2):
        yield at // 2 + 1, (text_from_bytes(parts[at]), text_from_bytes(parts[at + 1]))


def _text(word: str) -> str:
    return text_from_bytes(os.fsencode(word))


@frozen
class Redo:
    """What a receipt leaves to copy.

    Attributes:
        items: at most `MOST_ITEMS` in each part.
        settings: the ``extra_opts`` of the job of the receipt that hold for its files.
    """

    source: SitePath
    destination: SitePath
    protocol: str
    parts: Sequence[Sequence[Mapping[str, str]]]
    settings: Mapping[str, Any]


def read_redo(name: str, ca: str | None) -> Redo:
    """Verify a receipt, and find what is not done in it.

    Raises:
        CommandError: the receipt is not valid, or none of a copy that could be done again.
    """
    if name == "-":
        raise CommandError(ExitCode.USAGE, "a receipt to redo is read twice: name a file, not -")
    with open_receipt(name) as file:
        receipt = verified(file, name, ca)
        job = receipt.job.job
        if job.type != JobType.COPY.name or receipt.job.destination is None:
            raise CommandError(ExitCode.USAGE, f"the receipt is of a {job.type}: only a COPY can be redone")
        if job.extra_opts.get("dry_run"):
            raise CommandError(ExitCode.USAGE, "the receipt is of a dry run, which copied nothing: run the copy itself")
        _warn(receipt)
        file.seek(0)
        try:
            items = [{"src": each.source, "dst": each.destination} for each in _left(file) if each.destination]
        except ReceiptInvalidError as error:
            raise CommandError(ExitCode.FAILED, f"{display_name(name)} is not valid: {error}") from error
    return Redo(
        _place(receipt.job.source, job.src_filepath),
        _place(receipt.job.destination, job.dst_filepath or "/"),
        job.protocol.lower(),
        [items[at : at + MOST_ITEMS] for at in range(0, len(items), MOST_ITEMS)],
        _settings(job.extra_opts),
    )


def _left(file: BinaryIO) -> Iterator[ReceiptElement]:
    for line in read_receipt(file):
        if isinstance(line, ReceiptElement) and line.type == JobType.COPY.name and line.outcome not in _FINISHED:
            yield line


def _place(site: ReceiptSite, path: str) -> SitePath:
    return SitePath(site.name or str(site.id), path)


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of single files; those of a tree have chosen the files."""
    try:
        known = read_options(JobType.COPY, options)
    except msgspec.ValidationError as error:
        raise CommandError(
            ExitCode.USAGE, f"the job of the receipt has options that are not known here: {error}"
        ) from error
    assert isinstance(known, CopyOptions)
    settings = {name: options[name] for name in ("verify", "checksum", "preserve", "mover", "dummy") if name in options}
    return settings | {"overwrite": known.effective_overwrite}


def _warn(receipt: Receipt) -> None:
    """Say what the receipt cannot tell."""
    if not receipt.end.final:
        print_stderr("warning: the job had not ended when the receipt was written: later files are not in it")
    try:
        url = find_settings(os.environ, Path.home(), os.getuid()).url
    except SettingsError:
        return
    host = urlsplit(url).hostname or ""
    if host not in receipt.signer.names:
        print_stderr(
            f"warning: the receipt is of another service, {receipt.job.service.name}: its sites are looked up by name"
        )


def items_copy(
    client: WorkqueueClient,
    places: Sequence[ResolvedSitePath],
    items: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> SubmitFunction:
    """Submits a copy of items from one site to another, with the ``extra_opts`` `settings`."""
    source, target = places

    def submit(more: SubmitOptions) -> Deferred[JobView]:
        whole: SubmitOptions = {**more, "options": {**more.get("options", {}), **settings}}
        return client.copy_items(source.site.id, target.site.id, items, **whole)

    return submit


def pairs_copy(
    client: WorkqueueClient, places: Sequence[ResolvedSitePath], pairs: PathPairs, settings: Mapping[str, Any]
) -> SubmitFunction:
    """Submits a copy of pairs of paths; what the service refuses is named by its line."""
    submit_items = items_copy(client, places, pairs.items(places[0].path, places[1].path), settings)

    async def submit(more: SubmitOptions) -> JobView:
        try:
            return await submit_items(more)
        except InvalidRequestError as error:
            line = pairs.line_of(error.pointer)
            if line is None:
                raise
            raise CommandError(ExitCode.USAGE, f"line {line}: {error.detail.rstrip('.')}") from error

    return lambda more: Deferred.fromCoroutine(submit(more))
