"""Make an instance directory: configuration, sites, a test authority with certificates, state directories.

The certificate authority is for trials and tests; a production service gets its certificates from the grid. The sites
can be those of a test grid, as its ``grid.json`` describes them.
"""

from __future__ import annotations

import ipaddress
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from attrs import frozen

from pdm.workqueue.certificates.authority import Authority, write_private
from pdm.workqueue.certificates.pem import CertificateFilesError, read_identity, require_valid, to_pkcs12
from pdm.workqueue.config.reader import ConfigError, read_settings
from pdm.workqueue.config.values import subjects
from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.sites.registry import SiteRegistry


class InstanceError(Exception):
    """An instance cannot be made or changed as asked; the text says why and what to do."""


@frozen
class UserCertificate:
    """A certificate to call the service with."""

    name: str
    certificate: Path
    key: Path

    @property
    def pkcs12(self) -> Path:
        """The two in one file for browsers, once `write_pkcs12` has made it."""
        return self.certificate.with_suffix(".p12")


@frozen
class Grid:
    """A test grid, as its ``grid.json`` describes it.

    Attributes:
        trust: its hashed directory of authorities.
        users: users with accounts at its sites.
    """

    directory: Path
    trust: Path
    sites: Mapping[str, Mapping[str, Any]]
    users: Sequence[UserCertificate]

    @classmethod
    def read(cls, directory: Path) -> Grid:
        """Read the description of a grid.

        Raises:
            InstanceError: there is none, or it is not what it should be.
        """
        file = directory / "grid.json"
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
            return cls(
                directory,
                Path(said["ca_dir"]),
                {str(name): dict(site) for name, site in said["sites"].items()},
                [
                    UserCertificate(str(name), Path(user["cert"]), Path(user["key"]))
                    for name, user in said["users"].items()
                ],
            )
        except OSError as error:
            raise InstanceError(
                f"{file}: {error.strerror}; start a grid with: python -m pdm.testgrid up {directory}"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InstanceError(f"{file} is no description of a grid: {type(error).__name__}: {error}") from error


#: The entries of an instance directory; a directory with one of them is in use.
ENTRIES = ("workqueue.conf", "sites.d", "certificates", "var", "storage")
DEFAULT_PORT = 8443
_AUTHORITY = "/DC=org/DC=pdm/OU=Test instance/CN=PDM Test CA"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}", re.ASCII)
#: Names of files that are not users'.
_OPERATOR = "admin"
_RESERVED = frozenset({"ca", "host", _OPERATOR, "trust"})
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}|[0-9A-Fa-f:.]{2,45}", re.ASCII)
_EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 - recognised here, listened on only if the operator says so


@frozen
class Instance:
    """What was made.

    Attributes:
        url: at which the daemon will serve; with ``PORT`` where the port is only known once it runs.
        identities: certificates of its callers, the most useful first.
    """

    directory: Path
    url: str
    identities: Sequence[UserCertificate]
    site: str

    @property
    def config(self) -> Path:
        return self.directory / "workqueue.conf"

    @property
    def authority(self) -> Path:
        return self.directory / "certificates" / "ca.crt"


def make_instance(
    directory: Path,
    *,
    user: str,
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    grid: Grid | None = None,
    operators: Sequence[str] = (),
) -> Instance:
    """Make a ready instance directory.

    Args:
        directory: where; made if missing. Other files in it are left alone.
        port: TCP port; 0 for a free one at each start.
        grid: a test grid to serve; without one there are two sites in local directories.
        operators: subjects of operators besides the instance's own ``admin``.

    Raises:
        InstanceError: the directory is an instance already, or something asked for is wrong. Nothing is left of a try.
    """
    directory = directory.absolute()
    for entry in ENTRIES:
        if (directory / entry).exists() or (directory / entry).is_symlink():
            raise InstanceError(f"{directory} has a {entry} already: choose another directory, or move that away")
    if "\n" in str(directory):
        raise InstanceError("a directory whose name has a line end cannot be written into a configuration file")
    _check_name(user)
    if not _HOST.fullmatch(host):
        raise InstanceError(f"{host[:60]!r} is no address and no host name")
    for operator in operators:
        _check_subject(operator)
    made = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InstanceError(f"{directory} cannot be made: {error.strerror}") from error
    try:
        return _Maker(directory, host, port, grid).make(user, operators)
    except BaseException as error:
        for entry in ENTRIES:
            _remove(directory / entry)
        if made:
            _remove(directory)
        if isinstance(error, OSError):
            raise InstanceError(f"{directory}: {error.strerror or error}") from error
        if isinstance(error, ConfigError):
            raise InstanceError(f"what was asked for makes no good configuration: {error}") from error
        raise


