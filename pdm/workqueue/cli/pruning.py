"""``pdm admin prune``: on the machine of the service, not over its API."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from twisted.internet.defer import Deferred
from twisted.internet.task import react

from pdm.workqueue.cli.arguments import DurationType
from pdm.workqueue.config.reader import ConfigError, read_settings
from pdm.workqueue.domain.formatting import display_bytes, display_line

if TYPE_CHECKING:
    from pdm.workqueue.admin.prune import Forecast


@click.command()
@click.argument("config", metavar="CONFIG", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Only print what would be removed; the daemon may run.")
@click.option(
    "--older-than",
    type=DurationType(),
    metavar="DURATION",
    help="Purge jobs that ended so long ago (90d), instead of [retention] jobs.",
)
@click.option("--compact", is_flag=True, help="Then rewrite the SQLite file without its free space.")
def prune(config: Path, dry_run: bool, older_than: float | None, compact: bool) -> None:
    """Remove what is older than the configuration CONFIG says in [retention], or than --older-than.

    Its daemon does the same every ten minutes. On PostgreSQL it may run meanwhile; on SQLite it must be stopped.
    """
    # These import SQLAlchemy and OpenSSL: "pdm --help" must not wait for them.
    from pdm.workqueue.admin import prune as pruning
    from pdm.workqueue.assembly import EXPECTED_ERRORS

    try:
        settings = read_settings(config)
        policy = pruning.policy_of(settings, None if older_than is None else timedelta(seconds=older_than))
        if dry_run:
            _print_forecast(pruning.forecast(settings, policy))
            return
        removed: Mapping[str, int] = _in_reactor(lambda reactor: pruning.prune(reactor, settings, policy))
        words = ", ".join(f"{count:,} {name}" for name, count in sorted(removed.items()))
        click.echo(f"removed: {words or 'nothing'}")
        if compact:
            before, after = pruning.compact(settings)
            click.echo(f"the database file: {display_bytes(before)} before, {display_bytes(after)} now")
    except (ConfigError, pruning.PruneError, *EXPECTED_ERRORS) as error:
        raise click.ClickException(display_line(str(error))) from error


def _in_reactor(work: Callable[[Any], Any]) -> Any:
    """The result of a coroutine that needs the reactor; its exceptions are passed on."""
    outcome: list[Any] = []

    async def run(reactor: Any) -> None:
        try:
            outcome.extend((True, await work(reactor)))
        except Exception as error:
            outcome.extend((False, error))

    try:
        react(lambda reactor: Deferred.fromCoroutine(run(reactor)))
    except SystemExit:
        if not outcome:
            raise
    worked, result = outcome
    if not worked:
        raise result
    return result


def _print_forecast(found: Forecast) -> None:
    survey = found.survey
    stored = "; their receipts are stored" if found.keeps_receipts and survey.jobs else ""
    rows = [
        ("jobs", f"{survey.jobs:,}", f"{survey.elements:,} elements, about {display_bytes(survey.bytes)}{stored}"),
        ("log files", f"{found.log_files:,}", display_bytes(found.log_bytes)),
        ("events", f"{survey.events:,}", ""),
        ("audit records", f"{survey.records:,}", ""),
        ("stored receipts", f"{survey.receipts:,}", ""),
        ("summaries", f"{survey.summaries:,}", ""),
    ]
    click.echo("would remove:")
    for name, count, note in rows:
        click.echo(f"  {name:<16}{count:>14}  {note}".rstrip())
    for kept, why in (
        (survey.kept_for_files, "have temporary files that are not removed yet"),
        (survey.kept_for_others, "are awaited by other jobs"),
    ):
        if kept:
            click.echo(f"kept, although old: {kept:,} jobs {why}")
