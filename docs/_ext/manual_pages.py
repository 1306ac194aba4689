"""Manual pages, written from the parsers of the commands and from ``etc/workqueue.conf``: run by ``script/package``.

``python docs/_ext/manual_pages.py DIRECTORY`` writes ``man1``, ``man5`` and ``man8`` below it. Each page is
reStructuredText first, which docutils turns into a manual page.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
from docutils.core import publish_string

from pdm.workqueue import __version__
from pdm.workqueue.cli.exit_codes import exit_codes_text
from pdm.workqueue.cli.main import ENVIRONMENT_HELP, pdm
from pdm.workqueue.daemon import Options

_CONFIGURATION = Path(__file__).resolve().parents[2] / "etc" / "workqueue.conf"
_SPECIAL = re.compile(r"([\\*`_|])")
_KEY = re.compile(r"#(\w+) =(.*)")
_SECTION = re.compile(r"\[(\w+)\]")


def main(directory: Path) -> None:
    """Write all pages below a directory."""
    pages = {("pdmworkqueue", 8): _daemon_page(), ("workqueue.conf", 5): _configuration_page()}
    root = click.Context(pdm, info_name="pdm", **pdm.context_settings)
    pages["pdm", 1] = _overview_page(root)
    for name in pdm.list_commands(root):
        pages[f"pdm-{name}", 1] = _command_page(name, root)
    for (name, section), lines in pages.items():
        file = directory / f"man{section}" / f"{name}.{section}"
        file.parent.mkdir(parents=True, exist_ok=True)
        page = publish_string("\n".join(lines), writer="manpage", settings_overrides={"output_encoding": "unicode"})
        file.write_text(page, encoding="utf-8")


def _escaped(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", text)


def _title(name: str, section: int, subtitle: str) -> Iterator[str]:
    """The header, from which the manual page gets its name, section and summary."""
    yield from (_heading(name, "="), _heading(_escaped(subtitle.rstrip(".")), "-"))
    yield from (f":Version: {__version__}", f":Manual section: {section}", ":Manual group: PDM Workqueue", "")


def _heading(text: str, mark: str) -> str:
    over = f"{mark * len(text)}\n" if mark in "=-" else ""
    return f"{over}{text}\n{mark * len(text)}\n"


def _literal(text: str) -> str:
    return "::\n\n" + "\n".join(f"    {line}" for line in text.splitlines()) + "\n"


def _paragraphs(text: str) -> Iterator[str]:
    """Help of click: paragraphs; one that begins with a backspace keeps its line ends."""
    for paragraph in inspect.cleandoc(text).split("\f", maxsplit=1)[0].split("\n\n"):
        if paragraph.startswith("\b"):
            yield _literal(paragraph.removeprefix("\b").strip("\n"))
        else:
            yield _escaped(" ".join(paragraph.split())) + "\n"


def _definition(term: str, text: str) -> str:
    return f"{term}\n    {_escaped(' '.join(text.split())) or '..'}\n"


def _options(command: click.Command, ctx: click.Context) -> Iterator[str]:
    for each in command.get_params(ctx):
        record = each.get_help_record(ctx)
        if record is not None and isinstance(each, click.Option):
            names, text = record
            yield _definition(f"**{_escaped(names)}**", text)


def _synopsis(command: click.Command, ctx: click.Context) -> str:
    return _escaped(" ".join([ctx.command_path, *command.collect_usage_pieces(ctx)])) + "\n"


def _command_page(name: str, root: click.Context) -> Iterator[str]:
    command = pdm.get_command(root, name)
    assert command is not None
    ctx = click.Context(command, parent=root, info_name=name)
    yield from _title(f"pdm-{name}", 1, command.get_short_help_str(200))
    yield _heading("SYNOPSIS", "~")
    yield f"**{_synopsis(command, ctx).strip()}**\n"
    yield _heading("DESCRIPTION", "~")
    yield from _paragraphs(command.help or "")
    yield _heading("OPTIONS", "~")
    yield from _options(command, ctx)
    if isinstance(command, click.Group):
        yield _heading("COMMANDS", "~")
        for inner_name in command.list_commands(ctx):
            inner = command.get_command(ctx, inner_name)
            assert inner is not None
            inner_ctx = click.Context(inner, parent=ctx, info_name=inner_name)
            yield _heading(_synopsis(inner, inner_ctx).strip(), "^")
            yield from _paragraphs(inner.help or "")
            yield from _options(inner, inner_ctx)
    yield _heading("SEE ALSO", "~")
    yield "**pdm**\\(1): environment, files and exit status of all commands\n"


def _overview_page(root: click.Context) -> Iterator[str]:
    yield from _title("pdm", 1, "move data between storage sites with the PDM Workqueue")
    yield _heading("SYNOPSIS", "~")
    yield f"**{_synopsis(pdm, root).strip()}**\n"
    yield _heading("DESCRIPTION", "~")
    yield from _paragraphs(pdm.help or "")
    yield _heading("OPTIONS", "~")
    yield from _options(pdm, root)
    yield _heading("COMMANDS", "~")
    for name in pdm.list_commands(root):
        command = pdm.get_command(root, name)
        assert command is not None
        yield _definition(f"**pdm-{name}**\\(1)", command.get_short_help_str(200))
    yield from (_heading("ENVIRONMENT AND FILES", "~"), _literal(ENVIRONMENT_HELP))
    yield from (_heading("EXIT STATUS", "~"), _literal(exit_codes_text()))
    yield _heading("SEE ALSO", "~")
    yield "**pdmworkqueue**\\(8), **workqueue.conf**\\(5)\n"


def _daemon_page() -> Iterator[str]:
    yield from _title("pdmworkqueue", 8, "daemon of the PDM Workqueue")
    yield _heading("SYNOPSIS", "~")
    yield "**twistd --nodaemon pdmworkqueue** [**--config** *FILE*] [**--check-config**]\n"
    yield _heading("DESCRIPTION", "~")
    yield _escaped(Options.longdesc) + "\n"
    yield (
        "It prints ``pdmworkqueue ready https://HOST:PORT`` once it accepts requests. Each error that prevents the"
        " start is one line on standard error.\n"
    )
    yield _heading("OPTIONS", "~")
    for name, short, default, text in Options.optParameters:
        yield _definition(f"**-{short}, --{name}** *{name.upper()}*", f"{text} Default: {default}")
    for flag, _short, meaning in Options.optFlags:
        yield _definition(f"**--{flag}**", str(meaning))
    yield _heading("SIGNALS", "~")
    for name, text in _SIGNALS:
        yield _definition(f"**{name}**", text)
    yield from (_heading("SERVICE", "~"), _SERVICE, _heading("EXIT STATUS", "~"))
    yield _definition("**0**", "It was stopped.")
    yield _definition("**1**", "It could not start, or did not end within its time.")
    yield from (_heading("FILES", "~"), _FILES, _heading("SEE ALSO", "~"))
    yield "**workqueue.conf**\\(5), **pdm-admin**\\(1), **systemctl**\\(1), **twistd**\\(1)\n"


_SIGNALS = (
    ("SIGTERM, SIGINT", "Stop: helpers end, and work that has not ended goes back to the queue."),
    ("SIGHUP", "Read sites, authorities, revocation lists and signing policies again."),
    ("SIGUSR1", "Open the log file again, after it has been rotated."),
)
_SERVICE = """\
The unit **pdmworkqueue.service** of the Debian package is disabled until **systemctl enable --now pdmworkqueue**.
It is of ``Type=notify``: systemd waits until the service accepts requests, **systemctl status** shows its state, and
a daemon that hangs is started again. Host certificate and key come from ``/etc/grid-security`` by
``LoadCredential=``; FILE sites need ``ReadWritePaths=`` in a drop-in (**systemctl edit pdmworkqueue**).
"""
_FILES = """\
``/etc/pdm/workqueue.conf``
    The configuration.

