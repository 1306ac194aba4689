"""A daemon with a door for FTS3's clients on the real grid, and the clients themselves."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

from pdm.testgrid import TestGrid
from pdm.testgrid.ports import reserve_port
from pdm.testgrid.service import TestService
from tests.grid.conftest import sites  # noqa: F401 - a fixture
from tests.support.fts_door import ask_door

_ROOT = Path(__file__).resolve().parents[2]
_CLIENTS = _ROOT / ".venv-fts" / "bin"


@frozen
class FtsClients:
    """CERN's client, Rucio and DIRAC in an environment of their own, as a user of the grid.

    Attributes:
        url: of the door.
    """

    service: TestService
    grid: TestGrid
    url: str
    directory: Path

    def environment(self, user: str) -> dict[str, str]:
        known = self.grid.description()["users"].get(user)
        certificate, key = self.service.credentials(user)
        # The instance's own operator has no proxy.
        who = {"X509_USER_PROXY": known["proxy"]} if known else {"X509_USER_CERT": certificate, "X509_USER_KEY": key}
        return {
            "PATH": os.defpath,
            "HOME": str(self.directory),
            "X509_CERT_DIR": str(self.service.directory / "certificates" / "trust"),
            **{name: str(path) for name, path in who.items()},
            "RUCIO_HOME": str(self.directory / "rucio"),
        }

    def command(self, user: str, name: str, *arguments: str, status: int = 0) -> str:
        """Run a command of CERN's client; its output."""
        found, output = self.attempt(user, name, *arguments)
        assert found == status, (name, arguments, output)
        return output

    def attempt(self, user: str, name: str, *arguments: str) -> tuple[int, str]:
        """Run a command of CERN's client; its exit status and output."""
        done = self._run(user, [str(_CLIENTS / f"fts-rest-{name}"), "-s", self.url, *arguments])
        return done.returncode, done.stdout + done.stderr

    def script(self, user: str, name: str, *arguments: str) -> Any:
        """Run a script of this directory; the JSON of the last line that it prints."""
        command = [str(_CLIENTS / "python"), str(Path(__file__).with_name(name)), self.url, *arguments]
        done = self._run(user, command)
        assert not done.returncode, (command, done.stdout, done.stderr)
        return json.loads(done.stdout.splitlines()[-1])

    def call(self, user: str, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """One request by nothing but the standard library; its status and decoded body."""
        return ask_door(self.service, user, method, path, body)

    def _run(self, user: str, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            check=False,
            env=self.environment(user),
            capture_output=True,
            text=True,
            timeout=150,
            cwd=self.directory,
        )


@pytest.fixture(scope="session")
def fts_clients_installed() -> None:
    """The clients are installed."""
    if not (_CLIENTS / "fts-rest-whoami").exists():
        pytest.fail("the clients of FTS3 are missing: run script/bootstrap full")


@pytest.fixture(scope="module")
def clients(
    fts_clients_installed: None, grid: TestGrid, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FtsClients]:
    """A daemon with a door, and its clients."""
    directory = tmp_path_factory.mktemp("fts")
    service = TestService(directory / "instance", grid.description(), grid.directory)
    port = reserve_port()
    service.init(fts={"port": str(port)})
    (directory / "rucio" / "etc").mkdir(parents=True)
    (directory / "rucio" / "etc" / "rucio.cfg").write_text(
        f"[common]\nlogdir = {directory}\n"
        f"[database]\ndefault = sqlite:///{directory}/rucio.db\n"
        "[conveyor]\nuse_deterministic_id = True\n"
        f"usercert = {grid.description()['users']['alice']['proxy']}\n"
    )
    with service.running():
        yield FtsClients(service, grid, f"https://localhost:{port}", directory)
    assert "Traceback" not in service.log_path.read_text()
