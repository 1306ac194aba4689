"""Check what a COPY is asked, beyond the types of its options."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from pdm.workqueue.domain.filters import InvalidPatternError
from pdm.workqueue.domain.paths import StorageUrl, decoded, is_inside
from pdm.workqueue.http.problems import InvalidInputError
from pdm.workqueue.sites.registry import Site
from pdm.workqueue.wire.options import CopyOptions


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
