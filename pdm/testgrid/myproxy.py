"""A MyProxy server of a test grid: users put credentials there under a password, and the service fetches proxies."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from attrs import frozen

from pdm.testgrid.credentials import HostFiles, UserFiles
from pdm.testgrid.errors import GridError
from pdm.testgrid.processes import end_marked, marked, signal_marked
from pdm.testgrid.programs import program

_START_S = 15.0
_CONFIGURATION = """\
accepted_credentials "*"
authorized_retrievers "*"
default_retrievers "*"
cert_dir {trust}
"""


@frozen(eq=False)
class MyProxyServer:
    """A MyProxy server on a free port of loopback; it ends with the grid whose marks it carries.

    Attributes:
        folder: of its own, for its configuration and what is stored.
        host: its certificate.
        trust: grid style folder of authorities.
        marks: environment by which the grid finds its processes.
    """

    folder: Path
    host: HostFiles
    trust: Path
    marks: Mapping[str, str]

    @property
    def address(self) -> str:
        """``localhost:PORT``."""
        return f"localhost:{int((self.folder / 'port').read_text())}"

    def start(self) -> None:
        """Start it, and return when it listens.

        Raises:
            GridError: it does not come up.
        """
        store, port = self.folder / "store", self.folder / "port"
        self.folder.mkdir(mode=0o700)
        store.mkdir(mode=0o700)
        configuration, key = self.folder / "myproxy-server.conf", self.folder / "host.key"
        configuration.write_text(_CONFIGURATION.format(trust=self.trust))
        configuration.chmod(0o600)
        shutil.copyfile(self.host.key, key)
        key.chmod(0o600)
        arguments = ["-c", str(configuration), "-l", "localhost", "-p", "0", "-s", str(store)]
        arguments += ["-z", str(port), "-P", str(self.folder / "pid")]
        environment = {"X509_USER_CERT": str(self.host.certificate), "X509_USER_KEY": str(key)}
        started = self._run("myproxy-server", arguments, environment)
        if started.returncode:
            raise GridError(f"the MyProxy server does not start: {started.stderr.strip()}")
        deadline = time.monotonic() + _START_S
        while not (port.exists() and port.read_text().strip()):
            if time.monotonic() > deadline:
                raise GridError(f"the MyProxy server does not listen after {_START_S:.0f} s")
            time.sleep(0.01)

    def stop(self) -> None:
        """End it; its port and what is stored stay known."""
        end_marked(self._marks)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all its processes; after SIGSTOP nothing answers any more."""
        signal_marked(self._marks, number)

    @property
    def pids(self) -> list[int]:
        """Its processes."""
        return marked(self._marks)

    def store(self, user: UserFiles, username: str, password: str) -> None:
        """Put a user's credential there.

        Raises:
            GridError: the server does not take it.
        """
        host, _, port = self.address.partition(":")
        arguments = ["-S", "-s", host, "-p", port, "-l", username, "-c", "48", "-t", "24"]
        arguments += ["-C", str(user.certificate), "-y", str(user.key)]
        done = self._run("myproxy-init", arguments, {}, password + "\n")
        if done.returncode:
            raise GridError(f"the MyProxy server does not take the credential: {done.stderr.strip()}")

    @property
    def _marks(self) -> dict[str, str]:
        return {**self.marks, "PDM_TESTGRID_SERVER": "myproxy"}

    def _run(
        self, name: str, arguments: list[str], environment: Mapping[str, str], typed: str = ""
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(program(name)), *arguments],
            env={
                **(self._marks if name == "myproxy-server" else {}),
                "PATH": os.defpath,
                "HOME": str(self.folder),
                "X509_CERT_DIR": str(self.trust),
                **environment,
            },
            input=typed,
            # A daemon keeps what it is given: a pipe would never end.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE if name != "myproxy-server" else None,
            text=True,
            timeout=60,
            check=False,
        )
