"""SFTP and XRootD servers of a test grid: marked processes on free ports of the loopback interface."""

from __future__ import annotations

import base64
import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pdm.testgrid.grid_servers import GRID_MARK
from pdm.testgrid.identities import GridCredentials
from pdm.testgrid.ports import listens, reserve_port
from pdm.testgrid.processes import GridError, Marks, end_marked, program_path

_SERVER_MARK = "PDM_TESTGRID_SERVER"
#: Seconds until a server must answer.
_START_S = 60.0
#: Some servers now and then do not start, and a program that binds a fixed port may have taken theirs.
_TRIES = 5
_PAUSE_S = 0.3


class ServerProcess:
    """A server that is started and stopped by its marks; it keeps its port over `stop` and `start`.

    Args:
        directory: of the server, which exists.
        account: local account that it runs as; None for the caller's.
    """

    def __init__(self, directory: Path, name: str, account: str | None = None) -> None:
        self.directory = directory
        self.name = name
        self._runs_as = account
        self.port = 0
        self.pid: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def marks(self) -> Marks:
        return {GRID_MARK: str(self.directory), _SERVER_MARK: self.name}

    @property
    def output(self) -> Path:
        """What the server prints."""
        return self.directory / f"{self.name}.out"

    def command(self) -> Sequence[str]:
        """The program with its arguments, for `port`; it stays in the foreground."""
        raise NotImplementedError

    def account(self) -> tuple[int, int] | None:
        """User and group that it runs as; None for the caller's."""
        if self._runs_as is None:
            return None
        entry = pwd.getpwnam(self._runs_as)
        return entry.pw_uid, entry.pw_gid

    def environment(self) -> Mapping[str, str]:
        """What it needs in its environment besides."""
        return {}

    def start(self) -> None:
        """Start it and return when it takes connections.

        Raises:
            GridError: it does not come up; the text has what it printed.
        """
        if self.pid is not None:
            raise GridError(f"server {self.name} is running")
        for last in (*[False] * (_TRIES - 1), True):
            chosen = self.port
            self.port = chosen or reserve_port()
            pid = self._spawn(self.command())
            if self._answers():
                self.pid = pid
                return
            end_marked(self.marks)
            self._wait()
            if last:
                break
            self.port = chosen
            time.sleep(_PAUSE_S)
        raise GridError(f"server {self.name} does not come up: {self.output.read_text(errors='replace').strip()}")

    def revive(self) -> None:
        """Start it if it is stopped, or has crashed by itself as XRootD 5.5.3 does now and then; thaw it if need be."""
        self.thaw()
        if self._process is not None and self._process.poll() is not None:
            self.kill()
        if self.pid is None:
            self.start()

    def _spawn(self, command: Sequence[str]) -> int:
        environment = {
            **self.environment(),
            **self.marks,
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": str(self.directory),
        }
        account = self.account()
        who: dict[str, Any] = {}
        if account is not None:
            who = {"user": account[0], "group": account[1], "extra_groups": []}
        with self.output.open("ab") as printed:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                # A group of its own: a ^C at the terminal is not for the servers.
                start_new_session=True,
                **who,
            )
        return self._process.pid

    def _answers(self) -> bool:
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                return False
            with socket.socket() as probe:
                probe.settimeout(1.0)
                # Another server that has the port answers too, until this one has noticed and ended.
                if probe.connect_ex(("127.0.0.1", self.port)) == 0 and self._listens():
                    return True
            time.sleep(0.02)
        return False

    def _listens(self) -> bool:
        pid = 0 if self._process is None else self._process.pid
        return listens(pid, self.port) or any(listens(child, self.port) for child in descendants(pid))

    def stop(self) -> None:
        """End it and all its sessions; nothing if it is stopped."""
        self._signal(signal.SIGCONT)
        self.kill()

    def kill(self) -> None:
        """End it at once, as a crash does; clients see their connections close."""
        self._signal(signal.SIGKILL)
        end_marked(self.marks)
        if self.pid is not None:
            self._wait()
            self.pid = None

    def _wait(self) -> None:
        if self._process is not None:
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """Connections stay open, and nothing answers."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Continue it (SIGCONT)."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        """Signal the server, first of all, and then its sessions: some programs write over their marks."""
        if self.pid is None:
            return
        family = [self.pid, *descendants(self.pid)]
        handles = []
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                handles.append(os.pidfd_open(pid))
        for handle in handles:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, number)
            os.close(handle)


def descendants(pid: int) -> list[int]:
    """The living processes that a process has started, and those that they have."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # After the name, which is in brackets: state, parent.
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found += children
        waiting += children
    return found


_PRIVILEGE_DIRECTORY = Path("/run/sshd")


