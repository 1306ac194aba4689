"""``pdm ls``, ``stat``, ``du``: list places at sites, each by a job of the service."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import click
from attrs import asdict, evolve, frozen
from msgspec import UNSET, to_builtins
from twisted.internet.defer import CancelledError

from pdm.workqueue.cli.arguments import (
    DURATION,
    SITE_OR_PATH,
    ResolvedSitePath,
    SitePath,
    format_option,
    mover_option,
    protocol_for,
    protocol_option,
    resolve_paths,
)
from pdm.workqueue.cli.display import display_width, table, write_bytes
from pdm.workqueue.cli.exit_codes import CommandError, ExitCode
from pdm.workqueue.cli.outcome import WaitingReasons, common_exit_code, exit_code_of_job, hint_of, print_json
from pdm.workqueue.cli.places import display_place, expand, has_pattern, matches, unescaped
from pdm.workqueue.cli.session import print_error, run
from pdm.workqueue.client.errors import JobTimeoutError
from pdm.workqueue.domain.enums import JobProtocol, JobStatus
from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.domain.formatting import display_bytes, display_mode, display_name, display_time
from pdm.workqueue.wire.responses import ElementView, Entries, EntryView, JobView, Notes
from pdm.workqueue.WorkqueueClient import WorkqueueClient

_Command = TypeVar("_Command", bound=Callable[..., Any])
#: Seconds in which the kind of a destination must be known.
_PROBE_S = 10.0


@frozen
class Lister:
    """Lists places by LIST jobs; the sites choose a `protocol` and a `mover` of None."""

    client: WorkqueueClient
    protocol: str | None = None
    mover: str | None = None
    timeout_s: float | None = None

    async def listed(self, place: ResolvedSitePath, depth: int | None) -> ElementView:
        """The finished element of a listing; `depth` 0 is the place itself, 1 its entries, None all levels.

        Raises:
            CommandError: the listing failed, or was not done in time.
        """
        job = await self._submit(place, depth)
        ended = await self._wait(job.id)
        element = await self.client.element(job.id, 0)
        if ended.status != JobStatus.DONE.name:
            raise _listing_error(place, ended, element)
        return element

    async def entries(self, place: ResolvedSitePath) -> Sequence[EntryView]:
        """The entries of the directory at a place."""
        return [entry for _path, entry in rows_of(await self.listed(place, 1), place.path)]

    async def is_directory(self, place: ResolvedSitePath) -> bool | None:
        """Whether a directory is at a place; None if that cannot be found out at once."""
        if self._protocol(place) is JobProtocol.DUMMY:
            return None
        job = await self._submit(place, 0)
        try:
            ended = await self.client.wait(job.id, timeout=_PROBE_S, on_progress=_refuse_to_wait)
        except (JobTimeoutError, _NotAtOnceError, CancelledError) as error:
            await self.client.cancel(job.id)
            if isinstance(error, CancelledError):
                raise
            return None
        element = await self.client.element(job.id, 0)
        if ended.status == JobStatus.DONE.name:
            return any(entry.type == "directory" for _path, entry in rows_of(element, place.path))
        not_there = element.failure is not None and element.failure.code == FailureCode.NOT_FOUND
        return False if not_there else None

    async def expanded(self, places: Sequence[ResolvedSitePath]) -> list[ResolvedSitePath]:
        """The places, with patterns expanded."""
        return [each for place in places for each in await expand(place, self.entries)]

    def _protocol(self, place: ResolvedSitePath) -> JobProtocol:
        return protocol_for([place.site], self.protocol, self.mover)

    async def _submit(self, place: ResolvedSitePath, depth: int | None) -> JobView:
        return await self.client.list(
            place.site.id,
            place.path,
            depth=depth,
            protocol=self._protocol(place),
            options={} if self.mover is None else {"mover": self.mover},
        )

    async def _wait(self, job_id: int) -> JobView:
        try:
            return await self.client.wait(job_id, timeout=self.timeout_s, on_progress=WaitingReasons(job_id).report)
        except JobTimeoutError as error:
            raise CommandError(ExitCode.TIMED_OUT, error.what, f"pdm wait {job_id} | pdm cancel {job_id}") from error
        except CancelledError:
            # The listing is of no use without the command.
            await self.client.cancel(job_id)
            raise


class _NotAtOnceError(Exception):
    """A listing waits for something."""


def _refuse_to_wait(job: JobView) -> None:
    if job.status == JobStatus.HELD.name or (job.waiting and not job.num_running):
        raise _NotAtOnceError


def _listing_error(place: ResolvedSitePath, job: JobView, element: ElementView) -> CommandError:
    code = exit_code_of_job(job, [element])
    if element.failure is None:
        return CommandError(code, f"{display_place(place)}: the listing was {job.status.lower()}")
    failure = element.failure
    hint = hint_of(failure.code, failure.hint, job.type)
    return CommandError(code, f"{display_place(place)}: {failure.code}: {failure.message}", hint)


def rows_of(element: ElementView, top: str) -> list[tuple[str, EntryView]]:
    """The entries of a finished LIST element, sorted by path, each with its path relative to the listed one (`top`)."""
    if element.entries is UNSET:
        return []
    rows = []
    base = top.rstrip("/") + "/"
    for directory, entries in element.entries.items():
        below = (
            (directory.rstrip("/") + "/").removeprefix(base) if (directory.rstrip("/") + "/").startswith(base) else ""
        )
        for entry in entries:
            slash = "/" if entry.type == "directory" else ""
            rows.append((below + entry.name + slash, entry))
    return sorted(rows, key=lambda row: row[0])


def _listing_options(command: _Command) -> _Command:
    decorators = [
        click.argument("places", metavar="PLACE...", type=SITE_OR_PATH, nargs=-1, required=True),
        click.option("--timeout", type=DURATION, help="Maximum time to wait (90s, 5m)."),
        protocol_option,
        mover_option,
        format_option,
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


@click.command()
@_listing_options
@click.option("-l", "--long", "long_", is_flag=True, help="Show type and mode, owner, group, size, and time (UTC).")
@click.option("-b", "--bytes", "in_bytes", is_flag=True, help="Show sizes in bytes (with -l).")
@click.option("-R", "--recursive", is_flag=True, help="List subdirectories too; paths are relative.")
@click.option(
    "--depth", type=click.IntRange(0, 1000), help="Levels to list: 0 is PLACE itself, 1 (default) its entries."
)
@click.option("-0", "--null", is_flag=True, help="Print raw names, each followed by a NUL, for 'xargs -0'.")
def ls(
    places: Sequence[SitePath],
    long_: bool,
    in_bytes: bool,
    recursive: bool,
    depth: int | None,
    null: bool,
    timeout: float | None,
    protocol: str | None,
    mover: str | None,
    form: str,
) -> None:
    r"""List the files and directories at each PLACE; SITE alone is its default directory.

    Patterns are expanded: 'A:/run7/*.root' lists what matches, and no directory's content. Names of directories end in
    /. Unprintable characters are shown as backslash escapes (\n, \x1b).
    """
    if null and (long_ or form == "json"):
        raise click.UsageError("-0 prints names only: omit -l and -F json.")
    if recursive and depth is not None:
        raise click.UsageError("-R lists all levels: omit it, or --depth.")
    levels = depth if depth is not None else None if recursive else 1

    async def action(client: WorkqueueClient) -> int:
        answers: list[Entries] = []

        async def one(lister: Lister, place: ResolvedSitePath) -> int:
            entries, rows, unreadable = await _entries(lister, place, levels)
            if len(places) > 1 and form == "text" and not null:
                click.echo(f"{chr(10) if answers else ''}{display_place(place)}:")
            answers.append(entries)
            if null:
                for path, _entry in rows:
                    write_bytes(path.removesuffix("/"), b"\0")
            elif form == "text":
                print_rows(rows, long_=long_, in_bytes=in_bytes)
            for note in unreadable:
                print_error(f"{display_name(note.path)} could not be read: {note.reason}")
            return ExitCode.PARTIAL if unreadable else ExitCode.DONE

        code = await _for_each_place(Lister(client, protocol, mover, timeout), places, one)
        if form == "json":
            print_json(answers if len(places) > 1 else answers[0] if answers else None)
        return code

    run(action)


async def _for_each_place(
    lister: Lister,
    places: Sequence[SitePath],
    one: Callable[[Lister, ResolvedSitePath], Awaitable[int]],
) -> int:
    """Apply a function to each place; with several, failures are reported and do not end the command."""
    codes: list[int] = []
    for place in await resolve_paths(lister.client, *places):
        try:
            codes.append(await one(lister, place))
        except CommandError as error:
            if len(places) == 1 or error.code == ExitCode.TIMED_OUT:
                raise
            print_error(error.what, error.advice)
            codes.append(error.code)
    return common_exit_code(codes)


async def _entries(
    lister: Lister, place: ResolvedSitePath, depth: int | None
) -> tuple[Entries, Sequence[tuple[str, EntryView]], Notes]:
    """What is at a place, or matches its pattern: as the API has it, as rows, and what could not be read."""
    if not has_pattern(place.path):
        bare = evolve(place, path=unescaped(place.path))
        element = await lister.listed(bare, depth)
        entries = {} if element.entries is UNSET else element.entries
        return entries, rows_of(element, bare.path), [] if element.unreadable is UNSET else element.unreadable
    found: Entries = {}
    rows = []
    for path, entry in await matches(place, lister.entries):
        found.setdefault(path.rpartition("/")[0] or "/", []).append(entry)
        rows.append((path + "/" if entry.type == "directory" else path, entry))
    return found, rows, []


def print_rows(rows: Sequence[tuple[str, EntryView]], *, long_: bool, in_bytes: bool) -> None:
    if not long_ or not rows:
        for path, _entry in rows:
            click.echo(display_name(path))
        return
    owners, groups = (_padded(list(names)) for names in zip(*(_owners(entry) for _path, entry in rows), strict=True))
    sizes = [_size_cell(entry, in_bytes=in_bytes) for _path, entry in rows]
    width = max(map(len, sizes))
    for (path, entry), owner, group, size in zip(rows, owners, groups, sizes, strict=True):
        target = f" -> {display_name(entry.target)}" if entry.target is not UNSET else ""
        click.echo(
            f"{display_mode(entry.type, entry.mode)}  {owner}  {group}  {size:>{width}}  {display_time(entry.mtime)}"
            f"  {display_name(path)}{target}"
        )


def _padded(texts: Sequence[str]) -> list[str]:
    width = max(map(display_width, texts))
    return [text + " " * (width - display_width(text)) for text in texts]


def _owners(entry: EntryView) -> tuple[str, str]:
    """Owner and group of an entry; ``-`` where the server does not report them."""
    owner, group = ("-" if name is UNSET else display_name(name) for name in (entry.owner, entry.group))
    return owner, group


def _size_cell(entry: EntryView, *, in_bytes: bool) -> str:
    if entry.type != "file":
        return "-"
    return str(entry.size) if in_bytes else display_bytes(entry.size)


@click.command()
@_listing_options
def stat(places: Sequence[SitePath], timeout: float | None, protocol: str | None, mover: str | None, form: str) -> None:
    """Show type, size, mode, owner and time of the file or directory at each PLACE."""

    async def action(client: WorkqueueClient) -> int:
        answers: list[dict[str, Any]] = []

        async def one(lister: Lister, place: ResolvedSitePath) -> int:
            for each in await lister.expanded([place]):
                rows = rows_of(await lister.listed(each, 0), each.path)
                for _path, entry in rows:
                    if form == "json":
                        answers.append({"site": each.site.name, "path": each.path, **to_builtins(entry)})
                    else:
                        click.echo("\n".join(_stat_lines(each, entry)))
            return ExitCode.DONE

        code = await _for_each_place(Lister(client, protocol, mover, timeout), places, one)
        if form == "json":
            print_json(answers[0] if len(answers) == 1 else answers)
        return code

    run(action)


def _stat_lines(place: ResolvedSitePath, entry: EntryView) -> list[str]:
    lines = [display_place(place), f"  type  {entry.type}"]
    if entry.type == "file":
        lines.append(f"  size  {display_bytes(entry.size)} ({entry.size} bytes)")
    if entry.target is not UNSET:
        lines.append(f"  leads to  {display_name(entry.target)}")
    mode = "unknown" if entry.mode is None else f"{display_mode(entry.type, entry.mode)} ({entry.mode:04o})"
    lines.append(f"  mode  {mode}")
    if entry.owner is not UNSET or entry.group is not UNSET:
        owner, group = _owners(entry)
        lines.append(f"  owner  {owner}, group {group}")
    lines.append("  time  unknown" if entry.mtime is None else f"  time  {display_time(entry.mtime)} UTC")
    return lines


@click.command()
@_listing_options
@click.option("-b", "--bytes", "in_bytes", is_flag=True, help="Show sizes in bytes.")
@click.option("--depth", type=click.IntRange(0, 1000), default=0, help="Levels of subdirectories to show (default 0).")
def du(
    places: Sequence[SitePath],
    in_bytes: bool,
    depth: int,
    timeout: float | None,
    protocol: str | None,
    mover: str | None,
    form: str,
) -> None:
    """Show how many bytes and files are at each PLACE, with all subdirectories; symbolic links are not counted."""

    async def action(client: WorkqueueClient) -> int:
        totals: list[DirectoryTotal] = []

        async def one(lister: Lister, place: ResolvedSitePath) -> int:
            notes: Notes = []
            for each in await lister.expanded([place]):
                element = await lister.listed(each, None)
                totals.extend(directory_totals(each, rows_of(element, each.path), depth))
                notes += [] if element.unreadable is UNSET else element.unreadable
            for note in notes:
                print_error(f"{display_name(note.path)} could not be read: {note.reason}")
            return ExitCode.PARTIAL if notes else ExitCode.DONE

        code = await _for_each_place(Lister(client, protocol, mover, timeout), places, one)
        if form == "json":
            print_json([asdict(total) for total in totals])
        elif totals:
            rows = [
                [
                    str(total.bytes) if in_bytes else display_bytes(total.bytes),
                    str(total.files),
                    str(total.directories),
                    f"{display_name(total.site)}:{display_name(total.path)}",
                ]
                for total in totals
            ]
            click.echo(table(["BYTES", "FILES", "DIRECTORIES", "PLACE"], rows, right=[0, 1, 2]))
        return code

    run(action)


@frozen
class DirectoryTotal:
    """What is in a directory and all below it; the directory itself is not counted."""

    site: str
    path: str
    bytes: int
    files: int
    directories: int


def directory_totals(
    place: ResolvedSitePath, rows: Sequence[tuple[str, EntryView]], depth: int
) -> list[DirectoryTotal]:
    """Totals of a listed place and of its subdirectories down to `depth` levels; the place first."""
    sizes, files, directories = Counter[str](), Counter[str](), Counter[str]()
    for path, entry in rows:
        parts = path.removesuffix("/").split("/")
        for level in range(min(len(parts), depth + 1)):
            above = "/".join(parts[:level])
            if entry.type == "file":
                files[above] += 1
                sizes[above] += entry.size
            elif entry.type == "directory":
                directories[above] += 1
    shown = [path.removesuffix("/") for path, entry in rows if entry.type == "directory" and path.count("/") <= depth]
    return [
        DirectoryTotal(
            place.site.name,
            f"{place.path.rstrip('/')}/{path}" if path else place.path,
            sizes[path],
            files[path],
            directories[path],
        )
        for path in ("", *shown)
    ]
