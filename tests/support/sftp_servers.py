"""SFTP servers of many makes, each from its package, on free ports of loopback.

Each serves one account of the machine and one directory of the disk. Those that need a home of their own for the
account, or a directory that only root may reach, are started in a mount namespace: the machine stays unchanged.
"""

from __future__ import annotations

import os
import pwd
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from pdm.testgrid.processes import program_path
from pdm.testgrid.storage_servers import ServerProcess, make_key

_SFTP_SERVER = "/usr/lib/openssh/sftp-server"
_ASYNCSSH = Path(__file__).with_name("asyncssh_server.py")
#: A directory of root below directories of root, as sshd requires for a chroot; mounted in the server's namespace only.
_JAIL = "/media"
_CHATTY = "echo 'Welcome to the cluster!'; module load defaults 2>/dev/null;"


class SftpMake(ServerProcess):
    """A server of one make.

    Args:
        directory: for keys and configurations of all servers; accounts can enter it.
        name: of the server.
        account: local account that sessions become; None for the caller's.

    Attributes:
        disk: the directory that it serves.
    """

    #: Whether only root can start it as intended.
    needs_root = False
    #: Programs that it needs.
    programs: tuple[str, ...] = ()

    def __init__(self, directory: Path, name: str, account: str | None) -> None:
        super().__init__(directory, name)
        self.user = account or pwd.getpwuid(os.geteuid()).pw_name
        self.client_key = directory / "id_ed25519"
        self.own = directory / name
        self.disk = self.own / "disk"
        self._host_key = self.own / "host_ed25519"
        self._authorized = self.own / "authorized_keys"
        self.disk.mkdir(parents=True)
        for key in (self.client_key, self._host_key):
            if not key.exists():
                make_key(key)
        self._authorized.write_text(self.client_key.with_suffix(".pub").read_text())
        self._give(self.disk)

    @property
    def url(self) -> str:
        return f"sftp://localhost:{self.port}"

    @property
    def served(self) -> str:
        """The path of `disk` at the server."""
        return str(self.disk)

    @property
    def known_host(self) -> str:
        """Its line for a known_hosts file."""
        kind, key, *_ = self._host_key.with_suffix(".pub").read_text().split()
        return f"[localhost]:{self.port} {kind} {key}\n"

    def _give(self, *paths: Path) -> None:
        if os.geteuid() == 0:
            who = pwd.getpwnam(self.user)
            for path in paths:
                os.chown(path, who.pw_uid, who.pw_gid)

    def _account(self) -> tuple[int, int] | None:
        """For servers that run as one account; they read their key as that account."""
        if os.geteuid() != 0:
            return None
        self._give(self._host_key)
        who = pwd.getpwnam(self.user)
        return who.pw_uid, who.pw_gid

    def _in_namespace(self, mounts: Sequence[tuple[Path, str]], command: Sequence[str]) -> list[str]:
        """The command in a namespace with directories or files mounted over others."""
        script = "".join(f'mount --bind "{source}" "{target}" && ' for source, target in mounts) + 'exec "$@"'
        return [str(program_path("unshare")), "--mount", "sh", "-c", script, "sh", *command]


class OpenSsh(SftpMake):
    """``sshd`` with lines of its own in its configuration."""

    programs: tuple[str, ...] = ("sshd",)
    #: How the subsystem is run; empty for no subsystem.
    subsystem = "internal-sftp"
    lines = ""

    def command(self) -> Sequence[str]:
        configuration = self.own / "sshd.conf"
        configuration.write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self._host_key}\nPidFile none\n"
            f"AuthorizedKeysFile {self._authorized}\nStrictModes no\nUsePAM no\nUseDNS no\nMaxStartups 200\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            + (f"Subsystem sftp {self.subsystem}\n" if self.subsystem else "")
            + self.lines
        )
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        return [str(program_path("sshd")), "-D", "-e", "-f", str(configuration)]


