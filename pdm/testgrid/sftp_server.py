"""An OpenSSH server that serves SFTP to one account, with keys of its own."""

from __future__ import annotations

import os
import pwd
import subprocess
from collections.abc import Sequence
from pathlib import Path

from pdm.testgrid.daemons import Daemon
from pdm.testgrid.errors import GridError
from pdm.testgrid.programs import program

_PRIVILEGE_FOLDER = Path("/run/sshd")


class SftpServer(Daemon):
    """``sftp://localhost:PORT``; started by root it lets ``account`` in, else who started it.

    Args:
        folder: for keys and configuration; accounts must be able to enter it.
        name: of the server.
        account: local account that sessions become.
    """

    def __init__(self, folder: Path, name: str, account: str | None = None) -> None:
        super().__init__(folder, name)
        self.user = account or pwd.getpwuid(os.geteuid()).pw_name
        self.client_key = folder / "id_ed25519"
        self.known_hosts = folder / f"{name}.known_hosts"
        #: The keys that are let in, as sshd reads them at each login.
        self.authorized = folder / f"{name}.authorized"
        self._host_key = folder / f"{name}.host_ed25519"
        for key in (self._host_key, self.client_key):
            if not key.exists():
                make_key(key)
        self.authorized.write_text(self.client_key.with_suffix(".pub").read_text())

    @property
    def url(self) -> str:
        return f"sftp://localhost:{self.port}"

    def command(self) -> Sequence[str]:
        kind, key, *_ = self._host_key.with_suffix(self._host_key.suffix + ".pub").read_text().split()
        self.known_hosts.write_text(f"[localhost]:{self.port} {kind} {key}\n")
        configuration = self.folder / f"{self.name}.conf"
        configuration.write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self._host_key}\nPidFile none\n"
            f"AuthorizedKeysFile {self.authorized}\nStrictModes no\nUsePAM no\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            f"AllowUsers {self.user}\nUseDNS no\nMaxStartups 200\nSubsystem sftp internal-sftp\n"
        )
        if os.geteuid() == 0:
            _PRIVILEGE_FOLDER.mkdir(mode=0o755, exist_ok=True)
        return [str(program("sshd")), "-D", "-e", "-f", str(configuration)]


def make_key(path: Path) -> None:
    """An Ed25519 key pair for SSH, without a passphrase."""
    done = subprocess.run(
        [str(program("ssh-keygen")), "-q", "-t", "ed25519", "-N", "", "-C", "pdm-testgrid", "-f", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise GridError(f"ssh-keygen: {done.stderr.strip()}")
