"""``pdm admin check``, ``backup``, ``restore``, ``rekey`` and ``upgrade``: on the machine of the service."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
from msgspec.structs import asdict

from pdm.workqueue.cli.arguments import format_option
from pdm.workqueue.cli.exit_codes import ExitCode
from pdm.workqueue.cli.outcome import print_json
from pdm.workqueue.config.reader import ConfigError, read_settings
from pdm.workqueue.config.settings import Settings
from pdm.workqueue.domain.formatting import display_line

_PATH = click.Path(path_type=Path)
config_argument = click.argument("config", metavar="CONFIG", type=_PATH)


@contextlib.contextmanager
def operator_errors() -> Iterator[None]:
    """Turn errors that an operator can correct into one line and exit status 1."""
    # These import SQLAlchemy and OpenSSL: "pdm --help" must not wait for them.
    from pdm.workqueue.admin.rekey import RekeyError
    from pdm.workqueue.assembly import EXPECTED_ERRORS
    from pdm.workqueue.store.backup import BackupError

    try:
        yield
    except (RekeyError, BackupError, *EXPECTED_ERRORS) as error:
        raise click.ClickException(display_line(str(error))) from error


def settings_of(config: Path) -> Settings:
    """The settings of a configuration file.

    Raises:
        click.ClickException: it is not valid.
    """
    try:
        return read_settings(config)
    except ConfigError as error:
        raise click.ClickException(display_line(str(error))) from error


@click.command()
@config_argument
@click.option("-v", "--verbose", is_flag=True, help="Also print what is good.")
@format_option
def check(config: Path, verbose: bool, form: str) -> None:
    """Check everything that the configuration CONFIG names, and print what is wrong, with the remedy, one line each.

    The daemon may run; nothing is changed. The exit status is 0 if nothing is wrong, 1 for errors, with which the
    daemon does not start or jobs fail, and 6 for warnings alone.
    """
    settings = settings_of(config)
    from pdm.workqueue.admin.checks import Level
    from pdm.workqueue.admin.examination import examine

    found = examine(settings)
    if form == "json":
        print_json([asdict(each) for each in found])
    else:
        for each in found:
            if verbose or each.level is not Level.GOOD:
                click.echo(display_line(f"{each.level.value}: {each.line}"))
    levels = {each.level for each in found}
    if levels == {Level.GOOD} and form == "text" and not verbose:
        click.echo(f"{config}: nothing is wrong")
    code = ExitCode.FAILED if Level.ERROR in levels else ExitCode.PARTIAL if Level.WARNING in levels else ExitCode.DONE
    raise SystemExit(code)


@click.command()
@config_argument
@click.argument("directory", metavar="DIR", type=_PATH)
@click.option("--keys", type=_PATH, metavar="FILE", help="Also write private keys and passwords, to this new file.")
@click.option("--logs", is_flag=True, help="Also copy the logs of attempts.")
def backup(config: Path, directory: Path, keys: Path | None, logs: bool) -> None:
    """Back up the instance with the configuration CONFIG to the new directory DIR; its daemon may run.

    DIR gets a consistent copy of the database, the configuration and the files that it names, but no private key: keep
    the file of --keys apart from it.
    """
    settings = settings_of(config)
    with operator_errors():
        from pdm.workqueue.admin.backup import make_backup

        made = make_backup(settings, directory, keys=keys, logs=logs)
    click.echo(f"{made.directory}: {made.summary.jobs} jobs, {made.summary.ended} of them have ended")
    if keys is not None:
        click.echo(f"{keys}: private keys and passwords; keep it apart from the backup")
    for path in made.missing:
        click.echo(f"not in it: {path} (a key or password; --keys FILE writes it)", err=True)
    for path in made.outside:
        click.echo(f"not in it: {path} (of the machine)", err=True)


@click.command()
@click.argument("directory", metavar="BACKUP", type=_PATH)
@click.argument("target", metavar="DIR", type=_PATH)
@click.option("--keys", type=_PATH, metavar="FILE", help="The file of private keys that was written with the backup.")
@click.option("--database", metavar="URL", help="Restore into this empty PostgreSQL database.")
def restore(directory: Path, target: Path, keys: Path | None, database: str | None) -> None:
    """Make a new instance in DIR of the backup in BACKUP. Nothing is overwritten.

    The original daemon must not run any more: both would do the same work. A backup of SQLite can be restored into
    PostgreSQL.
    """
    with operator_errors():
        from pdm.workqueue.admin.restore import restore_backup

        made = restore_backup(directory, target, keys=keys, database=database)
    manifest = made.manifest
    when = f"{manifest.created_at:%Y-%m-%dT%H:%M:%SZ}"
    click.echo(f"An instance of the service is restored in {made.directory}")
    click.echo(f"  as of {when}, from {manifest.host}: {manifest.jobs} jobs, {manifest.ended} of them had ended\n")
    config = shlex.quote(str(made.configuration))
    steps = [f"put {path} there, which is private and was not restored" for path in made.missing]
    if made.lacks_key:
        steps.append(f"if the key of the credentials is lost: pdm admin rekey --lost {config}")
    steps += [f"put the authorities of your sites into {path}" for path in made.outside]
    if not manifest.has_logs:
        steps.append("logs of earlier attempts are not in the backup: 'pdm logs' says so for them")
    steps += [
        "make sure that the original daemon does not run, and never runs again on its old database",
        f"pdm admin check {config}",
        f"twistd --nodaemon pdmworkqueue --config {config}",
    ]
    click.echo("Next:")
    for number, step in enumerate(steps, 1):
        click.echo(f"  {number}. {step}")


@click.command()
@config_argument
@click.option("--lost", is_flag=True, help="The key is lost: delete what it has encrypted. The daemon must be stopped.")
def rekey(config: Path, lost: bool) -> None:
    """Encrypt the stored credentials of the instance with the configuration CONFIG with a new key.

    Its daemon may run. Other nodes of a shared database must be stopped, and get the new key file afterwards.
    """
    settings = settings_of(config)
    path = settings.credentials.key_file
    with operator_errors():
        from pdm.workqueue.admin.rekey import change_key, replace_lost_key

        if lost:
            gone = replace_lost_key(settings)
            if gone.kept is not None:
                click.echo(f"the former key file is now {gone.kept}")
            click.echo(f"{path} has a new key")
            click.echo(
                f"credentials deleted: {gone.credentials}; users store them again (pdm delegate, pdm login,"
                " pdm ssh-key, pdm token, pdm s3-key), and their jobs resume"
            )
            if gone.webhooks:
                click.echo(f"webhooks disabled: {gone.webhooks}; their users remove them, and add them again")
            return
        changed = change_key(settings)
    counts = {kind.value: count for kind, count in changed.counts.items() if count}
    words = ", ".join(f"{count} {kind}{'' if count == 1 else 's'}" for kind, count in counts.items())
    click.echo(f"{path} has a new key; encrypted anew: {words or 'nothing was stored'}")
    click.echo("backups that were made before need their own file of keys: keep that with them")


@click.command()
@config_argument
@click.option("--backup", "directory", type=_PATH, metavar="DIR", help="Where to make the backup.")
def upgrade(config: Path, directory: Path | None) -> None:
    """Upgrade the database of the instance with the configuration CONFIG to this version, with a backup first."""
    settings = settings_of(config)
    with operator_errors():
        from pdm.workqueue.admin.upgrade import upgrade as upgrade_instance

        done = upgrade_instance(settings, directory)
    if done.before is None:
        click.echo("the database has no tables yet: the daemon makes them at its first start")
    elif done.backup is None:
        click.echo(f"nothing to do: the database has schema {done.after}")
    else:
        click.echo(f"backup: {done.backup}")
        click.echo(f"the database has schema {done.after} now; it had {done.before}")
