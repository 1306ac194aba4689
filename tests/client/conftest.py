"""Certificates and a server that misbehaves, for the tests of the client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor

from pdm.workqueue.certificates.authority import Authority
from pdm.workqueue.client.settings import ClientSettings
from pdm.workqueue.WorkqueueClient import WorkqueueClient
from tests.client.fault_server import FaultServer


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two authorities (``ca``, ``other``), ``host``, ``alice``, and ``eve`` of the other one."""
    directory = tmp_path_factory.mktemp("pki")
    ca, other = Authority.create("/DC=org/DC=test/CN=CA"), Authority.create("/DC=org/DC=test/CN=Other")
    credentials = {
        "host": ca.host(["localhost"], ["127.0.0.1"]),
        "stranger": ca.host(["elsewhere.example.org"]),
        "alice": ca.user("Alice"),
        "eve": other.user("Eve"),
    }
    for name, credential in credentials.items():
        credential.write_certificate(directory / f"{name}.crt")
        credential.write_key(directory / f"{name}.key")
    credentials["alice"].proxy().write_bundle(directory / "proxy.pem")
    ca.write(directory)
    other.write(directory / "other")
    return directory


@pytest.fixture
def server(pki: Path) -> Iterator[FaultServer]:
    running = FaultServer.create(pki / "host.crt", pki / "host.key", pki / "ca.crt")
    yield running
    running.close()


@pytest.fixture
def client_of(pki: Path) -> Iterator[Callable[..., WorkqueueClient]]:
    """Makes clients for a URL; they are closed when the test ends."""
    made: list[WorkqueueClient] = []

    def make(url: str, user: str | None = "alice", ca: Path | None = None, **more: Any) -> WorkqueueClient:
        certificate, key = (None, None) if user is None else (pki / f"{user}.crt", pki / f"{user}.key")
        settings = ClientSettings(url, certificate, key, ca or pki / "ca.crt")
        made.append(WorkqueueClient.from_settings(reactor, settings, **more))
        return made[-1]

    yield make
    for client in made:
        pytest_twisted.blockon(client.close())
