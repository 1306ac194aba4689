"""``pdm whoami``, ``delegate``, ``credentials``, ``login``, ``logout``, ``ssh-key``, ``token``, and ``sites``."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import click

from pdm.workqueue.cli.arguments import DURATION, SitePath, find_site, format_option, resolve_paths
from pdm.workqueue.cli.exit_codes import CommandError, ExitCode
from pdm.workqueue.cli.outcome import print_json
from pdm.workqueue.cli.session import run
from pdm.workqueue.cli.text import display_line, display_name, display_timestamp, stdout_table, table
from pdm.workqueue.wire.responses import CredentialView, SiteView
from pdm.workqueue.WorkqueueClient import WorkqueueClient


@click.command()
@click.option("--lifetime", type=DURATION, default="12h", help="How long the proxy is valid (30m, 12h; default 12h).")
@format_option
def delegate(lifetime: float, form: str) -> None:
    """Let the service act for me at the sites, for a while.

    It makes a key and I sign a proxy for it; my own key stays here. The proxy ends with my own certificate at the
    latest. Jobs that are held for want of it go on by themselves.
    """

    async def action(client: WorkqueueClient) -> int:
        delegation = await client.delegate(timedelta(seconds=lifetime))
        if form == "json":
            print_json(delegation)
        else:
            click.echo(f"delegated until {display_timestamp(delegation.termination_time)}")
        return ExitCode.DONE

    run(action)


@click.command()
@format_option
def sites(form: str) -> None:
    """Show the sites and what they offer."""
    show_sites(form)


def _site_state(site: SiteView) -> str:
    """What stands before the description of a site that is not as it should be; of a drained one, the message."""
    if site.state == "ok":
        return ""
    return f"[{site.state}: {site.reason}] " if site.state == "drained" else f"[{site.state}] "


def show_sites(form: str) -> None:
    """Carry out ``pdm sites``, and ``pdm site list``."""

    async def action(client: WorkqueueClient) -> int:
        found = await client.sites()
        if form == "json":
            print_json(found)
            return ExitCode.DONE
        rows = [
            [
                str(site.id),
                display_name(site.name),
                ", ".join(name.lower() for name in site.protocols),
                display_name(site.default_folder),
                display_line(f"{_site_state(site)}{site.description}").strip(),
            ]
            for site in found
        ]
        header = ["ID", "NAME", "PROTOCOLS", "FOLDER", "DESCRIPTION"]
        click.echo(stdout_table(header, rows, right=[0], flexible=[3, 4]))
        return ExitCode.DONE

    run(action)


@click.command()
@format_option
def whoami(form: str) -> None:
    """Show as whom the service sees me."""

    async def action(client: WorkqueueClient) -> int:
        me = await client.whoami()
        if form == "json":
            print_json(me)
        else:
            until = me.credential_valid_until
            click.echo(f"{display_name(me.subject)} ({me.role})")
            click.echo(f"certificate valid until {display_timestamp(me.certificate_valid_until)}")
            click.echo(f"delegated {'nothing' if until is None else 'until ' + display_timestamp(until)}")
        return ExitCode.DONE

    run(action)


@click.command()
@click.option("--remove", "removed", type=click.IntRange(min=1), metavar="N", help="Make the service forget number N.")
@format_option
def credentials(removed: int | None, form: str) -> None:
    """Show what the service may use on my behalf; what is secret of it is never shown."""

    async def action(client: WorkqueueClient) -> int:
        if removed is not None:
            await client.remove_credential(removed)
            return ExitCode.DONE
        found = await client.credentials()
        if form == "json":
            print_json(found)
            return ExitCode.DONE
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
        return ExitCode.DONE

    run(action)


def _description(credential: CredentialView) -> str:
    words = [credential.subject]
    words += [f"({credential.label})"] if credential.label else []
    words += [f"as {credential.account}"] if credential.account else []
    words += [f"VO {each.vo}: {', '.join(each.fqans)}" for each in credential.voms]
    return " ".join(words)


@click.command()
@click.argument("site", metavar="SITE")
@click.option("--username", "-u", help="At the MyProxy server (default: asked for).")
@click.option("--lifetime", type=DURATION, default="12h", help="How long the proxy is valid (30m, 12h; default 12h).")
@format_option
def login(site: str, username: str | None, lifetime: float, form: str) -> None:
    """Log on at SITE: the service fetches a proxy from its MyProxy server, to be used there.

    The password is asked for, or read from standard input where that is no terminal; the service uses it once and
    keeps it nowhere. Jobs that are held for want of a proxy there go on by themselves.
    """

    async def action(client: WorkqueueClient) -> int:
        found = await find_site(client, site)
        if found.myproxy is None:
            raise CommandError(
                ExitCode.FAILED, f"site {display_name(found.name)} has no MyProxy server", "Run 'pdm delegate' instead."
            )
        # Whoever makes a site says where it is: who types a password is told who gets it.
        click.echo(f"MyProxy server of {display_name(found.name)}: {display_line(found.myproxy)}", err=True)
        user = username or _prompt("User name: ", hidden=False)
        password = _prompt("Password: ", hidden=True)
        credential = await client.log_on(found.id, user, password, timedelta(seconds=lifetime))
        if form == "json":
            print_json(credential)
        else:
            until = "" if credential.valid_until is None else f" until {display_timestamp(credential.valid_until)}"
            click.echo(f"logged on at {display_name(site)} as {display_line(credential.subject)}{until}")
        return ExitCode.DONE

    run(action)


@click.command()
@click.argument("site", metavar="SITE")
def logout(site: str) -> None:
    """Log off at SITE: the service forgets the proxy of the logon."""

    async def action(client: WorkqueueClient) -> int:
        await client.log_off(await _site_number(client, site))
        return ExitCode.DONE

    run(action)


@click.command(name="ssh-key")
@click.argument("site", metavar="[SITE]", required=False)
@click.option("--upload", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A private key of mine.")
@click.option("--account", help="Who to be at the site: alice, alice@site.org, 'DOMAIN\\alice'.")
@click.option("--label", help="A word of my own for it.")
@format_option
def ssh_key(site: str | None, upload: Path | None, account: str | None, label: str | None, form: str) -> None:
    """Have the service make an SSH key for SITE (without it, for every site), and print its public part.

    Install that line at the site, in ~/.ssh/authorized_keys. The private part never leaves the service.
    """
    try:
        # The service says what is wrong with a key; here only what is no text at all.
        private = None if upload is None else upload.read_text(encoding="utf-8")
    except OSError as error:
        raise click.UsageError(f"{upload} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise click.UsageError(
            f"{upload} is no plain text: save it as UTF-8, or give the file as ssh-keygen wrote it."
        ) from error

    async def action(client: WorkqueueClient) -> int:
        number = None if site is None else await _site_number(client, site)
        credential = await client.ssh_key(number, private, account=account, label=label)
        if form == "json":
            print_json(credential)
        else:
            click.echo(credential.public_key)
        return ExitCode.DONE

    run(action)


@click.command()
@click.argument("site", metavar="[SITE]", required=False)
@click.option("--label", help="A word of my own for it.")
@format_option
def token(site: str | None, label: str | None, form: str) -> None:
    """Give the service a bearer token for SITE (without it, for every site).

    It is asked for, or read from standard input where that is no terminal.
    """
    secret = _prompt("Token: ", hidden=True)

    async def action(client: WorkqueueClient) -> int:
        number = None if site is None else await _site_number(client, site)
        credential = await client.token(secret, number, label=label)
        if form == "json":
            print_json(credential)
        else:
            until = (
                "" if credential.valid_until is None else f", valid until {display_timestamp(credential.valid_until)}"
            )
            click.echo(f"stored: {display_line(credential.subject)}{until}")
        return ExitCode.DONE

    run(action)


def _prompt(prompt: str, *, hidden: bool) -> str:
    """One line from the terminal, a secret one without echo; from standard input where that is no terminal."""
    if sys.stdin.isatty():
        answer: str = click.prompt(prompt, hide_input=hidden, err=True, prompt_suffix="")
    else:
        answer = sys.stdin.readline().rstrip("\r\n")
    if not answer:
        raise click.UsageError(f"{prompt.rstrip(': ')} is missing: nothing was typed.")
    return answer


async def _site_number(client: WorkqueueClient, site: str) -> int:
    (found,) = await resolve_paths(client, SitePath(site, ""))
    return found.site.id
