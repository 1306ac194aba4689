"""Progress of a running job: never more than the total, and never less than before unless bytes were lost.

The board, the records of the database, which come late, and the arithmetic together, in any order of events.
"""

from __future__ import annotations

from datetime import timedelta

from attrs import define, evolve, field
from hypothesis import given, settings
from hypothesis import strategies as st

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.jobs import Counters, JobRecord
from pdm.workqueue.domain.progress import JobProgress, job_progress
from pdm.workqueue.execution.progress_board import ProgressBoard, ReportedProgress
from tests.domain.test_progress import BEGUN, job


@define
class World:
    """A job of some files: running ones, those whose verdict waits, and what the database says."""

    sizes: list[int]
    seconds: float = 0.0
    moved: dict[int, int] = field(factory=dict)
    unsettled: list[int] = field(factory=list)
    waiting: list[int] = field(init=False)
    record: JobRecord = field(init=False)
    board: ProgressBoard = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.waiting = list(range(len(self.sizes)))
        self.board = ProgressBoard(lambda: self.seconds)
        counters = Counters(elements=len(self.sizes) + 1, done=1, submitted=len(self.sizes))
        self.record = job(counters=counters, bytes_total=sum(self.sizes), bytes_done=0)

    def step(self, kind: str, part: float) -> None:
        """One thing happens."""
        self.seconds += part
        counters = self.record.counters
        if kind == "begin" and self.waiting:
            number = self.waiting.pop()
            self.moved[number] = 0
            self.board.begin(7, number)
            counters = evolve(counters, submitted=counters.submitted - 1, running=counters.running + 1)
            self.record = evolve(self.record, counters=counters)
        elif kind == "move" and self.moved:
            number = min(self.moved)
            self.moved[number] += int(part * (self.sizes[number] - self.moved[number]))
            self.board.update(7, number, ReportedProgress(self.moved[number], 1.0, 1.0, 1.0))
        elif kind == "end" and self.moved:
            number, _ = self.moved.popitem()
            self.board.drop(7, number, finished=True, proven=self.sizes[number])
            self.unsettled.append(number)
        elif kind == "settle" and self.unsettled:
            settled, self.unsettled = self.unsettled, []
            count = len(settled)
            counters = evolve(counters, running=counters.running - count, done=counters.done + count)
            proven = self.record.bytes_done + sum(self.sizes[number] for number in settled)
            status = JobStatus.DONE if counters.done == counters.elements else JobStatus.RUNNING
            self.record = evolve(self.record, counters=counters, bytes_done=proven, status=status)

    def ask(self, read: JobRecord) -> JobProgress:
        """What the API tells who has read this record."""
        now = BEGUN + timedelta(seconds=self.seconds)
        return job_progress(read, JobStatus.DONE, self.board.of_job(7, read.bytes_done), now)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 10**9), min_size=1, max_size=6),
    st.lists(
        st.tuples(st.sampled_from(["begin", "move", "end", "settle", "read", "answer"]), st.floats(0, 1)), max_size=80
    ),
)
def test_bytes_never_exceed_the_total_and_never_go_back(sizes: list[int], steps: list[tuple[str, float]]) -> None:
    world = World(sizes)
    read = world.record
    told = 0
    for kind, part in [*steps, *[("begin", 0.1), ("end", 0.1), ("settle", 0.1), ("answer", 0.0)] * len(sizes)]:
        world.step(kind, part)
        if kind == "read":
            # The answer may be made much later, when more has happened.
            read = world.record
        elif kind == "answer":
            seen = world.ask(read)
            assert seen.bytes_total == sum(sizes)
            assert seen.bytes_done == read.bytes_done
            assert seen.bytes_moving is not None or read.counters.running
            now = seen.bytes_done + (seen.bytes_moving or 0)
            assert now <= sum(sizes)
            if seen.bytes_moving is not None and read.counters.running:
                assert now >= told
                told = now
            assert seen.eta is None or seen.eta >= 0
            read = world.record
    ended = world.ask(world.record)
    assert (ended.bytes_done, ended.bytes_moving, ended.files_done) == (sum(sizes), 0, len(sizes))
