"""Tokens: options of ``pdm site`` for an issuer and its client, and ``pdm login SITE --oidc``."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click

from pdm.workqueue.cli.exit_codes import CommandError, ExitCode
from pdm.workqueue.cli.outcome import print_json
from pdm.workqueue.client.errors import RequestRefusedError
from pdm.workqueue.domain.formatting import display_line, display_name, display_timestamp
from pdm.workqueue.domain.oidc import LoginState
from pdm.workqueue.wire.credentials import LoginView
from pdm.workqueue.wire.sites import OidcView, SiteView
from pdm.workqueue.WorkqueueClient import WorkqueueClient

_Command = TypeVar("_Command", bound=Callable[..., Any])
#: Parameter of the command → key of the body.
_KEYS = {
    "oidc": "issuer",
    "oidc_client": "client_id",
    "oidc_scope": "scope",
    "oidc_base_path": "base_path",
}


def oidc_options(command: _Command) -> _Command:
    """Add the options to a command."""
    for decorator in (
        click.option("--oidc-exchange/--no-oidc-exchange", default=None, help="Exchange access tokens (RFC 8693)."),
        click.option("--oidc-base-path", metavar="DIR", help="Directory that the paths of scopes are relative to."),
        click.option("--oidc-audience", metavar="AUD", multiple=True, help="Audience of tokens; repeatable."),
        click.option("--oidc-scope", metavar="SCOPES", help="Scopes that a login asks for."),
        click.option(
            "--oidc-secret-file",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="File with the secret of the client.",
        ),
        click.option("--oidc-client", metavar="ID", help="Client that the service is registered as at the issuer."),
        click.option("--oidc", metavar="URL", help="Issuer of the site's tokens; '' removes all about tokens."),
    ):
        command = decorator(command)
    return command


def oidc_body(given: dict[str, Any], before: OidcView | None) -> dict[str, Any] | None:
    """The key ``oidc`` of the body: what the site has, with the options that are given; None to remove it."""
    if given["oidc"] == "":
        return None
    body: dict[str, Any] = {}
    if before is not None:
        body = {
            "issuer": before.issuer,
            "client_id": before.client_id,
            "scope": before.scope,
            "audience": before.audience,
            "base_path": before.base_path,
            "exchange": before.exchange,
        }
    for option, key in _KEYS.items():
        if given[option] is not None:
            body[key] = given[option] or None
    if given["oidc_audience"]:
        body["audience"] = [each for each in given["oidc_audience"] if each]
    if given["oidc_exchange"] is not None:
        body["exchange"] = given["oidc_exchange"]
    if given["oidc_secret_file"] is not None:
        try:
            body["client_secret"] = given["oidc_secret_file"].read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise click.UsageError(f"--oidc-secret-file cannot be read: {error}") from error
    return body


def has_oidc_options(given: dict[str, Any]) -> bool:
    """Whether any of the options is given."""
    return any(value not in (None, ()) for name, value in given.items() if name.startswith("oidc"))


def print_oidc(oidc: OidcView) -> None:
    """What a site says about tokens."""
    if oidc.issuer is not None:
        client = "" if oidc.client_id is None else f", client {oidc.client_id}{' with a secret' * oidc.has_secret}"
        click.echo(f"tokens    of {display_line(oidc.issuer)}{display_line(client)}")
    if oidc.client_id is not None:
        click.echo(f"scope     {display_line(oidc.scope)}{', by token exchange' if oidc.exchange else ''}")
    for audience in oidc.audience:
        click.echo(f"audience  {display_line(audience)}")
    if oidc.base_path is not None:
        click.echo(f"base path {display_line(oidc.base_path)}, of the scopes in tokens")


#: Status of the service's answer while the issuer does not answer.
_ISSUER_AWAY = 424
_LONGEST_PAUSE_S = 60


def _show_issuer(site: SiteView) -> str:
    """Show the issuer of a site; returns the name of the site."""
    name = display_name(site.name)
    if site.oidc is None or site.oidc.issuer is None or site.oidc.client_id is None:
        raise CommandError(ExitCode.FAILED, f"site {name} has no token issuer to log in at", f"Run 'pdm token {name}'.")
    # The owner of the site chooses the issuer: the user must see where the password is asked for.
    click.echo(f"token issuer of {name}: {display_line(site.oidc.issuer)}", err=True)
    return name


async def log_in_by_token(client: WorkqueueClient, site: SiteView, read_token: Callable[[], str], form: str) -> None:
    """Log in by a refresh token, which is asked for once the issuer is shown: that gets it."""
    name = _show_issuer(site)
    _print_login(await client.put_refresh_token(site.id, read_token()), name, form)


async def log_in(client: WorkqueueClient, site: SiteView, form: str) -> None:
    """Begin a login, show what the user has to do, and wait until it is done or the code has ended."""
    name = _show_issuer(site)
    login = await client.begin_login(site.id)
    _show_code(login)
    pause_s, until = login.interval or 5, login.code_valid_until or datetime.now(UTC)
    while login.state == LoginState.WAITING:
        await client.pause(pause_s)
        try:
            login = await client.continue_login(site.id)
            pause_s = login.interval or pause_s
        except RequestRefusedError as error:
            if error.status != _ISSUER_AWAY or datetime.now(UTC) >= until:
                raise
            click.echo(f"{display_line(str(error))}; asking again", err=True)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    _print_login(login, name, form)


def _print_login(login: LoginView, name: str, form: str) -> None:
    if form == "json":
        print_json(login)
        return
    click.echo(f"logged in at {name} as {display_line(login.subject or '?')}, {_validity(login)}")


def _show_code(login: LoginView) -> None:
    click.echo("To log in, open this page in a browser on any machine:", err=True)
    click.echo(f"    {display_line(login.verification_uri_complete or login.verification_uri or '')}", err=True)
    if login.verification_uri_complete is not None:
        click.echo(f"and compare the code (or enter it at {display_line(login.verification_uri or '')}):", err=True)
    else:
        click.echo("and enter the code:", err=True)
    click.echo(f"    {display_line(login.user_code or '')}", err=True)
    if login.code_valid_until is not None:
        click.echo(f"The code is valid until {display_timestamp(login.code_valid_until)}.", err=True)


def _validity(login: LoginView) -> str:
    if login.next_renewal is not None:
        return "the service renews the token"
    end = "" if login.valid_until is None else f" until {display_timestamp(login.valid_until)}"
    return f"the token is valid{end}; it is not renewed, for the issuer gave no refresh token (scope offline_access)"


def login_line(login: LoginView, name: str) -> str:
    """A login, for the list of credentials; ``name``: of the site."""
    line = f"login at {login.issuer} for {name}: {login.state}"
    if login.subject:
        line += f", {login.subject}"
    if login.next_renewal is not None:
        line += f", renewed at {display_timestamp(login.next_renewal)}"
    if login.failure:
        line += f" ({login.failure})"
    if login.state in (LoginState.ENDED, LoginState.WAITING):
        line += f"; run 'pdm login {name} --oidc'"
    return display_line(line)
