"""The items of a COPY: many pairs of paths in one request, validated as a whole before anything is stored."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence

from attrs import frozen

from pdm.workqueue.domain.enums import JobType
from pdm.workqueue.domain.jobs import NewElement
from pdm.workqueue.domain.paths import joined, normalised
from pdm.workqueue.http.problems import InvalidInputError
from pdm.workqueue.http.site_urls import UrlOf
from pdm.workqueue.wire.options import CopyOptions, CopyPair
from pdm.workqueue.wire.requests import SubmitJob

#: Options that are about a tree.
_OF_TREES = ("sync", "filters", "min_size", "max_size", "newer_than", "older_than", "delete_extra", "dry_run", "move")
_CHECKSUM = re.compile(r"([A-Z0-9]+):([0-9A-F]+)", re.IGNORECASE)
#: Hexadecimal digits of a checksum.
_DIGITS = {"ADLER32": 8, "MD5": 32, "SHA256": 64}
_POINTER = "$.extra_opts.items"


@frozen
class PlannedItems:
    """The elements of a job of items.

    Attributes:
        source: the directory that all sources are in.
        destination: the same of all destinations.
        checksums: number of an element → the checksum that was given for it.
    """

    elements: Sequence[NewElement]
    source: str
    destination: str
    checksums: Mapping[int, str]


def refuse_paths(submission: SubmitJob) -> None:
    """Refuse paths beside items."""
    for name in ("src_filepath", "dst_filepath"):
        if getattr(submission, name) is not None:
            raise InvalidInputError(f"{name} and items contradict each other: items have their own paths", f"$.{name}")


def planned_items(options: CopyOptions, source_url: UrlOf, destination_url: UrlOf) -> PlannedItems:
    """Plan one element for each pair. May take seconds: to be called in a thread.

    Raises:
        InvalidInputError: a pair is invalid, or two have one destination; the text has their numbers, from 1.
    """
    pairs = options.items
    if not isinstance(pairs, tuple):
        raise InvalidInputError("an array of items is expected", _POINTER)
    for name in _OF_TREES:
        if getattr(options, name):
            raise InvalidInputError(
                f"{name} and items contradict each other: items are single files", f"$.extra_opts.{name}"
            )
    if options.verify == "size" and any(pair.checksum for pair in pairs):
        raise InvalidInputError(
            "verify=size computes no checksum to compare with those of items", "$.extra_opts.verify"
        )
    elements: list[NewElement] = []
    checksums: dict[int, str] = {}
    numbers: dict[str, int] = {}
    for number, pair in enumerate(pairs):
        pointer = f"{_POINTER}[{number}]"
        target = joined(pair.dst.rstrip("/"), posixpath.basename(pair.src)) if pair.dst.endswith("/") else pair.dst
        if options.check is not None and pair.size is None:
            raise InvalidInputError(f"item {number + 1}: a check needs the size of each file", pointer + ".size")
        try:
            url = _destination_of(pair, target, pointer, source_url, destination_url)
            if pair.checksum is not None:
                checksums[number] = _checksum(pair.checksum, options.checksum or "ADLER32", pointer)
        except InvalidInputError as error:
            raise InvalidInputError(f"item {number + 1}: {error.detail}", error.pointer) from error
        other = numbers.setdefault(normalised(url), number)
        if other != number:
            raise InvalidInputError(f"items {other + 1} and {number + 1} have the same destination", pointer + ".dst")
        elements.append(NewElement(JobType.COPY, pair.src, target, pair.size or 0))
    return PlannedItems(
        elements,
        _common_directory([each.src_filepath for each in elements]),
        _common_directory([each.dst_filepath or "" for each in elements]),
        checksums,
    )


def _destination_of(pair: CopyPair, target: str, pointer: str, source_url: UrlOf, destination_url: UrlOf) -> str:
    if pair.src.endswith("/"):
        raise InvalidInputError("src is a directory: items are single files", pointer + ".src")
    url = destination_url(target, pointer + ".dst")
    if url == source_url(pair.src, pointer + ".src"):
        raise InvalidInputError("the destination is the source itself", pointer + ".dst")
    return url


def _checksum(text: str, algorithm: str, pointer: str) -> str:
    found = _CHECKSUM.fullmatch(text)
    if found is None or found[1].upper() not in _DIGITS or len(found[2]) > _DIGITS[found[1].upper()]:
        known = ", ".join(f"{name}: and {digits} hexadecimal digits" for name, digits in _DIGITS.items())
        raise InvalidInputError(f"a checksum is {known}", pointer + ".checksum")
    if found[1].upper() != algorithm:
        raise InvalidInputError(
            f"the checksum is {found[1].upper()}, and the files of this job are compared by {algorithm}: ask for"
            f" checksum={found[1].upper()}",
            pointer + ".checksum",
        )
    return f"{algorithm}:{found[2].lower():0>{_DIGITS[algorithm]}}"


def _common_directory(paths: Sequence[str]) -> str:
    """The directory that all paths are in; ``.`` for none."""
    # What the first and the last in order have in common, all between them have.
    first, last = min(paths), max(paths)
    common = 0
    while common < min(len(first), len(last)) and first[common] == last[common]:
        common += 1
    directory = first[:common].rpartition("/")[0]
    return directory or ("/" if first.startswith("/") else ".")