class OpenSshChroot(OpenSsh):
    """As for SFTP-only accounts: chroot, forced internal-sftp, a banner."""

    programs = ("sshd", "unshare")
    needs_root = True

    def __init__(self, directory: Path, name: str, account: str | None) -> None:
        super().__init__(directory, name, account)
        (self.own / "jail" / "data").mkdir(parents=True)
        self.disk = self.own / "jail" / "data"
        self._give(self.disk)
        (self.own / "banner").write_text("*" * 70 + "\nAuthorised users only.\n" + "*" * 70 + "\n")
        self.lines = f"ChrootDirectory {_JAIL}\nForceCommand internal-sftp\nBanner {self.own / 'banner'}\n"

    @property
    def served(self) -> str:
        return "/data"

    def command(self) -> Sequence[str]:
        return self._in_namespace([(self.own / "jail", _JAIL)], super().command())


class OpenSshShell(OpenSsh):
    """The external ``sftp-server``, started by the account's shell."""

    subsystem = _SFTP_SERVER


class OpenSshNoisy(OpenSsh):
    """A start-up file of the account's shell that prints, like ~/.bashrc of many clusters."""

    programs = ("sshd", "unshare", "bash")
    needs_root = True
    subsystem = _SFTP_SERVER

    def command(self) -> Sequence[str]:
        home = self.own / "home"
        home.mkdir(exist_ok=True)
        (home / ".bashrc").write_text(_CHATTY + "\n")
        return self._in_namespace([(_etc(self.own, self.user, home, "/bin/bash"), "/etc")], super().command())


class OpenSshForced(OpenSsh):
    """A ForceCommand that is no SFTP server: it prints a greeting and ends."""

    lines = "ForceCommand echo 'This account is for git only.'\n"


class OpenSshNoSubsystem(OpenSsh):
    """No subsystem: SFTP is turned off."""

    subsystem = ""


class OpenSshMissing(OpenSsh):
    """The program of the subsystem is not installed."""

    subsystem = "/nonexistent/sftp-server"


class OpenSshOld(OpenSsh):
    """Algorithms that today's clients refuse."""

    lines = "KexAlgorithms diffie-hellman-group1-sha1\n"


class Dropbear(SftpMake):
    """Dropbear, which starts OpenSSH's ``sftp-server``."""

    programs = ("dropbear", "dropbearconvert", "unshare")
    needs_root = True

    def command(self) -> Sequence[str]:
        home = self.own / "home"
        (home / ".ssh").mkdir(parents=True, exist_ok=True)
        shutil.copy(self._authorized, home / ".ssh" / "authorized_keys")
        self._give(home, home / ".ssh", home / ".ssh" / "authorized_keys")
        for path, mode in ((home, 0o755), (home / ".ssh", 0o700), (home / ".ssh" / "authorized_keys", 0o600)):
            path.chmod(mode)
        return self._in_namespace(
            [(_etc(self.own, self.user, home, "/bin/sh"), "/etc")],
            ["sh", "-c", self._script()],
        )

    def _script(self) -> str:
        key = self.own / "host_dropbear"
        convert = f"dropbearconvert openssh dropbear {self._host_key} {key}"
        return f"[ -e {key} ] || {convert} && exec dropbear -F -E -s -r {key} -p 127.0.0.1:{self.port} -P ''"


