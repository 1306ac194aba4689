"""Jobs through the daemon: SSH, HTTPS and XROOT sites, and copies between unlike ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdm.testgrid.service import TestService
from pdm.testgrid.storages import TestStorages
from tests.agents.helpers.driver import tree
from tests.protocols.places import Places

#: Sites by protocol and letter.
PROTOCOLS = ("ssh", "https", "file", "xroot")
SITES = {
    (protocol, letter): 2 * n + m for n, protocol in enumerate(PROTOCOLS) for m, letter in enumerate("AB", start=1)
}
ONLY_DUMMY = 9
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def service(storages: TestStorages, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestService]:
    credentials = storages.credentials
    assert credentials is not None
    alice = credentials.users["alice"]
    grid = {
        "ca_dir": str(credentials.trust),
        "users": {"alice": {"cert": str(alice.certificate), "key": str(alice.key)}},
    }
    service = TestService(tmp_path_factory.mktemp("jobs") / "instance", grid)
    environment = storages.environment()
    service.init(
        queue={"first_pause": "100ms", "longest_pause": "300ms", "stall": "30s", "total": "60s"},
        credentials={"trust_dir": str(credentials.trust)},
        ssh={
            "key": environment["PDM_SSH_KEY"],
            "known_hosts": environment["PDM_SSH_KNOWN_HOSTS"],
            "user": environment["PDM_SSH_USER"],
        },
    )
    trust = service.directory / "certificates" / "trust"
    for file in credentials.trust.iterdir():
        (trust / file.name).write_bytes(file.read_bytes())
    sections = [
        f"[{protocol}-{letter}]\nid = {number}\n{protocol} = {_endpoint(storages, protocol, letter)}\n"
        for (protocol, letter), number in SITES.items()
    ]
    sections.append(f"[nothing]\nid = {ONLY_DUMMY}\ndummy = dummy://x/\n")
    (service.directory / "sites.d" / "sites.conf").write_text("\n".join(sections))
    with service.running():
        service.delegate("alice")
        yield service
    assert "Traceback" not in service.log_path.read_text()


def _endpoint(storages: TestStorages, protocol: str, letter: str) -> str:
    if protocol == "file":
        return "file:///"
    return storages.xrootd[letter].root_url if protocol == "xroot" else storages.server(protocol, letter).url


def run(service: TestService, type_: str, protocol: str, letter: str, path: Path, **more: Any) -> dict[str, Any]:
    submitted = service.submit(
        "alice", type_, src_siteid=SITES[protocol, letter], src_filepath=str(path), protocol=protocol, **more
    )
    return service.wait_for("alice", submitted["id"], timeout_s=150.0)


@pytest.mark.parametrize("protocol", ["ssh", "https", "xroot"])
def test_all_five_job_types(protocol: str, service: TestService, places: Places) -> None:
    source = places.a / "tree"
    for number in range(30):
        places.put(source / f"folder {number % 3}" / f"näme {number}", bytes([number]) * number)
    (source / "empty").mkdir()
    places.storages.give(places.a)

    listed = run(service, "list", protocol, "A", source)
    assert (listed["status"], listed["num_elements"]) == ("DONE", 1)
    copied = run(
        service, "copy", protocol, "A", source, dst_siteid=SITES[protocol, "B"], dst_filepath=str(places.b / "new")
    )
    assert copied["status"] == "DONE", service.call("alice", "GET", f"/jobs/{copied['id']}/elements")
    assert tree(places.b / "new") == tree(source)
    assert (places.b / "new" / "empty").is_dir()
    moved = run(service, "rename", protocol, "B", places.b / "new", dst_filepath=str(places.b / "newer"))
    assert moved["status"] == "DONE" and (places.b / "newer").is_dir()
    removed = run(service, "remove", protocol, "B", places.b / "newer", extra_opts={"recursive": True})
    assert removed["status"] == "DONE", service.call("alice", "GET", f"/jobs/{removed['id']}/elements")
    assert list(places.b.iterdir()) == []
    made = run(service, "mkdir", protocol, "B", places.b / "made")
    assert made["status"] == "DONE" and (places.b / "made").is_dir()


@pytest.mark.parametrize(
    ("protocol", "other"),
    [(one, other) for one in PROTOCOLS for other in PROTOCOLS if one != other],
)
def test_copies_between_unlike_protocols(protocol: str, other: str, service: TestService, places: Places) -> None:
    source = places.a / "tree"
    for number in range(5):
        places.put(source / f"file {number}", bytes([number]) * 300_000 * number)
    places.storages.give(places.a)
    copied = run(
        service, "copy", protocol, "A", source, dst_siteid=SITES[other, "B"], dst_filepath=str(places.b / "new")
    )
    assert copied["status"] == "DONE", service.call("alice", "GET", f"/jobs/{copied['id']}/elements")
    assert tree(places.b / "new") == tree(source)
    assert places.left() == []


def test_a_users_own_key_is_used_in_place_of_the_services(
    service: TestService, storages: TestStorages, places: Places
) -> None:
    source, server = places.put(places.a / "file", b"content"), storages.sftp["A"]
    status, made = service.call(
        "alice", "POST", "/credentials", {"kind": "ssh-key", "site": SITES["ssh", "A"], "account": server.user}
    )
    assert status == 201
    services = server.authorized.read_text()
    server.authorized.write_text(made["public_key"] + "\n")
    try:
        copied = run(
            service, "copy", "ssh", "A", source, dst_siteid=SITES["https", "B"], dst_filepath=str(places.b / "new")
        )
        assert copied["status"] == "DONE", service.call("alice", "GET", f"/jobs/{copied['id']}/elements")
        assert (places.b / "new").read_bytes() == b"content"
    finally:
        server.authorized.write_text(services)
        service.call("alice", "DELETE", f"/credentials/{made['id']}")


def test_pairs_that_do_not_work_are_named(service: TestService, places: Places) -> None:
    body = {"src_siteid": 1, "src_filepath": "/a", "dst_siteid": ONLY_DUMMY, "dst_filepath": "/b", "protocol": "SSH"}
    status, problem = service.call("alice", "POST", "/copy", body)
    assert status == 400
    assert problem["detail"] == (
        "site nothing offers DUMMY; by SSH this service can copy SSH to SSH, SSH to FILE, SSH to HTTPS, SSH to XROOT"
    )
