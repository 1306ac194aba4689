"""Shares of limits among nodes: no limit is ever exceeded, and each is used up while there is work."""

from __future__ import annotations

from collections import Counter

from attrs import define, evolve, field
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdm.workqueue.domain.limits import LimitKey, LimitKind, Route
from pdm.workqueue.domain.shares import MOST_NAMED, NodeShare, fair_part, increased, key_of, key_text, reduced

NODES = 4
KEYS: tuple[LimitKey, ...] = ((LimitKind.INTO, 1), (LimitKind.USER, 1), (LimitKind.JOB, 7))
LIMITS = dict(zip(KEYS, (2, 5, 1), strict=True))
MOST = 4

nodes = st.integers(0, NODES - 1)
keys = st.sampled_from(KEYS)


@define
class Node:
    """A daemon as the rule sees it; ``planned``: between its own reduction and the end of its transaction."""

    own: NodeShare = field(factory=lambda: NodeShare(most=MOST))
    goals: dict[LimitKey, int] = field(factory=dict)
    running: Counter[LimitKey] = field(factory=Counter)
    demand: Counter[LimitKey] = field(factory=Counter)
    planned: bool = False
    committed: NodeShare | None = None
    stopped: bool = False

    def may_start(self, key: LimitKey) -> bool:
        allowed = min(self.own.allowance(key, LIMITS[key]), self.goals.get(key, MOST))
        return self.running[key] < allowed and not self.stopped


class Cluster:
    """Nodes and what they have published; every step of a node is one of its own."""

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {}
        self.rows: dict[int, NodeShare] = {}

    def others(self, number: int) -> list[NodeShare]:
        return [row for other, row in sorted(self.rows.items()) if other != number]

    def register(self, number: int) -> None:
        self.nodes[number] = Node()
        self.rows[number] = NodeShare(most=MOST)

    def plan(self, number: int) -> None:
        node = self.nodes[number]
        node.own, goals = reduced(node.own, self.others(number), node.running, node.demand, LIMITS.__getitem__)
        node.goals = dict(goals)
        wanted = {key: node.demand[key] for key in KEYS if node.demand[key] > node.own.allowance(key, LIMITS[key])}
        node.own = evolve(node.own, wanted=wanted)
        node.planned = True

    def commit(self, number: int) -> None:
        node = self.nodes[number]
        busy = set(+node.running)
        self.rows[number] = increased(node.own, self.others(number), busy, LIMITS.__getitem__)
        node.committed, node.planned = self.rows[number], False

    def learn(self, number: int) -> None:
        node = self.nodes[number]
        assert node.committed is not None
        node.own, node.committed = node.committed, None

    def start(self, number: int, key: LimitKey) -> None:
        self.nodes[number].running[key] += 1

    def expire(self, number: int) -> None:
        """Its lease has ended, its helpers before that."""
        node = self.nodes[number]
        node.running.clear()
        del self.rows[number]
        if not node.stopped:
            del self.nodes[number]

    def settle(self, rounds: int = 12) -> None:
        """Let all nodes publish and start what they can, until nothing changes any more."""
        for _ in range(rounds):
            for number, node in self.nodes.items():
                if not node.planned and node.committed is None:
                    self.plan(number)
                if node.planned:
                    self.commit(number)
                self.learn(number)
                for key in KEYS:
                    while node.running[key] < node.demand[key] and node.may_start(key):
                        self.start(number, key)

    def running(self, key: LimitKey) -> int:
        return sum(node.running[key] for node in self.nodes.values())


