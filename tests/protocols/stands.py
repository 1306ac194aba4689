"""What the matrix of faults asks of a protocol: two directories, URLs, helpers, and servers that can be broken.

A protocol more is one more line in `STANDS`.
"""

from __future__ import annotations

import itertools
import json
import pwd
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from attrs import evolve, field, frozen

from pdm.testgrid import GridFtpServer, TestGrid
from pdm.testgrid.identities import GridCredentials
from pdm.testgrid.storage_servers import ServerProcess, descendants, make_key
from pdm.testgrid.storages import TestStorages
from pdm.workqueue.certificates.authority import Authority
from pdm.workqueue.wire.agent_requests import (
    CopyRequest,
    ListRequest,
    MkdirRequest,
    PathItem,
    RemoveRequest,
    RenameItem,
    RenameRequest,
    TimeLimits,
    WorkRequest,
)
from tests.helpers.driver import HelperProcess, copy_item, put
from tests.protocols.places import require_tools
from tests.protocols.tokens import macaroon

#: Environment of a helper in which a credential is used that is not as it should be.
Changes = Mapping[str, str]
_RELAY = "pdm.workqueue.helpers.main_relay"
_GRIDFTP = "pdm.workqueue.helpers.main_gridftp"
_TOOLS = "pdm.workqueue.helpers.main_tools"
#: Runs a helper as an account: what root could do shows nothing of permissions.
#: What the helper imports later may not be readable for that account.
_AS = (
    "import os; from {module} import main; import pdm.workqueue.helpers.backends.local_groups; "
    "os.setgroups([]); os.setgid({gid}); os.setuid({uid}); main()"
)
_WAIT_S = 30.0
_numbers = itertools.count(1)
#: A server that is gone is noticed at once; only one that is frozen for good would cost this.
LIMITS = TimeLimits(stall_s=20.0, total_s=60.0)
_ESTABLISHED = "01"


@frozen
class Stand:
    """A protocol with its servers.

    Attributes:
        protocol: as movers are looked up; ``tools`` is GRIDFTP by the field's own commands.
        a: directory at the site that copies come from.
        b: directory at the site that everything else happens at.
        url: of a path.
        give: lets the account own a path.
        servers: by site; none for a protocol without.
        environment: of a helper that works.
        code: arguments of the interpreter that runs the helper.
        bad: what is wrong with a credential → environment of a helper that uses it.
    """

    protocol: str
    a: Path
    b: Path
    url: Callable[[Path], str]
    give: Callable[[Path], object]
    servers: Mapping[str, ServerProcess | GridFtpServer]
    environment: Mapping[str, str]
    code: tuple[str, ...]
    bad: Mapping[str, Changes] = field(factory=dict)

    def helper(self, changes: Changes | None = None) -> HelperProcess:
        return HelperProcess(self.code, {**self.environment, **(changes or {})})

    def put(self, path: Path, content: bytes = b"content") -> Path:
        self.give(put(path, content).parent)
        return path


def relay_as(account: str) -> tuple[str, ...]:
    """Arguments of the interpreter for a relay that becomes an account."""
    who = pwd.getpwnam(account)
    return ("-c", _AS.format(module=_RELAY, uid=who.pw_uid, gid=who.pw_gid))


