"""Options of ``pdm site`` about tokens: the issuer, and the client with which users log in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from pdm.workqueue.domain.formatting import display_line
from pdm.workqueue.wire.sites import OidcView

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
