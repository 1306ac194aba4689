"""What follows a failed attempt."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdm.workqueue.domain.enums import JobType
from pdm.workqueue.domain.failures import (
    API_WORDS,
    MEANINGS,
    AttemptFailure,
    FailureCode,
    FailureScope,
    Remedy,
    code_for_errno,
    hint_for,
)
from pdm.workqueue.domain.lifecycle import GiveUp, Hold, RetryAt, RetryPolicy, decide_retry

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
POLICY = RetryPolicy(first_pause_s=4, longest_pause_s=60)


def failure(code: FailureCode) -> AttemptFailure:
    return AttemptFailure(FailureScope.TRANSFER, code, "so it was")


def test_every_code_says_what_to_do() -> None:
    assert set(MEANINGS) == set(FailureCode)
    for code, type_ in itertools.product(FailureCode, JobType):
        hint = hint_for(code, type_)
        assert hint.endswith(".")
        assert "\n" not in hint


def test_hints_name_only_what_the_job_can_do() -> None:
    """Options by the words of who reads it, and none that the type of the job does not have."""
    words = dict.fromkeys(API_WORDS, "") | {
        "overwrite": "<COPY RENAME>",
        "overwrite_or_different": "<COPY>",
        "recursive": "<REMOVE>",
        "parents": "<MKDIR>",
        "verify": "<COPY>",
        "max_delete": "<COPY>",
    }
    for code, type_ in itertools.product(FailureCode, JobType):
        hint = hint_for(code, type_, words)
        assert "=" not in hint
        assert "<" not in hint or type_.name in hint, hint
        assert "destination" not in hint or type_ is JobType.COPY, hint


def test_what_would_fail_again_is_given_up_at_once() -> None:
    assert decide_retry(POLICY, failure(FailureCode.NOT_FOUND), 1, 10, NOW, 0.5) == GiveUp()


def test_an_expired_credential_holds_whatever_has_been_tried() -> None:
    assert decide_retry(POLICY, failure(FailureCode.CREDENTIAL_EXPIRED), 9, 2, NOW, 0.5) == Hold()


def test_the_last_try_is_the_last() -> None:
    assert decide_retry(POLICY, failure(FailureCode.CONNECTION), 2, 2, NOW, 0.5) == GiveUp()


@pytest.mark.parametrize(("tries", "pause"), [(1, 4), (2, 8), (3, 16), (5, 60), (9, 60)])
def test_pauses_double_up_to_the_longest(tries: int, pause: float) -> None:
    assert decide_retry(POLICY, failure(FailureCode.CONNECTION), tries, 10, NOW, 1.0) == RetryAt(
        NOW + timedelta(seconds=pause)
    )


@given(st.integers(1, 10), st.floats(0, 1))
def test_jitter_spreads_over_the_second_half_of_the_pause(tries: int, jitter: float) -> None:
    decision = decide_retry(POLICY, failure(FailureCode.TIMEOUT), tries, 11, NOW, jitter)
    assert isinstance(decision, RetryAt)
    full = min(4 * 2 ** (tries - 1), 60)
    assert full / 2 <= (decision.not_before - NOW).total_seconds() <= full


def test_retryable_is_all_that_is_not_given_up() -> None:
    for code, meaning in MEANINGS.items():
        assert failure(code).retryable is (meaning.remedy is not Remedy.GIVE_UP)


def test_an_unknown_errno_is_unknown() -> None:
    assert code_for_errno(None) is FailureCode.UNKNOWN
    assert code_for_errno(99999) is FailureCode.UNKNOWN
    assert code_for_errno(2) is FailureCode.NOT_FOUND


@pytest.mark.parametrize(("asked_for_s", "soonest_s"), [(0.0, 1.0), (90.0, 90.0), (1e9, 3600.0)])
def test_a_server_says_when_it_wants_to_be_asked_again(asked_for_s: float, soonest_s: float) -> None:
    busy = AttemptFailure(FailureScope.SOURCE, FailureCode.BUSY, "503", asked_for_s)
    decision = decide_retry(RetryPolicy(0.001, 0.001), busy, 1, 10, NOW, 0.5)
    assert isinstance(decision, RetryAt)
    assert soonest_s <= (decision.not_before - NOW).total_seconds() <= 1.1 * soonest_s


@pytest.mark.parametrize("code", [FailureCode.BUSY, FailureCode.LOCKED, FailureCode.SERVER_ERROR])
def test_a_busy_server_is_not_asked_twice_within_a_second(code: FailureCode) -> None:
    decision = decide_retry(RetryPolicy(0.001, 0.001), failure(code), 1, 10, NOW, 0.0)
    assert isinstance(decision, RetryAt) and (decision.not_before - NOW).total_seconds() >= 1.0
