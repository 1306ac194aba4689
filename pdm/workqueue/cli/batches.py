"""Files to copy or check in one job: from a file (``cp --batch``), or from a receipt (``cp --redo``, ``check``)."""

from __future__ import annotations

import os
import shlex
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal
from urllib.parse import urlsplit

import msgspec
from attrs import evolve, frozen
from twisted.internet.defer import Deferred

from pdm.workqueue.cli.arguments import ResolvedSitePath, SitePath
from pdm.workqueue.cli.display import print_stderr
from pdm.workqueue.cli.exit_codes import CommandError, ExitCode
from pdm.workqueue.cli.receipts import open_receipt, verified
from pdm.workqueue.client.errors import InvalidRequestError, SettingsError
from pdm.workqueue.client.receipts import Receipt, ReceiptInvalidError, read_receipt
from pdm.workqueue.client.settings import find_settings
from pdm.workqueue.domain.enums import JobType
from pdm.workqueue.domain.formatting import display_name
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
class ReceiptFiles:
    """Files of a receipt, for one or more jobs of the same two sites.

    Attributes:
        parts: the items of each job, at most `MOST_ITEMS`.
        settings: ``extra_opts`` of the jobs.
        others: number of files in the receipt that are in no part.
        without_checksum: number of files in the parts without a checksum.
    """

    source: SitePath
    destination: SitePath
    protocol: str
    parts: Sequence[Sequence[Mapping[str, Any]]]
    settings: Mapping[str, Any]
    others: int
    without_checksum: int


def read_redo(name: str, ca: str | None) -> ReceiptFiles:
    """Verify a receipt, and find what is not done in it.

    Raises:
        CommandError: the receipt is not valid, or none of a copy that could be done again.
    """

    def left(element: ReceiptElement) -> dict[str, Any] | None:
        if element.outcome in _FINISHED:
            return None
        return {"src": element.source, "dst": element.destination}

    found = _read_files(name, ca, "redone", left)
    return evolve(found, settings=_settings(found.settings))


def read_check(name: str, ca: str | None, at: Literal["source", "destination"]) -> ReceiptFiles:
    """Verify a receipt, and find what is done in it, with the size and checksum that each file must have.

    Raises:
        CommandError: the receipt is not valid, or its files cannot be checked at that end.
    """

    def done(element: ReceiptElement) -> dict[str, Any] | None:
        if element.outcome not in _FINISHED:
            return None
        item = {"src": element.source, "dst": element.destination, "size": element.size}
        return item if element.checksum is None else item | {"checksum": element.checksum}

    found = _read_files(name, ca, "checked", done)
    if found.settings.get("move") and at == "source":
        raise CommandError(
            ExitCode.USAGE, "the receipt is of a move, which removed the sources", "Check the destination."
        )
    has_checksums = found.without_checksum < sum(map(len, found.parts))
    names = ("mover", "dummy", *(["checksum"] if has_checksums else []))
    kept = {name: found.settings[name] for name in names if name in found.settings}
    if not has_checksums:
        kept["verify"] = "size"
    return evolve(found, settings=kept | {"check": at})


def _read_files(
    name: str, ca: str | None, purpose: str, item_of: Callable[[ReceiptElement], dict[str, Any] | None]
) -> ReceiptFiles:
    """Verify the receipt of a copy, and make items of its files.

    Args:
        name: of the file.
        ca: path of other authorities.
        purpose: what is to be done with the files, as a participle.
        item_of: the item for an element; None for none.

    Returns:
        The files, with the ``extra_opts`` of the job of the receipt.

    Raises:
        CommandError: the receipt is not valid, or none of a copy of files.
    """
    if name == "-":
        raise CommandError(ExitCode.USAGE, f"a receipt to be {purpose} is read twice: name a file, not -")
    with open_receipt(name) as file:
        receipt = verified(file, name, ca)
        job = receipt.job.job
        if job.type != JobType.COPY.name or receipt.job.destination is None:
            raise CommandError(ExitCode.USAGE, f"the receipt is of a {job.type}: only a COPY can be {purpose}")
        if job.extra_opts.get("dry_run"):
            raise CommandError(ExitCode.USAGE, "the receipt is of a dry run, which copied nothing: run the copy itself")
        _warn(receipt)
        file.seek(0)
        items, others = [], 0
        try:
            for element in _files(file):
                item = item_of(element)
                if item is not None:
                    items.append(item)
                else:
                    others += 1
        except ReceiptInvalidError as error:
            raise CommandError(ExitCode.FAILED, f"{display_name(name)} is not valid: {error}") from error
    return ReceiptFiles(
        _place(receipt.job.source, job.src_filepath),
        _place(receipt.job.destination, job.dst_filepath or "/"),
        job.protocol.lower(),
        [items[at : at + MOST_ITEMS] for at in range(0, len(items), MOST_ITEMS)],
        job.extra_opts,
        others,
        sum("checksum" not in item for item in items),
    )


def _files(file: BinaryIO) -> Iterator[ReceiptElement]:
    for line in read_receipt(file):
        if isinstance(line, ReceiptElement) and line.type == JobType.COPY.name and line.destination:
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