class Ground:
    """Paths for one cell: a file at A, and at B a directory with a file in it."""

    def __init__(self, stand: Stand, name: str) -> None:
        self.stand = stand
        self.file = stand.put(stand.a / name / "file", b"x" * 3_000_000)
        self.here = stand.put(stand.b / name / "here")
        self.directory = self.here.parent
        self.absent, self.new = self.directory / "absent", self.directory / "new"

    def request(self, job: str, number: int, *, missing: bool = False, taken: bool = False) -> WorkRequest:
        """A request for a type of job; ``missing`` and ``taken``: of what is not there, to what is."""
        url = self.stand.url
        old = self.absent if missing else self.here
        if job == "LIST":
            return ListRequest(number, 1, url(self.absent if missing else self.directory), None, LIMITS)
        if job == "COPY":
            source = self.absent_source if missing else self.file
            return self.copy(number, source, self.here if taken else self.new)
        if job == "REMOVE":
            return RemoveRequest(number, [PathItem(1, url(old))], LIMITS)
        if job == "RENAME":
            new = self.stand.put(self.directory / "other") if taken else self.new
            return RenameRequest(number, [RenameItem(1, url(old), url(new))], "never", LIMITS)
        made = self.absent / "new" if missing else self.here if taken else self.directory / "made"
        return MkdirRequest(number, [PathItem(1, url(made), directory=True)], False, LIMITS)

    @property
    def absent_source(self) -> Path:
        return self.file.parent / "absent"

    def copy(self, number: int, source: Path, destination: Path) -> CopyRequest:
        size = source.stat().st_size if source.exists() else 7
        item = copy_item(1, self.stand.url(source), self.stand.url(destination), size)
        return CopyRequest(number, [item], "never", "checksum", LIMITS)

    def left(self) -> list[Path]:
        """Temporary files that should not be there."""
        return list(self.stand.b.rglob(".pdm-*"))


@contextmanager
def _directories(a: Path, b: Path) -> Iterator[tuple[Path, Path]]:
    for directory in (a, b):
        directory.mkdir()
    yield a, b
    for directory in (a, b):
        shutil.rmtree(directory)


def freeze(server: ServerProcess | GridFtpServer) -> None:
    """Stop a server and its sessions, and return when none of their threads runs any more."""
    server.freeze()
    assert server.pid is not None
    give_up_at = time.monotonic() + _WAIT_S
    while any(_runs(pid) for pid in (server.pid, *descendants(server.pid))):
        assert time.monotonic() < give_up_at, "the server does not stop"
        time.sleep(0.005)


def _runs(pid: int) -> bool:
    try:
        tasks = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    except OSError:
        return False
    return any(text.rpartition(")")[2].split()[0] not in "TZX" for text in tasks)


def unread(url: str) -> int:
    """Bytes that were sent to the server of a URL and lie in the kernel, unread."""
    port = f":{urlsplit(url).port:04X}"
    count = 0
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, queues, *_ = line.split()
            if local.endswith(port) and state == _ESTABLISHED:
                count += int(queues.partition(":")[2], 16)
    return count


def wait_for_unread(url: str, more_than: int) -> None:
    """Wait until something has reached a frozen server."""
    give_up_at = time.monotonic() + _WAIT_S
    while unread(url) <= more_than:
        assert time.monotonic() < give_up_at, "nothing was sent to the server"
        time.sleep(0.005)


@contextmanager
def _gridftp(request: pytest.FixtureRequest, scratch: Path) -> Iterator[Stand]:
    grid: TestGrid = request.getfixturevalue("grid")
    unmapped, number = scratch / "unmapped", next(_numbers)
    grid.credentials.authority.user("nobody knows").proxy().write_bundle(unmapped)
    with _directories(*(grid.sites[site].root / f"matrix{number}" for site in "AB")) as (a, b):
        for directory in (a, b):
            grid.give(directory)
        yield Stand(
            "gridftp",
            a,
            b,
            lambda path: grid.sites["A" if path.is_relative_to(a) else "B"].url(path),
            grid.give,
            {site: grid.sites[site].server for site in "AB"},
            grid.environment(),
            ("-m", _GRIDFTP),
            {
                "proxy expired": {"X509_USER_PROXY": str(grid.users["alice"].files.expired_proxy)},
                "proxy not mapped": {"X509_USER_PROXY": str(unmapped)},
            },
        )


