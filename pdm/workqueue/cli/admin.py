"""``pdm admin``: create, check, back up, restore, rekey, upgrade and prune an instance, on its own machine."""

from __future__ import annotations

import contextlib
import getpass
import re
import secrets
import shlex
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from msgspec.structs import asdict
from twisted.internet.defer import Deferred
from twisted.internet.task import react

from pdm.workqueue.admin.instance import (
    DEFAULT_PORT,
    Grid,
    Instance,
    InstanceError,
    UserCertificate,
    add_user,
    is_user_name,
    make_instance,
    write_pkcs12,
)
from pdm.workqueue.cli.activity import top, why
from pdm.workqueue.cli.arguments import DurationType, format_option
from pdm.workqueue.cli.exit_codes import ExitCode
from pdm.workqueue.cli.nodes import node
from pdm.workqueue.cli.outcome import print_json
from pdm.workqueue.config.reader import ConfigError, read_settings
from pdm.workqueue.config.settings import Settings
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
    for kept, reason in (
        (survey.kept_for_files, "have temporary files that are not removed yet"),
        (survey.kept_for_others, "are awaited by other jobs"),
    ):
        if kept:
            click.echo(f"kept, although old: {kept:,} jobs {reason}")


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


#: Characters of generated passphrases: none looks like another.
_LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"
_SHORTEST_PASSPHRASE = 12


@click.group()
def admin() -> None:
    """Create and maintain an instance of the service."""


for _command in (check, backup, restore, rekey, upgrade, prune, why, top, node):
    admin.add_command(_command)


@admin.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--port", type=click.IntRange(0, 65535), default=DEFAULT_PORT, show_default=True, help="TCP port; 0: a free one."
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address or name to listen on.")
@click.option("--grid", type=click.Path(path_type=Path), metavar="GRIDDIR", help="Serve this test grid.")
@click.option(
    "--operator", "operators", multiple=True, metavar="SUBJECT", help="Additional operator: /C=XX/O=Grid/CN=Name."
)
def init(directory: Path, port: int, host: str, grid: Path | None, operators: tuple[str, ...]) -> None:
    """Create a ready-to-run instance in the directory DIR.

    It gets a configuration, two sites in local directories (or those of a test grid), its own certificate authority
    with certificates for the host, for an operator and for you, and directories for database and logs.
    """
    try:
        instance = make_instance(
            directory,
            user=_login_name(),
            host=host,
            port=port,
            grid=None if grid is None else Grid.read(grid.absolute()),
            operators=operators,
        )
    except InstanceError as error:
        raise click.ClickException(str(error)) from error
    click.echo(_next_steps(instance, delegates=grid is not None))


@admin.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("name")
@click.option("--p12", is_flag=True, help="Also write NAME.p12 for a browser; of a user with a certificate, only that.")
@click.option("--ask-passphrase", is_flag=True, help="Ask for the passphrase of NAME.p12 instead of generating one.")
def user(directory: Path, name: str, p12: bool, ask_passphrase: bool) -> None:
    """Create a certificate for the user NAME of the instance in DIR."""
    if ask_passphrase and not p12:
        raise click.UsageError("--ask-passphrase is for --p12")
    try:
        if p12:
            _write_browser_file(directory, name, _asked_passphrase() if ask_passphrase else None)
            return
        identity = add_user(directory, name)
    except InstanceError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{identity.certificate}\n{identity.key}")
    click.echo("\nTo call the service as this user:")
    click.echo(_exports(identity, None, directory.absolute() / "certificates" / "ca.crt"))


def _write_browser_file(directory: Path, name: str, asked: str | None) -> None:
    passphrase = asked or "-".join("".join(secrets.choice(_LETTERS) for _ in range(5)) for _ in range(4))
    identity = write_pkcs12(directory, name, passphrase)
    click.echo(identity.pkcs12)
    if asked is None:
        click.echo(f"\nPassphrase, shown only now: {passphrase}")
    click.echo(
        "\nImport the file into the browser as a client certificate (docs/browser.rst), delete it, and trust the"
        f"\nservice's authority there: {directory.absolute() / 'certificates' / 'ca.crt'}"
    )


def _asked_passphrase() -> str:
    while True:
        passphrase: str = click.prompt("Passphrase", hide_input=True, confirmation_prompt=True, err=True)
        if len(passphrase) >= _SHORTEST_PASSPHRASE:
            return passphrase
        click.echo(f"at least {_SHORTEST_PASSPHRASE} characters", err=True)


def _login_name() -> str:
    """The user's login name, reduced to characters that are valid in a certificate's file name."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = ""
    name = re.sub(r"[^A-Za-z0-9._-]", "", name).lstrip("._-")[:40]
    return name if is_user_name(name) else "user"


def _next_steps(instance: Instance, *, delegates: bool) -> str:
    """What to type next; with `delegates` its sites need a delegated proxy."""
    first = instance.identities[0]
    others = ", ".join(identity.name for identity in instance.identities[1:])
    delegate = "  pdm delegate\n" if delegates else ""
    return (
        f"An instance of the service is ready in {instance.directory}\n\n"
        "Start the daemon in its own terminal, to which it writes its log:\n"
        f"  twistd --nodaemon pdmworkqueue --config {shlex.quote(str(instance.config))}\n\n"
        f"Call it as {first.name} (there are also: {others}):\n"
        f"{_exports(first, instance.url, instance.authority)}\n"
        f"{delegate}"
        f"  pdm ls {instance.site}:"
    )


def _exports(identity: UserCertificate, url: str | None, authority: Path) -> str:
    values = {"PDM_URL": url, "PDM_CERT": identity.certificate, "PDM_KEY": identity.key, "PDM_CA": authority}
    return "\n".join(f"  export {name}={shlex.quote(str(value))}" for name, value in values.items() if value)
