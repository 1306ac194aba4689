"""WebDAV servers of other makes: the everyday session through the daemon, and what each of them does in its own way."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import msgspec
import pytest

from pdm.testgrid.service import TestService
from pdm.testgrid.storages import TestStorages
from pdm.workqueue.wire.agent_events import AgentEvent, DoneEvent, FailedEvent, LogEvent
from pdm.workqueue.wire.agent_requests import CopyItem, CopyRequest, TimeLimits
from tests.helpers.driver import HelperProcess, copy_item, outcomes
from tests.protocols.places import judged, owner
from tests.support.everyday_session import SessionEnd, Step, everyday_session, failed_steps
from tests.support.quirk_server import QuirkServer, Rule, on
from tests.support.webdav_servers import (
    APACHE_CLIENT_CERTIFICATE,
    MAKES,
    ApacheServer,
    NginxServer,
    WebDavServer,
    webdav_server,
)

RELAY = ["-m", "pdm.workqueue.helpers.main_relay"]
LOCAL, QUIRKS, XROOTD, XROOT = 1, 99, "xrootd", "xroot"
_numbers = iter(range(1_000_000))
pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def servers(storages: TestStorages, open_directory: Path) -> Iterator[dict[str, WebDavServer]]:
    """All makes, each with a directory of its own."""
    credentials = storages.credentials
    assert credentials is not None
    directory = open_directory / "webdav"
    directory.mkdir(mode=0o755)
    made = {
        make: webdav_server(make, directory, directory / f"of-{make}", credentials, storages.account) for make in MAKES
    }
    missing = [program for server in made.values() for program in server.programs if not _found(program)]
    if missing:
        text = f"THE SERVERS OF OTHER MAKES ARE NOT THERE: {', '.join(missing)}: run script/bootstrap as root"
        if os.environ.get("CI") == "true":
            pytest.fail(text, pytrace=False)
        pytest.skip(text)
    try:
        for server in made.values():
            server.start()
        yield made
    finally:
        for server in made.values():
            server.stop()


def _site_ids(servers: Mapping[str, WebDavServer]) -> Mapping[str, int]:
    return {make: LOCAL + number for number, make in enumerate([*servers, XROOTD, XROOT], start=1)}


def _found(program: str) -> bool:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin") is not None


@pytest.fixture(scope="module")
def quirks(storages: TestStorages) -> Iterator[QuirkServer]:
    credentials = storages.credentials
    assert credentials is not None
    with QuirkServer(credentials.host.certificate, credentials.host.key) as running:
        yield running


@pytest.fixture(scope="module")
def service(
    storages: TestStorages,
    servers: Mapping[str, WebDavServer],
    quirks: QuirkServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[TestService]:
    credentials = storages.credentials
    assert credentials is not None
    alice = credentials.users["alice"]
    grid = {
        "ca_dir": str(credentials.trust),
        "users": {"alice": {"cert": str(alice.certificate), "key": str(alice.key)}},
    }
    service = TestService(tmp_path_factory.mktemp("webdav") / "instance", grid)
    service.init(
        queue={"first_pause": "100ms", "longest_pause": "300ms", "stall": "30s", "total": "60s"},
        credentials={"trust_dir": str(credentials.trust)},
    )
    trust = service.directory / "certificates" / "trust"
    for file in credentials.trust.iterdir():
        (trust / file.name).write_bytes(file.read_bytes())
    urls = {make: server.url for make, server in servers.items()} | {XROOTD: storages.xrootd["A"].url}
    sections = [
        f"[local]\nid = {LOCAL}\nfile = file:///\n",
        f"[quirks]\nid = {QUIRKS}\nhttps = {quirks.url}\n",
    ]
    numbers = _site_ids(servers)
    sections += [f"[{make}]\nid = {numbers[make]}\nhttps = {url}\n" for make, url in urls.items()]
    sections.append(f"[{XROOT}]\nid = {numbers[XROOT]}\nxroot = {storages.xrootd['A'].root_url}\n")
    (service.directory / "sites.d" / "sites.conf").write_text("\n".join(sections))
    with service.running():
        service.delegate("alice")
        yield service
    assert "Traceback" not in service.log_path.read_text()


@pytest.fixture(scope="module")
def sessions(
    service: TestService,
    servers: Mapping[str, WebDavServer],
    storages: TestStorages,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Future[list[Step]]]]:
    """The session against each make, some side by side."""

    def run(make: str, path: str) -> list[Step]:
        directory = tmp_path_factory.mktemp(make)
        return everyday_session(
            service,
            "alice",
            SessionEnd(_site_ids(servers)[make], "xroot" if make == XROOT else "https", path),
            SessionEnd(LOCAL, "file", str(directory)),
            directory,
        )

    paths = dict.fromkeys(servers, "/session")
    for server in servers.values():
        _directory_of(storages, server.exported / "session")
    for make in (XROOTD, XROOT):
        paths[make] = str(_directory_of(storages, storages.root("A") / f"session by {make}"))
    with ThreadPoolExecutor(4) as executor:
        yield {make: executor.submit(run, make, path) for make, path in paths.items()}


def _directory_of(storages: TestStorages, directory: Path) -> Path:
    directory.mkdir()
    return storages.give(directory)


@pytest.mark.parametrize("make", [*MAKES, XROOTD, XROOT])
def test_twelve_everyday_commands(make: str, sessions: Mapping[str, Future[list[Step]]]) -> None:
    steps = sessions[make].result()
    assert failed_steps(steps) == []
    assert len(steps) == 12


def test_a_new_site_can_be_checked_and_listed(
    service: TestService, servers: Mapping[str, WebDavServer], sessions: Mapping[str, Future[list[Step]]]
) -> None:
    """The default directory of a site is ``~``, which is the root of a server that knows no homes."""
    for future in sessions.values():
        future.result()
    for make in servers:
        checked = service.pdm("alice", "site", "check", make)
        assert checked.returncode == 0, checked.stdout + checked.stderr
        listed = service.pdm("alice", "ls", f"{make}://session/./../session//")
        assert listed.returncode == 0, listed.stderr


@pytest.mark.parametrize(
    ("rule", "code"),
    [(on("PUT", 503, at=b"/d/bad", Retry_After="1"), "BUSY"), (on("PUT", 0, at=b"/d/bad"), "SERVER_ERROR")],
)
def test_a_directory_that_always_fails_holds_up_no_other_job(
    rule: Rule, code: str, service: TestService, quirks: QuirkServer, tmp_path: Path
) -> None:
    """The server refuses, or hangs up, below one directory: its tries count, and the site is not paused."""
    quirks.rules[:] = [rule]
    (tmp_path / "f").write_bytes(b"content")

    def copy(to: str) -> int:
        fields = {"src_siteid": LOCAL, "src_filepath": str(tmp_path / "f"), "dst_siteid": QUIRKS, "dst_filepath": to}
        job: int = service.submit("alice", "copy", protocol="file", max_tries=2, **fields)["id"]
        return job

    bad = [copy(f"/d/bad/{code}{number}") for number in range(4)]
    good = [copy(f"/d/{code}{number}") for number in range(4)]
    assert [service.wait_for("alice", job)["status"] for job in good] == ["DONE"] * 4
    assert [service.wait_for("alice", job)["status"] for job in bad] == ["FAILED"] * 4
    for job in bad:
        _, element = service.call("alice", "GET", f"/jobs/{job}/elements/1")
        assert (element["type"], element["attempts"], element["error"]["code"]) == ("COPY", 2, code)


# -- what servers of one make do in their own way, by the helper


@pytest.fixture
def place(storages: TestStorages, servers: Mapping[str, WebDavServer]) -> Callable[[str], tuple[str, Path]]:
    """Gives URL and directory of a new place at a make."""

    def new(make: str) -> tuple[str, Path]:
        name = f"test{next(_numbers)}"
        server = servers[make]
        return f"{server.url}/{name}", _directory_of(storages, server.exported / name)

    return new


@pytest.fixture
def helper(storages: TestStorages, tmp_path: Path) -> Iterator[HelperProcess]:
    roots = json.dumps([quote(str(tmp_path))])
    with HelperProcess(RELAY, {**storages.environment(), "PDM_FILE_ROOTS": roots}) as running:
        yield running


def item_of(directory: Path, name: str, url: str, content: bytes = b"content", key: int = 1) -> CopyItem:
    path = directory / f"file{key}"
    path.write_bytes(content)
    return copy_item(key, f"file://{quote(str(path))}", f"{url}/{quote(name, safe='')}", len(content))


@pytest.mark.parametrize("make", MAKES)
def test_no_make_stores_a_file_under_another_name(
    make: str, place: Callable[[str], tuple[str, Path]], helper: HelperProcess, tmp_path: Path
) -> None:
    """A name is kept, or the copy fails and no other file is touched."""
    url, directory = place(make)
    victims = {"a": b"1", "q": b"2", "x&y": b"3", "100A": b"4", "tab": b"5", "cr": b"6", "lf": b"7"}
    names = ["a;b", "q?q", "x&amp;y", "100%41", "tab\tx", "cr\rx", "lf\nx"]
    for name, content in victims.items():
        (directory / name).write_bytes(content)
    items = [item_of(tmp_path, name, url, b"content", key) for key, name in enumerate(names)]
    outcomes = helper.copy(items, overwrite="always")
    kept = {name for key, name in enumerate(names) if isinstance(outcomes[key], DoneEvent)}
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == victims | dict.fromkeys(kept, b"content")
    assert "100%41" in kept
    if make == "apache":
        assert kept >= {"a;b", "q?q", "x&amp;y"}


@pytest.mark.parametrize("make", MAKES)
def test_many_files_into_one_new_directory(
    make: str, place: Callable[[str], tuple[str, Path]], storages: TestStorages, tmp_path: Path
) -> None:
    """By three helpers at once, as three jobs do: each finds the directory made by another."""
    url, directory = place(make)
    roots = json.dumps([quote(str(tmp_path))])
    environment = {**storages.environment(), "PDM_FILE_ROOTS": roots}

    def job(number: int) -> list[AgentEvent]:
        own = tmp_path / str(number)
        own.mkdir()
        items = []
        for key in range(40):
            item = item_of(own, f"{number}.{key}", f"{url}/new/deep", b"x", key)
            items.append(msgspec.structs.replace(item, temporary=f"{url}/new/deep/.pdm-job{number}.{key}.1.part"))
        with HelperProcess(RELAY, environment) as running:
            return list(running.copy(items).values())

    with ThreadPoolExecutor(3) as executor:
        for events in executor.map(job, range(3)):
            assert [event for event in events if not isinstance(event, DoneEvent)] == []
    assert len(list((directory / "new" / "deep").iterdir())) == 120


@pytest.mark.parametrize("overwrite", ["never", "always"])
@pytest.mark.parametrize("make", [*MAKES, XROOTD])
def test_small_files_within_a_make_come_in_groups(
    make: str,
    overwrite: str,
    place: Callable[[str], tuple[str, Path]],
    storages: TestStorages,
    helper: HelperProcess,
) -> None:
    """Between two directorys of a server; a name that is taken is replaced only where that is asked for."""
    if make == XROOTD:
        directory = _directory_of(storages, storages.root("A") / f"groups{next(_numbers)}")
        url = storages.url("https", "A", directory)
    else:
        url, directory = place(make)
    old = 1_700_000_000
    for number in range(60):
        path = directory / "from" / f"d{number % 2}" / f"f {number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"content%d" % number)
        os.utime(path, (old, old))
    (directory / "to" / "d1").mkdir(parents=True)
    (directory / "to" / "d1" / "f 5").write_bytes(b"another")
    storages.give(directory)
    items = [
        copy_item(n, f"{url}/from/d{n % 2}/f%20{n}", f"{url}/to/d{n % 2}/f%20{n}", len(b"content%d" % n))
        for n in range(60)
    ]
    request = CopyRequest(helper.new_id(), items, overwrite, "checksum", TimeLimits(stall_s=60.0))  # type: ignore[arg-type]
    events = helper.run(request)
    ended = outcomes(events)
    failed = {key: event for key, event in ended.items() if not isinstance(event, DoneEvent)}
    assert set(failed) == ({5} if overwrite == "never" else set()), failed
    arrived = {path.name: path.read_bytes() for path in (directory / "to").rglob("*") if path.is_file()}
    expected = {f"f {number}": b"content%d" % number for number in range(60)}
    assert arrived == expected | ({"f 5": b"another"} if overwrite == "never" else {})
    together = {event.key for event in events if isinstance(event, LogEvent) and "with others" in event.text}
    assert len(together) >= 58


@pytest.mark.skipif(not owner(), reason="the caller's own server can enter every directory")
def test_apache_hangs_up_on_a_directory_that_it_cannot_list(
    place: Callable[[str], tuple[str, Path]], helper: HelperProcess
) -> None:
    url, directory = place("apache")
    (directory / "shut").mkdir(mode=0o711)
    os.chown(directory / "shut", 0, 0)
    (directory / "shut").chmod(0o711)
    outcome = judged("https", helper.list(f"{url}/shut")[-1])
    # Not CONNECTION, which would pause the site for all.
    assert outcome in ("source SERVER_ERROR", "source PERMISSION_DENIED")


def test_wsgidav_hangs_up_on_a_name_that_is_not_utf_8(
    place: Callable[[str], tuple[str, Path]], helper: HelperProcess
) -> None:
    url, _ = place("wsgidav")
    assert judged("https", helper.list(f"{url}/%E9")[-1]).removeprefix("source ") in ("SERVER_ERROR", "NOT_FOUND")


def test_the_limit_of_a_request_is_named(
    storages: TestStorages, open_directory: Path, helper: HelperProcess, tmp_path: Path
) -> None:
    credentials = storages.credentials
    assert credentials is not None
    number = next(_numbers)
    exported = open_directory / f"limited{number}"
    server = NginxServer(
        open_directory, f"limits{number}", exported, credentials, storages.account, more="client_max_body_size 100k;"
    )
    server.start()
    try:
        event = helper.copy([item_of(tmp_path, "f", server.url, b"x" * 200_000)])[1]
    finally:
        server.stop()
    assert judged("https", event) == "destination TOO_LARGE"
    assert isinstance(event, FailedEvent) and "200000 bytes" in event.fault.message


def test_apache_asks_for_a_certificate_after_the_handshake(
    storages: TestStorages, open_directory: Path, tmp_path: Path
) -> None:
    """``SSLVerifyClient`` in a Directory with TLS 1.3, for a PUT larger than Apache keeps while it asks, too."""
    credentials = storages.credentials
    assert credentials is not None
    number = next(_numbers)
    exported = open_directory / f"asking{number}"
    server = ApacheServer(
        open_directory, f"asks{number}", exported, credentials, storages.account, more=APACHE_CLIENT_CERTIFICATE
    )
    own = tmp_path / "own.pem"
    alice = credentials.users["alice"]
    own.write_bytes(alice.certificate.read_bytes() + alice.key.read_bytes())
    own.chmod(0o600)
    roots = json.dumps([quote(str(tmp_path))])
    server.start()
    try:
        environment = {**storages.environment(), "PDM_FILE_ROOTS": roots}
        with HelperProcess(RELAY, {**environment, "X509_USER_PROXY": str(own)}) as running:
            assert isinstance(running.copy([item_of(tmp_path, "f", server.url, b"x" * 3_000_000)])[1], DoneEvent)
        assert (exported / "f").stat().st_size == 3_000_000
        with HelperProcess(RELAY, {**environment, "X509_USER_PROXY": ""}) as running:
            refused = running.list(server.url)[-1]
            assert judged("https", refused) in ("source PERMISSION_DENIED", "source CREDENTIAL_REFUSED")
    finally:
        server.stop()
