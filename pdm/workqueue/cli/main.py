"""``pdm``: the table of its commands, and ``pdm help``.

The module of a command is imported only when it is used, for a fast start.
"""

from __future__ import annotations

import difflib
import gc
import sys
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper
from types import ModuleType
from typing import NoReturn

import click
from click.exceptions import NoArgsIsHelpError

from pdm.workqueue import __version__
from pdm.workqueue.cli.exit_codes import exit_codes_text
from pdm.workqueue.installation import explain_missing

ENVIRONMENT_HELP = """\
Service, certificate and trusted authorities; the first one that is set is used:

  service      PDM_URL (https://HOST:PORT)
               url in client.conf
  certificate  PDM_CERT with PDM_KEY (without PDM_KEY the key is in the same file)
               certificate and key in client.conf
               X509_USER_PROXY
               X509_USER_CERT with X509_USER_KEY
               /tmp/x509up_u<uid>
               ~/.globus/usercert.pem with userkey.pem (prompts for the passphrase on a terminal)
  authorities  PDM_CA (a file or a grid-style directory)
               ca in client.conf
               X509_CERT_DIR
               ~/.globus/certificates
               /etc/grid-security/certificates

client.conf is ~/.config/pdm/client.conf (below XDG_CONFIG_HOME if that is set):

  [client]
  url = https://workqueue.example.org:8443
  certificate = ~/.globus/usercert.pem
  key = ~/.globus/userkey.pem
  ca = /etc/grid-security/certificates"""


@click.command(name="help")
@click.argument("topic", required=False)
@click.pass_context
def help_command(ctx: click.Context, topic: str | None) -> None:
    """Show a help page: exit-codes, environment, or a command."""
    parent = ctx.parent
    assert parent is not None
    assert isinstance(parent.command, click.Group)
    if topic == "exit-codes":
        click.echo(exit_codes_text())
    elif topic == "environment":
        click.echo(ENVIRONMENT_HELP)
    elif topic is None:
        click.echo(parent.get_help())
    else:
        command = parent.command.get_command(parent, topic)
        if command is None:
            raise click.UsageError(f"No help page {topic!r}: use exit-codes, environment or the name of a command.")
        with click.Context(command, info_name=topic, parent=parent) as inner:
            click.echo(inner.get_help())


#: Command → module and name in it, one line of help.
_COMMANDS: dict[str, tuple[str, str]] = {
    "ls": ("listing:ls", "List files and directories."),
    "stat": ("listing:stat", "Show type, size, mode and time of files and directories."),
    "du": ("listing:du", "Show how many files and bytes are in directories."),
    "cp": ("submission:cp", "Copy files and directory trees."),
    "rm": ("removal:rm", "Remove files, or with -r directory trees."),
    "mv": ("submission:mv", "Rename at a site, or move to another site."),
    "mkdir": ("submission:mkdir", "Create directories."),
    "jobs": ("jobs:jobs", "Show my jobs."),
    "status": ("jobs:status", "Show the status of jobs, and their failures."),
    "errors": ("receipts:errors", "Show the failures of a job by code, and what to do."),
    "receipt": ("receipts:receipt", "Get or verify the receipt of a job: what became of every file."),
    "check": ("submission:check", "Prove the files in a receipt again, at their site."),
    "wait": ("jobs:wait", "Wait for jobs; the exit status tells how they ended."),
    "queue": ("activity:queue", "For operators: show who works and waits, and why."),
    "events": ("activity:events", "Show what has happened to my jobs, or follow it."),
    "logs": ("logs:logs", "Show or follow the logs of a job or an element."),
    "cancel": ("jobs:cancel", "Cancel jobs."),
    "retry": ("jobs:retry", "Retry failed and cancelled elements of jobs."),
    "hold": ("holds:hold", "Hold jobs: nothing more of them begins."),
    "resume": ("holds:resume", "Resume jobs that are held."),
    "set": ("holds:set_", "Change the priority of jobs, or how much of them runs at once."),
    "schedule": ("schedules:schedule", "Submit a job again and again; list, show, pause and remove schedules."),
    "webhook": ("notifications:webhook", "Send events to a URL; add, list, show, test and remove webhooks."),
    "mail": ("notifications:mail", "Get mail when jobs end, fail or wait."),
    "delegate": ("credentials:delegate", "Delegate a proxy to the service."),
    "credentials": ("credentials:credentials", "Show the credentials that the service holds for me."),
    "login": ("credentials:login", "Log on at a site's MyProxy server."),
    "logout": ("credentials:logout", "Log off at a site."),
    "ssh-key": ("credentials:ssh_key", "Generate an SSH key for a site, or upload one."),
    "token": ("credentials:token", "Store a bearer token for a site."),
    "s3-key": ("credentials:s3_key", "Store an access key of S3 for a site."),
    "sites": ("sites:sites", "Show the sites and their protocols."),
    "routes": ("sites:routes", "Show streams between sites, and their limits."),
    "nodes": ("nodes:nodes", "For operators: show the nodes, the daemons that work on the queue."),
    "site": ("sites:site", "Add, show, check, change or remove a site."),
    "user": ("sites:user", "For operators: list, ban and unban users."),
    "audit": ("sites:audit", "For operators: show the audit log of sites and users."),
    "doctor": ("doctor:doctor", "Check server, certificates, clock and sites."),
    "whoami": ("credentials:whoami", "Show my identity and role."),
    "admin": ("admin:admin", "Create and maintain an instance of the service."),
    "help": ("main:help_command", "Show a help page: exit-codes, environment, or a command."),
}
#: Commands for programs, which help pages leave out.
_HIDDEN_COMMANDS = {"complete": ("completion:complete_command", "Print candidates for a shell.")}


