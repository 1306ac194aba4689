"""``pdm schedule``: jobs that the service submits again and again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click
from attrs import frozen
from msgspec import UNSET
from twisted.internet.defer import Deferred

from pdm.workqueue.cli.arguments import JOB_NUMBER, format_option
from pdm.workqueue.cli.display import print_stderr, stdout_table
from pdm.workqueue.cli.exit_codes import CommandError, ExitCode
from pdm.workqueue.cli.outcome import hint_of, print_json
from pdm.workqueue.cli.session import run
from pdm.workqueue.cli.submission import JobSink, Submission
from pdm.workqueue.domain.enums import JobType
from pdm.workqueue.domain.formatting import display_line, display_name, display_timestamp
from pdm.workqueue.wire.responses import JobView
from pdm.workqueue.wire.schedules import ScheduleRunView, ScheduleView
from pdm.workqueue.WorkqueueClient import SubmitOptions, WorkqueueClient

#: Commands that can be scheduled.
_SCHEDULABLE = ("cp", "rm", "mv", "mkdir")


class _RecordedError(Exception):
    """Carries the body of a submission that was recorded instead of sent."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        super().__init__("recorded")
        self.body = body


class RecordingClient(WorkqueueClient):
    """A client that can record a submission instead of sending it."""

    _recording = False

    async def record(
        self, submit: Callable[[SubmitOptions], Deferred[JobView]], options: SubmitOptions
    ) -> Mapping[str, Any]:
        """The body of ``POST /jobs`` that a function would submit."""
        self._recording = True
        try:
            await submit(options)
        except _RecordedError as recorded:
            return recorded.body
        finally:
            self._recording = False
        raise CommandError(ExitCode.USAGE, "this command submits no job")

    async def _register(self, path: str, body: Mapping[str, Any], key: str) -> JobView:
        if self._recording:
            raise _RecordedError({"type": JobType.parse(path.removeprefix("/")).name, **body})
        return await super()._register(path, body, key)


@frozen
class ScheduleSink(JobSink):
    """Stores a schedule of what a command would submit; with a number, changes that schedule."""

    recurrence: str | None
    timezone: str | None
    form: str
    number: int | None = None

    @property
    def client_type(self) -> type[WorkqueueClient]:
        return RecordingClient

    async def take(
        self, client: WorkqueueClient, submissions: Sequence[Submission], options: Sequence[SubmitOptions]
    ) -> int:
        assert isinstance(client, RecordingClient)
        if len(submissions) != 1:
            raise CommandError(
                ExitCode.USAGE,
                f"these are {len(submissions)} jobs, and a schedule submits one",
                "Name one directory, and choose with --include; or add a schedule for each.",
            )
        body = await client.record(submissions[0].submit, options[0])
        if self.number is not None:
            await _edit(client, self.number, self.form, recurrence=self.recurrence, timezone=self.timezone, job=body)
            return ExitCode.DONE
        assert self.recurrence is not None
        added = await client.add_schedule(self.recurrence, body, timezone=self.timezone)
        first = "" if added.next_due is None else f", first due {display_timestamp(added.next_due)}"
        print_stderr(f"schedule {added.id} added{first}")
        if self.form == "json":
            print_json(added)
        else:
            click.echo(added.id)
        return ExitCode.DONE


@click.group()
def schedule() -> None:
    """Add, list, show, edit, pause, resume or remove a schedule."""


@schedule.command(context_settings={"ignore_unknown_options": True})
@click.argument("when")
@click.argument("words", metavar="-- COMMAND...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--timezone", metavar="ZONE", help="Time zone of WHEN, such as Europe/Paris (default UTC).")
@format_option
@click.pass_context
def add(ctx: click.Context, when: str, words: Sequence[str], timezone: str | None, form: str) -> None:
    r"""Submit a job at each time of WHEN: five fields of cron, or an interval.

    \b
    pdm schedule add '0 3 * * *' -- cp --sync mtime A:/run7/ B:/run7/
    pdm schedule add --timezone Europe/Paris '30 6 * * mon-fri' -- rm -r A:/scratch
    pdm schedule add 'every 6h' -- cp --deadline 5h A:/data B:/data

    COMMAND is one of cp, rm, mv and mkdir, as it is typed after 'pdm'; its options come after the --. A job whose
    earlier run has not ended is not submitted again; of missed times, one is made up for. The number of the
    schedule is printed on stdout.
    """
    _record_command(ctx, words, ScheduleSink(when, timezone, form))


def _record_command(ctx: click.Context, words: Sequence[str], sink: ScheduleSink) -> None:
    """Run a command whose submission the sink takes."""
    # Options before the words make click keep the --.
    name, *arguments = words[1:] if words[0] == "--" and len(words) > 1 else words
    if name not in _SCHEDULABLE:
        raise click.UsageError(f"{name!r} cannot be scheduled: use one of {', '.join(_SCHEDULABLE)}.")
    root = ctx.find_root()
    assert isinstance(root.command, click.Group)
    command = root.command.get_command(root, name)
    assert command is not None
    with command.make_context(name, list(arguments), parent=root, obj=sink) as inner:
        command.invoke(inner)


