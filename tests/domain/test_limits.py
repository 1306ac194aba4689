"""The ledger: nothing runs beyond a limit, and all is given back."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdm.workqueue.domain.limits import (
    BATCH_TIME_S,
    FIRST_BATCH_SIZE,
    MIN_SHARE,
    NO_LIMIT,
    FairQueue,
    LimitKey,
    LimitKind,
    Route,
    StreamLedger,
    StreamQuota,
    StreamSlot,
    batch_work,
    fair_share,
    next_batch_size,
    runs_alone,
)

ROUTE = Route(1, 2)


def user(number: int) -> LimitKey:
    return (LimitKind.USER, number)


def ledger_of(limits: dict[LimitKey, int]) -> StreamLedger:
    return StreamLedger(lambda key: limits.get(key, NO_LIMIT), lambda key, count: None)


def test_a_route_has_sites() -> None:
    assert ROUTE.limit_keys() == ((LimitKind.ROUTE, ROUTE), (LimitKind.OUT_OF, 1), (LimitKind.INTO, 2))
    alone = Route(3, None)
    assert alone.limit_keys() == ((LimitKind.ROUTE, alone), (LimitKind.INTO, 3))


def test_no_more_start_than_the_limit_allows() -> None:
    ledger = ledger_of({user(1): 2})
    slots = [ledger.slot([user(1)]) for _ in range(3)]
    assert [slot.start() for slot in slots] == [True, True, False]
    assert (ledger.streams, ledger.waiting, ledger.running(user(1))) == (2, 1, 2)
    assert ledger.left(user(1), 2) == 1
    slots[0].leave()
    assert slots[2].is_open and slots[2].start()


def test_a_stream_is_taken_over() -> None:
    ledger = ledger_of({user(1): 1, user(2): 1})
    first, second, other = ledger.slot([user(1)]), ledger.slot([user(1)]), ledger.slot([user(1), user(2)])
    assert first.start() and not second.start()
    assert second.follow(first)
    assert not other.follow(first)
    first.leave()
    assert second.has_stream and ledger.running(user(1)) == 1
    assert other.follow(second)
    assert (ledger.running(user(1)), ledger.running(user(2))) == (1, 1)
    second.leave()
    assert not ledger.slot([user(2)]).start()
    other.leave()
    assert (ledger.running(user(1)), ledger.running(user(2))) == (0, 0)


def test_a_following_batch_may_end_first() -> None:
    ledger = ledger_of({user(1): 1})
    first, second, third = (ledger.slot([user(1)]) for _ in range(3))
    assert first.start() and second.follow(first)
    second.leave()
    assert ledger.running(user(1)) == 1
    assert third.follow(first)
    first.leave()
    third.leave()
    assert (ledger.running(user(1)), ledger.waiting, ledger.streams) == (0, 0, 0)


def test_no_batch_follows_beyond_a_lowered_limit() -> None:
    limits = {user(1): 2}
    ledger = ledger_of(limits)
    first, second, third = (ledger.slot([user(1)]) for _ in range(3))
    assert first.start() and second.start()
    limits[user(1)] = 1
    assert not third.follow(first)
    second.leave()
    assert third.follow(first)


def test_a_quota_has_a_default_for_each_kind() -> None:
    quota = StreamQuota({user(1): 0}, {LimitKind.USER: 3})
    assert [quota.of(key) for key in (user(1), user(2), (LimitKind.JOB, 1))] == [0, 3, NO_LIMIT]


class Agents(RuleBasedStateMachine):
    """Batches on agents, as the pool puts them there: one carried out, one more waiting behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.limits: dict[LimitKey, int] = {user(number): number for number in (1, 2, 3)}
        self.allowed: Counter[LimitKey] = Counter()
        self.ledger = ledger_of(self.limits)
        self.waiting: list[StreamSlot] = []
        self.agents: list[list[StreamSlot]] = []

    @rule(keys=st.sets(st.integers(1, 3), min_size=1))
    def claim(self, keys: set[int]) -> None:
        self.waiting.append(self.ledger.slot(map(user, keys)))

    @rule(pick=st.integers(0, 99))
    def start(self, pick: int) -> None:
        if self.waiting:
            slot = self.waiting[pick % len(self.waiting)]
            if slot.start():
                self.waiting.remove(slot)
                self.agents.append([slot])

    @rule(pick=st.integers(0, 99), behind=st.integers(0, 99))
    def follow(self, pick: int, behind: int) -> None:
        free = [agent for agent in self.agents if len(agent) == 1]
        if self.waiting and free:
            slot, agent = self.waiting[pick % len(self.waiting)], free[behind % len(free)]
            if slot.follow(agent[0]):
                self.waiting.remove(slot)
                agent.append(slot)

    @rule(pick=st.integers(0, 99), last=st.booleans())
    def end(self, pick: int, last: bool) -> None:
        if self.agents:
            agent = self.agents[pick % len(self.agents)]
            agent.pop(-1 if last else 0).leave()
            self.agents = [agent for agent in self.agents if agent]

    @rule(pick=st.integers(0, 99))
    def give_up(self, pick: int) -> None:
        if self.waiting:
            self.waiting.pop(pick % len(self.waiting)).leave()

    @invariant()
    def nothing_runs_beyond_a_limit(self) -> None:
        carried_out: Counter[LimitKey] = Counter()
        held: Counter[LimitKey] = Counter()
        for agent in self.agents:
            carried_out.update(agent[0].keys)
            held.update(frozenset[LimitKey]().union(*(slot.keys for slot in agent)))
        for key, limit in self.limits.items():
            assert carried_out[key] <= limit
            assert self.ledger.running(key) == held[key] <= limit
            claimed = [*self.waiting, *(slot for agent in self.agents for slot in agent)]
            assert self.ledger.left(key, 1000) == 1000 * limit - sum(key in slot.keys for slot in claimed)


