"""Weighted turns, shown on users who always, or only now and then, have something to do."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from pdm.workqueue.domain.limits import FairQueue, batch_work


def serve(turns: FairQueue, users: list[int], times: int, work: float = 1.0) -> dict[int, int]:
    served = dict.fromkeys(users, 0)
    for _ in range(times):
        user = min(users, key=turns.time_of)
        turns.give(user, work)
        served[user] += 1
    return served


def test_users_without_weights_get_the_same() -> None:
    assert serve(FairQueue(), [1, 2, 3], 30) == {1: 10, 2: 10, 3: 10}


def test_weights_are_shares() -> None:
    assert serve(FairQueue({1: 3.0, 2: 0.5}), [1, 2, 3], 90) == {1: 60, 2: 10, 3: 20}


def test_nobody_pays_for_the_time_alone_and_nobody_saves_up_turns() -> None:
    turns = FairQueue()
    serve(turns, [1], 1000)
    assert serve(turns, [1, 2], 10) in ({1: 5, 2: 5}, {1: 4, 2: 6})
    serve(turns, [1], 1000)
    assert serve(turns, [1, 2], 10) in ({1: 5, 2: 5}, {1: 4, 2: 6})


def test_a_copy_is_tried_out_without_an_effect() -> None:
    turns = FairQueue({1: 2.0})
    other = turns.copy()
    serve(other, [1, 2], 10)
    assert (turns.time_of(1), turns.time_of(2)) == (0.0, 0.0)
    assert other.weight(1) == 2.0


def test_work_is_a_part_of_a_full_batch() -> None:
    assert batch_work(500, 500, 0, 100) == 1.0
    assert batch_work(50, 500, 20, 100) == 0.2
    assert batch_work(1, 500, 400, 100) == 4.0


@given(
    weights=st.dictionaries(st.integers(1, 5), st.floats(0.1, 10), min_size=2, max_size=5),
    works=st.lists(st.floats(0.01, 4), min_size=1, max_size=40),
)
def test_shares_differ_by_a_turn_at_most(weights: dict[int, float], works: list[float]) -> None:
    """Of two users who always wait, none is ahead by more than each one's largest turn, in shares of their weights."""
    turns = FairQueue(weights)
    given_to = dict.fromkeys(weights, 0.0)
    for number in range(200):
        user = min(weights, key=turns.time_of)
        work = works[number % len(works)]
        turns.give(user, work)
        given_to[user] += work
        shares = {user: given_to[user] / weights[user] for user in weights}
        for one, other in itertools.permutations(weights, 2):
            most = max(works) / weights[one] + max(works) / weights[other]
            assert shares[one] - shares[other] <= most + 1e-6
