"""Status from counts: a table that one can read."""

from __future__ import annotations

import pytest

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.jobs import Counters
from pdm.workqueue.domain.lifecycle import (
    TRANSITIONS,
    IllegalTransitionError,
    counters_after_adding,
    counters_after_moving,
    job_status,
    settled_status,
)

_S = JobStatus


@pytest.mark.parametrize(
    ("counters", "started", "cancelled", "status"),
    [
        (Counters(1, submitted=1), False, False, _S.SUBMITTED),
        # It has begun once: waiting for a retry it is RUNNING.
        (Counters(1, submitted=1), True, False, _S.RUNNING),
        (Counters(3, running=1, done=2), True, False, _S.RUNNING),
        (Counters(3, running=1, held=2), True, False, _S.RUNNING),
        (Counters(3, submitted=1, held=1, failed=1), True, False, _S.RUNNING),
        (Counters(3, held=1, failed=1, done=1), True, False, _S.HELD),
        (Counters(3, done=3), True, False, _S.DONE),
        (Counters(3, done=2, failed=1), True, False, _S.FAILED),
        (Counters(3, done=2, cancelled=1), True, True, _S.CANCELLED),
        (Counters(3, done=2, failed=1), True, True, _S.CANCELLED),
        # The request came too late: nothing was left to cancel.
        (Counters(3, done=3), True, True, _S.DONE),
        (Counters(1, running=1), True, True, _S.RUNNING),
    ],
)
def test_where_a_job_stands(counters: Counters, started: bool, cancelled: bool, status: JobStatus) -> None:
    assert job_status(counters, started=started, cancel_requested=cancelled) is status


def test_every_status_has_its_transitions_and_done_has_none() -> None:
    assert set(TRANSITIONS) == set(JobStatus)
    assert TRANSITIONS[_S.DONE] == frozenset()


def test_elements_go_only_where_the_table_says() -> None:
    waiting = counters_after_adding(Counters(), _S.SUBMITTED, 3)
    assert counters_after_moving(waiting, _S.SUBMITTED, _S.RUNNING, 2) == Counters(3, submitted=1, running=2)
    with pytest.raises(IllegalTransitionError, match="from SUBMITTED to DONE"):
        counters_after_moving(waiting, _S.SUBMITTED, _S.DONE, 1)
    with pytest.raises(IllegalTransitionError, match="4 elements leave SUBMITTED"):
        counters_after_moving(waiting, _S.SUBMITTED, _S.RUNNING, 4)


def test_what_would_wait_is_cancelled_in_a_job_that_is_to_end() -> None:
    assert settled_status(_S.SUBMITTED, cancel_requested=True) is _S.CANCELLED
    assert settled_status(_S.HELD, cancel_requested=True) is _S.CANCELLED
    assert settled_status(_S.DONE, cancel_requested=True) is _S.DONE
    assert settled_status(_S.SUBMITTED, cancel_requested=False) is _S.SUBMITTED
