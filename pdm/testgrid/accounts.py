"""Local accounts for the users of test grids, where root brings them up.

GridFTP sessions become such an account, so that permissions are real. The accounts are shared by all grids of the
machine: the first grid makes them, the last one removes them. A folder of references tells which grids are up; a
reference whose grid's folder is gone (its test run was killed) does not count.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pwd
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pdm.testgrid.errors import GridError
from pdm.testgrid.programs import program

_REGISTRY = Path("/run/pdm-testgrid")
_CREATED = "created"
_LOCK = "lock"
_PREFIX = "pdm"


def acquire(directory: Path, users: Sequence[str], registry: Path = _REGISTRY) -> Mapping[str, str]:
    """Note that a grid uses the accounts, and make those that are not there.

    Args:
        directory: folder of the grid; it exists.
        users: names of the grid's users.
        registry: folder of the references.

    Returns:
        User → local account.

    Raises:
        GridError: an account cannot be made.
    """
    accounts = {user: f"{_PREFIX}{user}" for user in users}
    with _locked(registry):
        _reference(registry, directory).write_text(str(directory))
        for account in accounts.values():
            if not _exists(account):
                _run("useradd", "--system", "--user-group", "--no-create-home", "--home-dir", "/", account)
                with (registry / _CREATED).open("a") as created:
                    created.write(f"{account}\n")
    return accounts


def release(directory: Path, registry: Path = _REGISTRY) -> None:
    """Note that a grid has ended; remove the accounts that grids have made if it was the last one.

    Raises:
        GridError: an account cannot be removed.
    """
    if not registry.exists():
        return
    with _locked(registry):
        _reference(registry, directory).unlink(missing_ok=True)
        for reference in registry.glob("*.grid"):
            if not Path(reference.read_text()).exists():
                reference.unlink()
        if any(registry.glob("*.grid")):
            return
        created = registry / _CREATED
        if created.exists():
            for account in created.read_text().split():
                if _exists(account):
                    _run("userdel", account)
            created.unlink()


def unlock(account: str) -> None:
    """Let sshd take the account: without PAM it refuses one whose password is locked; this one has none that fits."""
    _run("usermod", "--password", "*", account)


def _exists(account: str) -> bool:
    try:
        pwd.getpwnam(account)
    except KeyError:
        return False
    return True


def _reference(registry: Path, directory: Path) -> Path:
    return registry / f"{hashlib.sha256(bytes(directory)).hexdigest()[:24]}.grid"


def _run(name: str, *arguments: str) -> None:
    done = subprocess.run([str(program(name)), *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise GridError(f"{name} {arguments[-1]} failed: {done.stderr.strip()}")


@contextlib.contextmanager
def _locked(registry: Path) -> Iterator[None]:
    """Hold the lock of the registry; the registry goes with its last reference."""
    path = registry / _LOCK
    while True:
        registry.mkdir(mode=0o755, exist_ok=True)
        try:
            lock = path.open("w")
        except FileNotFoundError:  # removed by another grid since the line before
            continue
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # A lock on a file that has lost its name since it was opened locks nobody out.
            if path.exists() and path.stat().st_ino == os.fstat(lock.fileno()).st_ino:
                yield
                if [entry.name for entry in registry.iterdir()] == [_LOCK]:
                    path.unlink()
                    registry.rmdir()
                return