def add_user(directory: Path, name: str) -> UserCertificate:
    """Sign a user certificate with the authority of an instance.

    Args:
        name: of the files; the certificate's common name too.

    Raises:
        InstanceError: the name is strange or taken, or the directory is no instance.
    """
    _check_name(name)
    certificates = directory.absolute() / "certificates"
    identity = _identity(certificates, name)
    if identity.certificate.exists() or identity.key.exists():
        raise InstanceError(f"{name} has a certificate already: {identity.certificate}")
    try:
        authority = Authority.load(certificates)
    except (OSError, ValueError) as error:
        raise InstanceError(f"{directory} is no instance made by 'pdm admin init': {error}") from error
    return _sign_user(authority, identity)


def write_pkcs12(directory: Path, name: str, passphrase: str) -> UserCertificate:
    """Write the certificate and key of a user for browsers, NAME.p12; signs a certificate for a new user.

    A former file is replaced.

    Raises:
        InstanceError: the name is strange, the directory is no instance, or the certificate has expired.
    """
    certificates = directory.absolute() / "certificates"
    identity = _identity(certificates, name)
    if name != _OPERATOR:
        _check_name(name)
    if name != _OPERATOR and not identity.certificate.exists():
        add_user(directory, name)
    try:
        pair = read_identity(identity.certificate, identity.key)
        require_valid(identity.certificate, (pair.certificate,), datetime.now(UTC))
        write_private(identity.pkcs12, to_pkcs12(pair, f"PDM {name}", passphrase))
    except CertificateFilesError as error:
        raise InstanceError(str(error)) from error
    except OSError as error:
        raise InstanceError(f"{identity.pkcs12} cannot be written: {error.strerror}") from error
    return identity


def is_user_name(name: str) -> bool:
    """Whether a user's files may have this name."""
    return _NAME.fullmatch(name) is not None and name.lower() not in _RESERVED


def _check_name(name: str) -> None:
    if not is_user_name(name):
        taken = ", ".join(sorted(_RESERVED))
        raise InstanceError(
            f"{name[:60]!r} is no name for a user: letters, digits, dots, dashes and underscores, at most 40, and "
            f"none of {taken}"
        )


def _check_subject(text: str) -> None:
    try:
        found = subjects(text)
    except ValueError as error:
        raise InstanceError(str(error)) from error
    if found != (text,):
        raise InstanceError(f"{text[:60]!r} is not one subject: /C=XX/O=Organisation/CN=Name is expected")


def _identity(certificates: Path, name: str) -> UserCertificate:
    return UserCertificate(name, certificates / f"{name}.crt", certificates / f"{name}.key")


