"""How large the next batch is."""

from __future__ import annotations

import pytest

from pdm.workqueue.domain.limits import (
    BATCH_TIME_S,
    FIRST_BATCH_SIZE,
    MIN_SHARE,
    fair_share,
    next_batch_size,
    runs_alone,
)

MOST = 500


@pytest.mark.parametrize(
    ("size", "elements", "seconds", "expected"),
    [
        (64, 64, 0.01, 128),
        (64, 64, BATCH_TIME_S / 2 - 0.01, 128),
        # Well used as it is.
        (64, 64, BATCH_TIME_S / 2, 64),
        (64, 64, BATCH_TIME_S, 64),
        # Twice as long as wanted: half as many.
        (64, 64, 2 * BATCH_TIME_S, 32),
        (200, 10, 10 * BATCH_TIME_S, 1),
        (1, 1, 3600.0, 1),
        # A quarter of a batch in a quarter of the time says that a whole one is short enough.
        (64, 16, 0.2, 128),
        (64, 16, 0.3, 64),
        # Too few to say anything.
        (64, 15, 0.001, 64),
        (400, 400, 0.1, MOST),
        # The operator has lowered the bound.
        (900, 900, 1.5, MOST),
    ],
)
def test_the_next_size(size: int, elements: int, seconds: float, expected: int) -> None:
    assert next_batch_size(size, elements, seconds, MOST) == expected


@pytest.mark.parametrize("seconds_each", [0.0001, 0.01, 0.3, 1.0, 30.0])
def test_sizes_settle_where_a_batch_takes_about_as_long_as_wanted(seconds_each: float) -> None:
    size, seen = FIRST_BATCH_SIZE, []
    for _ in range(20):
        size = next_batch_size(size, size, size * seconds_each, MOST)
        seen.append(size)
    assert seen[-1] == seen[-2]
    taken = size * seconds_each
    assert taken <= BATCH_TIME_S or size == 1
    assert taken >= BATCH_TIME_S / 2 or size == MOST or seconds_each > BATCH_TIME_S / 2


def test_what_is_left_is_shared() -> None:
    assert fair_share(8000, 8) == 1000
    assert fair_share(801, 8) == 101
    assert fair_share(20, 8) == MIN_SHARE
    assert fair_share(100, 0) == 100


def test_what_agents_die_of_goes_alone() -> None:
    assert runs_alone(2, "CRASHED")
    assert not runs_alone(1, "CRASHED")
    assert not runs_alone(5, "CONNECTION")
    assert not runs_alone(5, None)
