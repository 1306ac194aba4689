"""``pdm rm``: remove files and directory trees, after a question where a pattern says which."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import click
from twisted.internet.defer import Deferred

from pdm.workqueue.cli.arguments import SITE_PATH, ResolvedSitePath, SitePath, submit_options
from pdm.workqueue.cli.display import print_stderr
from pdm.workqueue.cli.exit_codes import CommandError, ExitCode
from pdm.workqueue.cli.listing import Lister
from pdm.workqueue.cli.places import display_place, has_pattern
from pdm.workqueue.cli.submission import Submission, SubmissionRequest, submit_and_follow
from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.wire.responses import JobView
from pdm.workqueue.WorkqueueClient import SubmitOptions, WorkqueueClient

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


@click.command()
@click.argument("places", metavar="PLACE...", type=SITE_PATH, nargs=-1, required=True)
@click.option("-r", "-R", "--recursive", is_flag=True, help="Remove directories with all their content.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask before removing what matches a pattern.")
@submit_options
def rm(places: Sequence[SitePath], recursive: bool, yes: bool, **common: Any) -> None:
    """Remove the file at each PLACE, or with -r the directory.

    Patterns such as 'A:/run7/*.tmp' are expanded; on a terminal you are asked before what matches is removed.
    """
    if any(not place.path.strip("/") for place in places):
        raise click.UsageError("rm needs a path: it does not remove a whole site.")
    request = SubmissionRequest.read(**common)

    async def plan(client: WorkqueueClient, resolved: list[ResolvedSitePath]) -> list[Submission]:
        found = await Lister(client, request.protocol, request.mover).expanded(resolved)
        if any(has_pattern(place.path) for place in places) and not yes:
            _confirm_removal(found)
        return [Submission([place], _remove(client, place, recursive=recursive)) for place in found]

    submit_and_follow(places, request, plan)


def _confirm_removal(found: Sequence[ResolvedSitePath]) -> None:
    """Ask on a terminal whether to remove what matches a pattern.

    Raises:
        CommandError: the answer is no.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return
    for place in found:
        print_stderr(f"  {display_place(place)}")
    if not click.confirm(f"Remove these {len(found)}?", err=True):
        raise CommandError(ExitCode.CANCELLED, "nothing was removed")


def _remove(
    client: WorkqueueClient, place: ResolvedSitePath, *, recursive: bool
) -> Callable[[SubmitOptions], Deferred[JobView]]:
    def submit(more: SubmitOptions) -> Deferred[JobView]:
        warning = LINK_WARNINGS.get(JobProtocol.parse(more["protocol"]))
        if recursive and warning is not None:
            print_stderr(f"warning: {warning}")
        return client.remove(place.site.id, place.path, recursive=recursive, **more)

    return submit
