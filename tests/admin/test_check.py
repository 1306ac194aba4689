"""``pdm admin check``: what is wrong with an instance, in one line each with the remedy."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pdm.testgrid.service import service_environment, set_keys
from pdm.workqueue.admin import machine_checks
from pdm.workqueue.certificates.authority import Authority
from pdm.workqueue.certificates.vault import Vault
from pdm.workqueue.cli.admin import admin
from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.instance_lock import lock_instance
from tests.support.instances import make_instance


def check(directory: Path, *options: str) -> Result:
    return CliRunner().invoke(admin, ["check", str(directory / "workqueue.conf"), *options])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("check") / "instance"
    make_instance(directory)
    return directory


@pytest.fixture
def instance(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "instance")
    return tmp_path / "instance"


def test_a_good_instance(instance: Path) -> None:
    done = check(instance)
    assert done.exit_code == 0 and "nothing is wrong" in done.output, done.output
    before = sorted(instance.rglob("*"))
    found = json.loads(check(instance, "-F", "json").output)
    assert {each["level"] for each in found} == {"good"}
    assert {"host certificate", "[tls] trust", "database", "FILE", "descriptors"} <= {each["part"] for each in found}
    assert "it opens the credentials in this database" in check(instance, "-v").output
    assert sorted(instance.rglob("*")) == before


def _open_key(directory: Path) -> None:
    (directory / "certificates" / "host.key").chmod(0o644)


def _open_state(directory: Path) -> None:
    (directory / "var").chmod(0o777)


def _other_key(directory: Path) -> None:
    (directory / "var" / "credentials.key").unlink()
    Vault.open(directory / "var" / "credentials.key")


def _no_key(directory: Path) -> None:
    (directory / "var" / "credentials.key").unlink()


def _old_certificate(directory: Path) -> None:
    authority = Authority.load(directory / "certificates")
    host = authority.host(["localhost"], lifetime=timedelta(days=3))
    host.write_key(directory / "certificates" / "host.key")
    host.write_certificate(directory / "certificates" / "host.crt")


def _grid_site(directory: Path) -> None:
    (directory / "sites.d" / "more.conf").write_text(
        "[GRID]\nid = 7\ngridftp = gsiftp://g.example.org\nmyproxy = m.example.org:7512\nssh = sftp://s.example.org\n"
    )
    (directory / "nothing").mkdir()
    set_keys(directory / "workqueue.conf", {"credentials": {"trust_dir": "nothing"}})


def _few_descriptors(directory: Path) -> None:
    set_keys(directory / "workqueue.conf", {"server": {"connections": "1000000"}})


@pytest.mark.parametrize(
    ("spoil", "code", "expected"),
    [
        (_open_key, 6, ["warning: [tls] key", "chmod 600"]),
        (_open_state, 6, ["warning: [state] folder", "mode 777", "chmod go-w"]),
        (_other_key, 1, ["error: [credentials] key_file", "restore the right file"]),
        (_no_key, 1, ["error: [credentials] key_file", "rekey --lost"]),
        (
            _old_certificate,
            6,
            ["warning: host certificate", "valid for 2 d", "get a new one", "is not among its names"],
        ),
        (_grid_site, 6, ["warning: [credentials] trust_dir", "holds no authority", "[ssh] known_hosts", "ssh-keyscan"]),
        (_few_descriptors, 6, ["warning: descriptors", "LimitNOFILE"]),
    ],
)
def test_what_is_wrong_is_said_with_its_remedy(
    instance: Path, spoil: Callable[[Path], None], code: int, expected: list[str]
) -> None:
    spoil(instance)
    done = check(instance)
    assert done.exit_code == code, done.output
    for words in expected:
        assert words in done.output


def test_all_errors_of_the_start_are_among_them(instance: Path) -> None:
    set_keys(
        instance / "workqueue.conf",
        {"agents": {"python": "/nope"}, "server": {"host": "192.0.2.1"}, "sites": {"folder": "nowhere"}},
    )
    (instance / "var" / "workqueue.sqlite").write_bytes(b"not a database" * 100)
    done = check(instance)
    assert done.exit_code == 1
    for words in ("[agents] python: /nope", "192.0.2.1", "nowhere", "cannot be opened"):
        assert words in done.output


def test_a_port_in_use_is_only_good_if_the_daemon_uses_it(instance: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        set_keys(instance / "workqueue.conf", {"server": {"port": str(port)}})
        done = check(instance)
        assert done.exit_code == 1 and f"127.0.0.1:{port} is in use by another program" in done.output
        lock = lock_instance(instance / "var")
        try:
            done = check(instance, "-v")
            assert done.exit_code == 0 and f"127.0.0.1:{port} is in use, by the running daemon" in done.output
            assert f"it runs, pid {os.getpid()}" in done.output
        finally:
            os.close(lock)


def test_a_full_disk_and_a_network_file_system(instance: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks, "_LITTLE_SPACE", 2**62)
    done = check(instance)
    assert done.exit_code == 6 and "are free at" in done.output and "make room" in done.output
    monkeypatch.setattr(machine_checks, "_NO_SPACE", 2**62)
    monkeypatch.setattr(machine_checks, "_file_system", lambda directory: "nfs4")
    done = check(instance)
    assert done.exit_code == 1 and "network file system (nfs4)" in done.output


@pytest.mark.parametrize("protocol", [each for each in JobProtocol if each is not JobProtocol.DUMMY])
def test_software_that_is_missing_for_a_protocol_is_a_warning(
    instance: Path, tmp_path: Path, protocol: JobProtocol
) -> None:
    """An interpreter of the helpers that finds nothing else of the machine."""
    python = tmp_path / "python"
    report = json.dumps({protocol.name: "there is no libexample: install the package example"})
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *prerequisites*) echo \'{report}\';; *) exec {sys.executable} "$@";; esac\n'
    )
    python.chmod(0o755)
    scheme = protocol.info.schemes[0]
    url = f"{scheme}:///srv" if protocol is JobProtocol.FILE else f"{scheme}://x.example.org"
    if protocol is JobProtocol.S3:
        url += "/bucket"
    (instance / "sites.d" / "sites.conf").write_text(f"[X]\nid = 7\n{protocol.name.lower()} = {url}\n")
    (instance / "known_hosts").write_text("")
    set_keys(
        instance / "workqueue.conf",
        {"agents": {"python": str(python)}, "credentials": {"trust_dir": "certificates/trust"}},
    )
    done = check(instance)
    assert done.exit_code == 6, done.output
    (line,) = done.output.splitlines()
    assert line.startswith(f"warning: {protocol.name}: cannot be used: there is no libexample")
    assert "jobs that need it are held" in line


def test_the_daemon_checks_the_same_without_starting(instance: Path) -> None:
    _open_key(instance)
    for spoil, code in ((lambda _: None, 0), (_no_key, 1)):
        spoil(instance)
        done = subprocess.run(
            [
                str(Path(sys.executable).parent / "twistd"),
                *("--nodaemon", "pdmworkqueue", "--check-config", "--config", str(instance / "workqueue.conf")),
            ],
            env=service_environment(),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert "pdmworkqueue: warning: [tls] key" in done.stderr
    assert "pdmworkqueue: [credentials] key_file" in done.stderr
