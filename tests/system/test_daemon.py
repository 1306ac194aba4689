"""``twistd pdmworkqueue`` as operators meet it: start, stop, refusals."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from pdm.testgrid.service import TestService, service_environment, set_keys
from pdm.workqueue import __version__
from pdm.workqueue.admin.checks import find_problems
from pdm.workqueue.config.reader import read_settings

TWISTD = str(Path(sys.executable).parent / "twistd")


@pytest.fixture
def service(tmp_path: Path) -> Iterator[TestService]:
    service = TestService(tmp_path / "instance")
    service.init(node={"name": "first-node"})
    yield service
    if service.process is not None:
        service.kill()


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> TestService:
    instance = TestService(tmp_path_factory.mktemp("unstarted") / "instance")
    instance.init()
    return instance


@pytest.fixture
def unstarted(instance: TestService, tmp_path: Path) -> Iterator[TestService]:
    """An instance as ``pdm admin init`` made it, for tests that start no daemon; it is made whole afterwards."""
    shutil.copytree(instance.directory, tmp_path / "kept")
    yield instance
    shutil.rmtree(instance.directory)
    shutil.copytree(tmp_path / "kept", instance.directory)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestService]:
    """A running daemon, for tests that leave it as it is."""
    service = TestService(tmp_path_factory.mktemp("daemon") / "instance")
    service.init(queue={"first_pause": "50ms", "longest_pause": "50ms"})
    with service.running():
        yield service


def run(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [TWISTD, "--nodaemon", "pdmworkqueue", "--config", str(config), *arguments]
    with TestService.popen(
        command,
        env=service_environment(),
        cwd=config.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=30)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a daemon which cannot start leaves for the operator."""
    assert done.returncode != 0
    assert "ready" not in done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("pdmworkqueue: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


def test_it_says_when_it_serves_and_stops_cleanly(service: TestService) -> None:
    service.popen = subprocess.Popen
    url = service.start()
    assert re.fullmatch(r"https://127\.0\.0\.1:\d+", url)
    status, health = service.call("admin", "GET", "/health")
    assert status == 200, health
    _log_something(service)
    assert service.process is not None
    service.process.send_signal(signal.SIGHUP)
    assert service.stop() == 0
    assert not list(service.directory.glob("*.pid"))
    log = service.log_path.read_text()
    configuration = re.escape(str(service.directory / "workqueue.conf"))
    for pattern in (
        rf"info .* PDM Workqueue {__version__} starts: configuration {configuration}, node first-node,"
        r" database sqlite:///\S+$",
        rf"info .* ready {url}: version {__version__}, node first-node, 2 sites$",
        r"info .*subject=\S+ .* POST /workqueue/api/v1.0/copy 200 \d+\.\d ms$",
        r"info .*\[.*job=1 .*job 1 of user 1 submitted: COPY by FILE, site 1 -> 2, 1 elements, priority 5$",
        r"info .*job=1.* job 1 of user 1 ended DONE: COPY, 2 of 2 elements done, 0 failed, 0 cancelled,"
        r" 5 bytes in \d+\.\d s$",
        r"warn .*job=2.* job 2 of user 1 ended FAILED: REMOVE, 0 of 1 elements done, 1 failed, 0 cancelled, 0 bytes in",
        r"info .* SIGHUP: the sites and the TLS files are read again; other settings need a restart$",
        r"info .* stopping: 0 batches with 0 attempts run, 0 results are not in the database yet$",
        r"info .* stopped after \d\.\d s: since its start 2 attempts were done, 1 failed, 5 bytes$",
    ):
        assert re.search(pattern, log, re.MULTILINE), f"{pattern}\n{log}"
    service.log_path.write_text("")

    set_keys(service.directory / "workqueue.conf", {"logs": {"format": "json"}})
    service.start()
    _log_something(service)
    assert service.stop() == 0
    events = [json.loads(line) for line in service.log_path.read_text().splitlines()]
    assert {event["node"] for event in events} == {"first-node"}
    (asked,) = [event for event in events if event.get("path", "").endswith("/copy")]
    assert (asked["method"], asked["status"], asked["level"]) == ("POST", 200, "info")
    assert asked["ms"] > 0
    assert asked["subject"].endswith("/CN=admin")
    submitted, ended = (
        next(event for event in events if event.get("job") == 4 and word in event["event"])
        for word in ("submitted", "ended")
    )
    assert (submitted["user"], submitted["type"], submitted["elements"]) == (1, "REMOVE", 1)
    assert (ended["level"], ended["outcome"], ended["failed"], ended["bytes"]) == ("warn", "FAILED", 1, 0)
    assert ended["seconds"] > 0


def _log_something(service: TestService) -> None:
    """A COPY that is DONE, and a REMOVE that has FAILED."""
    (service.directory / "storage" / "a" / "file").write_text("hello")
    copy = service.submit(
        "admin", "copy", src_siteid=1, src_filepath="file", dst_siteid=2, dst_filepath="copy", protocol="FILE"
    )
    remove = service.submit("admin", "remove", src_siteid=1, src_filepath="nothing", protocol="FILE")
    assert service.wait_for("admin", copy["id"])["status"] == "DONE", service.tail()
    assert service.wait_for("admin", remove["id"])["status"] == "FAILED", service.tail()


def test_a_job_runs_between_local_directories(service: TestService) -> None:
    with service.running():
        source = service.directory / "storage" / "a"
        (source / "tree" / "empty").mkdir(parents=True)
        (source / "tree" / "file one").write_text("1")
        job = service.submit(
            "admin", "copy", src_siteid=1, src_filepath="tree", dst_siteid=2, dst_filepath="copy", protocol="FILE"
        )
        assert service.wait_for("admin", job["id"])["status"] == "DONE", service.tail()
        copy = service.directory / "storage" / "b" / "copy"
        assert (copy / "file one").read_text() == "1"
        assert (copy / "empty").is_dir()


def test_the_configuration_can_be_checked(unstarted: TestService) -> None:
    done = run(unstarted.directory / "workqueue.conf", "--check-config")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("section", "key", "value", "named"),
    [
        ("database", "url", "mysql://root@localhost/pdm", "mysql"),
        ("database", "url", "postgresql://pdm@127.0.0.1:1/pdm", "cannot be opened"),
        ("database", "url", "sqlite:////dev/null/queue.sqlite", "cannot be made"),
        ("agents", "python", "/nope", "[agents] python: /nope"),
        ("agents", "python", "/bin/false", "no Python 3.11"),
        ("state", "folder", "/dev/null", "[state] folder"),
        ("logs", "folder", "/dev/null/logs", "[logs] folder"),
        ("credentials", "folder", "/dev/null/credentials", "[credentials] folder"),
        ("server", "host", "192.0.2.1", "no address of this machine"),
        ("tls", "trust", "var/trust", "[tls] trust"),
        ("tls", "trust", "var/../var/trust/own.pem", "is emptied at each start"),
        ("credentials", "trust_dir", "var/trust", "[credentials] trust_dir"),
    ],
)
def test_what_cannot_work_is_found(unstarted: TestService, section: str, key: str, value: str, named: str) -> None:
    config = unstarted.directory / "workqueue.conf"
    before = sorted(unstarted.directory.rglob("*"))
    set_keys(config, {section: {key: value}})
    found = find_problems(read_settings(config), database=True)
    assert any(named in problem for problem in found), found
    assert not any("\n" in problem for problem in found)
    assert sorted(unstarted.directory.rglob("*")) == before


