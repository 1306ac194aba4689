"""``pdm whoami``, ``delegate``, ``credentials``, ``login``, ``logout``, ``ssh-key``, ``token``, ``s3-key``."""

from __future__ import annotations

import sys
from datetime import datetime, timedelta
from pathlib import Path

import click

from pdm.workqueue.cli.arguments import DURATION, END, SitePath, find_site, format_option, resolve_paths
from pdm.workqueue.cli.display import table
from pdm.workqueue.cli.exit_codes import CommandError, ExitCode
from pdm.workqueue.cli.oidc import log_in, log_in_by_token, login_line
from pdm.workqueue.cli.outcome import print_json
from pdm.workqueue.cli.session import run
from pdm.workqueue.domain.formatting import display_line, display_name, display_timestamp
from pdm.workqueue.wire.credentials import CredentialView
from pdm.workqueue.WorkqueueClient import WorkqueueClient


@click.command()
@click.option("--lifetime", type=DURATION, default="12h", help="How long the proxy is valid (30m, 12h; default 12h).")
@format_option
def delegate(lifetime: float, form: str) -> None:
    """Delegate a proxy to the service, so that it can act for me at the sites.

    The service generates a key and I sign a proxy for it; my own key stays here. The proxy expires with my own
    certificate at the latest. Jobs that are held for it resume automatically.
    """

    async def action(client: WorkqueueClient) -> None:
        delegation = await client.delegate(timedelta(seconds=lifetime))
        if form == "json":
            print_json(delegation)
        else:
            click.echo(f"delegated until {display_timestamp(delegation.termination_time)}")

    run(action)


@click.command()
@format_option
def whoami(form: str) -> None:
    """Show my identity and role, and until when my certificate and delegated proxy are valid."""

    async def action(client: WorkqueueClient) -> None:
        me = await client.whoami()
        if form == "json":
            print_json(me)
        else:
            until = me.credential_valid_until
            click.echo(f"{display_name(me.subject)} ({me.role})")
            click.echo(f"certificate valid until {display_timestamp(me.certificate_valid_until)}")
            click.echo(f"delegated {'nothing' if until is None else 'until ' + display_timestamp(until)}")

    run(action)


@click.command()
@click.option("--remove", "removed", type=click.IntRange(min=1), metavar="N", help="Remove number N from the service.")
@format_option
def credentials(removed: int | None, form: str) -> None:
    """Show the credentials that the service holds for me; their secrets are never shown."""

    async def action(client: WorkqueueClient) -> None:
        if removed is not None:
            await client.remove_credential(removed)
            return
        found = await client.credentials()
        if form == "json":
            print_json(found)
            return
        names = {each.id: display_name(each.name) for each in await client.sites()}
        rows = [
            [
                str(each.id),
                each.kind,
                "all" if each.site is None else names.get(each.site, str(each.site)),
                "-" if each.valid_until is None else display_timestamp(each.valid_until),
                display_line(_description(each)),
            ]
            for each in found
        ]
        click.echo(table(["ID", "KIND", "SITE", "VALID UNTIL", "SUBJECT"], rows, right=[0]))
        for login in await client.logins():
            click.echo(login_line(login, names.get(login.site, str(login.site))))

    run(action)


def _description(credential: CredentialView) -> str:
    words = [credential.subject]
    words += [f"({credential.label})"] if credential.label else []
    words += [f"as {credential.account}"] if credential.account else []
    words += [f"VO {each.vo}: {', '.join(each.fqans)}" for each in credential.voms]
    return " ".join(words)


@click.command()
@click.argument("site", metavar="SITE")
@click.option("--username", "-u", help="User name at the MyProxy server (default: prompt for it).")
@click.option("--lifetime", type=DURATION, default="12h", help="How long the proxy is valid (30m, 12h; default 12h).")
@click.option("--oidc", is_flag=True, help="Log in at the site's token issuer instead, in a browser.")
@click.option("--refresh-token", is_flag=True, help="With --oidc: by a refresh token, read from standard input.")
@format_option
def login(site: str, username: str | None, lifetime: float, oidc: bool, refresh_token: bool, form: str) -> None:
    """Log on at SITE: the service fetches a proxy from its MyProxy server, for use at this site only.

    The password is prompted for, or read from standard input if that is not a terminal; the service uses it once and
    does not store it. Jobs that are held for a proxy at SITE resume automatically.

    With --oidc the command shows a page of the site's token issuer and a code: log in there, with any browser. The
    service gets the tokens, and renews them until 'pdm logout SITE --oidc'. With --refresh-token it reads a refresh
    token of the site's client instead, which you have by another way; issuers may then end it wherever else it is used.
    """
    if refresh_token and not oidc:
        raise click.UsageError("--refresh-token needs --oidc.")

    async def action(client: WorkqueueClient) -> None:
        found = await find_site(client, site)
        if refresh_token:
            await log_in_by_token(client, found, lambda: _prompt("Refresh token: ", hidden=True), form)
            return
        if oidc:
            await log_in(client, found, form)
            return
        if found.myproxy is None:
            raise CommandError(
                ExitCode.FAILED, f"site {display_name(found.name)} has no MyProxy server", "Run 'pdm delegate' instead."
            )
        # The owner of the site defines this address: the user must see where the password is sent.
        click.echo(f"MyProxy server of {display_name(found.name)}: {display_line(found.myproxy)}", err=True)
        user = username or _prompt("User name: ", hidden=False)
        password = _prompt("Password: ", hidden=True)
        credential = await client.log_on(found.id, user, password, timedelta(seconds=lifetime))
        if form == "json":
            print_json(credential)
        else:
            until = "" if credential.valid_until is None else f" until {display_timestamp(credential.valid_until)}"
            click.echo(f"logged on at {display_name(site)} as {display_line(credential.subject)}{until}")

    run(action)