class SftpServer(ServerProcess):
    """``sftp://localhost:PORT``; started by root it lets ``account`` in, else who started it.

    Args:
        directory: for keys and configuration; accounts must be able to enter it.
    """

    def __init__(self, directory: Path, name: str, account: str | None = None) -> None:
        super().__init__(directory, name)
        self.user = account or pwd.getpwuid(os.geteuid()).pw_name
        self.client_key = directory / "id_ed25519"
        self.known_hosts = directory / f"{name}.known_hosts"
        #: The keys that are let in, as sshd reads them at each login.
        self.authorized = directory / f"{name}.authorized"
        self._host_key = directory / f"{name}.host_ed25519"
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
        configuration = self.directory / f"{self.name}.conf"
        configuration.write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self._host_key}\nPidFile none\n"
            f"AuthorizedKeysFile {self.authorized}\nStrictModes no\nUsePAM no\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            f"AllowUsers {self.user}\nUseDNS no\nMaxStartups 200\nSubsystem sftp internal-sftp\n"
        )
        if os.geteuid() == 0:
            _PRIVILEGE_DIRECTORY.mkdir(mode=0o755, exist_ok=True)
        return [str(program_path("sshd")), "-D", "-e", "-f", str(configuration)]


def make_key(path: Path) -> None:
    """An Ed25519 key pair for SSH, without a passphrase."""
    done = subprocess.run(
        [str(program_path("ssh-keygen")), "-q", "-t", "ed25519", "-N", "", "-C", "pdm-testgrid", "-f", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise GridError(f"ssh-keygen: {done.stderr.strip()}")


_WIDTH = 64


class XrootdServer(ServerProcess):
    """``https://localhost:PORT`` and ``root://localhost:PORT``; paths at it are the real ones.

    XRootD refuses to run as root: started by root it runs as ``account``.

    Args:
        directory: of all servers; accounts must be able to enter it.
    """

    def __init__(
        self, directory: Path, name: str, exported: Path, credentials: GridCredentials, account: str | None = None
    ) -> None:
        super().__init__(directory, name, account)
        self._exported = exported
        self._credentials = credentials
        self._own = directory / name
        #: Where it speaks its own protocol; kept over `stop` and `start`, as `port` is.
        self.root_port = 0
        self._prepare()

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    @property
    def root_url(self) -> str:
        """Where it speaks its own protocol."""
        return f"root://localhost:{self.root_port}"

    def environment(self) -> Mapping[str, str]:
        # Third-party copy reads the authorities from here.
        return {"X509_CERT_DIR": str(self._credentials.trust)}

    def _prepare(self) -> None:
        for sub in ("admin", "pid"):
            (self._own / sub).mkdir(parents=True)
        host = self._credentials.host
        shutil.copyfile(host.certificate, self._own / "host.pem")
        shutil.copyfile(host.key, self._own / "host.key")
        text = base64.b64encode(os.urandom(64)).decode()
        (self._own / "macaroon.secret").write_text(
            "".join(text[start : start + _WIDTH] + "\n" for start in range(0, len(text), _WIDTH))
        )
        name = self._runs_as or pwd.getpwuid(os.geteuid()).pw_name
        (self._own / "gridmap").write_text(f'"{self._credentials.users["alice"].dn}" {name}\n')
        (self._own / "authdb").write_text(f"u {name} / a\n")
        account = self.account()
        for path in (self._own, *self._own.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o600)
            if account is not None:
                os.chown(path, *account)

    def command(self) -> Sequence[str]:
        own, trust = self._own, self._credentials.trust
        configuration = self.directory / f"{self.name}.conf"
        self.root_port = self.root_port or reserve_port()
        configuration.write_text(f"""\
all.sitename {self.name}
all.adminpath {own}/admin
all.pidpath {own}/pid
all.export {self._exported}
xrd.port {self.root_port}
xrd.network nodnr
xrd.allow host localhost
xrd.tls {own}/host.pem {own}/host.key
xrd.tlsca certdir {trust}
xrootd.seclib libXrdSec.so
sec.protocol gsi -certdir:{trust} -cert:{own}/host.pem -key:{own}/host.key -gridmap:{own}/gridmap -gmapopt:2 \
-crl:0 -vomsat:0 -dlgpxy:1 -exppxy:=creds
sec.protbind * only gsi
ofs.authorize 1
ofs.authlib ++ libXrdMacaroons.so
acc.authdb {own}/authdb
ofs.tpc fcreds ?gsi =X509_USER_PROXY ttl 60 60 xfr 100 autorm pgm {program_path("xrdcp")} --server
macaroons.secretkey {own}/macaroon.secret
xrootd.chksum max 4 adler32 crc32 md5
xrd.protocol http:{self.port} libXrdHttp.so
http.gridmap {own}/gridmap
http.listingdeny no
http.exthandler xrdtpc libXrdHttpTPC.so
http.exthandler xrdmacaroons libXrdMacaroons.so
http.header2cgi Authorization authz
""")
        return [str(program_path("xrootd")), "-c", str(configuration)]
