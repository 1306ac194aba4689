"""Check a configuration without changing anything: open what it names, and report each problem with its remedy.

`find_problems` has what keeps a daemon from starting; each start runs it, without the check of the database, which the
daemon opens anyway. `pdm.workqueue.admin.examination` looks at more.
"""

from __future__ import annotations

import enum
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import msgspec
from attrs import frozen

from pdm.workqueue.assembly import EXPECTED_ERRORS
from pdm.workqueue.certificates.vault import Vault
from pdm.workqueue.config.reader import ConfigError
from pdm.workqueue.config.settings import Settings
from pdm.workqueue.http.access import AccessList
from pdm.workqueue.policies import server_tls
from pdm.workqueue.sites.registry import SiteRegistry
from pdm.workqueue.store import schema_revisions
from pdm.workqueue.store.engines import make_engines

_PYTHON_TIMEOUT_S = 20
#: What the helpers' interpreter must be.
_PYTHON_TEST = "import sys; sys.exit('%d.%d' % sys.version_info[:2]) if sys.version_info < (3, 11) else None"
#: What helpers import besides the service itself and the standard library.
_HELPER_LIBRARIES = ("msgspec", "h11", "aws_request_signer")


class Level(enum.StrEnum):
    """How much a finding matters."""

    GOOD = "good"
    WARNING = "warning"
    ERROR = "error"


class CheckResult(msgspec.Struct, frozen=True, kw_only=True):
    """What was found at one thing.

    Attributes:
        what: a sentence without its end; a problem of `find_problems` has its remedy in it.
        remedy: what to do; empty if nothing needs to be done.
    """

    part: str
    level: Level
    what: str
    remedy: str = ""

    @property
    def line(self) -> str:
        return " ".join(f"{self.part}: {self.what}{': ' if self.remedy else ''}{self.remedy}".split())


def good(part: str, what: str) -> CheckResult:
    return CheckResult(part=part, level=Level.GOOD, what=what)


def warning(part: str, what: str, remedy: str) -> CheckResult:
    return CheckResult(part=part, level=Level.WARNING, what=what, remedy=remedy)


def fault(part: str, what: str, remedy: str) -> CheckResult:
    return CheckResult(part=part, level=Level.ERROR, what=what, remedy=remedy)


@frozen(kw_only=True)
class CheckedInstance:
    """What the checks look at.

    Attributes:
        daemon: process id of its daemon, perhaps empty; None if it does not run.
        sites: None if they cannot be read.
    """

    settings: Settings
    now: datetime
    daemon: str | None
    sites: SiteRegistry | None


def find_problems(settings: Settings, *, database: bool = False) -> list[str]:
    """Problems of these settings, one line each; empty if there are none.

    Args:
        database: whether to connect to the database and check its schema.
    """
    checks: list[Callable[[Settings], None]] = [
        lambda settings: _discard(SiteRegistry.read(settings.sites.folder)),
        lambda settings: _discard(AccessList.read(settings.users)),
        lambda settings: _discard(server_tls(settings)),
        _check_directories,
        _check_trust,
        _check_key_file,
        _check_python,
        _check_address,
        _check_database if database else lambda settings: _discard(make_engines(settings.database.url, 1)),
    ]
    return [problem for check in checks for problem in _problems_of(check, settings)]


def _problems_of(check: Callable[[Settings], None], settings: Settings) -> Iterator[str]:
    try:
        check(settings)
    except EXPECTED_ERRORS as error:
        yield " ".join(str(error).split())


def _discard(_: object) -> None:
    """Drop the result of a check."""


def _check_directories(settings: Settings) -> None:
    for key, directory in (
        ("[state] folder", settings.state.folder),
        ("[logs] folder", settings.logs.folder),
        ("[credentials] folder", settings.credentials.folder),
        ("[credentials] key_file", settings.credentials.key_file.parent),
    ):
        reason = _unusable(directory)
        if reason is not None:
            raise ConfigError(f"{settings.source}: {key}: {reason}")
    directory = settings.credentials.folder
    if directory.is_symlink() or (directory.exists() and directory.stat().st_uid != os.geteuid()):
        raise ConfigError(
            f"{settings.source}: [credentials] folder: {directory} is a link, or belongs to another account:"
            " name another"
        )


def _check_trust(settings: Settings) -> None:
    """The start empties ``trust`` in the state directory: an operator's authorities there would be lost."""
    emptied = (settings.state.folder / "trust").resolve()
    for key, path in (("[tls] trust", settings.tls.trust), ("[credentials] trust_dir", settings.credentials.trust_dir)):
        if path.resolve().is_relative_to(emptied):
            raise ConfigError(
                f"{settings.source}: {key}: {path} is emptied at each start of the daemon: name another path"
            )


def _unusable(directory: Path) -> str | None:
    """Why a directory cannot be made or written; None if it can."""
    nearest = directory
    # `exists` would call a path below a file missing.
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        return f"{directory} cannot be made: {nearest} is no directory"
    if not os.access(nearest, os.W_OK | os.X_OK):
        verb = "written" if nearest == directory else "made"
        return f"{directory} cannot be {verb} by this account: change the owner of {nearest}, or name another directory"
    return None


def _check_key_file(settings: Settings) -> None:
    # One that is missing is made at the first start.
    if settings.credentials.key_file.exists():
        Vault.open(settings.credentials.key_file)


def _check_python(settings: Settings) -> None:
    place = f"{settings.source}: [agents] python: {settings.agents.python}"
    if (why := _failure_of(settings, _PYTHON_TEST)) is not None:
        raise ConfigError(f"{place} is no Python 3.11 or newer ({why})")
    if _failure_of(settings, f"import {', '.join(_HELPER_LIBRARIES)}") is None:
        return
    for library in _HELPER_LIBRARIES:
        if (why := _failure_of(settings, f"import {library}")) is not None:
            raise ConfigError(
                f"{place} has no {library}, which helpers need ({why}): install it there, or leave the key out"
            )


def _failure_of(settings: Settings, code: str) -> str | None:
    """What the interpreter of the helpers says of code that fails there; None if it does not fail."""
    python = settings.agents.python
    place = f"{settings.source}: [agents] python: {python}"
    try:
        done = subprocess.run(
            [str(python), "-c", code],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PYTHON_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = error.strerror if isinstance(error, OSError) else "it does not end"
        raise ConfigError(f"{place} cannot be run ({reason}): name a Python 3.11 or newer") from error
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return lines[-1][:200] if done.returncode else None


def _check_address(settings: Settings) -> None:
    host = settings.server.host
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"{settings.source}: [server] host: {host} is no address of this machine ({error.strerror})"
        ) from error


def _check_database(settings: Settings) -> None:
    schema_revisions.check(settings.database.url)
