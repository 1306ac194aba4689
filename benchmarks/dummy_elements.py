"""Elements of no work: what the queue itself costs for each, with its log, its books and its commits.

``--shape job``: one COPY job, from submission to DONE. ``--shape jobs``: many MKDIR jobs of one element each; they are
submitted while all places are taken, and the clock runs from the moment the places are free until the last is DONE.
The floor writes for each element a log (one file for each job) and two rows, 200 elements a commit
(``synchronous=FULL``), in one thread, and does nothing else.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import uuid
from pathlib import Path
from typing import Any

from attrs import define, field
from caller import API, Caller, take_all_places, tls_context, wait_for
from figures import BenchmarkError
from rest_load import Connections, post
from rig import Rig, file_system, options_of, report, rig, run
from rounds import Comparison, Contender, timed
from trees import logs_taken, require_logs

_TOGETHER = 200
_TIMEOUT_S = 600.0
_CONNECTIONS = 16
_LOGS_OF = 100_000


@define
class Work:
    """Runs of either side."""

    rig: Rig
    caller: Caller
    elements: int
    many: bool
    number: int = 0
    holder: int = 0
    last: int = 0
    job: dict[str, Any] = field(factory=dict)
    submitted_per_s: list[float] = field(factory=list)
    logs: dict[str, float] = field(factory=dict)

    # -- one job

    def one_job(self) -> float:
        def copy() -> None:
            options = {"dummy": {"files": self.elements}}
            job = self.caller.submit(
                "copy", src_siteid=1, src_filepath="/tree", dst_siteid=2, dst_filepath="/copy", protocol="DUMMY",
                extra_opts=options,
            )  # fmt: skip
            self.job = self.caller.done(job["id"], _TIMEOUT_S)

        return timed(copy)

    def check_one_job(self) -> None:
        if self.job["num_done"] != self.elements + 1:
            raise BenchmarkError(f"{self.job['num_done']} elements done instead of {self.elements + 1}")
        require_logs(self.caller.logs, self.job["log_uid"], self.elements + 1)
        taken = logs_taken(self.caller.logs, self.job["log_uid"])
        # The file grows with the elements; it is one, however many there are.
        self.logs = {"MiB": taken["MiB"] * _LOGS_OF / self.elements, "inodes": taken["inodes"]}

    # -- many jobs

    def prepare_many_jobs(self) -> None:
        self.number += 1
        self.holder = take_all_places(self.caller)
        body = {"src_siteid": 1, "src_filepath": "/x", "protocol": "DUMMY", "label": f"run{self.number}"}
        encoded = json.dumps(body).encode()
        context = tls_context(self.rig.service, "admin")
        with Connections(self.rig.service.url or "", context, _CONNECTIONS) as connections:
            loaded = connections.load(
                lambda: post("localhost", f"{API}/mkdir", encoded, f"Idempotency-Key: {uuid.uuid4()}"),
                requests=self.elements,
            )
        self.submitted_per_s.append(loaded.rate)
        self.last = max(job["id"] for job in self._jobs("SUBMITTED"))
        early = self._jobs("DONE")
        if early:
            raise BenchmarkError(f"{len(early)} jobs ran although all places were taken")

    def many_jobs(self) -> float:
        def free_and_wait() -> None:
            self.caller.cancel(self.holder)
            self._wait()

        return timed(free_and_wait)

    def _wait(self) -> None:
        # The status of one job costs next to nothing; to look for unfinished ones again and again would be a load.
        self.caller.wait(self.last, _TIMEOUT_S)
        path = f"/jobs?status=SUBMITTED,RUNNING&label=run{self.number}&limit=1"
        wait_for(lambda: self.caller.call("GET", path), lambda found: not found, _TIMEOUT_S)

    def _jobs(self, status: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.caller.call("GET", f"/jobs?status={status}&label=run{self.number}")
        return found

    def check_many_jobs(self) -> None:
        done = self._jobs("DONE")
        if len(done) != self.elements:
            raise BenchmarkError(f"{len(done)} jobs done instead of {self.elements}")
        for job in done:
            require_logs(self.caller.logs, job["log_uid"], 1)

    # -- the floor

    def floor(self) -> float:
        return timed(lambda: keep_books(self._floor_directory, self.elements, many_jobs=self.many))

    def check_floor(self) -> None:
        shutil.rmtree(self._floor_directory)

    @property
    def _floor_directory(self) -> Path:
        return self.rig.directory / "floor"


def keep_books(directory: Path, elements: int, *, many_jobs: bool) -> None:
    """Write a log and two rows for each element, some elements a commit; a log file for each job."""
    directory.mkdir()
    connection = sqlite3.connect(directory / "books.sqlite", isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode=wal")
        connection.execute("PRAGMA synchronous=full")
        for table in ("elements", "attempts"):
            connection.execute(f"CREATE TABLE {table} (id INTEGER PRIMARY KEY, status TEXT, path TEXT)")
        for first in range(0, elements, _TOGETHER):
            numbers = range(first, min(first + _TOGETHER, elements))
            for number in numbers:
                log = directory / (str(number) if many_jobs else "0")
                log.mkdir(exist_ok=True)
                with (log / "log").open("a") as file:
                    file.write("done\n")
            rows = [(number, "DONE", f"/tree/d{number // 1000:05d}/f{number:07d}") for number in numbers]
            connection.execute("BEGIN IMMEDIATE")
            for table in ("elements", "attempts"):
                connection.executemany(f"INSERT INTO {table} VALUES (?, ?, ?)", rows)
            connection.execute("COMMIT")
    finally:
        connection.close()


def main() -> None:
    options = options_of(__doc__ or "", shape=("job", "job"), elements=(0, 0), rounds=(5, 2))
    many = options.shape == "jobs"
    options.elements = options.elements or ((2_000, 300) if many else (10_000, 1_000))[options.quick]
    with rig() as on, on.caller("admin") as caller:
        work = Work(on, caller, options.elements, many)
        ours = Contender(work.many_jobs, work.prepare_many_jobs, work.check_many_jobs) if many else Contender(
            work.one_job, check=work.check_one_job
        )  # fmt: skip
        figures = Comparison(on.meter, options.elements, "elements/s").alternate(
            ours,
            {"a log and two rows each, 200 a commit": Contender(work.floor, check=work.check_floor)},
            options.rounds,
        )
        if many:
            figures["submitted/s, 16 connections"] = {"median": sorted(work.submitted_per_s)[options.rounds // 2]}
        else:
            figures[f"logs of {_LOGS_OF:,} elements"] = work.logs
        figures["checksums"] = "none: nothing is moved"
        figures["database on"] = file_system(on.directory)
        figures["complete, with logs"] = True
    report(options, figures)


if __name__ == "__main__":
    run(main)
