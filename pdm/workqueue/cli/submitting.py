"""``pdm cp``, ``rm``, ``mv``, ``mkdir``: submit a job, then wait for it with progress on stderr."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

import click
from attrs import frozen
from twisted.internet.defer import CancelledError, Deferred

from pdm.workqueue.cli.arguments import PLACE, Place, merged_options, submit_options
from pdm.workqueue.cli.exit_codes import CommandError, ExitCode
from pdm.workqueue.cli.following import follow, print_json, report_end
from pdm.workqueue.cli.places import Found, find, protocol_for
from pdm.workqueue.cli.session import run, say
from pdm.workqueue.cli.text import shown_line
from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.wire.responses import JobView
from pdm.workqueue.WorkqueueClient import SubmitOptions, WorkqueueClient


@frozen
class Request:
    """What all of these commands take besides their own arguments.

    Attributes:
        submission: priority, label and the like, as the client wants them.
        protocol: as typed, None to choose.
        wait: whether to wait for the end.
        timeout_s: how long.
        form: ``text`` or ``json``.
    """

    submission: SubmitOptions
    protocol: str | None
    wait: bool
    timeout_s: float | None
    form: str

    @classmethod
    def read(
        cls,
        *,
        protocol: str | None,
        priority: int | None,
        max_tries: int | None,
        label: str | None,
        options: tuple[tuple[str, Any], ...],
        no_wait: bool,
        timeout: float | None,
        form: str,
    ) -> Request:
        """From the values of `submit_options`.

        Raises:
            click.UsageError: they contradict each other.
        """
        if no_wait and timeout is not None:
            raise click.UsageError("--no-wait does not wait: leave --timeout away, or --no-wait.")
        submission = SubmitOptions()
        if priority is not None:
            submission["priority"] = priority
        if max_tries is not None:
            submission["max_tries"] = max_tries
        if label is not None:
            submission["label"] = label
        if options:
            submission["options"] = merged_options(options)
        return cls(submission, protocol, not no_wait, timeout, form)


#: Protocol → what a recursive removal may do to what symbolic links lead to; the others show links as links.
LINK_WARNINGS: Mapping[JobProtocol, str] = MappingProxyType(
    {
        JobProtocol.XROOT: "XRootD shows symbolic links as what they lead to: links to folders are left alone, but with"
        " a link to a file it removes that file, too.",
        JobProtocol.HTTPS: "WebDAV servers show symbolic links as what they lead to: where the server is not XRootD or"
        " Apache, what links to folders lead to is removed, too. If the tree may hold links, remove those first.",
    }
)

#: Submits the job; gets the client, the places found, and what goes with every submission.
Submit = Callable[[WorkqueueClient, list[Found], SubmitOptions], Deferred[JobView]]


def carry_out(places: list[Place], request: Request, submit: Submit) -> NoReturn:
    """Look up the sites, submit, and follow the job unless told not to."""

    async def action(client: WorkqueueClient) -> int:
        found = await find(client, *places)
        protocol = protocol_for([place.site for place in found], request.protocol)
        try:
            job = await submit(client, found, {**request.submission, "protocol": protocol})
        except CancelledError:
            raise CommandError(
                ExitCode.INTERRUPTED, "interrupted while submitting", "See 'pdm jobs' for whether the job is there."
            ) from None
        say(f"job {job.id} submitted")
        for warning in job.warnings or ():
            say(f"warning: {shown_line(warning)}")
        if not request.wait:
            for reason in job.waiting or ():
                say(f"job {job.id} waits: {shown_line(reason)}")
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
@click.argument("source", type=PLACE)
@click.argument("destination", type=PLACE)
@click.option(
    "--overwrite",
    type=click.Choice(["never", "always", "different"]),
    help="What happens to files that are there (default never; identical ones count as copied).",
)
@click.option("--verify", type=click.Choice(["checksum", "size"]), help="How arrival is proven (default checksum).")
@submit_options
def cp(source: Place, destination: Place, overwrite: Any, verify: Any, **common: Any) -> None:
    """Copy a file or a tree from SOURCE to DESTINATION.

    The content of a folder goes to DESTINATION; a file goes to DESTINATION, or into it if it ends in /.
    """
    carry_out(
        [source, destination],
        Request.read(**common),
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
@click.argument("place", type=PLACE)
@click.option("-r", "--recursive", is_flag=True, help="Remove a folder with all that is in it.")
@submit_options
def rm(place: Place, recursive: bool, **common: Any) -> None:
    """Remove what is at PLACE; a folder only with -r."""
    if not place.path.strip("/"):
        raise click.UsageError("rm needs the path of what is to be removed, not a whole site.")

    def submit(client: WorkqueueClient, found: list[Found], more: SubmitOptions) -> Deferred[JobView]:
        warning = LINK_WARNINGS.get(JobProtocol.parse(more["protocol"]))
        if recursive and warning is not None:
            say(f"warning: {warning}")
        return client.remove(found[0].site.id, found[0].path, recursive=recursive, **more)

    carry_out([place], Request.read(**common), submit)


@click.command()
@click.argument("place", type=PLACE)
@click.argument("new_place", metavar="SITE:NEWPATH", type=PLACE)
@click.option(
    "--overwrite", type=click.Choice(["never", "always"]), help="What happens to something there (default never)."
)
@submit_options
def mv(place: Place, new_place: Place, overwrite: Any, **common: Any) -> None:
    """Give what is at PLACE a new name at the same site."""
    if not new_place.path:
        raise click.UsageError("mv needs the new path.")

    def submit(client: WorkqueueClient, found: list[Found], more: SubmitOptions) -> Deferred[JobView]:
        if found[0].site.id != found[1].site.id:
            raise CommandError(
                ExitCode.USAGE, "mv stays at one site", "To another site: 'pdm cp', then 'pdm rm' when it is done."
            )
        return client.rename(found[0].site.id, found[0].path, found[1].path, overwrite=overwrite, **more)

    carry_out([place, new_place], Request.read(**common), submit)


@click.command()
@click.argument("place", type=PLACE)
@click.option("-p", "--parents", is_flag=True, help="Make the folders above too; one that is there is no error.")
@submit_options
def mkdir(place: Place, parents: bool, **common: Any) -> None:
    """Make a folder at PLACE."""
    carry_out(
        [place],
        Request.read(**common),
        lambda client, found, more: client.mkdir(found[0].site.id, found[0].path, parents=parents, **more),
    )
