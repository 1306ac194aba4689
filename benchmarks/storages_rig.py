"""A daemon beside two sites of SSH, HTTPS or XROOT, which may lie behind a line with a delay."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen
from bare_clients import Route
from caller import Caller
from delaying_proxy import delayed
from meter import Meter
from rig import Rig, directory_for_all, end_daemon, storage_directory

from pdm.testgrid.service import TestService
from pdm.testgrid.storages import TestStorages
from tests.support.loopback import service_of, ssh_settings

_USER = "alice"


@frozen
class StoragesRig:
    """A daemon that runs, and its two sites, numbers 1 and 2.

    Attributes:
        rig: the daemon, without a grid.
        storages: the servers.
        route: of bare clients between the same two sites.
    """

    rig: Rig
    storages: TestStorages
    route: Route

    def caller(self) -> Caller:
        return self.rig.caller(_USER)

    @property
    def roots(self) -> tuple[Path, Path]:
        """The directories of the sites."""
        return self.storages.root("A"), self.storages.root("B")


@contextlib.contextmanager
def storages_rig(protocol: str, round_trip_ms: int, need_bytes: int) -> Iterator[StoragesRig]:
    """A running daemon with two sites of a protocol; all is gone afterwards.

    Args:
        protocol: ssh, https or xroot.
        round_trip_ms: of the line to the servers; 0 for none but loopback.
        need_bytes: how much the sites must hold: they lie in memory where there is room for it.
    """
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(directory_for_all("pdm-bench-"))
        where = stack.enter_context(directory_for_all("pdm-bench-sites-", storage_directory(need_bytes)))
        storages = stack.enter_context(TestStorages(where / "storages"))
        servers = list((storages.sftp if protocol == "ssh" else storages.xrootd).values())
        real = [storages.xrootd[site].root_port for site in ("A", "B")]
        if protocol != "xroot":
            real = [server.port for server in servers]
        ports = stack.enter_context(delayed(round_trip_ms, real))
        environment = {
            **storages.environment(),
            "PDM_SSH_KNOWN_HOSTS": str(_known_hosts(storages, directory, real, ports)),
        }
        schemes = {"ssh": "sftp", "https": "https", "xroot": "root"}
        first, second = (f"{schemes[protocol]}://localhost:{port}" for port in ports)
        service = _service(storages, directory / "instance", protocol, (first, second), environment)
        # What still runs when the figures are there is not worth waiting for.
        stack.callback(end_daemon, service)
        service.start()
        assert service.process is not None
        service.delegate(_USER)
        assert storages.credentials is not None
        user = storages.credentials.users[_USER]
        route = Route(protocol, (first, second), environment, user.certificate, user.key, directory, where)
        pids = [server.pid for server in servers if server.pid is not None]
        yield StoragesRig(Rig(service, None, directory, Meter(service.process.pid, pids)), storages, route)


def _known_hosts(storages: TestStorages, directory: Path, real: list[int], ports: list[int]) -> Path:
    """The keys of the SSH servers, by the ports at which they are reached."""
    lines = "".join(server.known_hosts.read_text() for server in storages.sftp.values())
    for port, reached in zip(real, ports, strict=True):
        lines = lines.replace(f"[localhost]:{port} ", f"[localhost]:{reached} ")
    path = directory / "known_hosts"
    path.write_text(lines)
    return path


def _service(
    storages: TestStorages, directory: Path, protocol: str, urls: tuple[str, str], environment: dict[str, str]
) -> TestService:
    """A daemon, not started, for alice of the storages."""
    sites = "".join(f"[{protocol}-{number}]\nid = {number}\n{protocol} = {url}\n" for number, url in enumerate(urls, 1))
    return service_of(storages, directory, sites, ssh=ssh_settings(environment))