#: Names of other programs for a command → the command.
_OTHER_NAMES = {
    "list": "ls",
    "dir": "ls",
    "copy": "cp",
    "sync": "cp --sync mtime",
    "scp": "cp",
    "del": "rm",
    "delete": "rm",
    "remove": "rm",
    "move": "mv",
    "rename": "mv",
    "log": "logs",
    "job": "status",
    "show": "status",
    "kill": "cancel",
    "abort": "cancel",
    "pause": "hold",
    "suspend": "hold",
    "unhold": "resume",
    "proxy": "delegate",
    "id": "whoami",
}


def _import_command_module(name: str) -> ModuleType:
    """Import a module without garbage collections: a quarter of the CPU time of a short command.

    Imports make almost no garbage, and each full collection, the last one at the exit, would scan all they have made.
    """
    if name in sys.modules:
        return sys.modules[name]
    gc.disable()
    try:
        module = import_module(name)
    finally:
        gc.enable()
    gc.freeze()
    return module


class _LazyGroup(click.Group):
    """A group that imports a command only when it runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = _COMMANDS.get(cmd_name) or _HIDDEN_COMMANDS.get(cmd_name)
        if found is None:
            return None
        module, _, name = found[0].partition(":")
        command = getattr(_import_command_module(f"pdm.workqueue.cli.{module}"), name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in (*_COMMANDS, *_HIDDEN_COMMANDS) and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], [*_COMMANDS, *_OTHER_NAMES], n=1)
            advice = f" Did you mean '{_OTHER_NAMES.get(near[0], near[0])}'?" if near else ""
            ctx.fail(f"No such command {args[0]!r}.{advice}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in _COMMANDS.items()])


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Service URL and certificate: 'pdm help environment'. Exit status: 'pdm help exit-codes'.",
)
@click.version_option(__version__, prog_name="pdm", message="%(prog)s %(version)s")
@click.option("-F", "--format", "form", type=click.Choice(["text", "json"]), help="Default of -F for the command.")
def pdm(form: str | None) -> None:
    """Move data between storage sites with the PDM Workqueue.

    A PLACE is SITE:path; SITE is a name or a number (see 'pdm sites').
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script; prints usage errors in the same format as all errors of ``pdm``."""
    # Characters that the terminal cannot encode become escapes instead of errors.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        # click returns an exit status if it ended the command itself (--help).
        result = pdm.main(arguments, prog_name="pdm", standalone_mode=False)
    except NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        message = error.format_message().strip().rstrip(".")
        line = f"pdm: {message}{'' if message.endswith('?') else '.'}"
        if isinstance(error, click.UsageError):
            line += f" See '{'pdm' if error.ctx is None else error.ctx.command_path} --help'."
        click.echo(line, err=True)
        sys.exit(error.exit_code)
    except click.Abort:
        click.echo("pdm: interrupted.", err=True)
        sys.exit(130)
    except ModuleNotFoundError as error:
        if (missing := explain_missing(error)) is None:
            raise
        click.echo(f"pdm: {missing}", err=True)
        sys.exit(1)
    sys.exit(result if isinstance(result, int) else 0)