@click.command()
@click.argument("site", metavar="SITE")
@click.option("--oidc", is_flag=True, help="Log out at the site's token issuer.")
def logout(site: str, oidc: bool) -> None:
    """Log off at SITE: the service removes the proxy of the logon, or with --oidc the tokens of the login."""

    async def action(client: WorkqueueClient) -> None:
        number = await _site_number(client, site)
        await (client.log_out(number) if oidc else client.log_off(number))

    run(action)


@click.command(name="ssh-key")
@click.argument("site", metavar="[SITE]", required=False)
@click.option("--upload", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Private key to upload.")
@click.option("--account", help="User name at the site: alice, alice@site.org, 'DOMAIN\\alice'.")
@click.option("--label", help="A word by which to find the key.")
@format_option
def ssh_key(site: str | None, upload: Path | None, account: str | None, label: str | None, form: str) -> None:
    """Generate an SSH key in the service, for SITE or for all sites, and print the public key.

    Add that line to ~/.ssh/authorized_keys at the site. The private key never leaves the service.
    """
    try:
        # The service validates the key; here only the file is checked.
        private = None if upload is None else upload.read_text(encoding="utf-8")
    except OSError as error:
        raise click.UsageError(f"{upload} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise click.UsageError(
            f"{upload} is not a text file: upload the file as written by ssh-keygen, or save it as UTF-8."
        ) from error

    async def action(client: WorkqueueClient) -> None:
        number = None if site is None else await _site_number(client, site)
        credential = await client.ssh_key(number, private, account=account, label=label)
        if form == "json":
            print_json(credential)
        else:
            click.echo(credential.public_key)

    run(action)


@click.command()
@click.argument("site", metavar="[SITE]", required=False)
@click.option("--label", help="A word by which to find the token.")
@format_option
def token(site: str | None, label: str | None, form: str) -> None:
    """Store a bearer token in the service, for SITE or for all sites.

    The token is prompted for, or read from standard input if that is not a terminal.
    """
    secret = _prompt("Token: ", hidden=True)

    async def action(client: WorkqueueClient) -> None:
        number = None if site is None else await _site_number(client, site)
        credential = await client.token(secret, number, label=label)
        if form == "json":
            print_json(credential)
        else:
            click.echo(f"stored: {display_line(credential.subject)}{_validity(credential)}")

    run(action)


@click.command(name="s3-key")
@click.argument("site", metavar="[SITE]", required=False)
@click.option("--label", help="A word by which to find the key.")
@click.option("--session-token", is_flag=True, help="The keys are temporary: their session token is prompted for, too.")
@click.option("--until", type=END, metavar="TIME", help="When temporary keys end (12h; 2026-03-02T11:04; UTC).")
@format_option
def s3_key(site: str | None, label: str | None, session_token: bool, until: datetime | None, form: str) -> None:
    """Store an access key of S3 with its secret key in the service, for SITE or for all sites.

    They are prompted for, or read from one line each of standard input if that is not a terminal. Jobs are held when
    temporary keys end, and resume with the next ones.
    """
    access_key = _prompt("Access key: ", hidden=False)
    secret_key = _prompt("Secret key: ", hidden=True)
    token = _prompt("Session token: ", hidden=True) if session_token else None

    async def action(client: WorkqueueClient) -> None:
        number = None if site is None else await _site_number(client, site)
        credential = await client.s3_key(
            access_key, secret_key, number, session_token=token, valid_until=until, label=label
        )
        if form == "json":
            print_json(credential)
        else:
            click.echo(f"stored: {display_line(credential.subject)}{_validity(credential)}")

    run(action)


def _validity(credential: CredentialView) -> str:
    return "" if credential.valid_until is None else f", valid until {display_timestamp(credential.valid_until)}"


def _prompt(prompt: str, *, hidden: bool) -> str:
    """Read a line from the terminal, hidden ones without echo, or from standard input if that is not a terminal."""
    if sys.stdin.isatty():
        answer: str = click.prompt(prompt, hide_input=hidden, err=True, prompt_suffix="")
    else:
        answer = sys.stdin.readline().rstrip("\r\n")
    if not answer:
        raise click.UsageError(f"{prompt.rstrip(': ')} is missing: the input was empty.")
    return answer


async def _site_number(client: WorkqueueClient, site: str) -> int:
    (found,) = await resolve_paths(client, SitePath(site, ""))
    return found.site.id
