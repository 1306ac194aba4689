"""Sites of users do not lead to the machine of the service, nor to its link."""

from __future__ import annotations

import socket

import pytest
import pytest_twisted

from tests.http.service import Service

LOCAL = (
    "localhost", "LOCALHOST", "localhost.", "a.localhost", "127.0.0.1", "127.1", "0x7f000001", "2130706433", "0.0.0.0",
    "169.254.169.254", "[::1]", "[::ffff:127.0.0.1]", "[fe80::1]", "[::]", "localhost6", "ip6-localhost",
    "IP6-loopback", "localhost6.localdomain6", socket.gethostname(),
)  # fmt: skip


@pytest_twisted.ensureDeferred
async def test_users_sites_are_elsewhere(service: Service) -> None:
    for number, host in enumerate(LOCAL):
        name = f"local{number}"
        for site in (
            {"name": name, "endpoints": {"https": f"https://{host}:8443/data"}},
            {"name": name, "endpoints": {"gridftp": ["gsiftp://far.example.org", f"gsiftp://{host}:2811"]}},
            {"name": name, "endpoints": {"gridftp": "gsiftp://far.example.org"}, "myproxy": f"{host}:7512"},
        ):
            answer = await service.call("inward", "POST", "/sites", site)
            assert answer.status in (400, 403), (site, answer.body)
    site = {"name": "outward", "endpoints": {"gridftp": "gsiftp://far.example.org"}}
    made = (await service.call("inward", "POST", "/sites", site)).json
    answer = await service.call(
        "inward", "PATCH", f"/sites/{made['id']}", {"endpoints": {"ssh": "sftp://localhost:22"}}
    )
    assert (answer.status, answer.problem) == (403, "forbidden $.endpoints.ssh")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
@pytest_twisted.ensureDeferred
async def test_operators_know_what_they_do(service: Service, host: str) -> None:
    name = f"here-{host.replace('.', '-')}"
    site = {"name": name, "endpoints": {"gridftp": f"gsiftp://{host}:2811"}}
    assert (await service.call("operator", "POST", "/sites", site)).status == 201


@pytest_twisted.ensureDeferred
async def test_hosts_of_users_sites_are_hosts(service: Service) -> None:
    for server in (
        "-p:7512",
        "--help:7512",
        "far.example.org:80:7512",
        "me@far.example.org:7512",
        "far.example.org\n:7512",
    ):
        site = {"name": "odd", "endpoints": {"gridftp": "gsiftp://far.example.org"}, "myproxy": server}
        answer = await service.call("inward", "POST", "/sites", site)
        assert (answer.status, answer.problem) == (400, "invalid-input $.myproxy"), server
    for host in (
        "-oProxyCommand=x",
        "me:secret@far.example.org",
        "far.example.org\r\nX: y",
        "far.example.org\x1b[2J",
        "a b",
    ):
        for protocol, scheme in (("ssh", "sftp"), ("gridftp", "gsiftp"), ("https", "https"), ("xroot", "root")):
            site = {"name": "odd", "endpoints": {protocol: f"{scheme}://{host}:22"}}
            answer = await service.call("inward", "POST", "/sites", site)
            assert (answer.status, answer.problem) == (400, f"invalid-input $.endpoints.{protocol}"), host
            assert b"secret" not in answer.body