TestAgents = Agents.TestCase
TestAgents.settings = settings(max_examples=min(60, settings().max_examples), stateful_step_count=40, deadline=None)


# -- weighted turns, shown on users who always, or only now and then, have something to do


def serve(turns: FairQueue, users: list[int], times: int, work: float = 1.0) -> dict[int, int]:
    served = dict.fromkeys(users, 0)
    for _ in range(times):
        user = min(users, key=turns.virtual_time)
        turns.charge(user, work)
        served[user] += 1
    return served


def test_users_without_weights_get_the_same() -> None:
    assert serve(FairQueue(), [1, 2, 3], 30) == {1: 10, 2: 10, 3: 10}


def test_weights_are_shares() -> None:
    assert serve(FairQueue({1: 3.0, 2: 0.5}), [1, 2, 3], 90) == {1: 60, 2: 10, 3: 20}


def test_shares_do_not_depend_on_times_alone_or_idle() -> None:
    turns = FairQueue()
    serve(turns, [1], 1000)
    assert serve(turns, [1, 2], 10) in ({1: 5, 2: 5}, {1: 4, 2: 6})
    serve(turns, [1], 1000)
    assert serve(turns, [1, 2], 10) in ({1: 5, 2: 5}, {1: 4, 2: 6})


def test_a_copy_is_tried_out_without_an_effect() -> None:
    turns = FairQueue({1: 2.0})
    other = turns.copy()
    serve(other, [1, 2], 10)
    assert (turns.virtual_time(1), turns.virtual_time(2)) == (0.0, 0.0)
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
        user = min(weights, key=turns.virtual_time)
        work = works[number % len(works)]
        turns.charge(user, work)
        given_to[user] += work
        shares = {user: given_to[user] / weights[user] for user in weights}
        for one, other in itertools.permutations(weights, 2):
            most = max(works) / weights[one] + max(works) / weights[other]
            assert shares[one] - shares[other] <= most + 1e-6


# -- how large the next batch is

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
        (400, 400, 0.1, 800),
        # What is remembered may be more than a batch, within bounds.
        (800, MOST, 0.1, 1600),
        (8 * MOST, MOST, 0.1, 8 * MOST),
        # A batch in as long as a whole one shall take: what is remembered was far too much.
        (8 * MOST, MOST, BATCH_TIME_S, MOST),
        (8 * MOST, MOST // 10, BATCH_TIME_S / 2, 8 * MOST),
    ],
)
def test_the_next_size(size: int, elements: int, seconds: float, expected: int) -> None:
    assert next_batch_size(size, elements, seconds, MOST) == expected


@pytest.mark.parametrize("seconds_each", [0.0001, 0.01, 0.3, 1.0, 30.0])
def test_sizes_settle_where_a_batch_takes_about_as_long_as_wanted(seconds_each: float) -> None:
    size, seen = FIRST_BATCH_SIZE, []
    for _ in range(20):
        elements = min(size, MOST)
        size = next_batch_size(size, elements, elements * seconds_each, MOST)
        seen.append(size)
    assert seen[-1] == seen[-2]
    taken = size * seconds_each
    assert taken <= BATCH_TIME_S or size == 1
    assert taken >= BATCH_TIME_S / 2 or size == 8 * MOST or seconds_each > BATCH_TIME_S / 2


def test_what_is_left_is_shared() -> None:
    assert fair_share(8000, 8) == 1000
    assert fair_share(801, 8) == 101
    assert fair_share(20, 8) == MIN_SHARE
    assert fair_share(100, 0) == 100
    # A part of what takes as long as a batch shall: more batches would cost more than they bring.
    assert fair_share(801, 8, 4000) == 500


def test_what_agents_die_of_goes_alone() -> None:
    assert runs_alone(2, "CRASHED")
    assert not runs_alone(1, "CRASHED")
    assert not runs_alone(5, "CONNECTION")
    assert not runs_alone(5, None)
