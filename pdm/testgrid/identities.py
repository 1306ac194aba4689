"""Local accounts and certificates of the users, hosts and authorities of a test grid.

Where root brings the grid up, GridFTP sessions run as local accounts, so that permissions are real. The accounts are
shared by all grids of the machine: the first grid creates them, the last one removes them. A directory of references
records which grids are up; a reference whose grid directory is gone (its test run was killed) does not count. All
changes of accounts are made under one lock: the tools that make them end with an error if they wait too long for each
other.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pwd
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

from attrs import frozen

from pdm.testgrid.processes import GridError, program_path
from pdm.workqueue.certificates.authority import Authority, Credential

_REGISTRY = Path("/run/pdm-testgrid")
_CREATED = "created"
_LOCK = "lock"
_PREFIX = "pdm"
#: Fits nothing. An account that has none is locked, and sshd without PAM refuses it.
_NO_PASSWORD = "*"  # noqa: S105  (no secret)
#: Exit status of userdel: a process runs under the account.
_IN_USE = 8


def acquire_accounts(directory: Path, users: Sequence[str], registry: Path = _REGISTRY) -> Mapping[str, str]:
    """Note that a grid uses the accounts, and make those that are not there.

    Args:
        directory: directory of the grid; it exists.

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
                options = ["--system", "--user-group", "--no-create-home", "--home-dir", "/"]
                _run_program("useradd", *options, "--password", _NO_PASSWORD, account)
                with (registry / _CREATED).open("a") as created:
                    created.write(f"{account}\n")
            elif _finished("getent", "shadow", account).stdout.startswith(f"{account}:!"):
                _run_program("usermod", "--password", _NO_PASSWORD, account)
    return accounts


def release_accounts(directory: Path, registry: Path = _REGISTRY) -> None:
    """Note that a grid has ended; remove the accounts that grids have made if it was the last one.

    An account stays for the next grid to remove as long as a process runs under it, as after a run that was killed.

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
            kept = [account for account in created.read_text().split() if not _removed(account)]
            if kept:
                created.write_text("".join(f"{account}\n" for account in kept))
            else:
                created.unlink()


def _removed(account: str) -> bool:
    if not _exists(account):
        return True
    done = _finished("userdel", account)
    if done.returncode not in {0, _IN_USE}:
        raise GridError(f"userdel {account} failed: {done.stderr.strip()}")
    return done.returncode == 0


def _exists(account: str) -> bool:
    try:
        pwd.getpwnam(account)
    except KeyError:
        return False
    return True


def _reference(registry: Path, directory: Path) -> Path:
    return registry / f"{hashlib.sha256(bytes(directory)).hexdigest()[:24]}.grid"


def _run_program(name: str, *arguments: str) -> None:
    done = _finished(name, *arguments)
    if done.returncode != 0:
        raise GridError(f"{name} {arguments[-1]} failed: {done.stderr.strip()}")


def _finished(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program_path(name)), *arguments], capture_output=True, text=True, check=False)


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
            # A lock on a file that was unlinked after it was opened excludes no other process.
            if path.exists() and path.stat().st_ino == os.fstat(lock.fileno()).st_ino:
                yield
                if [entry.name for entry in registry.iterdir()] == [_LOCK]:
                    path.unlink()
                    registry.rmdir()
                return


_BASE = "/DC=org/DC=pdm-testgrid"
_LIFETIME = timedelta(days=7)
_EXPIRED_START, _EXPIRED_LIFETIME = timedelta(hours=-2), timedelta(hours=1)
STRANGER = "mallory"


@frozen
class UserFiles:
    """Where a user's credential lies.

    Attributes:
        dn: the subject in slash form.
        key: PEM, mode 0600.
        proxy: a proxy of the user as one file (certificate, key, chain), mode 0600.
        expired_proxy: one that ended an hour ago.
    """

    dn: str
    certificate: Path
    key: Path
    proxy: Path
    expired_proxy: Path


@frozen
class HostFiles:
    """Where a host's certificate lies."""

    certificate: Path
    key: Path


@frozen
class GridCredentials:
    """All certificates of a grid.

    Attributes:
        authority: signs hosts and users.
        trust: grid style directory that trusts the authority.
        host: for servers named ``localhost``.
        stranger: a user of an authority that the grid does not trust.
        stranger_trust: grid style directory that trusts both authorities: with it the stranger's client accepts the
            servers, and it is they who refuse.
    """

    authority: Authority
    trust: Path
    host: HostFiles
    users: Mapping[str, UserFiles]
    stranger: UserFiles
    stranger_trust: Path


def make_credentials(directory: Path, users: Sequence[str], authority_name: str = "Test Grid CA") -> GridCredentials:
    """Make the certificates of a grid under its directory.

    Args:
        authority_name: of the authority; those that are to be trusted together must differ in it.
    """
    trust, stranger_trust = directory / "certificates", directory / "stranger-certificates"
    for path in (trust, stranger_trust, directory / "ca", directory / "users", directory / "hosts"):
        path.mkdir(exist_ok=True)
        # Sessions read these as the accounts of users, whatever the umask is here.
        path.chmod(0o755)
    # Nearly all the time goes into making keys, which leaves the interpreter lock to others.
    with ThreadPoolExecutor() as threads:
        own = threads.submit(Authority.create, f"{_BASE}/CN={authority_name}")
        other = threads.submit(Authority.create, f"{_BASE}-stranger/CN=Stranger CA")
        authority, stranger_authority = own.result(), other.result()
        host = threads.submit(make_host, directory, authority, "localhost", ["localhost"], ["127.0.0.1"])
        made = {name: threads.submit(_make_user, directory, authority, name) for name in users}
        stranger = threads.submit(_make_user, directory, stranger_authority, STRANGER)
    authority.write(directory / "ca")
    authority.write_trust(trust)
    authority.write_trust(stranger_trust)
    stranger_authority.write_trust(stranger_trust)
    for trusted in (trust, stranger_trust):
        for file in trusted.iterdir():
            file.chmod(0o644)
    return GridCredentials(
        authority=authority,
        trust=trust,
        host=host.result(),
        users={name: future.result() for name, future in made.items()},
        stranger=stranger.result(),
        stranger_trust=stranger_trust,
    )


def make_host(
    directory: Path, authority: Authority, label: str, names: Sequence[str], addresses: Sequence[str] = ()
) -> HostFiles:
    """Make a host certificate.

    Args:
        label: names the files.
    """
    files = HostFiles(directory / "hosts" / f"{label}.crt", directory / "hosts" / f"{label}.key")
    _write(authority.host(list(names), list(addresses)), files)
    return files


def _make_user(directory: Path, authority: Authority, name: str) -> UserFiles:
    user = authority.user(name)
    users = directory / "users"
    files = UserFiles(
        dn=user.dn,
        certificate=users / f"{name}.crt",
        key=users / f"{name}.key",
        proxy=users / f"{name}.proxy",
        expired_proxy=users / f"{name}-expired.proxy",
    )
    _write(user, HostFiles(files.certificate, files.key))
    user.proxy(lifetime=_LIFETIME).write_bundle(files.proxy)
    user.proxy(start=_EXPIRED_START, lifetime=_EXPIRED_LIFETIME).write_bundle(files.expired_proxy)
    return files


def _write(credential: Credential, files: HostFiles) -> None:
    credential.write_certificate(files.certificate)
    credential.write_key(files.key)