@pytest.mark.parametrize(("present", "missing"), [((), "msgspec"), (("msgspec",), "h11")])
def test_an_interpreter_without_what_helpers_import_is_found(
    unstarted: TestService, tmp_path: Path, present: Sequence[str], missing: str
) -> None:
    """A real one that sees no site-packages, but for some libraries."""
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    for name in present:
        (libraries / name).symlink_to(Path(importlib.import_module(name).__path__[0]))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={libraries} exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    config = unstarted.directory / "workqueue.conf"
    set_keys(config, {"agents": {"python": str(python)}})
    (problem,) = find_problems(read_settings(config), database=True)
    assert f"[agents] python: {python} has no {missing}, which helpers need" in problem
    assert f"No module named '{missing}'" in problem


def test_all_errors_are_reported_at_once(unstarted: TestService) -> None:
    config = unstarted.directory / "workqueue.conf"
    set_keys(config, {"agents": {"python": "/nope"}, "credentials": {"folder": "/dev/null/credentials"}})
    for arguments in (["--check-config"], []):
        done = run(config, *arguments)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        told = [line for line in done.stderr.splitlines() if line.startswith("pdmworkqueue: ")]
        assert [sum(word in line for line in told) for word in ("/nope", "[credentials] folder")] == [1, 1]


def test_a_newer_schema_is_found(unstarted: TestService) -> None:
    path = unstarted.directory / "var" / "workqueue.sqlite"
    config = unstarted.directory / "workqueue.conf"
    path.parent.mkdir(exist_ok=True)
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        database.execute("INSERT INTO alembic_version VALUES ('9999')")
        database.commit()
    (problem,) = find_problems(read_settings(config), database=True)
    assert "9999" in problem
    path.write_bytes(b"not a database" * 100)
    (problem,) = find_problems(read_settings(config), database=True)
    assert "cannot be opened" in problem


def test_an_unknown_key_is_named_with_file_and_section(unstarted: TestService) -> None:
    config = unstarted.directory / "workqueue.conf"
    set_keys(config, {"server": {"prot": "1"}})
    for arguments in ([], ["--check-config"]):
        line = refused(run(config, *arguments))
        assert str(config) in line and "[server]" in line and "prot" in line and "port" in line


def test_a_missing_configuration_is_one_line(tmp_path: Path) -> None:
    assert str(tmp_path / "no.conf") in refused(run(tmp_path / "no.conf"))


