"""An installation without the extra "server": the client works, and the daemon says what is missing."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from pdm.testgrid.service import service_environment
from pdm.workqueue.installation import explain_missing

_ROOT = Path(__file__).resolve().parents[2]
#: Data only: nothing imports it by name.
_NOT_IMPORTED = {"tzdata"}


def _server_distributions() -> set[str]:
    config = configparser.ConfigParser()
    config.read(_ROOT / "setup.cfg")
    lines = config["options.extras_require"]["server"].splitlines()
    return {re.split(r"[ \[>=<]", line)[0].lower() for line in lines if line and not line.startswith("#")}


def _server_modules() -> set[str]:
    server = _server_distributions()
    return {
        module for module, owners in packages_distributions().items() if server & {owner.lower() for owner in owners}
    }


def _run_without_server(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program of Python in which no library of the extra "server" can be imported."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({sorted(_server_modules())!r}))\n"
    return subprocess.run(
        [sys.executable, "-c", blocked + program, *arguments],
        env=service_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_each_library_of_the_extra_is_explained() -> None:
    explained = {
        owner.lower().replace("_", "-")
        for module, owners in packages_distributions().items()
        if explain_missing(ModuleNotFoundError(name=module))
        for owner in owners
    }
    assert explained == _server_distributions() - _NOT_IMPORTED
    assert explain_missing(ModuleNotFoundError(name="twisted.web")) is None


def test_every_command_and_both_clients_are_imported_without_the_daemons_libraries() -> None:
    done = _run_without_server(
        "import pkgutil, importlib, pdm.workqueue.blocking, pdm.workqueue.cli as cli\n"
        "for each in pkgutil.iter_modules(cli.__path__):\n"
        "    if each.name != '__main__': importlib.import_module(f'{cli.__name__}.{each.name}')\n"
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("start", ["plugin", "command"])
def test_the_daemon_and_its_commands_say_what_to_install(tmp_path: Path, start: str) -> None:
    config = tmp_path / "workqueue.conf"
    config.write_text("")
    programs = {
        "plugin": (
            "import sys; from pdm.workqueue.daemon import Options, makeService\n"
            "options = Options(); options.parseOptions(['--config', sys.argv[1]]); makeService(options)"
        ),
        # What a command that opens the database does.
        "command": (
            "import click; from pdm.workqueue.cli import main\n"
            "main.pdm.invoke = lambda _: __import__('pdm.workqueue.store.engines')\n"
            "main.main(['whoami'])"
        ),
    }
    done = _run_without_server(programs[start], str(config))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "pip install 'pdm-workqueue[server]'" in done.stderr