class ProFtpd(SftpMake):
    """ProFTPD with mod_sftp."""

    programs = ("proftpd", "ssh-keygen")

    def command(self) -> Sequence[str]:
        who = pwd.getpwnam(self.user)
        users, keys = self.own / "users", self.own / "keys"
        users.write_text(f"{self.user}:*:{who.pw_uid}:{who.pw_gid}::{self.disk}:/bin/sh\n")
        users.chmod(0o600)
        _rfc4716(self.client_key, keys)
        configuration = self.own / "proftpd.conf"
        configuration.write_text(
            "ModulePath /usr/lib/proftpd\nLoadModule mod_sftp.c\nServerType standalone\nUseIPv6 off\n"
            f"DefaultAddress 127.0.0.1\nPort {self.port}\nPidFile {self.own}/pid\nScoreboardFile {self.own}/scores\n"
            f"User nobody\nGroup nogroup\nAuthOrder mod_auth_file.c\nAuthUserFile {users}\n"
            "RequireValidShell off\nUseReverseDNS off\nWtmpLog off\nTransferLog none\nDelayEngine off\n"
            "AllowOverwrite on\nMaxInstances 50\n"
            f"<IfModule mod_sftp.c>\nSFTPEngine on\nSFTPHostKey {self._host_key}\nSFTPAuthMethods publickey\n"
            f"SFTPAuthorizedUserKeys file:{keys}\n</IfModule>\n"
        )
        return [str(program_path("proftpd")), "--nodaemon", "-c", str(configuration)]


class Rclone(SftpMake):
    """``rclone serve sftp``; its root is the directory that it serves."""

    programs = ("rclone",)

    @property
    def served(self) -> str:
        return "/"

    def account(self) -> tuple[int, int] | None:
        return self._account()

    def command(self) -> Sequence[str]:
        cache = self.own / "cache"
        cache.mkdir(exist_ok=True)
        self._give(cache)
        where = ["--addr", f"127.0.0.1:{self.port}", "--key", str(self._host_key)]
        files = ["--authorized-keys", str(self._authorized), "--config", "/dev/null", "--cache-dir", str(cache)]
        # Files that tests write are visible at once, not after the usual five minutes.
        options = ["--dir-cache-time", "0s"]
        # The distribution's, not the newer one beside the interpreter that serves S3: that of 1.75.2 was seen to answer
        # no RENAME of a directory any more, and to take all of a processor.
        rclone = shutil.which("rclone", path=os.defpath) or program_path("rclone")
        return [str(rclone), "serve", "sftp", *where, *files, *options, str(self.disk)]


class AsyncSsh(SftpMake):
    """AsyncSSH, with the quirks that the account's name selects."""

    def command(self) -> Sequence[str]:
        keys = ["--host-key", str(self._host_key), "--authorized", str(self._authorized)]
        # It changes to the account itself, because the account may not be able to start this interpreter.
        self._give(self._host_key)
        account = ["--account", self.user] if os.geteuid() == 0 else []
        return [sys.executable, str(_ASYNCSSH), "--port", str(self.port), *keys, *account]


#: Makes that the everyday session runs against.
MAKES: dict[str, type[SftpMake]] = {
    "openssh-chroot": OpenSshChroot,
    "openssh-shell": OpenSshShell,
    "dropbear": Dropbear,
    "proftpd": ProFtpd,
    "rclone": Rclone,
    "asyncssh": AsyncSsh,
}


def _etc(directory: Path, user: str, home: Path, shell: str) -> Path:
    """A copy of ``/etc`` in which one account has another home and shell.

    A copy of the directory, not of ``passwd`` alone: when another test adds an account, that file is replaced, and the
    mount over it is lost.
    """
    copy = directory / "etc"
    if copy.exists():
        shutil.rmtree(copy)
    shutil.copytree("/etc", copy, symlinks=True)
    lines = []
    for line in Path("/etc/passwd").read_text().splitlines():
        fields = line.split(":")
        if fields[0] == user:
            fields[5:] = [str(home), shell]
        lines.append(":".join(fields))
    (copy / "passwd").write_text("\n".join(lines) + "\n")
    return copy


def _rfc4716(key: Path, public: Path) -> None:
    """The public key in the format of ProFTPD."""
    kind, text, *_ = key.with_suffix(".pub").read_text().split()
    assert kind
    folded = "\n".join(text[start : start + 70] for start in range(0, len(text), 70))
    public.write_text(f'---- BEGIN SSH2 PUBLIC KEY ----\nComment: "pdm"\n{folded}\n---- END SSH2 PUBLIC KEY ----\n')
