"""Sources and destinations as ``cp`` takes them: patterns are expanded, directories get what is put into them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Awaitable, Callable, Sequence

from attrs import evolve

from pdm.workqueue.cli.arguments import ResolvedSitePath, SitePath
from pdm.workqueue.cli.exit_codes import CommandError, ExitCode
from pdm.workqueue.domain.formatting import display_name
from pdm.workqueue.wire.responses import EntryView

#: A character of a pattern, unless a backslash is before it.
_PATTERN = re.compile(r"(?<!\\)[*?\[]")
_ESCAPED = re.compile(r"\\([*?\[\]])")
#: Directories that are listed for one pattern.
_MAX_LISTINGS = 100
#: Paths without a name of their own.
_NAMELESS = ("", ".", "..", "~")

#: Lists the directory at a place: its entries.
DirectoryLister = Callable[[ResolvedSitePath], Awaitable[Sequence[EntryView]]]


def has_pattern(path: str) -> bool:
    """Whether a path has a ``*``, ``?`` or ``[`` that is not escaped by a backslash."""
    return _PATTERN.search(path) is not None


def display_place(place: ResolvedSitePath) -> str:
    return f"{display_name(place.site.name)}:{display_name(place.path)}"


async def expand(place: ResolvedSitePath, lister: DirectoryLister) -> list[ResolvedSitePath]:
    """The existing paths that match a pattern, sorted; a path without pattern is only freed of its backslashes.

    Raises:
        CommandError: as `matches`.
    """
    if not has_pattern(place.path):
        return [evolve(place, path=unescaped(place.path))]
    slash = "/" if place.path.endswith("/") else ""
    return [evolve(place, path=path + slash) for path, _entry in await matches(place, lister)]


async def matches(place: ResolvedSitePath, lister: DirectoryLister) -> list[tuple[str, EntryView]]:
    """The existing paths that match a pattern, sorted, without a ``/`` at their ends, and what they are.

    As in a shell, ``*`` does not match a dot at the beginning of a name, and a component that matches nothing matches
    the file that has exactly this name.

    Raises:
        CommandError: nothing matches, or too many directories would have to be listed.
    """
    components = place.path.split("/")
    first = next(index for index, component in enumerate(components) if has_pattern(component))
    base = unescaped("/".join(components[:first]))
    if not base:
        base = "/" if first else place.site.default_folder or "/"
    wanted = [component for component in components[first:] if component]
    directories, found = [base], list[tuple[str, EntryView]]()
    for level, component in enumerate(wanted, 1):
        if len(directories) > _MAX_LISTINGS:
            raise CommandError(
                ExitCode.USAGE,
                f"{display_place(place)}: {len(directories)} directories match the first part of the pattern",
                f"At most {_MAX_LISTINGS} are listed: name fewer, or use --include.",
            )
        found = []
        for directory in directories:
            entries = await lister(evolve(place, path=directory))
            if level < len(wanted) or place.path.endswith("/"):
                entries = [entry for entry in entries if entry.type == "directory"]
            found += [(f"{directory.rstrip('/')}/{entry.name}", entry) for entry in _matching(component, entries)]
        directories = [path for path, _entry in found]
    if not found:
        raise CommandError(
            ExitCode.NOT_FOUND,
            f"{display_place(place)}: nothing matches",
            r"Check the path with 'pdm ls'. For a name that contains * ? or [, put a backslash before it: \*.",
        )
    return found


def _matching(pattern: str, entries: Sequence[EntryView]) -> list[EntryView]:
    """The entries that match one component of a pattern, sorted by name."""
    # fnmatch has no escapes, but classes of one character.
    match = re.compile(fnmatch.translate(_ESCAPED.sub(r"[\1]", pattern))).match
    hidden = pattern.startswith(".")
    found = [entry for entry in entries if match(entry.name) and (hidden or not entry.name.startswith("."))]
    found = found or [entry for entry in entries if entry.name == pattern]
    return sorted(found, key=lambda entry: entry.name)


def unescaped(path: str) -> str:
    """A path without the backslashes before characters of patterns."""
    return _ESCAPED.sub(r"\1", path)


def base_name(path: str) -> str:
    """The last component; empty for a path without a name of its own (``~``, ``/``, ``..``)."""
    name = path.rstrip("/").rpartition("/")[2]
    return "" if name in _NAMELESS else name


#: Finds out whether a directory is at a place; None if it cannot be found out.
DirectoryCheck = Callable[[ResolvedSitePath], Awaitable[bool | None]]


async def destination_paths(
    sources: Sequence[ResolvedSitePath],
    destination: ResolvedSitePath,
    typed: SitePath,
    *,
    several: bool,
    is_directory: DirectoryCheck,
) -> list[str]:
    """The path at the destination for each source.

    Several sources, and a source whose destination is ``SITE:``, keep their names below the destination. One source
    becomes the destination itself; a file goes into it if it ends in ``/``. A source that ends in ``/`` is the content
    of the directory.

    Args:
        sources: from `expand`.
        destination: the resolved one.
        typed: the destination as it was typed.
        several: whether several sources were typed, or a pattern.
        is_directory: is asked where several sources need it.

    Raises:
        CommandError: several sources, and the destination is no directory.
    """
    path = destination.path
    if not several and typed.path:
        return [path]
    if several and typed.path and not typed.path.endswith("/") and not await is_directory(destination):
        raise CommandError(
            ExitCode.USAGE,
            f"{display_place(destination)} is no existing directory, which several sources need",
            "Let it end in /, and it is created.",
        )
    return [_below(path, source) for source in sources]


def _below(directory: str, source: ResolvedSitePath) -> str:
    name = "" if source.path.endswith("/") else base_name(source.path)
    return f"{directory.rstrip('/')}/{name}" if name else directory
