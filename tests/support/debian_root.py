"""A bare Debian 12 in a directory: programs run in it, and it boots under systemd as a container."""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

#: What a Debian has besides its base for the tests: systemd, and the libraries that the package recommends.
_PACKAGES = (
    *("systemd-sysv", "dbus", "python3", "libstdc++6", "man-db", "logrotate", "procps"),
    *("libglobus-gssapi-gsi4", "openssh-client", "python3-xrootd", "myproxy"),
)
PROGRAMS = ("mmdebstrap", "systemd-nspawn", "lintian", "dh")
_TRIAL = """\
[Unit]
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/bin/bash /root/trial.sh
StandardOutput=file:/root/trial.out
StandardError=inherit
ExecStopPost=/bin/systemctl --no-block poweroff
[Install]
WantedBy=default.target
"""


class DebianRoot:
    """A Debian system in a directory, from the package sources of this machine."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def make(self) -> None:
        """Install a Debian into the directory."""
        packages = ",".join(_PACKAGES)
        subprocess.run(
            ["mmdebstrap", "--quiet", "--variant=apt", f"--include={packages}", "bookworm", str(self.directory)],
            check=True,
            timeout=300,
            capture_output=True,
        )

    def __truediv__(self, path: str) -> Path:
        return self.directory / path.lstrip("/")

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program in it, without its services."""
        return subprocess.run(
            ["chroot", str(self.directory), *command],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    def install(self, package: Path) -> str:
        """Install a package file; returns what was printed."""
        shutil.copy(package, self / "root")
        done = self.run("dpkg", "--install", "--force-confdef", f"/root/{package.name}")
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def write(self, path: str, text: str) -> None:
        target = self / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def boot(self, script: str, visible: Sequence[Path] = (), timeout_s: float = 300.0) -> Mapping[str, str]:
        """Boot it with systemd, run a script of bash at the end of the boot, and switch it off.

        Its network is the machine's own.

        Args:
            visible: directories of this machine that it sees, under the same path, for reading.

        Returns:
            What the script wrote into ``/root/found``: name of file → content. ``trial`` is what it printed.
        """
        self.write("/etc/systemd/system/trial.service", _TRIAL)
        self.write("/root/trial.sh", script)
        self.write("/etc/hosts", "127.0.0.1 localhost\n")
        (self / "/root/found").mkdir()
        self.run("systemctl", "enable", "trial.service")
        command = [
            "systemd-nspawn",
            "--quiet",
            "--register=no",
            "--keep-unit",
            "--boot",
            f"--directory={self.directory}",
        ]
        command += [f"--bind-ro={path}" for path in visible]
        leader, follower = pty.openpty()
        container = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower)
        os.close(follower)
        console = bytearray()
        reader = threading.Thread(target=_drain, args=(leader, console))
        reader.start()
        try:
            # A script that hangs is shown as far as it came.
            with contextlib.suppress(subprocess.TimeoutExpired):
                container.wait(timeout_s)
        finally:
            if container.poll() is None:
                container.kill()
                container.wait()
            reader.join()
            os.close(leader)
        trial = self / "/root/trial.out"
        assert trial.exists(), console.decode(errors="replace")[-4000:]
        found = {file.name: file.read_text() for file in (self / "/root/found").iterdir()}
        return {**found, "trial": trial.read_text()}


def _drain(leader: int, console: bytearray) -> None:
    # The end of the last writer is an error on a terminal.
    with contextlib.suppress(OSError):
        while data := os.read(leader, 65536):
            console += data
