"""The ledger: nothing runs beyond a limit, and all is given back."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdm.workqueue.domain.limits import NO_LIMIT, LimitKey, LimitKind, Route, StreamLedger, StreamQuota, StreamSlot

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


def test_who_follows_may_leave_first() -> None:
    ledger = ledger_of({user(1): 1})
    first, second, third = (ledger.slot([user(1)]) for _ in range(3))
    assert first.start() and second.follow(first)
    second.leave()
    assert ledger.running(user(1)) == 1
    assert third.follow(first)
    first.leave()
    third.leave()
    assert (ledger.running(user(1)), ledger.waiting, ledger.streams) == (0, 0, 0)


def test_a_limit_that_falls_lets_nobody_follow() -> None:
    limits = {user(1): 2}
    ledger = ledger_of(limits)
    first, second, third = (ledger.slot([user(1)]) for _ in range(3))
    assert first.start() and second.start()
    limits[user(1)] = 1
    assert not third.follow(first)
    second.leave()
    assert third.follow(first)


def test_openings_know_what_is_not_named() -> None:
    openings = StreamQuota({user(1): 0}, {LimitKind.USER: 3})
    assert [openings.of(key) for key in (user(1), user(2), (LimitKind.JOB, 1))] == [0, 3, NO_LIMIT]


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
TestAgents.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
