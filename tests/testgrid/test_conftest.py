"""The rules of tests/conftest.py itself: no error gets lost, and no missing grid goes unnoticed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

_ROOT = Path(__file__).parents[2]

_ERRORS = """
from twisted.internet.defer import fail
from twisted.logger import Logger

def test_forgotten_deferred():
    fail(RuntimeError("the forgotten one"))

def test_logged_error():
    Logger().error("the logged one")

def test_warning_is_fine():
    Logger().warn("only a warning")

def test_expected(lost_errors):
    Logger().error("expected")
    assert len(lost_errors) == 1
    lost_errors.clear()
"""

_FIXTURE = """
import pytest
from twisted.internet.defer import fail

class Cycle:
    pass

@pytest.fixture(scope="module")
def made():
    cycle = Cycle()
    cycle.itself, cycle.lost = cycle, fail(RuntimeError("that of the fixture"))
    yield

@pytest.mark.parametrize("number", range(%d))
def test_it(made, number):
    pass
"""

_GRID = """
import pytest

def test_on_the_grid(grid):
    pass

def test_without():
    pass
"""


@pytest.fixture
def run(pytester: pytest.Pytester) -> pytest.Pytester:
    """A project with our conftest and settings, and a plugin ``nogrid`` that hides the programs of the grid."""
    shutil.copy(_ROOT / "tests" / "conftest.py", pytester.path)
    shutil.copy(_ROOT / "pyproject.toml", pytester.path)
    (pytester.path / "nogrid.py").write_text(
        "from pdm.testgrid import processes as programs\nprograms._SEARCH_PATH = '/nowhere'\n"
    )
    pytester.syspathinsert(_ROOT)
    return pytester


def test_an_unhandled_error_fails_the_test(run: pytest.Pytester) -> None:
    run.makepyfile(test_errors=_ERRORS, test_grid=_GRID)

    # Tests on the grid are marked by themselves.
    result = run.runpytest_subprocess("-p", "no:cacheprovider", "-m", "not grid", ".")

    result.assert_outcomes(passed=5, errors=2, deselected=1)
    result.stdout.fnmatch_lines(["*the forgotten one*", "*the logged one*"])


@pytest.mark.parametrize("tests", [1, 30])
def test_an_unhandled_error_of_a_fixture_fails_the_module(run: pytest.Pytester, tests: int) -> None:
    run.makepyfile(_FIXTURE % tests)

    result = run.runpytest_subprocess("-p", "no:cacheprovider", ".")

    result.assert_outcomes(passed=tests, errors=1)
    result.stdout.fnmatch_lines(["*that of the fixture*"])


@pytest.mark.parametrize(("ci", "outcomes"), [("", {"passed": 1, "skipped": 1}), ("true", {"passed": 1, "errors": 1})])
def test_without_the_grid_its_tests_are_skipped_aloud_and_fail_in_ci(
    run: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, ci: str, outcomes: dict[str, int]
) -> None:
    monkeypatch.setenv("CI", ci)
    run.makepyfile(_GRID)

    result = run.runpytest_subprocess("-p", "no:cacheprovider", "-p", "nogrid", ".")

    result.assert_outcomes(**outcomes)
    result.stdout.fnmatch_lines(["*THE GRID TESTS CANNOT RUN: globus-gridftp-server*apt-get install*"])
