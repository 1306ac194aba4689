"""A daemon whose user's credentials end before jobs begin, and are renewed: of all protocols at once."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from attrs import define, field

from pdm.testgrid import TestGrid
from pdm.testgrid.service import TestService
from pdm.testgrid.storages import TestStorages
from tests.protocols.stands import STANDS, Ground, Stand
from tests.protocols.tokens import macaroon

#: Protocols with credentials, and the sites of each by letter; the first two are the grid's own.
PROTOCOLS = [protocol for protocol in STANDS if protocol not in ("file", "tools")]
SITES: Mapping[tuple[str, str], int] = {
    place: number for number, place in enumerate(itertools.product(PROTOCOLS, "AB"), start=1)
}
#: Those whose servers let alice in once she has renewed what she has; the others know another authority's alice.
RENEWED = ("gridftp", "ssh", "https")
#: Seconds for which credentials are good, enough to submit jobs; and those until a hold, or its end, must be seen.
LIFETIME_S, SOON_S = 12, 20.0


@define
class Renewals:
    """Alice's jobs and credentials at a daemon.

    Attributes:
        service: the daemon.
    """

    service: TestService
    storages: TestStorages
    grid: TestGrid
    _keys: list[int] = field(factory=list)

    def call(self, method: str, path: str, body: object = None, user: str = "alice") -> Any:
        status, answer = self.service.call(user, method, path, body)
        assert status < 300, (path, answer)
        return answer

    def give(self, lifetime_s: int) -> None:
        """Give, or renew, tokens, SSH keys and a proxy."""
        for site in "AB":
            token = macaroon(self.storages, site, self.storages.root(site), lifetime_s)
            self.call("POST", "/credentials", {"kind": "token", "site": SITES["https", site], "secret": token})
            server = self.storages.sftp[site]
            made = self.call(
                "POST", "/credentials", {"kind": "ssh-key", "site": SITES["ssh", site], "account": server.user}
            )
            self._keys.append(made["id"])
            with server.authorized.open("a") as lines:
                lines.write(made["public_key"] + "\n")
        # Last: with a proxy that lasts, jobs would go on without the tokens, which its servers do not know.
        delegated = self.service.pdm("alice", "delegate", "--lifetime", f"{lifetime_s}s")
        assert delegated.returncode == 0, delegated.stderr

    def end(self) -> None:
        """Wait until what has an end has ended; SSH keys have none, and are removed."""
        ends = [each["valid_until"] for each in self.call("GET", "/credentials") if each["valid_until"]]
        left = datetime.fromisoformat(max(ends)) - datetime.now(UTC)
        time.sleep(max(left.total_seconds(), 0.0))
        while self._keys:
            self.call("DELETE", f"/credentials/{self._keys.pop()}")

    @contextmanager
    def nothing_begins(self) -> Iterator[None]:
        for number in SITES.values():
            self.call("POST", f"/sites/{number}/drain", {"message": "wait"}, user="admin")
        yield
        for number in SITES.values():
            self.call("POST", f"/sites/{number}/resume", user="admin")

    def submit(self, stand: Stand, job: str) -> int:
        """A job of one try: an attempt that counted would be its last."""
        ground = Ground(stand, f"renewed {job}")
        source, path, more = "B", ground.here, {}
        if job == "LIST":
            path = ground.directory
        elif job == "COPY":
            source, path = "A", ground.file
            more = {"dst_siteid": SITES[stand.protocol, "B"], "dst_filepath": str(ground.new)}
        elif job == "RENAME":
            more = {"dst_filepath": str(ground.new)}
        elif job == "MKDIR":
            path = ground.new
        submitted = self.service.submit(
            "alice",
            job.lower(),
            src_siteid=SITES[stand.protocol, source],
            src_filepath=str(path),
            protocol=stand.protocol,
            max_tries=1,
            **more,
        )
        return int(submitted["id"])


def _endpoint(storages: TestStorages, protocol: str, site: str) -> str:
    return "/".join(storages.url(protocol, site, Path("/")).split("/")[:3])


@contextmanager
def renewals(directory: Path, storages: TestStorages, grid: TestGrid) -> Iterator[Renewals]:
    """The daemon, running; it trusts the servers of both, and has no SSH key of its own."""
    assert storages.credentials is not None
    trust = directory / "trust"
    trust.mkdir()
    for authorities in (grid.credentials.trust, storages.credentials.trust):
        for file in authorities.iterdir():
            (trust / file.name).write_bytes(file.read_bytes())
    service = TestService(directory / "instance", grid.description(), grid.directory)
    service.init(
        credentials={"trust_dir": str(trust), "minimum_lifetime": "0s"},
        ssh={"known_hosts": storages.environment()["PDM_SSH_KNOWN_HOSTS"]},
    )
    sections = [
        f"[{protocol}-{letter}]\nid = {number}\n{protocol} = {_endpoint(storages, protocol, letter)}\n"
        for (protocol, letter), number in SITES.items()
        if protocol != "gridftp"
    ]
    (service.directory / "sites.d" / "more.conf").write_text("\n".join(sections))
    kept = {server: server.authorized.read_text() for server in storages.sftp.values()}
    try:
        with service.running():
            yield Renewals(service, storages, grid)
        assert "Traceback" not in service.log_path.read_text()
    finally:
        for server, lines in kept.items():
            server.authorized.write_text(lines)
