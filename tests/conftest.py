"""Fixtures of all tests: the real grid, and the rule that no logged error is ignored."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import pytest_timeout
from twisted.internet.defer import Deferred
from twisted.logger import ILogObserver, LogEvent, LogLevel, globalLogPublisher
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import provider

from pdm.testgrid import GridMissingError, TestGrid
from pdm.testgrid.processes import require_programs
from pdm.testgrid.service import TestService
from tests.security import canary
from tests.support.preloaded import Preloader

# Imports make almost no garbage: until all tests are collected, collections would only scan what the imports have made.
gc.disable()

# The duration of an example depends on the machine more than on the code.
hypothesis.settings.register_profile("default run", deadline=None, max_examples=25)
hypothesis.settings.register_profile("full run", deadline=None)

#: Seconds for a test on the real grid: a login alone takes 0.2 s, and CI is slow.
_GRID_TIMEOUT_S = 180
#: Seconds after its timeout in which a hung test may still end by itself.
_GRACE_S = 15
#: Directories of tests that start the daemon, its HTTP side, or servers of a grid.
_WITH_SERVERS = frozenset({"cli", "client", "http", "protocols", "reference", "security", "system", "testgrid", "web"})
#: Long-running modules of a full run, the longest first (script/test full --slowest): started late, one would occupy a
#: single worker at the end.
_LONGEST = (
    "packaging/test_debian_package",
    "protocols/test_jobs",
    "protocols/test_fts",
    "protocols/test_relayed_faults",
    "system/test_nodes",
    "system/test_outages",
    "protocols/test_matrix",
    "protocols/test_torn_copies",
    "protocols/test_webdav_servers",
    "web/test_views",
    "tools/test_tools_jobs",
    "packaging/test_files",
    "system/test_faults_of_the_machine",
    "system/test_sync",
    "system/test_cluster_faults",
    "protocols/test_sftp_servers",
    "protocols/test_tape",
    "protocols/test_s3",
    "grid/test_credentials",
    "grid/test_silent_servers",
    "web/test_files_in_browser",
    "cli/test_commands",
    "system/test_daemon",
    "tools/test_tools_helper",
    "grid/test_fts_services",
    "grid/test_jobs",
    "grid/test_gridftp_agent",
    "grid/test_torn_copies",
    "grid/test_crashes",
    "grid/test_sites",
    "grid/test_pipelining",
    "protocols/test_webdav_quirks",
    "protocols/test_faults",
    "protocols/test_groups",
    "protocols/test_own_faults",
    "protocols/test_starving",
    "system/test_shares",
    "system/test_own_faults",
    "system/test_lease",
    "system/test_limits",
    "security/test_fuzz",
    "security/test_connections",
)


def pytest_configure(config: pytest.Config) -> None:
    """Try fewer examples of each property in a run that leaves out the dear matrices."""
    is_full = "not full" not in config.getoption("markexpr")
    hypothesis.settings.load_profile("full run" if is_full else "default run")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that use the grid, and order all tests."""
    for item in items:
        if item.path.parent.name in _WITH_SERVERS:
            item.add_marker(pytest.mark.server)
        if "grid_programs" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.grid)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(_GRID_TIMEOUT_S))
    if hasattr(config, "workerinput"):
        # Workers of pytest-xdist take whole modules in this order: with short ones last, all workers end at about
        # the same time.
        ranks = {path: rank for rank, path in enumerate(_LONGEST)}
        dear = {item.path for item in items if _is_dear(item)}
        items.sort(key=lambda item: (ranks.get(_module(item), len(ranks)), item.path not in dear))
    else:
        # In a single process: the grid last, so that quick failures come first.
        items.sort(key=lambda item: item.get_closest_marker("grid") is not None)


def _module(item: pytest.Item) -> str:
    return f"{item.path.parent.name}/{item.path.stem}"


def _is_dear(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) for name in ("grid", "server", "postgresql"))


