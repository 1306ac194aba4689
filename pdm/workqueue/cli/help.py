"""``pdm help``."""

from __future__ import annotations

import click

from pdm.workqueue.cli.exit_codes import exit_codes_text

_ENVIRONMENT = """\
Where the service is, who calls, and whom to trust; the first that is set counts:

  service      PDM_URL (https://HOST:PORT)
               url in client.conf
  certificate  PDM_CERT with PDM_KEY (without PDM_KEY the key is in the same file)
               certificate and key in client.conf
               X509_USER_PROXY
               X509_USER_CERT with X509_USER_KEY
               /tmp/x509up_u<uid>
               ~/.globus/usercert.pem with userkey.pem (asks for the passphrase on a terminal)
  authorities  PDM_CA (a file or a grid-style directory)
               ca in client.conf
               X509_CERT_DIR
               ~/.globus/certificates
               /etc/grid-security/certificates

client.conf is ~/.config/pdm/client.conf (below XDG_CONFIG_HOME where that is set):

  [client]
  url = https://workqueue.example.org:8443
  certificate = ~/.globus/usercert.pem
  key = ~/.globus/userkey.pem
  ca = /etc/grid-security/certificates"""


@click.command(name="help")
@click.argument("topic", required=False)
@click.pass_context
def help_command(ctx: click.Context, topic: str | None) -> None:
    """Show a page: exit-codes, environment, or the help of a command."""
    parent = ctx.parent
    assert parent is not None
    assert isinstance(parent.command, click.Group)
    if topic == "exit-codes":
        click.echo(exit_codes_text())
    elif topic == "environment":
        click.echo(_ENVIRONMENT)
    elif topic is None:
        click.echo(parent.get_help())
    else:
        command = parent.command.get_command(parent, topic)
        if command is None:
            raise click.UsageError(f"There is no page {topic!r}: exit-codes, environment or the name of a command.")
        with click.Context(command, info_name=topic, parent=parent) as inner:
            click.echo(inner.get_help())
