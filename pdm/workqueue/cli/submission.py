"""``pdm ls``, ``cp``, ``rm``, ``mv``, ``mkdir``: submit a job, then wait for it with progress on stderr."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

import click
from attrs import frozen
from msgspec import UNSET
from twisted.internet.defer import CancelledError, Deferred

from pdm.workqueue.cli.arguments import (
    DURATION,
    SITE_PATH,
    ResolvedSitePath,
    SitePath,
    format_option,
    merged_options,
    mover_option,
    protocol_for,
    protocol_option,
    resolve_paths,
    submit_options,
)
from pdm.workqueue.cli.display import (
    display_line,
    display_mode,
    display_name,
    display_time,
    print_stderr,
    write_bytes,
)
from pdm.workqueue.cli.exit_codes import CommandError, ExitCode
from pdm.workqueue.cli.outcome import WaitingReasons, exit_code_of_job, follow, hint_of, print_json, report_end
from pdm.workqueue.cli.session import print_error, run
from pdm.workqueue.client.errors import JobTimeoutError
from pdm.workqueue.domain.enums import JobProtocol, JobStatus
from pdm.workqueue.wire.responses import ElementView, EntryView, JobView
from pdm.workqueue.WorkqueueClient import SubmitOptions, WorkqueueClient


@click.command()
@click.argument("place", type=SITE_PATH)
@click.option("-l", "--long", "long_", is_flag=True, help="Show type and mode, size in bytes, and time (UTC).")
@click.option("-R", "--recursive", is_flag=True, help="List subdirectories too; paths are relative.")
@click.option("-0", "--null", is_flag=True, help="Print raw names, each followed by a NUL, for 'xargs -0'.")
@click.option("--timeout", type=DURATION, help="Maximum time to wait (90s, 5m).")
@protocol_option
@mover_option
@format_option
def ls(
    place: SitePath,
    long_: bool,
    recursive: bool,
    null: bool,
    timeout: float | None,
    protocol: str | None,
    mover: str | None,
    form: str,
) -> None:
    r"""List the file or directory at PLACE; without a path, the site's default directory.

    Names of directories end in /. Unprintable characters are shown as backslash escapes (\n, \x1b).
    """
    if null and (long_ or form == "json"):
        raise click.UsageError("-0 prints names only: omit -l and -F json.")

    async def action(client: WorkqueueClient) -> int:
        (found,) = await resolve_paths(client, place)
        job = await client.list(
            found.site.id,
            found.path,
            depth=None if recursive else 1,
            protocol=protocol_for([found.site], protocol, mover),
            options={} if mover is None else {"mover": mover},
        )
        ended = await _wait_for_listing(client, job.id, timeout)
        element = await client.element(job.id, 0)
        if ended.status != JobStatus.DONE.name:
            raise _listing_error(found, ended, element)
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
            print_error(f"{display_name(note.path)} could not be read: {note.reason}")
        return ExitCode.PARTIAL

    run(action)


async def _wait_for_listing(client: WorkqueueClient, job_id: int, timeout_s: float | None) -> JobView:
    try:
        return await client.wait(job_id, timeout=timeout_s, on_progress=WaitingReasons(job_id).report)
    except JobTimeoutError as error:
        raise CommandError(ExitCode.TIMED_OUT, error.what, f"pdm wait {job_id} | pdm cancel {job_id}") from error
    except CancelledError:
        # The listing is of no use without the command.
        await client.cancel(job_id)
        raise


def _listing_error(found: ResolvedSitePath, job: JobView, element: ElementView) -> CommandError:
    what = f"{display_name(found.site.name)}:{display_name(found.path)}"
    code = exit_code_of_job(job, [element])
    if element.failure is None:
        return CommandError(code, f"{what}: the listing was {job.status.lower()}")
    failure = element.failure
    hint = hint_of(failure.code, failure.hint, job.type)
    return CommandError(code, f"{what}: {failure.code}: {failure.message}", hint)


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


def print_rows(rows: list[tuple[str, EntryView]], long_: bool) -> None:
    if not long_:
        for path, _entry in rows:
            click.echo(display_name(path))
        return
    width = max((len(str(entry.size)) for _path, entry in rows), default=0)
    for path, entry in rows:
        target = f" -> {display_name(entry.target)}" if entry.target is not UNSET else ""
        click.echo(
            f"{display_mode(entry.type, entry.mode)}  {entry.size:{width}d}  {display_time(entry.mtime)}"
            f"  {display_name(path)}{target}"
        )


@frozen
class SubmissionRequest:
    """The common options of commands that submit a job; the sites choose a `protocol` and a `mover` of None."""

    submission: SubmitOptions
    protocol: str | None
    mover: str | None
    wait: bool
    timeout_s: float | None
    form: str

    @classmethod
    def read(
        cls,
        *,
        protocol: str | None,
        mover: str | None,
        priority: int | None,
        max_tries: int | None,
        label: str | None,
        after: tuple[int, ...],
        after_any: bool,
        deadline: str | None,
        options: tuple[tuple[str, Any], ...],
        no_wait: bool,
        timeout: float | None,
        form: str,
    ) -> SubmissionRequest:
        """Convert the values of `submit_options`.

        Raises:
            click.UsageError: they contradict each other.
        """
        if no_wait and timeout is not None:
            raise click.UsageError("--no-wait and --timeout cannot be combined: omit one.")
        if after_any and not after:
            raise click.UsageError("--after-any needs --after, with the jobs to wait for.")
        submission = SubmitOptions()
        if priority is not None:
            submission["priority"] = priority
        if max_tries is not None:
            submission["max_tries"] = max_tries
        if label is not None:
            submission["label"] = label
        if after:
            submission["after"] = after
        if after_any:
            submission["after_any"] = True
        if deadline is not None:
            submission["deadline"] = deadline
        extra = merged_options(options)
        if mover is not None:
            extra["mover"] = mover
        if extra:
            submission["options"] = extra
        return cls(submission, protocol, mover, not no_wait, timeout, form)


#: Protocols whose servers do not show symbolic links as links → warning for recursive removals.
LINK_WARNINGS: Mapping[JobProtocol, str] = MappingProxyType(
    {
        JobProtocol.XROOT: "XRootD shows the targets of symbolic links instead of the links: links to directories are"
        " kept, but removing a link to a file also removes that file.",
        JobProtocol.HTTPS: "WebDAV servers show the targets of symbolic links instead of the links: unless the server"
        " is XRootD or Apache, the targets of links to directories are removed too. If the tree may contain links,"
        " remove those first.",
    }
)

#: Submits the job, given the client, the resolved places and the common options.
SubmitFunction = Callable[[WorkqueueClient, list[ResolvedSitePath], SubmitOptions], Deferred[JobView]]


def submit_and_follow(places: list[SitePath], request: SubmissionRequest, submit: SubmitFunction) -> NoReturn:
    """Look up the sites, submit the job, and follow it unless ``--no-wait`` is given."""

    async def action(client: WorkqueueClient) -> int:
        found = await resolve_paths(client, *places)
        protocol = protocol_for([place.site for place in found], request.protocol, request.mover)
        try:
            job = await submit(client, found, {**request.submission, "protocol": protocol})
        except CancelledError:
            raise CommandError(
                ExitCode.INTERRUPTED, "interrupted while submitting", "Run 'pdm jobs' to see if the job was registered."
            ) from None
        print_stderr(f"job {job.id} submitted")
        for warning in job.warnings or ():
            print_stderr(f"warning: {display_line(warning)}")
        if not request.wait:
            for reason in job.waiting or ():
                print_stderr(f"job {job.id} waits: {display_line(reason)}")
            # Data for scripts: id=$(pdm cp --no-wait ...)
            if request.form == "json":
                print_json(job)
            else:
                click.echo(job.id)
            return ExitCode.DONE
        ended = await follow(client, job.id, request.timeout_s, request.form)
        return await report_end(client, ended, request.form)

    run(action)


@click.command()
@click.argument("source", type=SITE_PATH)
@click.argument("destination", type=SITE_PATH)
@click.option(
    "--overwrite",
    type=click.Choice(["never", "always", "different"]),
    help="Whether to replace existing files (default never; identical ones count as copied).",
)
@click.option("--verify", type=click.Choice(["checksum", "size"]), help="How copies are verified (default checksum).")
@submit_options
def cp(source: SitePath, destination: SitePath, overwrite: Any, verify: Any, **common: Any) -> None:
    """Copy a file or a directory tree from SOURCE to DESTINATION.

    The content of a directory goes to DESTINATION; a file goes to DESTINATION, or into it if it ends in /.
    """
    submit_and_follow(
        [source, destination],
        SubmissionRequest.read(**common),
        lambda client, found, more: client.copy(
            found[0].site.id,
            found[0].path,
            found[1].site.id,
            found[1].path,
            overwrite=overwrite,
            verify=verify,
            **more,
        ),
    )


@click.command()
@click.argument("place", type=SITE_PATH)
@click.option("-r", "--recursive", is_flag=True, help="Remove a directory with all its content.")
@submit_options
def rm(place: SitePath, recursive: bool, **common: Any) -> None:
    """Remove the file at PLACE, or with -r the directory."""
    if not place.path.strip("/"):
        raise click.UsageError("rm needs a path: it does not remove a whole site.")

    def submit(client: WorkqueueClient, found: list[ResolvedSitePath], more: SubmitOptions) -> Deferred[JobView]:
        warning = LINK_WARNINGS.get(JobProtocol.parse(more["protocol"]))
        if recursive and warning is not None:
            print_stderr(f"warning: {warning}")
        return client.remove(found[0].site.id, found[0].path, recursive=recursive, **more)

    submit_and_follow([place], SubmissionRequest.read(**common), submit)


@click.command()
@click.argument("place", type=SITE_PATH)
@click.argument("new_place", metavar="SITE:NEWPATH", type=SITE_PATH)
@click.option(
    "--overwrite", type=click.Choice(["never", "always"]), help="Whether to replace an existing file (default never)."
)
@submit_options
def mv(place: SitePath, new_place: SitePath, overwrite: Any, **common: Any) -> None:
    """Rename the file or directory at PLACE, at the same site."""
    if not new_place.path:
        raise click.UsageError("mv needs a new path.")

    def submit(client: WorkqueueClient, found: list[ResolvedSitePath], more: SubmitOptions) -> Deferred[JobView]:
        if found[0].site.id != found[1].site.id:
            raise CommandError(
                ExitCode.USAGE,
                "mv works within one site",
                "To move data to another site, run 'pdm cp', and 'pdm rm' when it is done.",
            )
        return client.rename(found[0].site.id, found[0].path, found[1].path, overwrite=overwrite, **more)

    submit_and_follow([place, new_place], SubmissionRequest.read(**common), submit)


@click.command()
@click.argument("place", type=SITE_PATH)
@click.option("-p", "--parents", is_flag=True, help="Create missing parents; an existing directory is no error.")
@submit_options
def mkdir(place: SitePath, parents: bool, **common: Any) -> None:
    """Create a directory at PLACE."""
    submit_and_follow(
        [place],
        SubmissionRequest.read(**common),
        lambda client, found, more: client.mkdir(found[0].site.id, found[0].path, parents=parents, **more),
    )
