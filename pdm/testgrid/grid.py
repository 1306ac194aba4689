"""The grid as one object: certificates, accounts and servers, brought up and taken down together."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import stat
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

from attrs import frozen

from pdm.testgrid import identities
from pdm.testgrid.grid_servers import GRID_MARK, GridFtpServer, GridFtpSettings, MyProxyServer
from pdm.testgrid.identities import STRANGER, GridCredentials, HostFiles, UserFiles, make_credentials, make_host
from pdm.testgrid.processes import GridError, end_marked, marked, program_path, require_programs
from pdm.workqueue.certificates.authority import Authority

USERS = ("alice", "bob")
_SITES = {"A": 1, "B": 2}
_PROBE_S = 30.0
#: Says that the directory is a grid's, so that `TestGrid.down` removes nothing of anybody else's.
_LABEL = ".pdm-testgrid"
#: What `TestGrid.up` makes in its directory, and `TestGrid.down` removes; the label last.
_MADE = (
    "grid.json",
    "grid-mapfile",
    "ca",
    "certificates",
    "stranger-certificates",
    "hosts",
    "users",
    "servers",
    "sites",
    _LABEL,
)


@frozen
class GridSite:
    """A site of the grid.

    Attributes:
        root: its directory on disk; paths at the site are the real paths.
    """

    id: int
    root: Path
    server: GridFtpServer

    def url(self, path: Path | None = None) -> str:
        """The URL of a path at the site; of its root if none is given."""
        return self.server.url + quote(bytes(self.root if path is None else path))


@frozen
class GridUser:
    """A user of the grid.

    Attributes:
        account: local account that sessions become; None where the grid was brought up without root.
    """

    name: str
    files: UserFiles
    account: str | None


class TestGrid:
    """Two GridFTP sites, A and B, with an authority and users of their own, on free ports of loopback.

    Any number of grids can be up side by side, each in its own directory. Brought up by root, sessions become local
    accounts and permissions are real; otherwise every user acts as who brought it up.
    """

    __test__ = False  # not a test case, whatever its name makes pytest think

    def __init__(
        self, directory: Path | str, *, users: Sequence[str] = USERS, log_level: str = "ERROR,WARN,INFO"
    ) -> None:
        """Name a grid; `up` brings it up.

        Args:
            directory: its directory; made by `up`, or empty.
            users: names of its users, alice among them; short words of small letters: accounts are named after them.
            log_level: of the servers, as ``globus-gridftp-server -d`` takes it.
        """
        self.directory = Path(directory).resolve()
        self.sites: dict[str, GridSite] = {}
        self.users: dict[str, GridUser] = {}
        self._users = tuple(users)
        self._log_level = log_level
        self._setuid = os.geteuid() == 0
        self._credentials: GridCredentials | None = None
        self._servers: dict[str, GridFtpServer] = {}

    def __enter__(self) -> Self:
        # Both "with TestGrid(directory)" and "with TestGrid(directory).up()" read well.
        return self if self._credentials is not None else self.up()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.down()

    @property
    def credentials(self) -> GridCredentials:
        """All certificates of the grid.

        Raises:
            GridError: the grid is not up.
        """
        if self._credentials is None:
            raise GridError(f"no grid is up in {self.directory}")
        return self._credentials

    @property
    def stranger(self) -> UserFiles:
        """A user whom no server of the grid trusts; see `environment`."""
        return self.credentials.stranger

    def up(self) -> Self:
        """Bring the grid up, and return when both sites have served a login.

        Raises:
            GridMissingError: programs are not installed.
            GridError: the directory cannot be used, or a server does not serve; nothing is left behind.
        """
        require_programs()
        self._prepare_directory()
        try:
            self._bring_up()
        except BaseException:
            self.down()
            raise
        return self

    def down(self, *, keep_files: bool = False) -> int:
        """End all servers and sessions, and remove what `up` made; the directory too if nothing else is in it.

        It needs no more than the directory's name, so another process than that of `up` may call it, and calling it
        again does nothing.

        Args:
            keep_files: leave certificates, logs and the content of the sites.

        Returns:
            How many processes were ended.

        Raises:
            GridError: the grid is another user's, or a process or an account could not be removed.
        """
        self._check_owner()
        ended = end_marked({GRID_MARK: str(self.directory)})
        for server in self._servers.values():
            server.stop()
        self._servers.clear()
        self._credentials = None
        if (self.directory / _LABEL).exists():
            (self.directory / "grid.json").unlink(missing_ok=True)
            if not keep_files:
                self._remove_files()
        if self._setuid:
            identities.release_accounts(self.directory)
        return ended

    def environment(self, user: str = "alice") -> dict[str, str]:
        """What a grid client needs in its environment to act as a user, or as the `stranger` (``mallory``)."""
        if user == STRANGER:
            trust, files = self.credentials.stranger_trust, self.stranger
        else:
            trust, files = self.credentials.trust, self.users[user].files
        return {"X509_CERT_DIR": str(trust), "X509_USER_PROXY": str(files.proxy)}

    def add_server(
        self,
        name: str,
        host_names: Sequence[str] = ("localhost",),
        home: str = "B",
        authority: Authority | None = None,
    ) -> GridFtpServer:
        """Start a further server, which ends with the grid.

        Args:
            host_names: whom its certificate is for; ``["wrong.example.org"]`` makes one that clients must refuse.
            home: name of the site whose directory is its home.
            authority: vouches for it; the grid's own if None. The server itself trusts that of the grid's users only.
        """
        host = self.credentials.host
        if authority is not None or list(host_names) != ["localhost"]:
            host = make_host(self.directory, authority or self.credentials.authority, name, host_names)
        return self._start_server(name, self.directory / "sites" / home, host)

    def add_myproxy(self) -> MyProxyServer:
        """Start a MyProxy server, which ends with the grid.

        Raises:
            GridError: it does not come up, or its package is not installed.
        """
        home = self.directory / "servers" / "myproxy"
        server = MyProxyServer(home, self.credentials.host, self.credentials.trust, {GRID_MARK: str(self.directory)})
        server.start()
        return server

    def give(self, path: Path, user: str = "alice") -> Path:
        """Make a user the owner of a file or tree at a site, as if the user had put it there; return the path."""
        account = self.users[user].account
        if account is not None:
            entry = pwd.getpwnam(account)
            inside = [Path(top, name) for top, names, files in os.walk(path) for name in (*names, *files)]
            for member in (path, *inside):
                os.chown(member, entry.pw_uid, entry.pw_gid, follow_symlinks=False)
        return path

    def _prepare_directory(self) -> None:
        if marked({GRID_MARK: str(self.directory)}):
            raise GridError(f"a grid is up in {self.directory}: take it down first")
        self.directory.mkdir(parents=True, exist_ok=True)
        found = {entry.name for entry in self.directory.iterdir()}
        foreign = sorted(found - set(_MADE) if _LABEL in found else found)
        if foreign:
            raise GridError(f"{self.directory} is not empty ({foreign[0]}): name a new directory for the grid")
        self._check_owner()
        (self.directory / _LABEL).touch()

    def _open_directory(self) -> None:
        """Let the accounts into the grid's directory."""
        self.directory.chmod(0o755)
        for parent in self.directory.parents:
            if not stat.S_IMODE(parent.stat().st_mode) & stat.S_IXOTH:
                raise GridError(f"the grid's accounts cannot enter {parent}: run chmod o+x on it, or use another")

    def _check_owner(self) -> None:
        label = self.directory / _LABEL
        if label.exists() and not self._setuid and label.stat().st_uid != os.geteuid():
            owner = pwd.getpwuid(label.stat().st_uid).pw_name
            raise GridError(f"the grid in {self.directory} is {owner}'s: run this as {owner}, or as root")

    def _bring_up(self) -> None:
        if self._setuid:
            self._open_directory()
        for name in ("servers", "sites"):
            _make_directory(self.directory / name)
        self._credentials = make_credentials(self.directory, self._users)
        local = identities.acquire_accounts(self.directory, self._users) if self._setuid else {}
        self.users = {name: GridUser(name, files, local.get(name)) for name, files in self._credentials.users.items()}
        own_account = _own_account()
        (self.directory / "grid-mapfile").write_text(
            "".join(f'"{user.files.dn}" {user.account or own_account}\n' for user in self.users.values())
        )
        for name, number in _SITES.items():
            root = self.directory / "sites" / name
            _make_directory(root, 0o1777 if self._setuid else 0o755)
            self.sites[name] = GridSite(number, root, self._start_server(name, root, self._credentials.host))
        self._probe()
        (self.directory / "grid.json").write_text(json.dumps(self.description(), indent=2) + "\n")

    def _start_server(self, name: str, home: Path, host: HostFiles) -> GridFtpServer:
        if name in self._servers:
            raise GridError(f"a server named {name} is there already")
        server = GridFtpServer(
            GridFtpSettings(
                directory=self.directory,
                name=name,
                home=home,
                certificate=host.certificate,
                key=host.key,
                trust=self.credentials.trust,
                gridmap=self.directory / "grid-mapfile",
                setuid=self._setuid,
                log_level=self._log_level,
            )
        )
        server.start()
        self._servers[name] = server
        return server

    def _probe(self) -> None:
        """List each site's root as the first user: only a login shows that certificates and accounts fit together."""
        environment = {"PATH": os.environ.get("PATH", os.defpath), **self.environment()}
        client = str(program_path("globus-url-copy"))
        listings = {
            name: subprocess.Popen(
                [client, "-list", site.url() + "/"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for name, site in self.sites.items()
        }
        try:
            for name, listing in listings.items():
                printed, _ = listing.communicate(timeout=_PROBE_S)
                if listing.returncode != 0:
                    raise GridError(f"site {name} does not let a user in: {printed.decode(errors='replace').strip()}")
        except subprocess.TimeoutExpired as error:
            raise GridError(f"a site does not answer within {_PROBE_S:.0f} s") from error
        finally:
            for listing in listings.values():
                with listing:
                    listing.kill()

    def description(self) -> dict[str, Any]:
        """Content of ``grid.json``; the first three keys are a promise to other projects."""
        return {
            "ca_dir": str(self.credentials.trust),
            "sites": {
                name: {"id": site.id, "root": str(site.root), "endpoints": {"gsiftp": site.server.url}}
                for name, site in self.sites.items()
            },
            "users": {
                user.name: {**_paths(user.files), **({"account": user.account} if user.account else {})}
                for user in self.users.values()
            },
            "strangers": {STRANGER: {**_paths(self.stranger), "ca_dir": str(self.credentials.stranger_trust)}},
            "environment": self.environment(),
            "servers": {name: {"pid": server.pid, "log": str(server.log)} for name, server in self._servers.items()},
        }

    def _remove_files(self) -> None:
        for name in _MADE:
            path = self.directory / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        if self.directory.exists() and not any(self.directory.iterdir()):
            self.directory.rmdir()


def _make_directory(path: Path, mode: int = 0o755) -> None:
    path.mkdir(exist_ok=True)
    # The accounts must get in whatever the umask is.
    path.chmod(mode)


def _paths(files: UserFiles) -> Mapping[str, str]:
    return {
        "cert": str(files.certificate),
        "key": str(files.key),
        "proxy": str(files.proxy),
        "expired_proxy": str(files.expired_proxy),
        "dn": files.dn,
    }


def _own_account() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError as error:
        raise GridError(f"user {os.geteuid()} has no name in /etc/passwd: GridFTP maps users to names") from error
