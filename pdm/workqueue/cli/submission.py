"""``pdm cp``, ``mv``, ``mkdir``, ``check``: submit jobs, then wait for them with progress on stderr."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn, Protocol

import click
from attrs import evolve, frozen
from twisted.internet.defer import CancelledError, Deferred

from pdm.workqueue.cli.arguments import (
    SITE_PATH,
    ResolvedSitePath,
    SitePath,
    merged_options,
    protocol_for,
    resolve_paths,
    submit_options,
)
from pdm.workqueue.cli.batches import PathPairs, ReceiptFiles, items_copy, pairs_copy, read_check, read_pairs, read_redo
from pdm.workqueue.cli.copy_options import CopyCommand, copy_options, copy_settings
from pdm.workqueue.cli.display import print_stderr
from pdm.workqueue.cli.exit_codes import CommandError, ExitCode
from pdm.workqueue.cli.listing import Lister
from pdm.workqueue.cli.outcome import common_exit_code, follow, follow_jobs, print_json, report_end
from pdm.workqueue.cli.places import base_name, destination_paths, display_place, has_pattern
from pdm.workqueue.cli.session import error_text, exit_code_of, print_error, run
from pdm.workqueue.client.errors import WorkqueueClientError
from pdm.workqueue.domain.enums import JobProtocol, JobStatus
from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.domain.formatting import display_line
from pdm.workqueue.wire.responses import JobView
from pdm.workqueue.WorkqueueClient import SubmitOptions, WorkqueueClient

#: Jobs that one command submits.
_MAX_JOBS = 1000


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
        max_active: int | None,
        after: tuple[int, ...],
        after_any: bool,
        deadline: str | None,
        notify: str | None,
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
        if max_active is not None:
            submission["max_active"] = max_active
        if after:
            submission["after"] = after
        if after_any:
            submission["after_any"] = True
        if deadline is not None:
            submission["deadline"] = deadline
        if notify is not None:
            submission["notify"] = [each.strip() for each in notify.split(",")]
        extra = merged_options(options)
        if mover is not None:
            extra["mover"] = mover
        if extra:
            submission["options"] = extra
        return cls(submission, protocol, mover, not no_wait, timeout, form)


@frozen
class Submission:
    """One job of a command.

    Attributes:
        places: source, and destination if there is one.
        submit: registers it, given the common options.
        into: of a copy: the same into the destination; for a file, if the destination turns out to be a directory.
    """

    places: Sequence[ResolvedSitePath]
    submit: Callable[[SubmitOptions], Deferred[JobView]]
    into: Submission | None = None


class JobSink(Protocol):
    """Takes the jobs of a command instead of the service: the object of the command's context."""

    @property
    def client_type(self) -> type[WorkqueueClient]:
        """The client that the command gets."""

    async def take(
        self, client: WorkqueueClient, submissions: Sequence[Submission], options: Sequence[SubmitOptions]
    ) -> int:
        """Take the jobs, with the options of each; returns the exit code."""


#: Finds the jobs of a command, given the client and the resolved places.
Planner = Callable[[WorkqueueClient, list[ResolvedSitePath]], Awaitable[list[Submission]]]


def submit_and_follow(places: Sequence[SitePath], request: SubmissionRequest, plan: Planner) -> NoReturn:
    """Look up the sites, submit the jobs, and follow them unless ``--no-wait`` is given.

    If the context of the command has a `JobSink`, that gets the jobs.
    """
    sink: JobSink | None = click.get_current_context().obj

    async def action(client: WorkqueueClient) -> int:
        submissions = await plan(client, await resolve_paths(client, *places))
        if len(submissions) > _MAX_JOBS:
            raise CommandError(
                ExitCode.USAGE,
                f"these are {len(submissions)} jobs",
                f"One command submits {_MAX_JOBS} at most: name the directory, and choose with --include.",
            )
        several = len(submissions) > 1
        jobs: list[JobView] = []
        codes: list[int] = []
        # All protocols are chosen before anything is submitted.
        protocols = [
            protocol_for([place.site for place in each.places], request.protocol, request.mover) for each in submissions
        ]
        if sink is not None:
            options: list[SubmitOptions] = [{**request.submission, "protocol": protocol} for protocol in protocols]
            return await sink.take(client, submissions, options)
        for submission, protocol in zip(submissions, protocols, strict=True):
            what = f": {display_place(submission.places[0])}" if several else ""
            try:
                jobs.append(await _submit(submission, protocol, request, what))
            except WorkqueueClientError as error:
                if not several:
                    raise
                print_error(error_text(error), error.advice)
                codes.append(exit_code_of(error))
        if not request.wait:
            _print_submitted(jobs, request.form, several=several)
        elif len(jobs) == 1 and (into := submissions[0].into) is not None:
            codes.append(await _follow_copy(client, jobs[0], into, protocols[0], request))
        elif jobs:
            codes.append(await follow_jobs(client, [job.id for job in jobs], request.timeout_s, request.form))
        return common_exit_code([*codes, ExitCode.DONE] if jobs and not request.wait else codes)

    run(action, WorkqueueClient if sink is None else sink.client_type)


