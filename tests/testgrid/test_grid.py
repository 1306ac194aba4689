"""The grid, up for real: what it promises, how it fails, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import pwd
import socket
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from pdm.testgrid import GridError, GridFtpServer, TestGrid, processes
from pdm.testgrid.grid_servers import GRID_MARK
from pdm.testgrid.processes import marked

_ROOT = Path(__file__).parents[2]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give users accounts of their own")


def client(environment: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["globus-url-copy", *arguments],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def connected(server: GridFtpServer) -> socket.socket:
    """A connection, which is a session at the server from the moment that its greeting has come."""
    return socket.create_connection(("127.0.0.1", urlsplit(server.url).port or 0), timeout=10)


def greeting(connection: socket.socket) -> bytes:
    return connection.recv(4)


def test_grid_json_has_all_addresses(grid: TestGrid) -> None:
    told = json.loads((grid.directory / "grid.json").read_text())

    assert Path(told["ca_dir"]).is_dir()
    assert {name: site["id"] for name, site in told["sites"].items()} == {"A": 1, "B": 2}
    for site in told["sites"].values():
        assert Path(site["root"]).is_dir()
        assert urlsplit(site["endpoints"]["gsiftp"]).scheme == "gsiftp"
    assert set(told["users"]) == {"alice", "bob"}
    for user in told["users"].values():
        assert user["dn"].startswith("/DC=")
        for key in ("cert", "key", "proxy"):
            assert Path(user[key]).is_file()
        assert Path(user["proxy"]).stat().st_mode & 0o777 == 0o600


def test_a_file_goes_from_site_to_site(grid: TestGrid) -> None:
    sites = grid.sites
    (sites["A"].root / "greeting").write_text("hello")

    done = client(
        grid.environment(), sites["A"].url(sites["A"].root / "greeting"), sites["B"].server.url + "/~/arrived"
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert (sites["B"].root / "arrived").read_text() == "hello"


@needs_root
def test_a_user_cannot_read_what_is_anothers(grid: TestGrid) -> None:
    site = grid.sites["A"]
    secret = site.root / "secret"
    secret.write_text("of alice")
    secret.chmod(0o600)
    grid.give(secret, "alice")

    assert client(grid.environment("alice"), site.url(secret), "file:///dev/null").returncode == 0
    refused = client(grid.environment("bob"), site.url(secret), "file:///dev/null")
    assert "Permission denied" in refused.stderr


@needs_root
def test_a_given_tree_is_the_users(grid: TestGrid) -> None:
    tree = grid.sites["A"].root / "tree"
    (tree / "directory").mkdir(parents=True)
    (tree / "directory" / "file").touch()
    (tree / "link").symlink_to("/etc/passwd")

    grid.give(tree, "bob")

    owners = {path.lstat().st_uid for path in (tree, *tree.rglob("*"))}
    assert owners == {pwd.getpwnam("pdmbob").pw_uid}
    assert Path("/etc/passwd").stat().st_uid == 0


def test_a_stranger_is_refused_by_the_server(grid: TestGrid) -> None:
    refused = client(grid.environment("mallory"), "-list", grid.sites["A"].url() + "/")

    assert refused.returncode == 1
    assert "530" in refused.stderr


def test_an_expired_proxy_is_refused(grid: TestGrid) -> None:
    expired = {**grid.environment(), "X509_USER_PROXY": str(grid.users["alice"].files.expired_proxy)}

    refused = client(expired, "-list", grid.sites["A"].url() + "/")

    assert refused.returncode == 1
    assert "expired" in refused.stderr


def test_a_server_with_another_hosts_certificate_is_refused_by_the_client(grid: TestGrid) -> None:
    wrong = grid.add_server("wrong", ["wrong.example.org"])

    refused = client(grid.environment(), "-list", wrong.url + "/~/")

    assert refused.returncode == 1
    assert "do not match" in refused.stderr


def test_killed_sessions_end_and_new_ones_are_served(grid: TestGrid) -> None:
    server = grid.sites["A"].server
    with connected(server) as old:
        assert greeting(old) == b"220 "
        # That of a test before may still be on its way out.
        assert server.kill_sessions() >= 1
        while old.recv(4096):
            pass
    with connected(server) as new:
        assert greeting(new) == b"220 "


def test_a_frozen_server_does_not_answer_until_it_thaws(grid: TestGrid) -> None:
    server = grid.sites["A"].server
    server.freeze()
    try:
        with connected(server) as connection:
            connection.settimeout(0.2)
            with pytest.raises(TimeoutError):
                greeting(connection)
            server.thaw()
            connection.settimeout(10)
            assert greeting(connection) == b"220 "
    finally:
        server.thaw()


def test_a_stopped_server_comes_back_on_its_port(grid: TestGrid) -> None:
    server = grid.add_server("restarted")
    url = server.url

    server.stop()
    with pytest.raises(ConnectionRefusedError):
        connected(server)
    server.start()

    assert server.url == url
    with connected(server) as connection:
        assert greeting(connection) == b"220 "


@pytest.mark.full
def test_grids_side_by_side_do_not_meet_and_leave_nothing(grid_programs: None, open_directory: Path) -> None:
    grids = [TestGrid(open_directory / name) for name in ("one", "two")]
    with ThreadPoolExecutor() as threads:
        list(threads.map(TestGrid.up, grids))
    try:
        urls = {site.server.url for grid in grids for site in grid.sites.values()}
        assert len(urls) == 4
        one, two = grids
        assert client(two.environment(), "-list", one.sites["A"].url() + "/").returncode == 1
        with connected(one.sites["A"].server) as session:
            assert greeting(session) == b"220 "
            one.sites["B"].server.freeze()
            assert one.down() == 3
        assert client(two.environment(), "-list", two.sites["A"].url() + "/").returncode == 0
    finally:
        for grid in grids:
            grid.down()
    for grid in grids:
        assert not grid.directory.exists()
        assert marked({GRID_MARK: str(grid.directory)}) == []


def test_a_grid_that_cannot_come_up_leaves_nothing(
    grid_programs: None, open_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "globus-gridftp-server"
    broken.write_text("#!/bin/sh\necho cannot find a library\nexit 127\n")
    broken.chmod(0o755)
    monkeypatch.setattr(processes, "_SEARCH_PATH", f"{tmp_path}:{processes._SEARCH_PATH}")
    grid = TestGrid(open_directory / "broken")

    with pytest.raises(GridError, match="server A ended at its start: cannot find a library"):
        grid.up()

    assert not grid.directory.exists()
    assert marked({GRID_MARK: str(grid.directory)}) == []


def test_a_grid_is_not_brought_up_twice(grid: TestGrid) -> None:
    with pytest.raises(GridError, match="take it down first"):
        TestGrid(grid.directory).up()

    assert client(grid.environment(), "-list", grid.sites["B"].url() + "/").returncode == 0


def test_a_directory_with_other_things_is_left_alone(grid_programs: None, tmp_path: Path) -> None:
    (tmp_path / "users").mkdir()
    (tmp_path / "users" / "thesis.txt").write_text("years of work")
    grid = TestGrid(tmp_path)

    with pytest.raises(GridError, match="is not empty"):
        grid.up()
    assert grid.down() == 0

    assert (tmp_path / "users" / "thesis.txt").read_text() == "years of work"


@needs_root
def test_a_directory_that_the_accounts_cannot_enter_is_refused(grid_programs: None, open_directory: Path) -> None:
    closed = open_directory / "closed"
    closed.mkdir(mode=0o700)

    with pytest.raises(GridError, match=f"cannot enter {closed}"):
        TestGrid(closed / "grid").up()

    closed.rmdir()


@pytest.mark.full
def test_files_can_be_kept(grid_programs: None, open_directory: Path) -> None:
    grid = TestGrid(open_directory / "kept").up()
    (grid.sites["A"].root / "file").write_text("stays")

    grid.down(keep_files=True)
    assert not (grid.directory / "grid.json").exists()
    with grid.up():
        assert (grid.sites["A"].root / "file").read_text() == "stays"

    assert not grid.directory.exists()


# The account may not be able to read the interpreter's files, so import everything first.
_AS_NOBODY = """
import os, sys
from pdm.testgrid.__main__ import main
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.full
def test_it_needs_no_root_and_another_process_takes_it_down(grid_programs: None, open_directory: Path) -> None:
    directory = open_directory / "everybody"
    directory.mkdir()
    directory.chmod(0o777)

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", _AS_NOBODY, *arguments],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(_ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )

    up = command("up", str(directory / "grid"))
    try:
        assert (up.returncode, up.stderr) == (0, "")
        told = json.loads((directory / "grid" / "grid.json").read_text())
        assert "account" not in told["users"]["alice"]
        proxy = {"X509_CERT_DIR": told["ca_dir"], "X509_USER_PROXY": told["users"]["bob"]["proxy"]}
        if os.geteuid() == 0:
            # Globus reads a proxy only for its owner.
            os.chown(proxy["X509_USER_PROXY"], 0, 0)
        site = told["sites"]["B"]
        assert client(proxy, "-list", f"{site['endpoints']['gsiftp']}{site['root']}/").returncode == 0
    finally:
        down = command("down", str(directory / "grid"))
    assert (down.returncode, down.stdout) == (0, "grid is down: 2 processes ended\n")
    assert not (directory / "grid").exists()
    assert command("down", str(directory / "grid")).returncode == 0


def test_the_command_reports_a_fault_in_one_line(grid: TestGrid) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pdm.testgrid", "up", str(grid.directory)],
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"pdm.testgrid: a grid is up in {grid.directory}: take it down first\n"
