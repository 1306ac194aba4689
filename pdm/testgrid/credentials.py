"""The certificates of a test grid: authority, host, users, and those that must be refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

from attrs import frozen

from pdm.workqueue.certificates.authority import Authority, Credential

_BASE = "/DC=org/DC=pdm-testgrid"
_LIFETIME = timedelta(days=7)
_EXPIRED_START, _EXPIRED_LIFETIME = timedelta(hours=-2), timedelta(hours=1)
STRANGER = "mallory"


@frozen
class UserFiles:
    """Where a user's credential lies.

    Attributes:
        dn: the subject in slash form.
        certificate: PEM.
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
        trust: grid style folder that trusts the authority.
        host: for servers named ``localhost``.
        users: name → files.
        stranger: a user of an authority that the grid does not trust.
        stranger_trust: grid style folder that trusts both authorities: with it the stranger's client accepts the
            servers, and it is they who refuse.
    """

    authority: Authority
    trust: Path
    host: HostFiles
    users: Mapping[str, UserFiles]
    stranger: UserFiles
    stranger_trust: Path


def make_credentials(directory: Path, users: Sequence[str], authority_name: str = "Test Grid CA") -> GridCredentials:
    """Make the certificates of a grid under its folder.

    Args:
        directory: the folder.
        users: names of the users.
        authority_name: of the authority; those that are to be trusted together must differ in it.
    """
    trust, stranger_trust = directory / "certificates", directory / "stranger-certificates"
    for folder in (trust, stranger_trust, directory / "ca", directory / "users", directory / "hosts"):
        folder.mkdir(exist_ok=True)
        # Sessions read these as the accounts of users, whatever the umask is here.
        folder.chmod(0o755)
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
    for folder in (trust, stranger_trust):
        for file in folder.iterdir():
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
        directory: folder of the grid.
        authority: signs it.
        label: names the files.
        names: DNS names that it is for.
        addresses: IP addresses that it is for.
    """
    files = HostFiles(directory / "hosts" / f"{label}.crt", directory / "hosts" / f"{label}.key")
    _write(authority.host(list(names), list(addresses)), files)
    return files


def _make_user(directory: Path, authority: Authority, name: str) -> UserFiles:
    user = authority.user(name)
    folder = directory / "users"
    files = UserFiles(
        dn=user.dn,
        certificate=folder / f"{name}.crt",
        key=folder / f"{name}.key",
        proxy=folder / f"{name}.proxy",
        expired_proxy=folder / f"{name}-expired.proxy",
    )
    _write(user, HostFiles(files.certificate, files.key))
    user.proxy(lifetime=_LIFETIME).write_bundle(files.proxy)
    user.proxy(start=_EXPIRED_START, lifetime=_EXPIRED_LIFETIME).write_bundle(files.expired_proxy)
    return files


def _write(credential: Credential, files: HostFiles) -> None:
    credential.write_certificate(files.certificate)
    credential.write_key(files.key)