async def _follow_copy(
    client: WorkqueueClient, job: JobView, into: Submission, protocol: JobProtocol, request: SubmissionRequest
) -> int:
    """Follow a copy; that of a file to a path that is a directory is submitted once more, into the directory."""
    ended = await follow(client, job.id, request.timeout_s, request.form)
    if ended.status == JobStatus.FAILED.name and ended.num_failed == 1:
        (failed,) = await client.elements(job.id, status=JobStatus.FAILED, limit=1)
        is_directory = failed.failure is not None and failed.failure.code == FailureCode.IS_A_DIRECTORY
        if is_directory and failed.dst_filepath == job.dst_filepath:
            print_stderr(f"job {job.id}: {display_place(into.places[-1])} is a directory: the file goes into it")
            again = await _submit(into, protocol, request, "")
            return await follow_jobs(client, [again.id], request.timeout_s, request.form)
    return await report_end(client, ended, request.form)


async def _submit(submission: Submission, protocol: JobProtocol, request: SubmissionRequest, what: str) -> JobView:
    try:
        job = await submission.submit({**request.submission, "protocol": protocol})
    except CancelledError:
        raise CommandError(
            ExitCode.INTERRUPTED, "interrupted while submitting", "Run 'pdm jobs' to see what was registered."
        ) from None
    print_stderr(f"job {job.id} submitted{what}")
    for warning in job.warnings or ():
        print_stderr(f"warning: {display_line(warning)}")
    if not request.wait:
        for reason in job.waiting or ():
            print_stderr(f"job {job.id} waits: {display_line(reason)}")
    return job


def _print_submitted(jobs: Sequence[JobView], form: str, *, several: bool) -> None:
    """Data for scripts: ``id=$(pdm cp --no-wait ...)``."""
    if form == "json":
        print_json(jobs if several else jobs[0])
    else:
        for job in jobs:
            click.echo(job.id)


@click.command(cls=CopyCommand)
@click.argument("sources", metavar="SOURCE...", type=SITE_PATH, nargs=-1)
@click.argument("destination", type=SITE_PATH, required=False)
@click.option(
    "--batch",
    metavar="FILE",
    help="Copy the pairs of paths in FILE (- for stdin), 'SRC DST' a line, from below SOURCE to below DESTINATION.",
)
@click.option("-0", "--null", is_flag=True, help="With --batch: each path is followed by a NUL; nothing is quoted.")
@click.option("--redo", metavar="RECEIPT", help="Copy what is not done in a receipt, which is verified first.")
@click.option("--ca", metavar="PATH", help="With --redo: the trusted authorities, a PEM file or a directory.")
@click.option(
    "-r", "-R", "--recursive", is_flag=True, expose_value=False, help="Allowed; directories are always copied whole."
)
@copy_options
@click.option(
    "--move", is_flag=True, help="Remove each file from the source once its copy is verified, as 'pdm mv' does."
)
@submit_options
def cp(
    sources: Sequence[SitePath],
    destination: SitePath | None,
    batch: str | None,
    null: bool,
    redo: str | None,
    ca: str | None,
    move: bool,
    **given: Any,
) -> None:
    r"""Copy files and directory trees from each SOURCE to DESTINATION.

    A file goes to DESTINATION, or into it if that is a directory or ends in /. The content of a directory goes to
    DESTINATION, whether it exists or not: the same command twice changes nothing. SITE: as DESTINATION is the site's
    default directory, in which the source keeps its name.

    Several SOURCEs, and patterns such as 'A:/run7/*.root', keep their names below DESTINATION, which must exist or end
    in /; of a SOURCE that ends in / only the content is copied. To name a file with * ? or [, put a backslash before
    it. Quote patterns, for your shell does not know the files of a site.
    """
    settings = copy_settings(given, move=move)
    request = SubmissionRequest.read(**given)
    if ca is not None and redo is None:
        raise click.UsageError("--ca requires --redo.")
    if null and batch is None:
        raise click.UsageError("-0 requires --batch.")
    if redo is not None:
        if destination is not None or batch is not None:
            raise click.UsageError("--redo takes all paths from the receipt: omit the others.")
        _copy_left(redo, ca, settings, request)
    if not sources or destination is None:
        raise click.UsageError("Missing argument: name a SOURCE and a DESTINATION, as SITE:path.")
    if batch is None:
        copy_all(sources, destination, settings, request)
    if len(sources) > 1:
        raise click.UsageError("--batch takes one SOURCE, below which its paths are.")
    _copy_batch(lambda: read_pairs(batch, null=null), sources[0], destination, settings, request)


