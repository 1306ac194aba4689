"""What SFTP servers of the world do otherwise than a plain OpenSSH: nothing is mistaken, and failures say why."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import pytest

from pdm.testgrid import identities
from pdm.testgrid.processes import missing_of
from pdm.workqueue.domain.enums import JobProtocol, JobType
from pdm.workqueue.domain.failures import AttemptFailure, hint_for
from pdm.workqueue.movers import MOVERS
from pdm.workqueue.wire.agent_events import AgentEvent, DoneEvent, FailedEvent
from pdm.workqueue.wire.agent_requests import CopyItem, CopyRequest, TimeLimits
from tests.helpers.driver import HelperProcess, copy_item, entries, put, tree
from tests.support.sftp_servers import (
    AsyncSsh,
    OpenSshForced,
    OpenSshMissing,
    OpenSshNoisy,
    OpenSshNoSubsystem,
    OpenSshOld,
    Rclone,
    SftpMake,
)

RELAY = ["-m", "pdm.workqueue.helpers.main_relay"]
pytestmark = pytest.mark.timeout(120)
by_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


class Servers:
    """Servers that are started when a test asks for one, and a directory at each for the test.

    Args:
        directory: accounts can enter it.
        account: local account of the sessions; None for the caller's.
    """

    def __init__(self, directory: Path, account: str | None) -> None:
        self._directory = directory
        self._account = account
        self._made: dict[type[SftpMake], SftpMake] = {}

    def of(self, make: type[SftpMake]) -> SftpMake:
        if missing := missing_of(*make.programs):
            pytest.skip(f"not installed: {', '.join(missing)}")
        if make.needs_root and os.geteuid() != 0:
            pytest.skip("needs root")
        if make not in self._made:
            self._made[make] = make(self._directory, make.__name__.lower(), self._account)
            self._made[make].start()
        return self._made[make]

    @contextmanager
    def helper(self, server: SftpMake, account: str | None = None, **changes: str) -> Iterator[HelperProcess]:
        """A relay that logs in at a server, as an account that may be named for quirks."""
        known = self._directory / "known_hosts"
        known.write_text("".join(each.known_host for each in self._made.values()))
        environment = {
            "PDM_SSH_KEY": str(server.client_key),
            "PDM_SSH_KNOWN_HOSTS": str(known),
            "PDM_SSH_USER": account or server.user,
            "PDM_FILE_ROOTS": json.dumps([quote(str(self._directory))]),
            **changes,
        }
        with HelperProcess(RELAY, environment) as running:
            yield running

    def end(self) -> None:
        for server in self._made.values():
            server.stop()


class Room:
    """A directory of one test at a server, and URLs of it."""

    def __init__(self, server: SftpMake, name: str) -> None:
        self.server = server
        self.directory = server.disk / name
        self.directory.mkdir()
        self.directory.chmod(0o777)

    def url(self, *parts: str) -> str:
        below = (self.directory.joinpath(*parts)).relative_to(self.server.disk)
        return f"{self.server.url}{quote(str(Path(self.server.served) / below))}"

    def file_url(self, *parts: str) -> str:
        return f"file://{quote(str(self.directory.joinpath(*parts)))}"

    def put(self, name: str, content: bytes = b"content") -> Path:
        return put(self.directory / name, content)

    def upload(self, source: str, destination: str, key: int = 1) -> CopyItem:
        """A copy from the disk to the server."""
        size = (self.directory / source).stat().st_size
        return copy_item(key, self.file_url(source), self.url(destination), size)

    def download(self, source: str, destination: str) -> CopyItem:
        size = (self.directory / source).stat().st_size
        return copy_item(1, self.url(source), self.file_url(destination), size)

    def left(self) -> list[Path]:
        return list(self.directory.rglob(".pdm-*"))


@pytest.fixture(scope="module")
def servers(open_directory: Path) -> Iterator[Servers]:
    directory = open_directory / "sftp-quirks"
    directory.mkdir(mode=0o755)
    account = None
    if os.geteuid() == 0:
        account = identities.acquire_accounts(directory, ["alice"])["alice"]
    made = Servers(directory, account)
    yield made
    made.end()
    if account is not None:
        identities.release_accounts(directory)


@pytest.fixture
def room(servers: Servers, request: pytest.FixtureRequest) -> Room:
    return Room(servers.of(AsyncSsh), "".join(letter for letter in request.node.name if letter.isalnum()))


def failure(event: AgentEvent | None) -> AttemptFailure:
    assert isinstance(event, FailedEvent), event
    return MOVERS[JobProtocol.SSH].classify(event.fault)


def verdict(event: AgentEvent | None) -> str:
    found = failure(event)
    return f"{found.scope} {found.code}"


# -- A2: types


@pytest.mark.parametrize(
    "quirks", ["no-types", "no-types,bare-long-names", "no-permissions", "no-permissions,bare-long-names"]
)
def test_types_that_the_server_does_not_say_are_found_out(quirks: str, servers: Servers, room: Room) -> None:
    file = room.put("tree/dir/f.txt", b"12345")
    (room.directory / "tree" / "empty").mkdir()
    os.symlink("dir/f.txt", room.directory / "tree" / "to file")
    os.symlink("dir", room.directory / "tree" / "to dir")
    os.symlink("nowhere", room.directory / "tree" / "dangling")
    (room.directory / "up").mkdir(mode=0o777)
    (room.directory / "up").chmod(0o777)
    with servers.helper(room.server, quirks) as helper:
        found = entries(helper.list(room.url("tree")))
        assert {path: entry.type for path, entry in found.items()} == {
            "dir": "directory",
            "dir/f.txt": "file",
            "empty": "directory",
            "to%20file": "link",
            "to%20dir": "link",
            "dangling": "link",
        }
        assert (found["to%20file"].size, found["to%20file"].target) == (5, str(file))
        # A file that is named itself, by which a COPY knows that it is one.
        (itself,) = entries(helper.list(room.url("tree", "dir", "f.txt"))).values()
        assert (itself.path, itself.type, itself.size) == ("", "file", 5)
        assert isinstance(helper.copy([room.download("tree/dir/f.txt", "down")])[1], DoneEvent)
        # A directory that is there is one to upload into.
        assert isinstance(helper.copy([room.upload("tree/dir/f.txt", "up/f.txt")])[1], DoneEvent)
        assert verdict(helper.copy([room.upload("down", "down/x")])[1]) == "destination NOT_A_DIRECTORY"
        assert isinstance(helper.make(room.url("up"), parents=True)[0], DoneEvent)
    assert (room.directory / "down").read_bytes() == (room.directory / "up" / "f.txt").read_bytes() == b"12345"


# -- A5: nothing is overwritten without being asked


@pytest.mark.parametrize(
    ("make", "quirks"),
    [
        (AsyncSsh, "renaming-replaces"),
        pytest.param(AsyncSsh, "renaming-replaces,no-links", marks=pytest.mark.full),
        (AsyncSsh, "renaming-replaces,no-extensions"),
        pytest.param(Rclone, None, marks=pytest.mark.full),
    ],
)
def test_what_comes_during_a_copy_is_not_overwritten(
    make: type[SftpMake], quirks: str | None, servers: Servers
) -> None:
    """Two copies to one name at once, neither may overwrite: the slower one finds what the other has brought."""
    room = Room(servers.of(make), f"during{quirks}")
    os.truncate(room.put("slow", b""), 64 * 1024**2)
    room.put("quick", b"the rival's")
    with servers.helper(room.server, quirks) as slow, servers.helper(room.server, quirks) as quick:
        number = slow.new_id()
        limits = TimeLimits(60.0, 120.0, 500_000.0)
        slow.send(CopyRequest(number, [room.upload("slow", "contested")], "never", "size", limits))
        give_up_at = time.monotonic() + 30
        while not any(path.stat().st_size for path in room.left()):
            assert time.monotonic() < give_up_at
            time.sleep(0.001)
        slow.process.send_signal(signal.SIGSTOP)
        try:
            assert room.left(), "the copy was done before it could be stopped"
            item = room.upload("quick", "contested", key=2)
            assert isinstance(quick.copy([item])[2], DoneEvent)
        finally:
            slow.process.send_signal(signal.SIGCONT)
        assert verdict(slow.rest(number)[-1]) == "destination EXISTS"
    assert (room.directory / "contested").read_bytes() == b"the rival's"
    assert room.left() == []


@pytest.mark.parametrize("quirks", ["rival", "rival,renaming-replaces"])
def test_hard_links_leave_no_moment_in_which_a_rival_is_overwritten(quirks: str, servers: Servers, room: Room) -> None:
    room.put("source", b"ours")
    room.put("source 2", b"ours")
    with servers.helper(room.server, quirks) as helper:
        assert verdict(helper.copy([room.upload("source", "contested")])[1]) == "destination EXISTS"
        assert (room.directory / "contested").read_bytes() == b"the rival's"
        (room.directory / "contested").unlink()
        assert verdict(helper.rename(room.url("source 2"), room.url("contested"))) == "destination EXISTS"
    assert (room.directory / "contested").read_bytes() == b"the rival's"
    assert (room.directory / "source 2").read_bytes() == b"ours"
    assert room.left() == []


@pytest.mark.parametrize(("make", "quirks"), [(AsyncSsh, "made-again"), (Rclone, None)])
def test_making_what_is_there_is_no_success(make: type[SftpMake], quirks: str | None, servers: Servers) -> None:
    room = Room(servers.of(make), f"made{quirks}")
    with servers.helper(room.server, quirks) as helper:
        assert isinstance(helper.make(room.url("new"))[0], DoneEvent)
        assert verdict(helper.make(room.url("new"))[0]) == "destination EXISTS"
        assert isinstance(helper.make(room.url("new"), parents=True)[0], DoneEvent)


@pytest.mark.parametrize("quirks", ["no-extensions", "no-links", "like-openssh,rename-by-links", "rename-by-links"])
def test_servers_with_less_serve_all_the_same(quirks: str, servers: Servers, room: Room) -> None:
    room.put("source", b"new")
    room.put("there", b"old")
    with servers.helper(room.server, quirks) as helper:
        assert isinstance(helper.copy([room.upload("source", "copied")])[1], DoneEvent)
        assert isinstance(helper.copy([room.upload("source", "there")], "always")[1], DoneEvent)
        assert isinstance(helper.rename(room.url("copied"), room.url("renamed")), DoneEvent)
        assert verdict(helper.rename(room.url("renamed"), room.url("there"))) == "destination EXISTS"
    assert tree(room.directory) == {"source": b"new", "there": b"new", "renamed": b"new"}


# -- D19: reasons


@pytest.mark.parametrize(
    ("quirks", "wanted"),
    [
        ("read-only", "READ_ONLY"),
        ("read-only,silent", "READ_ONLY"),
        ("full", "NO_SPACE"),
        ("full,silent", "NO_SPACE"),
        ("no-inodes,silent", "UNKNOWN"),
    ],
)
def test_why_a_file_cannot_be_written(quirks: str, wanted: str, servers: Servers, room: Room) -> None:
    room.put("source")
    with servers.helper(room.server, quirks) as helper:
        assert verdict(helper.copy([room.upload("source", "new")])[1]) == f"destination {wanted}"
    assert room.left() == []


def test_a_rename_to_another_file_system_says_so(servers: Servers, room: Room) -> None:
    room.put("source")
    with servers.helper(room.server, "across") as helper:
        found = failure(helper.rename(room.url("source"), room.url("new")))
    assert found.code == "UNSUPPORTED"
    assert "another file system" in found.message


@by_root
def test_a_drop_box_takes_many_files(servers: Servers, room: Room) -> None:
    box = room.directory / "box"
    box.mkdir()
    box.chmod(0o733)
    items = [room.upload(room.put(f"{number}").name, f"box/{number}", number) for number in range(1, 41)]
    with servers.helper(room.server) as helper:
        outcomes = helper.copy(items)
    assert {key for key, event in outcomes.items() if not isinstance(event, DoneEvent)} == set()
    assert len(list(box.iterdir())) == 40


@pytest.mark.parametrize("quirks", ["short-reads", "small-writes", "endless-names", "no-sync"])
def test_limits_of_servers(quirks: str, servers: Servers, room: Room) -> None:
    content = os.urandom(300_000)
    room.put("source", content)
    with servers.helper(room.server, quirks) as helper:
        assert isinstance(helper.copy([room.upload("source", "new")])[1], DoneEvent)
        assert isinstance(helper.copy([room.download("new", "back")])[1], DoneEvent)
        assert set(entries(helper.list(room.url()))) == {"source", "new", "back"}
    assert (room.directory / "back").read_bytes() == content


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (OpenSshNoisy, ["'Welcome to the cluster!'", ".bashrc", "ForceCommand"]),
        (OpenSshForced, ["'This account is for git only.'", "may not use SFTP"]),
        (OpenSshNoSubsystem, ["allow the subsystem sftp"]),
        (OpenSshMissing, ["status 127", "not found"]),
        (OpenSshOld, ["no algorithm in common", "diffie-hellman-group1-sha1"]),
    ],
)
def test_servers_that_speak_no_sftp_are_given_up_with_the_reason(
    make: type[SftpMake], words: list[str], servers: Servers
) -> None:
    server = servers.of(make)
    with servers.helper(server) as helper:
        found = failure(helper.list(f"{server.url}/")[-1])
    assert found.code == "UNSUPPORTED", found
    assert not found.retryable
    assert [word for word in words if word not in found.message] == [], found


def test_a_server_of_another_protocol(servers: Servers) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=_answer_as_tls, args=(listening,), daemon=True).start()
        with servers.helper(servers.of(AsyncSsh)) as helper:
            found = failure(helper.list(f"sftp://127.0.0.1:{listening.getsockname()[1]}/")[-1])
    assert found.code == "UNSUPPORTED", found
    assert "check the port" in found.message


def _answer_as_tls(listening: socket.socket) -> None:
    with suppress(OSError):
        while True:
            with closing(listening.accept()[0]) as connection:
                connection.recv(1000)
                # An alert of TLS.
                connection.sendall(b"\x15\x03\x01\x00\x02\x02\x46\n")


def test_host_keys_have_words_and_a_hint_of_their_own(servers: Servers, tmp_path: Path) -> None:
    server = servers.of(AsyncSsh)
    changed = tmp_path / "changed"
    other = server.client_key.with_suffix(".pub").read_text().split()
    changed.write_text(f"[localhost]:{server.port} {other[0]} {other[1]}\n")
    nobody = tmp_path / "nobody"
    nobody.touch()
    for known, words in ((changed, "another host key"), (nobody, "no host key of this server")):
        with servers.helper(server, PDM_SSH_KNOWN_HOSTS=str(known)) as helper:
            found = failure(helper.list(f"{server.url}/")[-1])
        assert (found.scope, found.code) == ("source", "HOST_KEY")
        assert words in found.message
        hint = hint_for(found.code, JobType.LIST)
        assert "known_hosts" in hint
        assert "ertificate" not in hint


def test_accounts_of_windows_domains_log_in(servers: Servers, room: Room) -> None:
    room.put("file")
    with servers.helper(room.server, "DOM\\some.user") as helper:
        assert set(entries(helper.list(room.url()))) == {"file"}
