"""Validation of what a COPY is asked: the URLs of its paths, its pairs of paths (items), and its options together."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

from attrs import frozen

from pdm.workqueue.domain.enums import JobProtocol, JobType
from pdm.workqueue.domain.filters import InvalidPatternError
from pdm.workqueue.domain.jobs import NewElement
from pdm.workqueue.domain.paths import InvalidPathError, StorageUrl, checked, decoded, is_inside, joined, normalised
from pdm.workqueue.http.problems import InvalidInputError
from pdm.workqueue.sites.registry import Site
from pdm.workqueue.sites.storage_urls import EndpointUrls, NotOfferedError, storage_url
from pdm.workqueue.wire.options import CopyOptions, CopyPair
from pdm.workqueue.wire.requests import SubmitJob

#: Gives the URL of a path; the second argument is the pointer for an `InvalidInputError`.
UrlOf = Callable[[str, str], str]


def url_at(site: Site, protocol: JobProtocol, path: str, pointer: str) -> str:
    """The URL at which a site serves a path; ``pointer`` is that of the path in the request.

    Raises:
        InvalidInputError: the site has no endpoint for the protocol, or no site can hold the path.
    """
    try:
        return storage_url(site, protocol, checked(path))
    except NotOfferedError as error:
        raise InvalidInputError(str(error), "$.protocol") from error
    except InvalidPathError as error:
        raise InvalidInputError(str(error), pointer) from error


def urls_at(site: Site, protocol: JobProtocol) -> UrlOf:
    """Gives the URLs of many paths at a site, as `url_at` that of one."""
    endpoint = site.endpoints.get(protocol)
    if endpoint is None:
        return partial(url_at, site, protocol)
    urls = EndpointUrls(site, protocol, endpoint)

    def url_of(path: str, pointer: str) -> str:
        try:
            return urls.of(path)
        except InvalidPathError as error:
            raise InvalidInputError(str(error), pointer) from error

    return url_of


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


def check_filters(options: CopyOptions) -> None:
    """Refuse filters that cannot be used, or that leave out nothing or all.

    Raises:
        InvalidInputError: they are such.
    """
    try:
        entry_filter = options.rules(datetime.now(UTC)).entry_filter
    except InvalidPatternError as error:
        raise InvalidInputError(str(error), "$.extra_opts.filters") from error
    if options.filters and all(rule.exclude is None for rule in options.filters):
        raise InvalidInputError(
            'filters without exclude leave nothing out: end them with {"exclude": "*"}', "$.extra_opts.filters"
        )
    first, end = entry_filter.changed_from, entry_filter.changed_before
    if first is not None and end is not None and first >= end:
        raise InvalidInputError(
            "newer_than and older_than contradict each other: no file is that new and that old", "$.extra_opts"
        )


def check_tape(options: Mapping[str, Any], source: Site, destination: Site) -> None:
    """Refuse to stage from a site, or to archive at one, that can have no tape API.

    Args:
        options: of the COPY, as sent.

    Raises:
        InvalidInputError: it is asked for that.
    """
    for name, site in (("stage", source), ("archive", destination)):
        if options.get(name) and not site.may_have_tape:
            raise InvalidInputError(
                f"{name} needs a tape API, and site {site.name} has none: its definition names none (tape = URL), nor"
                " an HTTPS endpoint that could",
                f"$.extra_opts.{name}",
            )


def check_not_removed(options: Mapping[str, Any], source_url: str, destination_url: str) -> None:
    """Refuse a copy that would remove its own source for an extra entry, or what it has just copied for the source.

    Args:
        options: of the COPY, as sent.

    Raises:
        InvalidInputError: it would.
    """
    # By host and path: one storage may be reached by several protocols.
    source, destination = _place(source_url), _place(destination_url)
    if options.get("delete_extra") and is_inside(source, destination):
        raise InvalidInputError(
            "the source is inside the destination, and would be removed as extra", "$.extra_opts.delete_extra"
        )
    if not options.get("move"):
        return
    if destination_url.endswith("/"):
        name = source_url.rstrip("/").rpartition("/")[2]
        if is_inside(f"{destination}/{decoded(name)}", source):
            raise InvalidInputError(
                "a file would be moved to where it is: choose another destination", "$.dst_filepath"
            )
    if is_inside(destination, source):
        raise InvalidInputError(
            "this host has the source at the same path, so a move might remove the only copy: choose another"
            " destination, or copy and remove",
            "$.dst_filepath",
        )


def _place(url: str) -> str:
    parts = StorageUrl(url)
    return f"/{parts.host}{parts.text_path}"