class Shares(RuleBasedStateMachine):
    """Nodes join, leave, are killed, stopped and continued, between any two steps of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = Cluster()

    def _can(self, number: int) -> Node | None:
        node = self.cluster.nodes.get(number)
        return None if node is None or node.stopped or number not in self.cluster.rows else node

    @rule(number=nodes)
    def join(self, number: int) -> None:
        if number not in self.cluster.nodes:
            self.cluster.register(number)

    @rule(number=nodes, key=keys, demand=st.integers(0, MOST))
    def ask(self, number: int, key: LimitKey, demand: int) -> None:
        if node := self._can(number):
            node.demand[key] = demand

    @rule(number=nodes)
    def plan(self, number: int) -> None:
        node = self._can(number)
        if node and not node.planned and node.committed is None:
            self.cluster.plan(number)

    @rule(number=nodes, is_answered=st.booleans(), is_committed=st.booleans())
    def commit(self, number: int, is_answered: bool, is_committed: bool) -> None:
        node = self._can(number)
        if not node or not node.planned:
            return
        if is_committed:
            self.cluster.commit(number)
        if not is_answered or not is_committed:
            node.planned, node.committed = False, None

    @rule(number=nodes)
    def learn(self, number: int) -> None:
        node = self._can(number)
        if node and node.committed is not None:
            self.cluster.learn(number)

    @rule(number=nodes, key=keys)
    def start(self, number: int, key: LimitKey) -> None:
        node = self._can(number)
        if node and node.may_start(key):
            self.cluster.start(number, key)

    @rule(number=nodes, key=keys)
    def end(self, number: int, key: LimitKey) -> None:
        node = self._can(number)
        if node and node.running[key]:
            node.running[key] -= 1

    @rule(number=nodes)
    def stop(self, number: int) -> None:
        if node := self.cluster.nodes.get(number):
            node.stopped = True

    @rule(number=nodes)
    def expire(self, number: int) -> None:
        if number in self.cluster.rows:
            self.cluster.expire(number)

    @rule(number=nodes)
    def continue_(self, number: int) -> None:
        node = self.cluster.nodes.get(number)
        if node and node.stopped:
            node.stopped = False
            if number not in self.cluster.rows:
                # It finds that its lease has ended.
                self.cluster.register(number)

    @precondition(lambda self: self.cluster.rows)
    @rule()
    def settle(self) -> None:
        """With all nodes alive, limits are used up as far as there is work."""
        for number, node in list(self.cluster.nodes.items()):
            node.stopped = False
            if number not in self.cluster.rows:
                self.cluster.register(number)
        self.cluster.settle()
        for key in KEYS:
            wanted = sum(max(node.demand[key], node.running[key]) for node in self.cluster.nodes.values())
            assert self.cluster.running(key) >= min(LIMITS[key], wanted), (key, self.cluster.nodes)

    @invariant()
    def no_limit_is_exceeded(self) -> None:
        for key, limit in LIMITS.items():
            assert self.cluster.running(key) <= limit
            assert sum(row.allowance(key, limit) for row in self.cluster.rows.values()) <= limit


TestShares = Shares.TestCase
TestShares.settings = settings(max_examples=min(60, settings().max_examples), stateful_step_count=50, deadline=None)


def cluster_of(number: int) -> Cluster:
    cluster = Cluster()
    for one in range(number):
        cluster.register(one)
    cluster.settle(3)
    return cluster


def test_a_node_alone_has_all() -> None:
    cluster = cluster_of(1)
    assert [cluster.rows[0].allowance(key, LIMITS[key]) for key in KEYS] == [2, MOST, 1]
    assert not cluster.rows[0].held


def test_a_new_node_waits_for_all_others() -> None:
    cluster = cluster_of(2)
    cluster.register(2)
    cluster.plan(2)
    cluster.commit(2)
    assert cluster.rows[2].allowance(KEYS[1], 5) == 0
    cluster.settle(2)
    assert [row.parts for row in cluster.rows.values()] == [3, 3, 3]


def test_nothing_is_named_where_all_have_the_same_work() -> None:
    cluster = cluster_of(3)
    key = KEYS[1]
    for node in cluster.nodes.values():
        node.demand[key] = 1
    cluster.settle()
    assert cluster.running(key) == 3
    assert not any(row.held for row in cluster.rows.values())


def test_what_others_do_not_use_is_lent_and_comes_back() -> None:
    cluster = cluster_of(3)
    key = KEYS[1]
    cluster.nodes[0].demand[key] = 5
    cluster.settle()
    assert cluster.nodes[0].running[key] == MOST
    cluster.nodes[1].demand[key] = 3
    for _ in range(4):
        cluster.settle(2)
        cluster.nodes[0].running[key] -= 1
        cluster.settle(2)
    assert cluster.nodes[1].running[key] >= 2
    assert cluster.running(key) == 5
    for node in cluster.nodes.values():
        node.demand.clear()
        node.running.clear()
    cluster.settle()
    assert not any(row.held for row in cluster.rows.values())


def test_a_lowered_limit_is_shared_anew() -> None:
    own = NodeShare(most=8, parts=2, held={KEYS[0]: 6})
    other = NodeShare(most=8, parts=2, held={KEYS[0]: 4})
    after, goals = reduced(own, [other], {KEYS[0]: 6}, {KEYS[0]: 6}, lambda key: 4)
    assert goals[KEYS[0]] == 2
    assert after.allowance(KEYS[0], 4) == 4


def test_too_many_keys_are_not_published() -> None:
    jobs: dict[LimitKey, int] = {(LimitKind.JOB, number): 1 for number in range(MOST_NAMED + 1)}
    own = NodeShare(most=8, parts=1)
    assert reduced(own, [NodeShare(most=8)], jobs, {}, lambda key: 1) == (own, {})
    other = NodeShare(most=8, parts=2, held=dict.fromkeys(jobs, 3))
    assert increased(NodeShare(most=8), [other], (), lambda key: 4).parts is None


@given(limit=st.integers(0, 20), demands=st.lists(st.integers(0, 20), min_size=1, max_size=6))
def test_fair_parts_use_up_a_limit(limit: int, demands: list[int]) -> None:
    order = sorted(range(len(demands)), key=lambda number: demands[number])
    parts = [
        fair_part(limit, demands[at], demands[:at] + demands[at + 1 :], first=len(order) - 1 - order.index(at))
        for at in range(len(demands))
    ]
    assert sum(parts) == min(limit, sum(demands))
    assert all(part <= demand for part, demand in zip(parts, demands, strict=True))


def test_keys_are_published_as_texts() -> None:
    for key in (*KEYS, (LimitKind.OUT_OF, 3), (LimitKind.ROUTE, Route(1, 2)), (LimitKind.ROUTE, Route(1, None))):
        assert key_of(key_text(key)) == key