``/etc/pdm/sites.d``
    The sites.

``/var/lib/pdm``
    Database, keys and logs of jobs.
"""


def _configuration_page() -> Iterator[str]:
    yield from _title("workqueue.conf", 5, "configuration of the daemon of the PDM Workqueue")
    header, *sections = _blocks(_CONFIGURATION.read_text(encoding="utf-8"))
    yield _heading("DESCRIPTION", "~")
    yield from (_escaped(each) + "\n" for each in header[1])
    for name, lines in sections:
        yield _heading(f"[{name}]", "~")
        yield from _keys(lines)
    yield _heading("SEE ALSO", "~")
    yield "**pdmworkqueue**\\(8)\n"


def _blocks(text: str) -> Iterator[tuple[str, list[str]]]:
    """The comment of the file as paragraphs, then each section with its lines."""
    name, lines = "", list[str]()
    for line in text.splitlines():
        if match := _SECTION.fullmatch(line):
            yield name, _paragraphs_of(lines) if not name else lines
            name, lines = match[1], []
        else:
            lines.append(line)
    yield name, lines


def _paragraphs_of(comment: Sequence[str]) -> list[str]:
    text = "\n".join(line.removeprefix("#").strip() for line in comment)
    return [" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n")]


def _keys(lines: Sequence[str]) -> Iterator[str]:
    """Keys after their comment; those that follow each other share one."""
    comment, terms = list[str](), list[str]()
    for line in [*lines, "# end"]:
        match = _KEY.fullmatch(line)
        if match and not line.startswith("# "):
            default = match[2].strip()
            terms.append(f"**{_escaped(match[1])}** = {_escaped(default)}" if default else f"**{_escaped(match[1])}**")
        elif line.startswith("#"):
            if terms:
                yield _definition(", ".join(terms), " ".join(comment))
                comment, terms = [], []
            comment.append(line.removeprefix("#").strip())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
