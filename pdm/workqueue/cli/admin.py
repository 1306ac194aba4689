"""``pdm admin``: create an instance of the service, and certificates for its users."""

from __future__ import annotations

import getpass
import re
import secrets
import shlex
from pathlib import Path

import click

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
from pdm.workqueue.cli.nodes import node
from pdm.workqueue.cli.pruning import prune
from pdm.workqueue.cli.recovery import backup, check, rekey, restore, upgrade

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
