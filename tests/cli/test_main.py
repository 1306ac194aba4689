"""``pdm`` before anything is sent: its commands, its pages, its usage errors, its quick start."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
from attrs import frozen

from pdm.workqueue import __version__
from pdm.workqueue.cli.main import _COMMANDS, main


@frozen
class Ended:
    exit_code: int
    output: str
    errors: str


Run = Callable[..., Ended]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs ``pdm`` in this process."""

    def run(*arguments: str) -> Ended:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert isinstance(caught.value.code, int)
        return Ended(caught.value.code, *capsys.readouterr())

    return run


def test_the_version(run: Run) -> None:
    assert run("--version") == Ended(0, f"pdm {__version__}\n", "")


@pytest.mark.parametrize("command", [name for name in _COMMANDS if name != "admin"])
def test_each_command_can_be_loaded_and_explained(run: Run, command: str) -> None:
    for arguments in ([command, "--help"], ["help", command]):
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        assert f"Usage: pdm {command}" in result.output


def test_the_help_names_each_command_and_imports_none() -> None:
    code = (
        "import sys; from pdm.workqueue.cli.main import pdm;"
        "pdm.main(['--help'], standalone_mode=False);"
        "dear = {'twisted', 'rich', 'cryptography', 'msgspec'};"
        "sys.exit(any(name.partition('.')[0] in dear for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, "starting pdm imports what --help does not need"
    assert all(f"  {name} " in done.stdout for name in _COMMANDS)
    code = (
        "import sys; from pdm.workqueue.cli import plans, receipts, schedules, submission;"
        "sys.exit(any(name.partition('.')[0] in {'re2', 'pathspec', 'joserfc'} for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, "a command imports what only filters and signatures need"


def test_pages(run: Run) -> None:
    assert "6  partly done" in run("help", "exit-codes").output
    assert "PDM_CERT" in run("help", "environment").output
    assert run("help").output == run("--help").output
    assert run("help", "nothing").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cp", "1:/a"], "Missing argument"),
        (["cp", "/a", "1:/b"], "SITE:path"),
        (["cp", "1:/a", "2:/b", "--no-wait", "--timeout", "5"], "--no-wait and --timeout cannot be combined"),
        (["cp", "1:/a", "2:/b", "--overwrite", "maybe"], "never"),
        (["cp", "1:/a", "2:/b", "--priority", "10"], "0<=x<=9"),
        (["cp", "1:/a", "2:/b", "--option", "x"], "KEY=VALUE"),
        (["cp", "1:/a", "2:/b", "--label", "\udcff"], "it is not UTF-8"),
        (["cp", "1:/a", "2:/b", "--option", "a=\udcff"], "the value of a is not UTF-8"),
        (["rm", "1:"], "rm needs a path"),
        (["rm", "1:/", "-r"], "rm needs a path"),
        (["mv", "1:/a", "1:"], "mv needs a new path"),
        (["ls", "1:/a", "-0", "-l"], "-0 prints names only"),
        (["ls", "1:/a", "--protocol", "pigeon"], "pigeon"),
        (["logs", "7.x"], "neither a job (214) nor an element"),
        (["logs", "7", "-a", "1"], "-a needs an element"),
        (["logs", "7.0.1", "-a", "1"], "given twice"),
        (["logs", "7.0", "-f", "-F", "json"], "-f prints lines"),
        (["wait", "0"], "1<=x<="),
        (["cancel"], "Missing argument"),
        (["status", "seven"], "not a valid integer"),
        (["jobs", "--since", "yesterday"], "neither a timestamp"),
        (["nonsense"], "No such command"),
    ],
)
def test_usage_errors_are_2_and_say_what_is_wrong(run: Run, arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.errors
    assert result.errors.startswith("pdm: ")
    assert "--help'." in result.errors
    assert result.output == ""


def test_without_arguments_the_help_is_shown(run: Run) -> None:
    result = run()
    assert result.exit_code == 2
    assert "Commands:" in result.errors