def pytest_timeout_set_timer(item: pytest.Item, settings: pytest_timeout.Settings) -> bool:
    """Let a hung test fail, and end the process only if that does not help.

    The exception that the signal raises is lost where Twisted catches all, as its main loop does.
    """
    pytest_timeout.pytest_timeout_set_timer(item, settings)
    cancel = item.cancel_timeout  # type: ignore[attr-defined]
    last = threading.Timer(settings.timeout + _GRACE_S, pytest_timeout.timeout_timer, (item, settings))
    last.daemon = True
    last.start()

    def cancel_both() -> None:
        last.cancel()
        last.join()
        cancel()

    item.cancel_timeout = cancel_both  # type: ignore[attr-defined]
    return True


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """Do not wait for threads of a service whose fixture has failed; the interpreter would, for ever."""
    left = [thread for thread in threading.enumerate() if not thread.daemon and thread is not threading.main_thread()]
    if left:
        last = threading.Timer(_GRACE_S, os._exit, (1,))
        last.daemon = True
        last.start()


def pytest_collection_finish(session: pytest.Session) -> None:
    _tests_of.update(item.path for item in session.items)
    # Imported modules are permanent: `lost_errors` need not scan them after each test.
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def preloaded() -> Iterator[None]:
    """Daemons and commands are forks; a test that needs a start as usual sets ``popen`` of its service."""
    preloader = Preloader()
    TestService.popen = preloader
    yield
    preloader.close()


@pytest.fixture(scope="session")
def grid_programs() -> None:
    """The programs of the grid are installed; for tests that start grids of their own."""
    try:
        require_programs()
    except GridMissingError as missing:
        text = f"THE GRID TESTS CANNOT RUN: {missing}"
        if os.environ.get("CI") == "true":
            pytest.fail(text, pytrace=False)
        pytest.skip(text)


@pytest.fixture(scope="session")
def open_directory() -> Iterator[Path]:
    """A temporary directory that every account can enter, unlike pytest's own."""
    directory = Path(tempfile.mkdtemp(prefix="pdm-test-"))
    directory.chmod(0o755)
    yield directory
    secrets = list(canary.found_in(directory))
    shutil.rmtree(directory)
    assert not secrets


@pytest.fixture(scope="session", autouse=True)
def no_secret_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Check that no log and no database of any test contains a secret."""
    yield
    assert not list(canary.found_in(tmp_path_factory.getbasetemp()))


@pytest.fixture(scope="session")
def grid(grid_programs: None, open_directory: Path) -> Iterator[TestGrid]:
    """The real grid: two GridFTP sites, shared by all tests of the run."""
    with TestGrid(open_directory / "grid") as running:
        yield running


@pytest.fixture(autouse=True)
def lost_errors(request: pytest.FixtureRequest) -> Iterator[list[LogEvent]]:
    """Fail a test if an error was only logged: a Deferred without an errback, a callback that raised.

    A test that expects such an error uses this list: checks its content and clears it.
    """
    if request.path in _not_frozen:
        _not_frozen.discard(request.path)
        gc.collect()
        gc.freeze()
    with _collected_errors() as events:
        yield events


#: In a module of so many tests, what its fixtures have made for the first one is not scanned after each.
_MANY_TESTS = 15
_tests_of: Counter[Path] = Counter()
_not_frozen: set[Path] = set()


@pytest.fixture(scope="module", autouse=True)
def lost_errors_of_fixtures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a module whose fixtures cause logged errors; their objects are not scanned again after each later test."""
    has_many = _tests_of[request.path] >= _MANY_TESTS
    if has_many:
        _not_frozen.add(request.path)
    yield
    if has_many:
        gc.unfreeze()
    with _collected_errors():
        pass
    gc.freeze()


@contextlib.contextmanager
def _collected_errors() -> Iterator[list[LogEvent]]:
    events: list[LogEvent] = []

    @provider(ILogObserver)
    def observe(event: LogEvent) -> None:
        if event.get("log_level", LogLevel.info) >= LogLevel.error or "log_failure" in event:
            events.append(event)

    globalLogPublisher.addObserver(observe)
    try:
        yield events
    finally:
        # A Deferred reports its unhandled failure when it is collected.
        gc.collect()
        globalLogPublisher.removeObserver(observe)
    if events:
        pytest.fail("unhandled errors:\n" + "\n".join(map(_told, events)), pytrace=False)


def _told(event: LogEvent) -> str:
    failure = event.get("log_failure")
    text = str(event.get("log_format", event.get("format", "")))
    return f"{text}\n{failure.getTraceback()}" if isinstance(failure, Failure) else f"{text} {event}"


@pytest.fixture
def result_of() -> Callable[[Deferred[Any] | Coroutine[Any, Any, Any]], Any]:
    """The current result of a Deferred or coroutine, without a reactor; the test fails if it has none yet."""
    return SynchronousTestCase().successResultOf
