"""Two sites of each protocol, brought up and taken down together; GridFTP servers only when they are first used."""

from __future__ import annotations

import json
import os
import pwd
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

from pdm.testgrid import identities
from pdm.testgrid.grid_servers import GRID_MARK, GridFtpServer, GridFtpSettings
from pdm.testgrid.identities import GridCredentials, make_credentials
from pdm.testgrid.processes import GridError, end_marked
from pdm.testgrid.storage_servers import ServerProcess, SftpServer, XrootdServer

_USERS = ("alice",)


class TestStorages:
    """Servers on free ports of loopback; any number of these can be up side by side.

    Brought up by root, the servers act as a local account, so that permissions are real; otherwise as the caller.

    Args:
        directory: of its own, which does not exist and which accounts can reach.

    Attributes:
        account: local account that all servers act as; None for the caller's.
    """

    __test__ = False  # not a test case, whatever its name makes pytest think

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.account: str | None = None
        self.sftp: dict[str, SftpServer] = {}
        self.xrootd: dict[str, XrootdServer] = {}
        self._gridftp: dict[str, GridFtpServer] = {}
        self.credentials: GridCredentials | None = None

    def __enter__(self) -> Self:
        self.directory.mkdir(mode=0o755)
        self.directory.chmod(0o755)
        try:
            self._bring_up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.down()

    @property
    def daemons(self) -> list[ServerProcess]:
        """All servers."""
        return [*self.sftp.values(), *self.xrootd.values()]

    def _bring_up(self) -> None:
        if os.geteuid() == 0:
            self.account = identities.acquire_accounts(self.directory, _USERS)["alice"]
        self.credentials = make_credentials(self.directory, _USERS, "Test Storages CA")
        for site in ("A", "B"):
            self.give(self.root(site))
            self.xrootd[site] = XrootdServer(
                self.directory, f"xrootd{site}", self.root(site), self.credentials, self.account
            )
            self.sftp[site] = SftpServer(self.directory, f"sftp{site}", self.account)
        for daemon in self.daemons:
            daemon.start()

    def root(self, site: str) -> Path:
        """The directory of a site; its servers show it under this path."""
        path = self.directory / "sites" / site
        path.mkdir(parents=True, exist_ok=True)
        return path

    def gridftp(self, site: str) -> GridFtpServer:
        """The GridFTP server of a site, started at its first use."""
        if site not in self._gridftp:
            if self.credentials is None:
                raise GridError("the servers are not up")
            servers, gridmap = self.directory / "servers", self.directory / "grid-mapfile"
            servers.mkdir(exist_ok=True)
            account = self.account or pwd.getpwuid(os.geteuid()).pw_name
            gridmap.write_text(f'"{self.credentials.users["alice"].dn}" {account}\n')
            host = self.credentials.host
            settings = GridFtpSettings(
                directory=self.directory,
                name=f"gridftp{site}",
                home=self.root(site),
                certificate=host.certificate,
                key=host.key,
                trust=self.credentials.trust,
                gridmap=gridmap,
                setuid=self.account is not None,
            )
            self._gridftp[site] = GridFtpServer(settings)
            self._gridftp[site].start()
        return self._gridftp[site]

    def revive(self) -> None:
        """Start what is stopped or has crashed, thaw what is frozen."""
        for daemon in self.daemons:
            daemon.revive()
        for server in self._gridftp.values():
            server.thaw()
            if server.pid is None:
                server.start()

    def server(self, protocol: str, site: str) -> SftpServer | XrootdServer | GridFtpServer:
        """What serves a site by a protocol."""
        if protocol == "gridftp":
            return self.gridftp(site)
        return self.sftp[site] if protocol == "ssh" else self.xrootd[site]

    def url(self, protocol: str, site: str, path: Path) -> str:
        """The URL of a path at a site."""
        place = quote(bytes(path))
        if protocol == "gridftp":
            return f"{self.gridftp(site).url}{place}"
        if protocol == "ssh":
            return f"{self.sftp[site].url}{place}"
        if protocol == "https":
            return f"{self.xrootd[site].url}{place}"
        if protocol == "xroot":
            return f"{self.xrootd[site].root_url}/{place}"
        return f"file://{place}"

    def give(self, path: Path) -> Path:
        """Let the servers' account own a file or a tree; returns the path."""
        if self.account is not None:
            entry = pwd.getpwnam(self.account)
            inside = [
                Path(directory, name)
                for directory, directories, files in os.walk(path)
                for name in (*directories, *files)
            ]
            for member in (path, *inside):
                os.chown(member, entry.pw_uid, entry.pw_gid, follow_symlinks=False)
        return path

    def environment(self) -> Mapping[str, str]:
        """What the helpers need in their environment."""
        known = self.directory / "known_hosts"
        known.write_text("".join(server.known_hosts.read_text() for server in self.sftp.values()))
        first = self.sftp["A"]
        proxy, trust = "", ""
        if self.credentials is not None:
            proxy, trust = str(self.credentials.users["alice"].proxy), str(self.credentials.trust)
        return {
            "PDM_SSH_KEY": str(first.client_key),
            "PDM_SSH_KNOWN_HOSTS": str(known),
            "PDM_SSH_USER": first.user,
            "X509_USER_PROXY": proxy,
            "X509_CERT_DIR": trust,
            "PDM_FILE_ROOTS": json.dumps([quote(bytes(self.directory / "sites"))]),
        }

    def down(self) -> None:
        """End all servers and remove the directory."""
        for daemon in self.daemons:
            daemon.stop()
        for server in self._gridftp.values():
            server.stop()
        end_marked({GRID_MARK: str(self.directory)})
        shutil.rmtree(self.directory, ignore_errors=True)
        if os.geteuid() == 0:
            identities.release_accounts(self.directory)
