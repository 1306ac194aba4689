"""Several daemons as one service: behind a load balancer, restarted one after the other, each showing what all do."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pdm.testgrid.ports import reserve_port
from pdm.testgrid.service import TestService
from tests.support.attempt_logs import moved_elements
from tests.support.cluster import Cluster, cluster_of, until

pytestmark = [pytest.mark.full, pytest.mark.postgresql, pytest.mark.timeout(300)]

_HAPROXY_CONFIGURATION = Path(__file__).parents[2] / "etc" / "haproxy" / "haproxy.cfg"
_PLACES = {"src_siteid": 1, "src_filepath": "/t", "dst_siteid": 2, "dst_filepath": "/c", "protocol": "DUMMY"}


@contextmanager
def load_balancer(cluster: Cluster, directory: Path) -> Iterator[str]:
    """HAProxy with the configuration of the documentation, before the nodes of a cluster; gives its URL."""
    program = shutil.which("haproxy", path="/usr/sbin:/usr/bin")
    if program is None:
        pytest.skip("HAProxy is not installed (Debian: apt-get install haproxy)")
    port = reserve_port()
    text = _HAPROXY_CONFIGURATION.read_text().replace("bind :8443", f"bind 127.0.0.1:{port}")
    for number, node in enumerate(cluster.nodes, 1):
        assert node.url is not None
        text = text.replace(f"node{number}.example.org:8443", node.url.rpartition("/")[2])
    assert "example.org" not in text
    path = directory / "haproxy.cfg"
    path.write_text(text)
    process = subprocess.Popen([program, "-db", "-f", path], stdin=subprocess.DEVNULL)
    try:
        until("HAProxy listens", lambda: _listens(port))
        yield f"https://localhost:{port}"
    finally:
        process.terminate()
        process.wait(10)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def test_clients_behind_a_load_balancer_notice_no_node_that_is_killed(tmp_path: Path) -> None:
    """Each node is killed and started again while commands run; each command does what it should."""
    with cluster_of(3, tmp_path) as cluster, load_balancer(cluster, tmp_path) as url:
        ending = threading.Event()

        def kill_in_turn() -> None:
            while True:
                for node in cluster.nodes:
                    if ending.wait(1.0):
                        return
                    node.kill()
                    # As long as a service manager takes.
                    ending.wait(1.0)
                    node.start()

        killing = threading.Thread(target=kill_in_turn)
        killing.start()
        client = TestService(cluster.nodes[0].directory)
        client.url = url
        try:
            numbers = []
            began = time.monotonic()
            while time.monotonic() - began < 25:
                options = ["--protocol", "DUMMY", "--option", 'dummy={"files": 4, "size": 1000, "delay": 0.5}']
                done = client.pdm("admin", "-F", "json", "cp", *options, "1:/t", "2:/c")
                assert done.returncode == 0, done.stderr
                number = re.search(r'"id": ?(\d+)', done.stdout)
                assert number is not None
                numbers.append(int(number[1]))
                assert client.pdm("admin", "status", number[1]).returncode == 0
        finally:
            ending.set()
            killing.join()
        # No command has submitted its job twice.
        jobs = cluster.query("SELECT id, num_done, num_elements FROM jobs ORDER BY id")
        assert [(row.id, row.num_done) for row in jobs] == [(number, 5) for number in numbers]


def test_a_rolling_restart_repeats_nothing(tmp_path: Path) -> None:
    """Each node is drained, restarted and resumed; meanwhile the others move, and each shows all of it."""
    with cluster_of(2, tmp_path) as cluster:
        first, second = cluster.nodes
        job = first.submit("admin", "copy", **_PLACES, extra_opts={"dummy": {"files": 160, "size": 1000, "delay": 2}})
        number = job["id"]
        until("both nodes move", lambda: cluster.running_on(number) == {"node1", "node2"})
        for node, other in ((first, second), (second, first)):
            name = node.directory.name
            done = other.pdm("admin", "admin", "node", "drain", name, "a new version")
            assert done.returncode == 0, done.stderr
            assert "drained: a new version" in done.stdout
            until("it runs nothing", lambda name=name: name not in cluster.running_on(number))  # type: ignore[misc]
            moved = until_moving(node, number)
            assert "silent" not in moved
            assert node.stop() == 0
            node.start()
            listed = other.pdm("admin", "nodes").stdout
            assert re.search(rf"^{name} +drained ", listed, re.MULTILINE), listed
            assert other.pdm("admin", "admin", "node", "resume", name).returncode == 0
        assert first.wait_for("admin", number, timeout_s=120)["num_done"] == 161
        # No file was moved by two attempts; what was claimed ahead and given back has moved nothing.
        moved_by = [attempt for node in cluster.nodes for attempt in moved_elements(node.directory / "var" / "logs")]
        assert len(moved_by) == len({element for element, _ in moved_by}) == 160
        audit = [line["action"] for line in first.call("admin", "GET", "/audit")[1]]
        assert audit == ["node.drain", "node.resume"] * 2


def until_moving(node: TestService, number: int) -> dict[str, object]:
    """The progress of a job as a node shows it that moves nothing of it, once some of it moves."""
    give_up_at = time.monotonic() + 20
    while True:
        progress: dict[str, object] = node.call("admin", "GET", f"/jobs/{number}")[1]["progress"]
        if progress["bytes_moving"] and progress["instant"]:
            return progress
        assert time.monotonic() < give_up_at, progress
        time.sleep(0.1)


def test_a_log_is_followed_and_a_drain_gives_back_at_its_deadline(tmp_path: Path) -> None:
    with cluster_of(2, tmp_path) as cluster:
        first = cluster.nodes[0]
        assert first.pdm("admin", "admin", "node", "drain", "node1").returncode == 0
        job = first.submit("admin", "copy", **_PLACES, extra_opts={"dummy": {"files": 1, "size": 1000, "delay": 20}})
        number = job["id"]
        until("node2 moves the file", lambda: cluster.running_on(number) == {"node2"})
        environment = first.environment("admin")
        following = subprocess.Popen(
            ["pdm", "logs", "-f", f"{number}.1"],
            env=environment, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert following.stdout is not None
        try:
            lines = iter(following.stdout.readline, "")
            assert any("progress bytes=" in line for line in lines), "it is written while the file moves"
            done = first.pdm("admin", "admin", "node", "drain", "node2", "away", "--deadline", "2s")
            assert done.returncode == 0, done.stderr
            until("it is given back", lambda: not cluster.running_on(number), 15)
            assert first.call("admin", "GET", f"/jobs/{number}")[1]["num_submitted"] == 1
            began = time.monotonic()
            assert first.pdm("admin", "admin", "node", "resume", "node1").returncode == 0
            until("node1 moves the file", lambda: cluster.running_on(number) == {"node1"}, 15)
            assert time.monotonic() - began < 10
            element = first.call("admin", "GET", f"/jobs/{number}/elements/1")[1]
            assert element.get("failure") is None
        finally:
            following.kill()
            following.wait()
            following.stdout.close()


def test_a_daemon_alone_is_drained(tmp_path: Path) -> None:
    """SQLite: the node is resumed although it does nothing but answer."""
    service = TestService(tmp_path / "instance")
    service.init(node={"name": "alone"})
    with service.running():
        assert service.pdm("admin", "admin", "node", "drain", "alone", "a new disk").returncode == 0
        number = service.submit("admin", "list", src_siteid=1, src_filepath="/t", protocol="DUMMY")["id"]
        time.sleep(1.0)
        assert service.call("admin", "GET", f"/jobs/{number}")[1]["status"] == "SUBMITTED"
        time.sleep(1.0)
        waiting = service.call("admin", "GET", f"/jobs/{number}")[1]["waiting"]
        assert "an operator has drained the service: a new disk" in waiting
        assert service.stop() == 0
        service.start()
        time.sleep(1.0)
        assert service.call("admin", "GET", f"/jobs/{number}")[1]["status"] == "SUBMITTED"
        assert service.pdm("admin", "admin", "node", "resume", "alone").returncode == 0
        service.wait_for("admin", number)


def _earlier_version(directory: Path) -> Path:
    """The sources before the newest migration, from the history of the checkout."""
    root = Path(__file__).parents[2]
    migrations = "pdm/workqueue/store/migrations/versions/"
    present = {path.name for path in (root / migrations).glob("0*.py")}
    newest = max(present)

    def git(*arguments: str) -> bytes:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("there is no history of this checkout to take an earlier version from")
        return done.stdout

    # By merges and renames, too: without these options git shows no file that came in so.
    parents = git("log", "-m", "--no-renames", "--diff-filter=A", "--format=%P", "--", migrations + newest).split()

    def is_before(commit: str) -> bool:
        """Whether a commit has none but our migrations, without the newest."""
        listed = git("ls-tree", "--name-only", commit, migrations).decode().split()
        names = {name for path in listed if (name := Path(path).name).startswith("0")}
        return newest not in names and names < present

    before = next(filter(is_before, (parent.decode() for parent in parents)), None)
    if before is None:
        pytest.skip("the newest migration is not in the history yet")
    archive = git("archive", "--format=tar", before, "pdm", "twisted")
    directory.mkdir()
    subprocess.run(["tar", "-x", "-C", directory], input=archive, check=True)
    return directory


def test_an_earlier_version_works_on_beside_a_newer_one(tmp_path: Path) -> None:
    """A rolling upgrade: the newer node expands the schema while the older one runs; both work, then one alone."""
    earlier = _earlier_version(tmp_path / "earlier")
    with cluster_of(2, tmp_path, start=False) as cluster:
        old, new = cluster.nodes
        configuration = old.directory / "workqueue.conf"
        text = configuration.read_text()
        configuration.write_text(re.sub(r"\[node\]\n([^\[]*)", "", text))
        old.start(PYTHONPATH=str(earlier))
        options = {"dummy": {"files": 40, "size": 1000, "delay": 1}}
        number = old.submit("admin", "copy", **_PLACES, extra_opts=options)["id"]
        until("the older version works", lambda: cluster.query("SELECT 1 FROM jobs WHERE num_done > 3"))
        cluster.start()
        until("both versions work", lambda: len(_workers_of(cluster, number)) == 2)
        for node in (old, new):
            assert node.call("admin", "GET", f"/jobs/{number}")[0] == 200
        assert old.wait_for("admin", number)["status"] == "DONE"
        more = old.submit("admin", "copy", **_PLACES, extra_opts=options)["id"]
        assert old.stop() == 0
        assert new.wait_for("admin", more)["status"] == "DONE"
        assert not cluster.query("SELECT 1 FROM job_elements WHERE status != 'DONE'")
        configuration.write_text(text)
        old.start()
        assert [node["alive"] for node in old.call("admin", "GET", "/nodes")[1]] == [True, True]


def _workers_of(cluster: Cluster, number: int) -> list[object]:
    return cluster.query(
        "SELECT DISTINCT worker_id FROM job_elements WHERE job_id = :job AND worker_id IS NOT NULL", job=number
    )