def copy_all(
    sources: Sequence[SitePath], destination: SitePath, settings: Mapping[str, Any], request: SubmissionRequest
) -> NoReturn:
    """Submit a copy for each source, with the ``extra_opts`` `settings`."""
    several = len(sources) > 1 or has_pattern(sources[0].path)

    async def plan(client: WorkqueueClient, places: list[ResolvedSitePath]) -> list[Submission]:
        lister = Lister(client, request.protocol, request.mover)
        found, target = await lister.expanded(places[:-1]), places[-1]
        paths = await destination_paths(found, target, destination, several=several, is_directory=lister.is_directory)

        def copy_to(source: ResolvedSitePath, path: str) -> Submission:
            place = evolve(target, path=path)
            can_go_into = not (several or source.path.endswith("/") or path.endswith("/"))
            into = copy_to(source, path + "/") if can_go_into else None
            return Submission([source, place], _copy(client, source, place, settings), into)

        return [copy_to(source, path) for source, path in zip(found, paths, strict=True)]

    submit_and_follow([*sources, destination], request, plan)


def _copy_batch(
    read: Callable[[], PathPairs],
    source: SitePath,
    destination: SitePath,
    settings: Mapping[str, Any],
    request: SubmissionRequest,
) -> NoReturn:
    async def plan(client: WorkqueueClient, places: list[ResolvedSitePath]) -> list[Submission]:
        return [Submission(places, pairs_copy(client, places, read(), settings))]

    submit_and_follow([source, destination], request, plan)


def _copy_left(name: str, ca: str | None, settings: Mapping[str, Any], request: SubmissionRequest) -> NoReturn:
    redo = _read(lambda: read_redo(name, ca))
    if not redo.parts:
        print_stderr("nothing to redo: all files of the receipt are done")
        raise SystemExit(ExitCode.DONE)
    _submit_files(redo, settings, request)


def _read(read: Callable[[], ReceiptFiles]) -> ReceiptFiles:
    try:
        return read()
    except CommandError as error:
        print_error(error.what, error.advice)
        raise SystemExit(error.code) from None


def _submit_files(files: ReceiptFiles, settings: Mapping[str, Any], request: SubmissionRequest) -> NoReturn:
    async def plan(client: WorkqueueClient, places: list[ResolvedSitePath]) -> list[Submission]:
        every = {**files.settings, **settings}
        return [Submission(places, items_copy(client, places, part, every)) for part in files.parts]

    same = request.protocol or files.protocol
    submit_and_follow([files.source, files.destination], evolve(request, protocol=same), plan)


