"""The port for clients of FTS3 at two daemons on one PostgreSQL: what one is asked holds at the other."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

from pdm.testgrid import TestGrid
from pdm.testgrid.ports import reserve_port
from pdm.testgrid.service import TestService, set_keys
from tests.support.cluster import Cluster, cluster_of, until
from tests.support.fts_door import ask_door

pytestmark = [pytest.mark.full, pytest.mark.timeout(180)]


@frozen
class Doors:
    """Two daemons with doors, of which only the first one works on the queue, and directories of alice."""

    cluster: Cluster
    grid: TestGrid
    source: Path
    destination: Path

    @property
    def first(self) -> TestService:
        return self.cluster.nodes[0]

    @property
    def second(self) -> TestService:
        return self.cluster.nodes[1]

    def files(self, count: int) -> list[dict[str, Any]]:
        """Files of a submission, whose sources are there."""
        names = [f"file{number}" for number in range(count)]
        for name in names:
            (self.source / name).write_bytes(name.encode() * 1000)
        self.grid.give(self.source)
        sites = self.grid.sites
        return [
            {"sources": [sites["A"].url(self.source / name)], "destinations": [sites["B"].url(self.destination / name)]}
            for name in names
        ]

    def submit(self, count: int, **params: Any) -> str:
        """Submit files to the first daemon; the id of the job."""
        status, answer = ask_door(self.first, "alice", "POST", "/jobs", {"files": self.files(count), "params": params})
        assert status == 200, answer
        number: str = answer["job_id"]
        return number

    def at_second(self, path: str, method: str = "GET") -> Any:
        """The answer of the second daemon."""
        return ask_door(self.second, "alice", method, path)[1]

    def both(self, path: str) -> Any:
        """The answer that both daemons give."""
        answers = [ask_door(node, "alice", "GET", path) for node in self.cluster.nodes]
        assert answers[0] == answers[1], path
        assert answers[0][0] in (200, 207), answers
        return answers[0][1]

    def until_states(self, job: str, wanted: list[str]) -> None:
        """Wait until both daemons give these states of the files of a job."""

        def are(node: TestService) -> bool:
            return [file["file_state"] for file in ask_door(node, "alice", "GET", f"/jobs/{job}/files")[1]] == wanted

        until(f"{job} is {wanted}", lambda: all(map(are, self.cluster.nodes)))

    def running_on(self, job: str) -> set[str]:
        """The names of the daemons that copy files of a job."""
        (row,) = self.cluster.query(
            "SELECT job_id FROM fts_parts JOIN fts_jobs ON fts_jobs.id = fts_job WHERE fts_id = :id", id=job
        )
        return self.cluster.running_on(row.job_id)


@pytest.fixture(scope="module")
def cluster(grid: TestGrid, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_of(
        2, tmp_path_factory.mktemp("doors"), grid=grid.description(), grid_directory=grid.directory, start=False
    ) as cluster:
        for node in cluster.nodes:
            set_keys(node.directory / "workqueue.conf", {"fts": {"host": "localhost", "port": str(reserve_port())}})
        cluster.start()
        first = cluster.nodes[0]
        first.delegate("alice")
        drained = first.pdm("admin", "admin", "node", "drain", "node2", "the other one works")
        assert drained.returncode == 0, drained.stderr
        yield cluster
        for node in cluster.nodes:
            assert "Traceback" not in node.log_path.read_text()


@pytest.fixture
def doors(cluster: Cluster, grid: TestGrid) -> Iterator[Doors]:
    paths = [grid.sites[name].root / "doors" for name in "AB"]
    for path in paths:
        path.mkdir()
        grid.give(path)
    yield Doors(cluster, grid, *paths)
    grid.sites["B"].server.thaw()
    for path in paths:
        shutil.rmtree(path)


def test_one_sid_at_both_at_once_is_one_job(doors: Doors) -> None:
    files = doors.files(20)
    with ThreadPoolExecutor(2) as threads:
        for turn in range(8):
            body = {
                "files": [{**file, "destinations": [f"{file['destinations'][0]}.{turn}"]} for file in files],
                "params": {"id_generator": "deterministic", "sid": f"turn {turn}"},
            }
            answers = list(
                threads.map(lambda node, body=body: ask_door(node, "alice", "POST", "/jobs", body), doors.cluster.nodes)
            )
            assert sorted(status for status, _ in answers) == [200, 409], answers
            (job,) = (answer["job_id"] for status, answer in answers if status == 200)
            doors.until_states(job, ["FINISHED"] * 20)
            (row,) = doors.cluster.query("SELECT count(*) AS number FROM jobs WHERE label = :id", id=job)
            assert row.number == 1


def test_a_job_that_one_copies_is_cancelled_at_the_other(doors: Doors) -> None:
    doors.grid.sites["B"].server.freeze()
    job = doors.submit(2)
    until("it runs", lambda: doors.running_on(job) == {"node1"})
    answer = doors.at_second(f"/jobs/{job}", "DELETE")
    assert (answer["job_state"], answer["http_status"]) == ("CANCELED", "200 Ok")
    until("nothing runs", lambda: not doors.running_on(job))
    doors.until_states(job, ["CANCELED"] * 2)
    assert doors.both(f"/jobs/{job}")["job_state"] == "CANCELED"
    doors.grid.sites["B"].server.thaw()
    assert list(doors.destination.iterdir()) == []


def test_files_of_a_job_are_cancelled_at_the_other(doors: Doors) -> None:
    """One that waits is; one that is being copied goes on, and the answer says so; all that are left are."""
    where = f"/sites/{doors.grid.sites['B'].id}"
    assert doors.first.call("admin", "POST", f"{where}/drain", {"message": "new disks"})[0] == 200
    job = doors.submit(3)
    ids = [file["file_id"] for file in doors.both(f"/jobs/{job}/files")]
    assert doors.at_second(f"/jobs/{job}/files/{ids[0]}", "DELETE") == "CANCELED"
    doors.until_states(job, ["CANCELED", "SUBMITTED", "SUBMITTED"])
    doors.grid.sites["B"].server.freeze()
    assert doors.first.call("admin", "POST", f"{where}/resume")[0] == 200
    doors.until_states(job, ["CANCELED", "ACTIVE", "ACTIVE"])
    assert doors.at_second(f"/jobs/{job}/files/{ids[1]}", "DELETE") == "ACTIVE"
    doors.until_states(job, ["CANCELED", "ACTIVE", "ACTIVE"])
    assert doors.at_second(f"/jobs/{job}/files/{ids[1]},{ids[2]}", "DELETE") == ["CANCELED"] * 2
    until("nothing runs", lambda: not doors.running_on(job))
    doors.until_states(job, ["CANCELED"] * 3)
    doors.grid.sites["B"].server.thaw()
    assert list(doors.destination.iterdir()) == []


def test_states_and_lists_are_the_same_at_both(doors: Doors) -> None:
    done = doors.submit(2, job_metadata={"name": "done"}, priority=5)
    doors.until_states(done, ["FINISHED"] * 2)
    doors.grid.sites["B"].server.freeze()
    files = doors.files(3)[2:]
    status, answer = ask_door(doors.second, "alice", "POST", "/jobs", {"files": files})
    assert status == 200, answer
    open_ = answer["job_id"]
    until("it runs at the first", lambda: doors.running_on(open_) == {"node1"})
    shown = doors.both(f"/jobs/{done},{open_},00000000-0000-0000-0000-000000000000")
    assert [each.get("job_state", each["http_status"]) for each in shown] == ["FINISHED", "ACTIVE", "404 Not Found"]
    assert doors.both(f"/jobs/{done}/job_metadata")["name"] == "done"
    whoami = doors.both("/whoami")
    source, destination = (url.rpartition(":")[0] for url in (doors.grid.sites[name].server.url for name in "AB"))

    def listed(query: str) -> set[str]:
        return {job["job_id"] for job in doors.both(f"/jobs?{query}")} & {done, open_}

    assert listed("") == {open_}
    assert listed("limit=500") == {open_}
    assert listed("state_in=FINISHED&time_window=1") == {done}
    assert listed("state_in=ACTIVE,SUBMITTED") == {open_}
    all_ = "state_in=ACTIVE,FINISHED&limit=500"
    assert listed(all_) == {done, open_}
    assert listed(f"{all_}&source_se={source}&dest_se={destination}") == {done, open_}
    assert listed(f"{all_}&source_se=gsiftp://other.example.org") == set()
    assert listed(f"{all_}&vo_name={whoami['vos'][0]}&dlg_id={whoami['delegation_id']}") == {done, open_}
    assert listed(f"{all_}&vo_name=other") == set()
    (newest,) = doors.both("/jobs?state_in=ACTIVE,FINISHED&limit=1&fields=job_id,job_state")
    assert newest == {"job_id": open_, "job_state": "ACTIVE"}
    assert doors.at_second(f"/jobs/{open_}", "DELETE")["job_state"] == "CANCELED"