@schedule.command(context_settings={"ignore_unknown_options": True})
@click.argument("number", metavar="N", type=JOB_NUMBER)
@click.argument("words", metavar="[-- COMMAND...]", nargs=-1, type=click.UNPROCESSED)
@click.option("--when", help="Five fields of cron, or an interval.")
@click.option("--timezone", metavar="ZONE", help="Time zone of WHEN, such as Europe/Paris.")
@format_option
@click.pass_context
def edit(
    ctx: click.Context, number: int, words: Sequence[str], when: str | None, timezone: str | None, form: str
) -> None:
    r"""Change when schedule N submits its job, or the job; what is not given stays.

    \b
    pdm schedule edit 3 --when '0 4 * * *'
    pdm schedule edit 3 -- cp --sync mtime A:/run8/ B:/run8/

    Its history stays. The job of a run that has not ended is not changed. COMMAND is as in 'pdm schedule add'.
    """
    if words:
        _record_command(ctx, words, ScheduleSink(when, timezone, form, number))
        return
    if when is None and timezone is None:
        raise click.UsageError("Nothing is to be changed: give --when, --timezone or -- COMMAND.")
    run(lambda client: _edit(client, number, form, recurrence=when, timezone=timezone))


async def _edit(
    client: WorkqueueClient,
    number: int,
    form: str,
    *,
    recurrence: str | None,
    timezone: str | None,
    job: Mapping[str, Any] | None = None,
) -> None:
    found = await client.edit_schedule(number, recurrence=recurrence, timezone=timezone, job=job)
    due = "it is paused" if found.next_due is None else f"next due {display_timestamp(found.next_due)}"
    print_stderr(f"schedule {number} changed, {due}")
    if form == "json":
        print_json(found)


@schedule.command(name="list")
@format_option
def list_(form: str) -> None:
    """Show my schedules, each with its last run."""

    async def action(client: WorkqueueClient) -> None:
        found = await client.schedules()
        if form == "json":
            print_json(found)
            return
        rows = [
            [
                str(each.id),
                display_line(_when(each)),
                "paused" if each.next_due is None else display_timestamp(each.next_due),
                "" if each.last_run is None else _run_words(each.last_run),
                display_line(_what(each.job)),
            ]
            for each in found
        ]
        if rows:
            click.echo(stdout_table(["ID", "WHEN", "NEXT", "LAST RUN", "WHAT"], rows, right=[0], flexible=[3, 4]))

    run(action)


@schedule.command()
@click.argument("number", metavar="N", type=JOB_NUMBER)
@format_option
def show(number: int, form: str) -> None:
    """Show schedule N with its last 100 runs, the newest first."""

    async def action(client: WorkqueueClient) -> None:
        found = await client.schedule(number)
        if form == "json":
            print_json(found)
            return
        places = await _places(client, found.job)
        click.echo(f"schedule {found.id}  {display_line(_when(found))}")
        click.echo(f"job       {found.job['type']} {places}")
        if found.job.get("label"):
            click.echo(f"label     {display_name(str(found.job['label']))}")
        due = "paused" if found.next_due is None else display_timestamp(found.next_due)
        click.echo(f"next      {due}")
        if found.hold is not UNSET:
            click.echo(f"held      {found.hold.code}: {display_line(found.hold.reason)}")
            click.echo(f"          {hint_of(found.hold.code, found.hold.hint, str(found.job['type']))}")
        rows = [[display_timestamp(each.due_at), _run_words(each)] for each in found.runs or ()]
        if rows:
            click.echo(stdout_table(["DUE", "RUN"], rows, flexible=[1]))

    run(action)


def _when(found: ScheduleView) -> str:
    return found.recurrence if found.recurrence.startswith("every ") else f"{found.recurrence} {found.timezone}"


def _run_words(each: ScheduleRunView) -> str:
    """``job 12 DONE``, ``SKIPPED: overlap: ...``."""
    if each.job is not None:
        return f"job {each.job} {each.status or ''}".strip()
    return display_line(f"{each.outcome}: {each.message or ''}")


def _what(job: Mapping[str, Any]) -> str:
    """``COPY 1:/data 2:/copy``."""
    ends = [("src_siteid", "src_filepath"), ("dst_siteid", "dst_filepath")]
    places = [f"{job.get(site, job['src_siteid'])}:{job[path]}" for site, path in ends if job.get(path) is not None]
    return " ".join([str(job["type"]), *places])


async def _places(client: WorkqueueClient, job: Mapping[str, Any]) -> str:
    """The places of a job, with the names of its sites where these exist."""
    names = {each.id: each.name for each in await client.sites()}
    ends = [("src_siteid", "src_filepath"), ("dst_siteid", "dst_filepath")]
    words = []
    for site, path in ends:
        if job.get(path) is not None:
            number = int(job.get(site, job["src_siteid"]))
            words.append(f"{display_name(str(names.get(number, number)))}:{display_name(str(job[path]))}")
    return " -> ".join(words)


@schedule.command()
@click.argument("number", metavar="N", type=JOB_NUMBER)
def pause(number: int) -> None:
    """Pause schedule N; times that pass meanwhile are not made up for."""

    async def action(client: WorkqueueClient) -> None:
        await client.pause_schedule(number)
        print_stderr(f"schedule {number} is paused")

    run(action)


@schedule.command()
@click.argument("number", metavar="N", type=JOB_NUMBER)
def resume(number: int) -> None:
    """Resume schedule N."""

    async def action(client: WorkqueueClient) -> None:
        found = await client.resume_schedule(number)
        due = "" if found.next_due is None else f", next due {display_timestamp(found.next_due)}"
        print_stderr(f"schedule {number} is resumed{due}")

    run(action)


@schedule.command()
@click.argument("number", metavar="N", type=JOB_NUMBER)
def remove(number: int) -> None:
    """Remove schedule N with its history; the jobs of its runs stay."""

    async def action(client: WorkqueueClient) -> None:
        await client.remove_schedule(number)
        print_stderr(f"schedule {number} removed")

    run(action)