@click.command()
@click.argument("receipt")
@click.option(
    "--at",
    type=click.Choice(["destination", "source"]),
    default="destination",
    show_default=True,
    help="The end at which the files are checked.",
)
@click.option("--ca", metavar="PATH", help="The authorities that the receipt is verified with: a file or a directory.")
@submit_options
def check(receipt: str, at: Literal["source", "destination"], ca: str | None, **common: Any) -> None:
    """Prove the files in RECEIPT again, by size and checksum, at the site to which they were copied.

    The receipt is verified first. Nothing is written. Files that are not done in the receipt are left out, and so are
    directories. Exits with 6 if a file is missing, is another one, or cannot be checked.
    """
    request = SubmissionRequest.read(**common)
    files = _read(lambda: read_check(receipt, ca, at))
    if files.others:
        print_stderr(f"{files.others:,} files are not done in the receipt, and are left out")
    if not files.parts:
        print_stderr("nothing to check: no file of the receipt is done")
        raise SystemExit(ExitCode.DONE)
    if files.without_checksum:
        print_stderr(f"{files.without_checksum:,} files have no checksum in the receipt: only their sizes are compared")
    _submit_files(files, {}, request)


def _copy(
    client: WorkqueueClient, source: ResolvedSitePath, target: ResolvedSitePath, settings: Mapping[str, Any]
) -> Callable[[SubmitOptions], Deferred[JobView]]:
    def submit(more: SubmitOptions) -> Deferred[JobView]:
        options = {**more.get("options", {}), **settings}
        whole: SubmitOptions = {**more, "options": options}
        return client.copy(source.site.id, source.path, target.site.id, target.path, **whole)

    return submit


@click.command(cls=CopyCommand)
@click.argument("sources", metavar="SOURCE...", type=SITE_PATH, nargs=-1, required=True)
@click.argument("destination", type=SITE_PATH)
@copy_options
@submit_options
def mv(sources: Sequence[SitePath], destination: SitePath, **given: Any) -> None:
    """Rename each SOURCE to DESTINATION at the same site, or move it to another site.

    A file is moved to another site by a copy, and removed from the source once the copy is verified; empty source
    directories are removed last. The options of a copy are for that; a rename knows --overwrite never and always.
    DESTINATION is completed as by 'pdm cp'.
    """
    if any(not base_name(source.path) for source in sources):
        raise click.UsageError("mv needs a path: it does not move a whole site.")
    settings = copy_settings(given, move=True)
    request = SubmissionRequest.read(**given)
    if len({source.site for source in sources} | {destination.site}) > 1:
        copy_all(sources, destination, settings, request)
    if not destination.path:
        raise click.UsageError("mv needs a new path.")
    if settings.keys() - {"move", "overwrite"} or settings.get("overwrite") == "different":
        raise click.UsageError(
            "within a site mv renames: of the options of a copy it knows --overwrite never and always."
        )
    several = len(sources) > 1 or has_pattern(sources[0].path)

    async def plan(client: WorkqueueClient, places: list[ResolvedSitePath]) -> list[Submission]:
        lister = Lister(client, request.protocol, request.mover)
        found, target = await lister.expanded(places[:-1]), places[-1]
        paths = (
            await destination_paths(found, target, destination, several=True, is_directory=lister.is_directory)
            if several or destination.path.endswith("/")
            else [target.path]
        )
        overwrite = settings.get("overwrite")
        return [
            Submission([source], _rename(client, source, path, overwrite))
            for source, path in zip(found, paths, strict=True)
        ]

    submit_and_follow([*sources, destination], request, plan)


def _rename(
    client: WorkqueueClient, source: ResolvedSitePath, path: str, overwrite: Any
) -> Callable[[SubmitOptions], Deferred[JobView]]:
    return lambda more: client.rename(source.site.id, source.path, path, overwrite=overwrite, **more)


@click.command()
@click.argument("places", metavar="PLACE...", type=SITE_PATH, nargs=-1, required=True)
@click.option("-p", "--parents", is_flag=True, help="Create missing parents; an existing directory is no error.")
@submit_options
def mkdir(places: Sequence[SitePath], parents: bool, **common: Any) -> None:
    """Create a directory at each PLACE."""

    async def plan(client: WorkqueueClient, found: list[ResolvedSitePath]) -> list[Submission]:
        return [Submission([place], _make_directory(client, place, parents=parents)) for place in found]

    submit_and_follow(places, SubmissionRequest.read(**common), plan)


def _make_directory(
    client: WorkqueueClient, place: ResolvedSitePath, *, parents: bool
) -> Callable[[SubmitOptions], Deferred[JobView]]:
    return lambda more: client.mkdir(place.site.id, place.path, parents=parents, **more)
