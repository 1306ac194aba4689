"""``pdm ls``: submit a listing, wait for it, print the names."""

from __future__ import annotations

import click
from msgspec import UNSET
from twisted.internet.defer import CancelledError

from pdm.workqueue.cli.arguments import DURATION, PLACE, Place, format_option, protocol_option
from pdm.workqueue.cli.exit_codes import CommandError, ExitCode
from pdm.workqueue.cli.following import WaitingReasons, exit_code_of_job, hint_of, print_json
from pdm.workqueue.cli.places import Found, find, protocol_for
from pdm.workqueue.cli.session import complain, run
from pdm.workqueue.cli.text import shown_mode, shown_name, shown_time, write_bytes
from pdm.workqueue.client.errors import JobTimeoutError
from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.wire.responses import ElementView, EntryView, JobView
from pdm.workqueue.WorkqueueClient import WorkqueueClient


@click.command()
@click.argument("place", type=PLACE)
@click.option("-l", "--long", "long_", is_flag=True, help="With type and mode, size in bytes, and time (UTC).")
@click.option("-R", "--recursive", is_flag=True, help="With all that is in the folders below; paths are relative.")
@click.option("-0", "--null", is_flag=True, help="Each name exactly as it is, followed by a NUL, for 'xargs -0'.")
@click.option("--timeout", type=DURATION, help="Wait no longer than this (90s, 5m).")
@protocol_option
@format_option
def ls(
    place: Place, long_: bool, recursive: bool, null: bool, timeout: float | None, protocol: str | None, form: str
) -> None:
    r"""List what is at PLACE; without a path, the site's default folder.

    Folders end in /. What is not printable in a name is shown as a backslash escape (\n, \x1b).
    """
    if null and (long_ or form == "json"):
        raise click.UsageError("-0 gives bare names: leave -l and -F json away.")

    async def action(client: WorkqueueClient) -> int:
        (found,) = await find(client, place)
        job = await client.list(
            found.site.id,
            found.path,
            depth=None if recursive else 1,
            protocol=protocol_for([found.site], protocol),
        )
        ended = await _end_of(client, job.id, timeout)
        element = await client.element(job.id, 0)
        if ended.status != JobStatus.DONE.name:
            raise _failed(found, ended, element)
        rows = rows_of(element, found.path)
        if form == "json":
            print_json(element.entries)
        elif null:
            for path, _entry in rows:
                write_bytes(path.removesuffix("/"), b"\0")
        else:
            print_rows(rows, long_)
        if element.unreadable is UNSET or not element.unreadable:
            return ExitCode.DONE
        for note in element.unreadable:
            complain(f"{shown_name(note.path)} could not be read: {note.reason}")
        return ExitCode.PARTIAL

    run(action)


async def _end_of(client: WorkqueueClient, job_id: int, timeout_s: float | None) -> JobView:
    try:
        return await client.wait(job_id, timeout=timeout_s, on_progress=WaitingReasons(job_id).tell)
    except JobTimeoutError as error:
        raise CommandError(ExitCode.TIMED_OUT, error.what, f"pdm wait {job_id} | pdm cancel {job_id}") from error
    except CancelledError:
        # A listing that nobody waits for is of no use.
        await client.cancel(job_id)
        raise


def _failed(found: Found, job: JobView, element: ElementView) -> CommandError:
    what = f"{shown_name(found.site.name)}:{shown_name(found.path)}"
    code = exit_code_of_job(job, [element])
    if element.failure is None:
        return CommandError(code, f"{what}: the listing was {job.status.lower()}")
    failure = element.failure
    hint = hint_of(failure.code, failure.hint, job.type)
    return CommandError(code, f"{what}: {failure.code}: {failure.message}", hint)


def rows_of(element: ElementView, top: str) -> list[tuple[str, EntryView]]:
    """The entries of a listing in the order of their paths, each with its path below the listed folder.

    Args:
        element: a LIST element that is done.
        top: the path that was asked for.
    """
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


def print_rows(rows: list[tuple[str, EntryView]], long_: bool) -> None:
    """One line an entry."""
    if not long_:
        for path, _entry in rows:
            click.echo(shown_name(path))
        return
    width = max((len(str(entry.size)) for _path, entry in rows), default=0)
    for path, entry in rows:
        target = f" -> {shown_name(entry.target)}" if entry.target is not UNSET else ""
        click.echo(
            f"{shown_mode(entry.type, entry.mode)}  {entry.size:{width}d}  {shown_time(entry.mtime)}"
            f"  {shown_name(path)}{target}"
        )
