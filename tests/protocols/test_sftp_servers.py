"""SFTP servers of many makes, through the whole service: what a user does every day works at each of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdm.testgrid import identities
from pdm.testgrid.processes import missing_of
from pdm.testgrid.service import TestService
from tests.support.everyday_session import SessionEnd, everyday_session, failed_steps
from tests.support.sftp_servers import MAKES, AsyncSsh, SftpMake

pytestmark = [pytest.mark.full, pytest.mark.server, pytest.mark.timeout(180)]
_LOCAL = 1
#: Servers with quirks, by the account that each is played for.
_QUIRKY = ("no-types", "no-permissions", "no-extensions")
_MAKES: dict[str, type[SftpMake]] = {**MAKES, **dict.fromkeys(_QUIRKY, AsyncSsh)}
_SITES = {name: number for number, name in enumerate(_MAKES, start=2)}


@pytest.fixture(scope="module")
def servers(open_directory: Path) -> Iterator[dict[str, SftpMake]]:
    """All makes whose programs are here, up."""
    directory = open_directory / "sftp-servers"
    directory.mkdir(mode=0o755)
    account = None
    if os.geteuid() == 0:
        account = identities.acquire_accounts(directory, ["alice"])["alice"]
    made: dict[str, SftpMake] = {}
    try:
        for name, make in _MAKES.items():
            if missing_of(*make.programs) or (make.needs_root and account is None):
                continue
            made[name] = make(directory, name, account)
            made[name].start()
        yield made
    finally:
        for server in made.values():
            server.stop()
        if account is not None:
            identities.release_accounts(directory)


@pytest.fixture(scope="module")
def service(servers: dict[str, SftpMake], tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestService]:
    """A daemon that has each server as a site, and the site ``local``."""
    directory = tmp_path_factory.mktemp("everyday")
    first = next(iter(servers.values()))
    known = directory / "known_hosts"
    known.write_text("".join(server.known_host for server in servers.values()))
    service = TestService(directory / "instance")
    service.init(
        queue={"first_pause": "100ms", "longest_pause": "300ms", "stall": "30s", "total": "60s"},
        ssh={"key": str(first.client_key), "known_hosts": str(known), "user": first.user},
    )
    sections = [f"[local]\nid = {_LOCAL}\nfile = file:///\n"]
    sections += [f"[{name}]\nid = {_SITES[name]}\nssh = {server.url}\n" for name, server in servers.items()]
    (service.directory / "sites.d" / "sites.conf").write_text("\n".join(sections))
    with service.running():
        for quirk in _QUIRKY:
            key = {"kind": "ssh-key", "site": _SITES[quirk], "account": quirk, "secret": first.client_key.read_text()}
            assert service.call("admin", "POST", "/credentials", key)[0] == 201
        yield service
    assert "Traceback" not in service.log_path.read_text()


@pytest.mark.parametrize("name", _MAKES)
def test_the_everyday_session(name: str, servers: dict[str, SftpMake], service: TestService, tmp_path: Path) -> None:
    if name not in servers:
        pytest.skip(f"{name} cannot be started here: it needs {_MAKES[name].programs}, or root")
    server = servers[name]
    local = SessionEnd(_LOCAL, "FILE", str(tmp_path))
    remote = SessionEnd(_SITES[name], "SSH", server.served)
    steps = everyday_session(service, "admin", remote, local, tmp_path)
    assert failed_steps(steps) == []
    assert len(steps) == 12
    assert list(server.disk.iterdir()) == []