@contextmanager
def _tools(request: pytest.FixtureRequest, scratch: Path) -> Iterator[Stand]:
    """GRIDFTP by globus-url-copy and gfal."""
    require_tools()
    with _gridftp(request, scratch) as stand:
        yield evolve(stand, protocol="tools", code=("-m", _TOOLS))


@contextmanager
def _stored(protocol: str, request: pytest.FixtureRequest) -> Iterator[Stand]:
    """A protocol of `TestStorages`."""
    storages: TestStorages = request.getfixturevalue("storages")
    number = next(_numbers)
    with _directories(*(storages.root(site) / f"matrix{number}" for site in "AB")) as (a, b):
        for directory in (a, b):
            storages.give(directory)
        yield Stand(
            protocol,
            a,
            b,
            lambda path: storages.url(protocol, "A" if path.is_relative_to(a) else "B", path),
            storages.give,
            {} if protocol == "file" else {site: storages.server(protocol, site) for site in "AB"},
            storages.environment(),
            ("-m", _RELAY),
        )


@contextmanager
def _ssh(request: pytest.FixtureRequest, scratch: Path) -> Iterator[Stand]:
    make_key(scratch / "other key")
    with _stored("ssh", request) as stand:
        yield evolve(stand, bad={"key not accepted": {"PDM_SSH_KEY": str(scratch / "other key")}})


def _bad_proxies(credentials: GridCredentials, scratch: Path) -> Mapping[str, Changes]:
    stranger = scratch / "stranger"
    Authority.create("/DC=org/DC=unknown/CN=Unknown CA").user("nobody knows").proxy().write_bundle(stranger)
    return {
        "proxy expired": {"X509_USER_PROXY": str(credentials.users["alice"].expired_proxy)},
        "proxy not accepted": {"X509_USER_PROXY": str(stranger)},
    }


@contextmanager
def _https(request: pytest.FixtureRequest, scratch: Path) -> Iterator[Stand]:
    storages: TestStorages = request.getfixturevalue("storages")
    credentials = storages.credentials
    assert credentials is not None
    with _stored("https", request) as stand:
        ended = {site: macaroon(storages, site, directory, 1) for site, directory in (("A", stand.a), ("B", stand.b))}
        bad = {
            **_bad_proxies(credentials, scratch),
            "token expired": _with_tokens(storages, scratch, "ended", ended),
            "token not accepted": _with_tokens(storages, scratch, "wrong", dict.fromkeys("AB", "no.such.token")),
        }
        # Servers count whole seconds.
        time.sleep(2.1)
        yield evolve(stand, bad=bad)


def _with_tokens(storages: TestStorages, scratch: Path, name: str, tokens: Mapping[str, str]) -> Changes:
    """The environment of a helper that has a token for each server, and no proxy."""
    told = {}
    for site, token in tokens.items():
        file = scratch / f"{name} {site}"
        file.write_text(token)
        told[storages.xrootd[site].url] = {"file": str(file), "account": None}
    return {"X509_USER_PROXY": "", "PDM_CREDENTIALS": json.dumps(told)}


@contextmanager
def _xroot(request: pytest.FixtureRequest, scratch: Path) -> Iterator[Stand]:
    storages: TestStorages = request.getfixturevalue("storages")
    credentials = storages.credentials
    assert credentials is not None
    with _stored("xroot", request) as stand:
        yield evolve(stand, bad=_bad_proxies(credentials, scratch))


@contextmanager
def _file(request: pytest.FixtureRequest, scratch: Path) -> Iterator[Stand]:
    storages: TestStorages = request.getfixturevalue("storages")
    with _stored("file", request) as stand:
        if storages.account is None:
            yield stand
        else:
            yield evolve(stand, code=relay_as(storages.account))


STANDS: Mapping[str, Callable[[pytest.FixtureRequest, Path], AbstractContextManager[Stand]]] = {
    "gridftp": _gridftp,
    "tools": _tools,
    "ssh": _ssh,
    "https": _https,
    "xroot": _xroot,
    "file": _file,
}