def _sign_user(authority: Authority, identity: UserCertificate) -> UserCertificate:
    credential = authority.user(identity.name)
    credential.write_key(identity.key)
    credential.write_certificate(identity.certificate)
    return identity


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class _Maker:
    """Writes the parts of one instance; the directory has none of them yet."""

    def __init__(self, directory: Path, host: str, port: int, grid: Grid | None) -> None:
        self._directory = directory
        self._certificates = directory / "certificates"
        self._host = host
        self._port = port
        self._grid = grid

    def make(self, user: str, operators: Sequence[str]) -> Instance:
        self._certificates.mkdir()
        authority = Authority.create(_AUTHORITY)
        authority.write(self._certificates)
        authority.write_trust(self._certificates / "trust")
        host = authority.host(*self._host_names())
        host.write_key(self._certificates / "host.key")
        host.write_certificate(self._certificates / "host.crt")
        admin = _sign_user(authority, _identity(self._certificates, _OPERATOR))
        caller = _sign_user(authority, _identity(self._certificates, user))
        if self._grid is not None:
            self._trust_grid(self._grid)
        (self._directory / "var").mkdir(mode=0o700)
        (self._directory / "var" / "logs").mkdir(mode=0o750)
        sites = self._grid_sites(self._grid) if self._grid is not None else self._local_sites()
        (self._directory / "sites.d").mkdir()
        (self._directory / "sites.d" / "sites.conf").write_text(_sites_text(sites), encoding="utf-8")
        operator = authority.dn.rpartition("/")[0] + f"/CN={_OPERATOR}"
        config = self._directory / "workqueue.conf"
        config.write_text(self._config_text([operator, *operators]), encoding="utf-8")
        settings = read_settings(config)
        SiteRegistry.read(settings.sites.folder)
        grid_users = [] if self._grid is None else list(self._grid.users)
        return Instance(self._directory, self._url(), [*grid_users, caller, admin], next(iter(sites)))

    def _host_names(self) -> tuple[list[str], list[str]]:
        names, addresses = ["localhost"], ["127.0.0.1", "::1"]
        try:
            address = str(ipaddress.ip_address(self._host))
            if address not in (*_EVERYWHERE, *addresses):
                addresses.append(address)
        except ValueError:
            if self._host not in names:
                names.append(self._host)
        return names, addresses

    def _url(self) -> str:
        host = "localhost" if self._host in _EVERYWHERE else self._host
        host = f"[{host}]" if ":" in host else host
        return f"https://{host}:{self._port or 'PORT'}"

    def _trust_grid(self, grid: Grid) -> None:
        """Copy the grid's authorities: the instance outlives the grid, and a link to nothing would stop it."""
        authorities = list(grid.trust.glob("*.[0-9]"))
        if not authorities:
            raise InstanceError(f"{grid.trust} has no authorities: is the grid up?")
        for file in [*authorities, *grid.trust.glob("*.signing_policy")]:
            shutil.copyfile(file, self._certificates / "trust" / file.name)

    def _local_sites(self) -> dict[str, dict[str, str]]:
        sites = {}
        for number, letter in enumerate("ab", 1):
            storage = self._directory / "storage" / letter
            storage.mkdir(parents=True)
            sites[f"local-{letter}"] = {
                "id": str(number),
                "description": f"the directory storage/{letter} of this instance",
                "default_folder": "/",
                "file": "file://" + quote(str(storage)),
                "dummy": f"dummy://{letter}/",
            }
        return sites

    def _grid_sites(self, grid: Grid) -> dict[str, dict[str, str]]:
        sites = {}
        for name, said in grid.sites.items():
            try:
                urls = [str(url) for url in said["endpoints"].values()]
                sites[name] = {
                    "id": str(said["id"]),
                    "description": f"site {name} of the test grid",
                    "default_folder": str(said["root"]),
                    **{
                        protocol.name.lower(): url
                        for url in urls
                        if (protocol := JobProtocol.of_scheme(StorageUrl(url).scheme)) is not None
                    },
                    "dummy": f"dummy://{name.lower()}/",
                }
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise InstanceError(
                    f"{grid.directory / 'grid.json'}: site {name} is not as expected: {type(error).__name__}: {error}"
                ) from error
        return sites

    def _config_text(self, operators: Sequence[str]) -> str:
        listed = "\n".join(f"    {operator}" for operator in operators)
        trust = f"trust_dir = {self._grid.trust}" if self._grid is not None else _TRUST_DIR_HINT
        sites = _LOCAL_SITES if self._grid is not None else ""
        return _CONFIG.format(host=self._host, port=self._port, operators=listed, trust_dir=trust, sites=sites)


def _sites_text(sites: Mapping[str, Mapping[str, str]]) -> str:
    sections = [
        f"[{name}]\n" + "".join(f"{key} = {text}\n" for key, text in keys.items()) for name, keys in sites.items()
    ]
    return "# Sites, one section each; read at start and on SIGHUP.\n\n" + "\n".join(sections)


_TRUST_DIR_HINT = "#trust_dir = /etc/grid-security/certificates"
_LOCAL_SITES = """
[sites]
# The test grid is on this machine.
local_addresses = yes
"""
_CONFIG = """\
# Configuration of a PDM workqueue instance, made by 'pdm admin init'.
# What is not here has its default; etc/workqueue.conf of the package shows and explains every key.

[server]
host = {host}
# 0: a free port; the ready line says which.
port = {port}

[tls]
certificate = certificates/host.crt
key = certificates/host.key
# Add an authority by its file HASH.0 to let its users in.
trust = certificates/trust

[users]
# anyone with a certificate of a trusted authority, or only listed users.
#register = anyone
operators =
{operators}

[database]
# By default SQLite in the state directory.
#url = postgresql://user@host/pdm

[logs]
# text or json
#format = text
#level = info

[agents]
#max_agents = 4

[credentials]
# Authorities of the storage servers.
{trust_dir}
{sites}"""
