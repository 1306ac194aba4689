"""A daemon of a restored backup that was taken under load: by the commands of ``docs/recovery.rst``."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from pdm.testgrid.service import TestService, service_environment, set_keys
from tests.store.clusters import cluster, programs

_PAGE = Path(__file__).parents[2] / "docs" / "recovery.rst"
_COMMAND = re.compile(r"^   \$ (pdm admin .*)$", re.MULTILINE)
_FILES = 3000
pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]


def commands(section: str) -> list[str]:
    """The ``pdm admin`` commands below a heading of the page."""
    text = _PAGE.read_text().partition(f"\n{section}\n---")[2]
    return _COMMAND.findall(re.split(r"\n.*\n---", text)[0])


class Machine:
    """Stands for the machines of the page: its paths are below a directory of the test."""

    def __init__(self, directory: Path, original: Path, database: str | None = None) -> None:
        self._places = {
            "/etc/pdm": original,
            "/srv/backup": directory / "backup",
            "/root": directory / "root",
            "/srv/pdm": directory / "restored",
            "postgresql://pdm@localhost/pdm": database,
        }
        for name in ("backup", "root"):
            (directory / name).mkdir(exist_ok=True)

    def run(self, command: str, code: int = 0) -> str:
        for place, path in self._places.items():
            command = command.replace(place, str(path))
        done = subprocess.run(
            shlex.split(command), env=service_environment(), capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def server() -> Iterator[sa.URL]:
    found = programs()
    if found is None:
        pytest.skip("no server programs of PostgreSQL")
    with cluster(found) as url:
        yield url


def empty_database(server: sa.URL, name: str) -> str:
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    return server.set(database=name, drivername="postgresql").render_as_string(hide_password=False)


@pytest.mark.parametrize(("kind", "restored_kind"), [("lite", "lite"), ("lite", "pg"), ("pg", "pg")])
def test_a_backup_under_load_becomes_a_daemon_that_continues(
    tmp_path: Path, request: pytest.FixtureRequest, kind: str, restored_kind: str
) -> None:
    def database_of(name: str) -> str:
        return empty_database(request.getfixturevalue("server"), name)

    original = TestService(tmp_path / "instance")
    # Small batches: the tree is still being copied while the backup is made.
    original.init(agents={"max_agents": "2"}, queue={"batch_elements": "2"})
    if kind == "pg":
        set_keys(original.directory / "workqueue.conf", {"database": {"url": database_of(f"from_{kind}")}})
    storage = original.directory / "storage"
    (storage / "a" / "tree").mkdir(parents=True)
    for number in range(_FILES):
        (storage / "a" / "tree" / f"{number:04}").write_text(f"{number}\n" * 20)
    for name in ("gone", "kept", "old"):
        (storage / "b" / name).write_text(f"{name} between backup and disaster")
    original.start()
    ended = [
        original.submit("admin", "mkdir", src_siteid=1, src_filepath=f"/made{number}", protocol="FILE")["id"]
        for number in range(20)
    ]
    for job in ended:
        assert original.wait_for("admin", job)["status"] == "DONE"
    assert original.pdm("admin", "site", "drain", "local-b", "until the backup").returncode == 0
    ends = {"src_siteid": 2, "protocol": "FILE"}
    waiting = {
        "remove": original.submit("admin", "remove", src_filepath="/gone", **ends)["id"],
        "mkdir": original.submit("admin", "mkdir", src_filepath="/made", **ends)["id"],
        "copy": original.submit("admin", "copy", src_filepath="/kept", dst_siteid=2, dst_filepath="/there", **ends)[
            "id"
        ],
        "rename": original.submit("admin", "rename", src_filepath="/old", dst_filepath="/new", **ends)["id"],
    }
    # Under load: one tree of many files, and one job whose elements run for a while.
    tree = original.submit(
        "admin", "copy", src_siteid=1, src_filepath="/tree", dst_siteid=1, dst_filepath="/copy", protocol="FILE"
    )["id"]
    slow = original.submit(
        "admin",
        "copy",
        src_siteid=1,
        src_filepath="/t",
        dst_siteid=1,
        dst_filepath="/c",
        protocol="DUMMY",
        extra_opts={"dummy": {"files": 60, "delay": 0.2}},
    )["id"]
    original.wait_for("admin", slow, until=["RUNNING"])
    give_up_at = time.monotonic() + 60
    while original.call("admin", "GET", f"/jobs/{tree}")[1]["num_done"] < 50 and time.monotonic() < give_up_at:
        time.sleep(0.01)

    database = None if restored_kind == "lite" else database_of(f"to_{kind}")
    machine = Machine(tmp_path, original.directory, database)
    (backup,) = commands("Back up")
    said = machine.run(f"{backup} --logs")
    at_backup = int(re.search(r"(\d+) of them have ended", said)[1])  # type: ignore[index]
    assert at_backup >= len(ended)
    # The original works on, and is lost then.
    assert original.pdm("admin", "site", "resume", "local-b").returncode == 0
    for name, job in waiting.items():
        assert original.wait_for("admin", job)["status"] == "DONE", name
    assert original.wait_for("admin", tree)["status"] == "DONE"
    arrived = {path.name: path.stat().st_ino for path in (storage / "a" / "copy").iterdir()}
    later = original.submit("admin", "mkdir", src_siteid=1, src_filepath="/later", protocol="FILE")["id"]
    original.kill()

    plain, check, into_postgresql = commands("Restore")
    said = machine.run(into_postgresql if restored_kind == "pg" else plain)
    assert f"{at_backup} of them had ended" in said
    machine.run(check, code=0)
    restored = TestService(tmp_path / "restored")
    # Users have their certificates themselves.
    for path in original.credentials("admin"):
        shutil.copy(path, restored.directory / "certificates")
    restored.start()
    try:
        for job in ended:
            assert restored.call("admin", "GET", f"/jobs/{job}")[1]["status"] == "DONE"
        assert restored.call("admin", "GET", f"/jobs/{later}")[0] == 404
        assert restored.pdm("admin", "site", "resume", "local-b").returncode == 0
        done = restored.wait_for("admin", tree, timeout_s=120)
        assert (done["status"], done["num_done"], done["num_failed"]) == ("DONE", _FILES + 1, 0), restored.tail()
        assert done["already_there"] > 0
        # No file was written twice.
        assert {path.name: path.stat().st_ino for path in (storage / "a" / "copy").iterdir()} == arrived
        assert restored.wait_for("admin", slow, timeout_s=120)["status"] == "DONE"
        # As the page says.
        outcomes = {}
        for name, job in waiting.items():
            status = restored.wait_for("admin", job)["status"]
            failed = restored.call("admin", "GET", f"/jobs/{job}/elements?status=FAILED")[1]
            outcomes[name] = failed[0]["error"]["code"] if failed else status
        assert outcomes == {"remove": "NOT_FOUND", "mkdir": "EXISTS", "copy": "DONE", "rename": "NOT_FOUND"}
        new = restored.submit("admin", "mkdir", src_siteid=1, src_filepath="/after", protocol="FILE")
        assert new["id"] > later + 900
        assert restored.wait_for("admin", new["id"])["status"] == "DONE"
        assert "outcome=DONE" in restored.pdm("admin", "logs", f"{ended[0]}.0").stdout
        assert restored.call("admin", "GET", "/events?limit=5")[0] == 200
        (key,) = commands("New key")
        Machine(tmp_path, restored.directory).run(key)
    finally:
        assert restored.stop() == 0
    (lost,) = commands("Lost key")
    (restored.directory / "var" / "credentials.key").unlink()
    machine.run(lost)
    with restored.running():
        assert restored.call("admin", "GET", "/health")[1]["status"] == "ok"
    (upgrade,) = commands("Upgrade")
    assert "nothing to do" in Machine(tmp_path, restored.directory).run(upgrade)
