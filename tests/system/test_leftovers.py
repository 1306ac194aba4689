"""Temporary files that copies have left are removed, whatever becomes of others."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import pytest

from pdm.testgrid.service import TestService


@pytest.mark.full
def test_files_of_several_elements_go_although_those_of_another_job_cannot(tmp_path: Path) -> None:
    service = TestService(tmp_path / "instance")
    service.init()
    storage = service.directory / "storage"
    (storage / "a" / "tree").mkdir(parents=True)
    for name in ("one", "two", "three"):
        (storage / "a" / "tree" / name).write_text(name)
    jobs = []
    with service.running():
        for directory in ("bad", "good"):
            job = service.submit(
                "admin",
                "copy",
                src_siteid=1,
                src_filepath="tree",
                dst_siteid=2,
                dst_filepath=directory,
                protocol="FILE",
            )
            jobs.append(job["id"])
            assert service.wait_for("admin", job["id"])["status"] == "DONE"
    # As a crash leaves them: the files are there, and the database knows that they may be.
    (database,) = service.directory.rglob("*.sqlite")
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE job_elements SET residue = 1 WHERE type = 'COPY'")
        connection.execute("UPDATE jobs SET extra_opts = '{\"overwrite\": 5}' WHERE id = ?", (jobs[0],))
        rows = connection.execute(
            "SELECT jobs.log_uid, job_elements.id, attempts FROM job_elements JOIN jobs ON jobs.id = job_id"
            " WHERE residue AND job_id = ?",
            (jobs[1],),
        ).fetchall()
    connection.close()
    left = [storage / "b" / "good" / f".pdm-{uid[:16]}.{number}.{attempt}.part" for uid, number, attempt in rows]
    assert len(left) == 3
    for path in left:
        path.write_text("a part of it")
    with service.running():
        give_up_at = time.monotonic() + 15
        while any(path.exists() for path in left):
            assert time.monotonic() < give_up_at, service.tail()
            time.sleep(0.05)
    log = service.log_path.read_text()
    assert log.count("unfinished files of job") == 1 and f"job {jobs[1]}: 3 unfinished files removed" in log, log
    with sqlite3.connect(database) as connection:
        assert connection.execute("SELECT count(*) FROM job_elements WHERE residue").fetchone() == (3,)
    connection.close()
