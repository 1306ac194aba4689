"""SSH alone: host keys, keys, links, paths from the home directory, bounded memory."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from pdm.testgrid.storage_servers import make_key
from pdm.testgrid.storages import TestStorages
from pdm.workqueue.helpers.backends.ssh_command import ssh_command
from pdm.workqueue.helpers.storage import StorageError, Timeouts
from pdm.workqueue.wire.agent_events import DoneEvent
from pdm.workqueue.wire.agent_requests import CopyItem
from tests.helpers.driver import HelperProcess, entries
from tests.protocols.places import Places, judged

RELAY = ["-m", "pdm.workqueue.helpers.main_relay"]


def outcome(storages: TestStorages, places: Places, **changes: str) -> str:
    with HelperProcess(RELAY, {**storages.environment(), **changes}) as helper:
        return judged("ssh", helper.list(places.url("ssh", places.a))[-1])


def test_a_server_without_a_known_host_key_is_refused(storages: TestStorages, places: Places, tmp_path: Path) -> None:
    nobody = tmp_path / "known hosts"
    nobody.write_text("")
    assert outcome(storages, places, PDM_SSH_KNOWN_HOSTS=str(nobody)) == "source HOST_KEY"
    assert nobody.read_text() == ""
    assert outcome(storages, places, PDM_SSH_KNOWN_HOSTS="") == "source HOST_KEY"


def test_a_server_with_another_host_key_is_refused(storages: TestStorages, places: Places, tmp_path: Path) -> None:
    make_key(tmp_path / "other")
    _, key, *_ = (tmp_path / "other.pub").read_text().split()
    changed = tmp_path / "known_hosts"
    changed.write_text(f"[localhost]:{storages.sftp['A'].port} ssh-ed25519 {key}\n")
    assert outcome(storages, places, PDM_SSH_KNOWN_HOSTS=str(changed)) == "source HOST_KEY"


def test_a_key_that_the_server_does_not_know(storages: TestStorages, places: Places, tmp_path: Path) -> None:
    make_key(tmp_path / "my key 100%")
    assert outcome(storages, places, PDM_SSH_KEY=str(tmp_path / "my key 100%")) == "source CREDENTIAL_REFUSED"
    assert outcome(storages, places, PDM_SSH_KEY="") == "service CREDENTIAL_MISSING"


def test_the_users_key_and_account_come_before_the_services(
    storages: TestStorages, places: Places, tmp_path: Path
) -> None:
    server = storages.sftp["A"]
    make_key(tmp_path / "other")

    def told(url: str, key: Path, account: str | None) -> str:
        return json.dumps({url: {"file": str(key), "account": account}})

    nobody = {"PDM_SSH_KEY": "", "PDM_SSH_USER": "nobody"}
    given = told(server.url, server.client_key, server.user)
    with HelperProcess(RELAY, {**storages.environment(), **nobody, "PDM_CREDENTIALS": given}) as helper:
        assert isinstance(helper.list(places.url("ssh", places.a))[-1], DoneEvent)
    wrong = told(server.url, tmp_path / "other", server.user)
    assert outcome(storages, places, PDM_CREDENTIALS=wrong) == "source CREDENTIAL_REFUSED"
    elsewhere = told(storages.sftp["B"].url, server.client_key, server.user)
    assert outcome(storages, places, PDM_SSH_KEY="", PDM_CREDENTIALS=elsewhere) == "service CREDENTIAL_MISSING"


def test_links_are_followed_to_their_end(relay: HelperProcess, places: Places) -> None:
    file = places.put(places.a / "tree" / "file", b"12345")
    os.symlink("file", places.a / "tree" / "to file")
    os.symlink("nowhere", places.a / "tree" / "dangling")
    os.symlink(".", places.a / "tree" / "loop")
    found = entries(relay.list(places.url("ssh", places.a / "tree")))
    link = found["to%20file"]
    assert (link.type, link.size, link.target) == (
        "link",
        5,
        places.url("ssh", file).partition("://")[2].partition("/")[2].join(["/", ""]),
    )
    assert (found["dangling"].type, found["dangling"].target) == ("link", None)
    assert found["loop"].type == "link"


@pytest.mark.parametrize("authority", ["-oProxyCommand=x", "a b", "h:22;x", "h:-1", "user@h"])
def test_an_authority_never_becomes_an_option(authority: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDM_SSH_KEY", "/k")
    monkeypatch.setenv("PDM_SSH_KNOWN_HOSTS", "/h")
    with pytest.raises(StorageError, match="HOST:PORT"):
        ssh_command(authority, Timeouts(1, 0, 1))


@pytest.mark.full
def test_memory_stays_bounded(own: HelperProcess, places: Places) -> None:
    size = 128 * 1024**2
    source = places.put(places.a / "large", b"")
    os.truncate(source, size)
    done = own.copy([places.item("ssh", source, places.b / "large")])[1]
    assert isinstance(done, DoneEvent)
    status = Path(f"/proc/{own.process.pid}/status").read_text()
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    assert int(peak) < 60 * 1024


def test_a_file_that_is_read_in_the_middle_of_nothing(relay: HelperProcess, places: Places) -> None:
    directory = places.a / "directory"
    directory.mkdir()
    places.storages.give(directory)
    item = CopyItem(
        1,
        places.url("ssh", directory),
        places.url("ssh", places.b / "x"),
        places.url("ssh", places.b / ".pdm-x"),
        [],
        5,
    )
    assert judged("ssh", relay.copy([item])[1]) == "source IS_A_DIRECTORY"
    assert places.left() == []
