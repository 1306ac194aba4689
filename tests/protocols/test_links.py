"""A removal at WebDAV servers that show links as what they lead to: the path that is named may be a link itself."""

from __future__ import annotations

import pwd
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from pdm.testgrid.ports import reserve_port
from pdm.testgrid.processes import missing_of
from pdm.testgrid.storages import TestStorages
from pdm.workqueue.wire.agent_events import AgentEvent, DoneEvent, EntriesEvent, FailedEvent
from pdm.workqueue.wire.agent_requests import ListRequest
from tests.helpers.driver import LIMITS, HelperProcess
from tests.protocols.places import owner

_MODULES = ("mpm_event", "authz_core", "dav", "dav_fs", "ssl", "socache_shmcb")
_START_S = 20.0


@pytest.fixture
def apache(storages: TestStorages, open_directory: Path) -> Iterator[tuple[str, Path]]:
    """URL and directory of an Apache with mod_dav."""
    if missing_of("apache2"):
        pytest.skip("there is no apache2: run script/bootstrap as root")
    directory, port = open_directory / "apache", reserve_port()
    served = directory / "served"
    served.mkdir(parents=True)
    credentials = storages.credentials
    assert credentials is not None
    lines = [f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so" for name in _MODULES]
    if owner() and storages.account is not None:
        entry = pwd.getpwnam(storages.account)
        lines += [f"User #{entry.pw_uid}", f"Group #{entry.pw_gid}"]
    configuration = directory / "apache.conf"
    configuration.write_text(
        "\n".join(
            [
                *lines,
                f"ServerRoot {directory}",
                f"Listen 127.0.0.1:{port}",
                "ServerName localhost",
                f"PidFile {directory}/pid",
                f"ErrorLog {directory}/errors",
                f"DocumentRoot {served}",
                f"DavLockDB {directory}/locks",
                "SSLEngine on",
                f"SSLCertificateFile {credentials.host.certificate}",
                f"SSLCertificateKeyFile {credentials.host.key}",
                f"<Directory {served}>",
                "Dav On",
                "Options FollowSymLinks",
                "Require all granted",
                "</Directory>",
                "",
            ]
        )
    )
    storages.give(directory)
    server = subprocess.Popen(["/usr/sbin/apache2", "-f", str(configuration), "-D", "FOREGROUND"])
    try:
        _wait_for(server, f"http://localhost:{port}/")
        yield f"https://localhost:{port}", served
    finally:
        server.terminate()
        server.wait()


def _wait_for(server: subprocess.Popen[bytes], url: str) -> None:
    give_up_at = time.monotonic() + _START_S
    while True:
        assert server.poll() is None, "apache2 does not start"
        try:
            urlopen(url, timeout=5).close()
        except URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError):
                # It answers: in clear text it says that it wants TLS.
                return
        assert time.monotonic() < give_up_at, "apache2 does not answer"
        time.sleep(0.05)


def test_a_link_that_is_named_itself_is_not_emptied_at_apache(
    apache: tuple[str, Path], relay: HelperProcess, storages: TestStorages
) -> None:
    url, served = apache
    for name in ("outside", "tree"):
        (served / name).mkdir()
        (served / name / "file").write_bytes(b"content")
    (served / "link").symlink_to("outside")
    (served / "tree" / "inside").symlink_to(served / "outside")
    storages.give(served)

    def listed(name: str) -> tuple[list[str], AgentEvent]:
        events = relay.run(ListRequest(relay.new_id(), 1, f"{url}/{name}", None, LIMITS, follow=False))
        found = [entry.path for event in events if isinstance(event, EntriesEvent) for entry in event.entries]
        return found, events[-1]

    found, end = listed("link")
    assert found == []
    assert isinstance(end, FailedEvent)
    assert end.fault.code == "UNSUPPORTED" and "may be a symbolic link" in end.fault.message
    # Links further down it does not show at all.
    found, end = listed("tree")
    assert (found, isinstance(end, DoneEvent)) == (["file"], True)
