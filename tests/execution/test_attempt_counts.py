"""Counts of attempts for the metrics."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import Batch, ClaimToken, Predecessors, Verdict
from pdm.workqueue.execution import attempt_counts
from pdm.workqueue.execution.attempt_counts import AttemptCounts, AttemptEnd, Work
from pdm.workqueue.telemetry.metrics import REACTOR_LAG, Distribution, HistogramTally
from tests.support.records import NOW, element_record, job_record

_AWAY = AttemptFailure(FailureScope.SOURCE, FailureCode.CONNECTION, "away")


def verdict(number: int, status: JobStatus = JobStatus.DONE, **more: Any) -> Verdict:
    ended = NOW + timedelta(seconds=2)
    return Verdict(ClaimToken(1, number, 1), status, NOW, ended)._replace(**more)


def test_what_is_committed_is_counted_by_type_outcome_and_sites() -> None:
    counts = AttemptCounts()
    verdicts = [
        verdict(1, transferred=10),
        verdict(2, transferred=20),
        verdict(3, transferred=30, already_there=True),
        verdict(4, JobStatus.SUBMITTED, failure=_AWAY),
        verdict(5, transferred=50),
    ]
    for each in verdicts:
        counts.submitted(each.token, job_record(), JobType.COPY)
    assert not counts.ended
    # The claim of the last one was lost: it runs again elsewhere, and is counted there.
    counts.settled(verdicts, {verdicts[4].token})
    work = Work(JobType.COPY, 1, 2)
    assert counts.ended == {
        AttemptEnd(work, JobStatus.DONE, "", ""): 3,
        AttemptEnd(work, JobStatus.SUBMITTED, "source", "CONNECTION"): 1,
    }
    assert counts.bytes == {(1, 2): 30}
    assert counts.durations.series()[()].total == 4.0
    # Sent again, after a commit without an answer, they are not counted again.
    counts.settled(verdicts, set())
    assert sum(counts.ended.values()) == 4


def test_sites_beyond_the_bound_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt_counts, "_MOST_KEYS", 3)
    counts = AttemptCounts()
    for number in range(1, 11):
        each = verdict(number, transferred=1)
        counts.submitted(each.token, job_record(src_siteid=number), JobType.COPY)
        counts.settled([each], set())
    assert len(counts.ended) == 4
    assert counts.ended[AttemptEnd(Work(JobType.COPY, None, None), JobStatus.DONE, "", "")] == 7
    assert counts.bytes[None, None] == 7


def test_the_wait_of_a_job_ends_with_its_first_element() -> None:
    counts = AttemptCounts()
    job, chained = job_record(), job_record(id=2, after=Predecessors(jobs=(1,)))
    first, later, retry = element_record(id=0), element_record(id=1), element_record(id=0, attempts=2)
    now = NOW + timedelta(seconds=7)
    counts.begun(Batch.of_one(job, JobType.COPY, [first, later]), now)
    counts.begun(Batch.of_one(job, JobType.COPY, [retry]), now)
    counts.begun(Batch.of_one(job, JobType.LIST, [first]), NOW - timedelta(seconds=5))
    counts.begun(Batch.of_one(chained, JobType.COPY, [element_record(job_id=2, id=0)]), now)
    waits = counts.waits.series()
    assert (waits["work"].total, sum(waits["work"].counts)) == (7.0, 1)
    # The clock of the daemon that registered it was ahead.
    assert (waits["listing"].total, sum(waits["listing"].counts)) == (0.0, 1)


def test_a_histogram_has_its_bounds_in_the_lower_bucket_and_a_last_one_for_the_rest() -> None:
    tally: HistogramTally[str] = HistogramTally(REACTOR_LAG, "other", known=["a"], most=2)
    assert tally.series() == {"a": Distribution([0] * 9, 0.0)}
    tally.observe("a", 0.001)
    tally.observe("a", 100.0)
    for key in ("b", "c", "d"):
        tally.observe(key, 0.003)
    assert tally.series() == {
        "a": Distribution([1, 0, 0, 0, 0, 0, 0, 0, 1], 100.001),
        "b": Distribution([0, 1, 0, 0, 0, 0, 0, 0, 0], 0.003),
        "other": Distribution([0, 2, 0, 0, 0, 0, 0, 0, 0], 0.006),
    }