def test_a_taken_port_is_one_line(unstarted: TestService) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        set_keys(unstarted.directory / "workqueue.conf", {"server": {"port": str(port)}})
        line = refused(run(unstarted.directory / "workqueue.conf"))
    assert str(port) in line


@pytest.mark.full
def test_a_second_daemon_on_the_instance_is_refused(service: TestService) -> None:
    with service.running():
        line = refused(run(service.directory / "workqueue.conf"))
        assert "another daemon" in line


def test_a_broken_certificate_is_one_line(unstarted: TestService) -> None:
    (unstarted.directory / "certificates" / "host.crt").write_text("not a certificate")
    (problem,) = find_problems(read_settings(unstarted.directory / "workqueue.conf"), database=True)
    assert "host.crt" in problem and "\n" not in problem


def test_a_broken_site_is_one_line(unstarted: TestService) -> None:
    (unstarted.directory / "sites.d" / "broken.conf").write_text("[x]\nid = one\n")
    (line,) = find_problems(read_settings(unstarted.directory / "workqueue.conf"), database=True)
    assert "broken.conf" in line and "id" in line and "\n" not in line


def test_a_stop_in_the_middle_of_work_gives_it_back(service: TestService) -> None:
    service.start()
    job = service.submit(
        "admin",
        "copy",
        src_siteid=1,
        src_filepath="/t",
        dst_siteid=2,
        dst_filepath="/c",
        protocol="DUMMY",
        extra_opts={"dummy": {"files": 50, "delay": 0.04}},
    )
    service.wait_for("admin", job["id"], until=["RUNNING"])
    time.sleep(0.5)
    assert service.stop() == 0
    with service.running():
        ended = service.wait_for("admin", job["id"])
        assert ended["status"] == "DONE"
        assert ended["num_done"] == 51


@pytest.mark.full
def test_a_silent_helper_is_killed_and_its_element_tried_again(service: TestService) -> None:
    set_keys(service.directory / "workqueue.conf", {"queue": {"stall": "500ms", "first_pause": "50ms"}})
    with service.running():
        job = service.submit(
            "admin",
            "list",
            src_siteid=1,
            src_filepath="/t",
            protocol="DUMMY",
            max_tries=1,
            extra_opts={"dummy": {"hang": True}},
        )
        assert service.wait_for("admin", job["id"])["status"] == "FAILED"
        _, element = service.call("admin", "GET", f"/jobs/{job['id']}/elements/0")
        assert element["error"]["code"] in ("CRASHED", "STALLED")


def test_sites_are_read_again_on_sighup(daemon: TestService) -> None:
    (daemon.directory / "sites.d" / "third.conf").write_text("[third]\nid = 33\ndummy = dummy://third\n")
    assert daemon.process is not None
    os.kill(daemon.process.pid, signal.SIGHUP)
    give_up_at = time.monotonic() + 10
    while daemon.call("admin", "GET", "/sites/33")[0] != 200:
        assert time.monotonic() < give_up_at, daemon.tail()
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("code", "status"), [("CONNECTION", "FAILED"), ("NOT_FOUND", "FAILED"), ("CREDENTIAL_EXPIRED", "HELD")]
)
def test_simulated_failures_end_as_their_class_says(daemon: TestService, code: str, status: str) -> None:
    job = daemon.submit(
        "admin", "list", src_siteid=1, src_filepath="/t", protocol="DUMMY", extra_opts={"dummy": {"fail": code}}
    )
    ended = daemon.wait_for("admin", job["id"], until=[status])
    _, element = daemon.call("admin", "GET", f"/jobs/{job['id']}/elements/0")
    assert element["attempts"] == (2 if code == "CONNECTION" else 1)
    assert element["error"]["code"] == code
    assert ended["status"] == status


def test_a_crashing_helper_costs_one_attempt(daemon: TestService) -> None:
    job = daemon.submit(
        "admin", "list", src_siteid=1, src_filepath="/t", protocol="DUMMY", extra_opts={"dummy": {"crash": True}}
    )
    assert daemon.wait_for("admin", job["id"])["status"] == "DONE"
    _, output = daemon.call("admin", "GET", f"/jobs/{job['id']}/elements/0/output/1")
    assert output["status"] == "FAILED"
    assert "code=CRASHED" in output["log"]


def test_a_hanging_job_is_cancelled_and_can_be_retried(daemon: TestService) -> None:
    job = daemon.submit(
        "admin", "list", src_siteid=1, src_filepath="/t", protocol="DUMMY", extra_opts={"dummy": {"hang": True}}
    )
    daemon.wait_for("admin", job["id"], until=["RUNNING"])
    assert daemon.call("admin", "DELETE", f"/jobs/{job['id']}")[0] == 200
    assert daemon.wait_for("admin", job["id"], timeout_s=3)["status"] == "CANCELLED"
    status, answer = daemon.call("admin", "POST", f"/jobs/{job['id']}/retry", {})
    assert status == 200, answer
    daemon.wait_for("admin", job["id"], until=["RUNNING"])
