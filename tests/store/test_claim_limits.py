"""What limits keep out of a claim, and whose turn it is: on both databases."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdm.workqueue.domain.enums import JobProtocol, JobStatus, JobType
from pdm.workqueue.domain.jobs import Batch
from pdm.workqueue.domain.limits import (
    ALL_SERVICES,
    OWN_STREAMS,
    ClaimExclusions,
    FairQueue,
    HandOvers,
    LimitKey,
    LimitKind,
    Route,
    StreamQuota,
)
from pdm.workqueue.store import claim_queries, job_changes
from pdm.workqueue.WorkqueueDB import HAS_WORK
from tests.store.stores import LIST_LANE, WORK_LANE, Store, done, ended


def only(left: dict[LimitKey, int], **otherwise: int) -> StreamQuota:
    return StreamQuota(left, {LimitKind[name]: limit for name, limit in otherwise.items()})


def taken(store: Store, quota: StreamQuota) -> dict[int, int]:
    """Batches that a claim takes, by user; they go back."""
    batches = store.claim(batch_elements=4, batches=20, quota=quota)
    for batch in batches:
        store.settle(ended(JobStatus.SUBMITTED, batch, counts=False))
    return dict(Counter(batch.job.user_id for batch in batches))


def test_each_limit_counts_batches(store: Store) -> None:
    store.worker()
    alice, bob = store.user("alice"), store.user("bob")
    large = store.copy_job(alice, [1] * 20)
    store.copy_job(bob, [1] * 20)
    elsewhere = store.submit(bob, src_siteid=7, priority=9)
    assert taken(store, only({})) == {alice: 5, bob: 6}
    assert taken(store, only({(LimitKind.JOB, large.id): 2})) == {alice: 2, bob: 6}
    assert taken(store, only({(LimitKind.USER, alice): 0, (LimitKind.USER, bob): 3})) == {bob: 3}
    assert sum(taken(store, only({(LimitKind.ROUTE, Route(1, 2)): 3})).values()) == 4
    assert sum(taken(store, only({(LimitKind.OUT_OF, 1): 2})).values()) == 3
    assert sum(taken(store, only({(LimitKind.INTO, 2): 1})).values()) == 2
    # Where there is one site only, work goes into it.
    assert taken(store, only({(LimitKind.INTO, 7): 0})) == {alice: 5, bob: 5}
    assert taken(store, only({(LimitKind.OUT_OF, 7): 0})) == {alice: 5, bob: 6}
    assert taken(store, only({(LimitKind.ROUTE, Route(7, None)): 0})) == {alice: 5, bob: 5}
    # What is not named has the limit of its kind.
    assert taken(store, only({}, USER=2)) == {alice: 2, bob: 2}
    assert sum(taken(store, only({}, ROUTE=1)).values()) == 2
    assert taken(store, only({}, JOB=1)) == {alice: 1, bob: 2}
    assert store.job(elsewhere.id).counters.submitted == 1


def test_small_jobs_in_one_batch_are_one_batch_of_each(store: Store) -> None:
    store.worker()
    user = store.user()
    small = [store.submit(user) for _ in range(6)]
    named: dict[LimitKey, int] = {(LimitKind.JOB, job.id): 1 for job in small[1:]}
    (batch,) = store.claim(quota=only({**named, (LimitKind.JOB, small[0].id): 0}, USER=1, ROUTE=1))
    assert sorted(batch.jobs) == [job.id for job in small[1:]]


@pytest.mark.parametrize(
    "closed",
    [(LimitKind.INTO, 7), (LimitKind.ROUTE, Route(7, None))],
)
def test_what_is_closed_hides_no_other_work_of_a_user(store: Store, closed: LimitKey) -> None:
    store.worker()
    user = store.user()
    for _ in range(10):
        store.submit(user, src_siteid=7)
    other = store.submit(user, src_siteid=8)
    assert [batch.job.id for batch in store.claim(batches=1, quota=only({closed: 0}))] == [other.id]


def test_users_on_a_closed_route_hide_no_others(store: Store) -> None:
    store.worker()
    for number in range(12):
        store.submit(store.user(f"user{number}"), src_siteid=7)
    mine = store.submit(store.user("last"), src_siteid=8)
    turns = FairQueue()
    turns.charge(mine.user_id, 100.0)
    limits = only({(LimitKind.ROUTE, Route(7, None)): 0})
    assert [batch.job.id for batch in store.claim(batches=1, quota=limits, fair_queue=turns)] == [mine.id]


def test_what_a_claim_looks_at_is_bounded_where_much_is_closed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.worker()
    user = store.user()
    for site in (7, 7, 7, 8):
        store.submit(user, src_siteid=site)
    closed = only({(LimitKind.INTO, 7): 0})
    for most, found in ((3, 0), (4, 1)):
        monkeypatch.setattr(claim_queries, "MOST_PASSED_OVER", most)
        monkeypatch.setattr(
            claim_queries, "WORK_QUEUE", claim_queries.ClaimQueue(claim_queries.WORK_QUEUE.due_at, HAS_WORK)
        )
        assert len(store.claim(quota=closed)) == found


def test_listings_wait_for_no_limit(store: Store) -> None:
    store.worker()
    user = store.user()
    listing = store.submit(user, JobType.LIST)
    store.submit(user)
    limits = only({(LimitKind.USER, user): 0}, ROUTE=0)
    assert [batch.job.id for batch in store.claim(quota=limits)] == [listing.id]
    assert store.claim(types=LIST_LANE | WORK_LANE, quota=limits) == []


# -- what may not begin at all

DUMMY = JobProtocol.DUMMY


def begun(store: Store, exclusions: ClaimExclusions) -> dict[int, int]:
    """Elements of listings and of work that a claim of each takes, by job; they go back."""
    taken: Counter[int] = Counter()
    for lane in (LIST_LANE, WORK_LANE):
        for batch in store.claim(batches=20, types=lane, exclusions=exclusions):
            store.settle(ended(JobStatus.SUBMITTED, batch, counts=False))
            taken.update(element.job_id for element in batch.elements)
    return dict(taken)


@pytest.mark.parametrize(
    ("exclusions", "kept_out"),
    [
        (ClaimExclusions(), ()),
        (ClaimExclusions(drained=frozenset({7})), ("listing", "work")),
        (ClaimExclusions(drained=frozenset({2})), ("copy",)),
        (ClaimExclusions(paused=frozenset({(7, DUMMY)})), ("listing", "work")),
        (ClaimExclusions(paused=frozenset({(2, DUMMY), (7, JobProtocol.GRIDFTP)})), ("copy", "other")),
    ],
)
def test_nothing_begins_where_a_site_is_drained_or_away(
    store: Store, exclusions: ClaimExclusions, kept_out: tuple[str, ...]
) -> None:
    store.worker()
    user = store.user()
    jobs_ = {
        "copy": store.copy_job(user, [1] * 3),
        "listing": store.submit(user, JobType.LIST, src_siteid=7),
        "work": store.submit(user, src_siteid=7),
        "other": store.submit(user, src_siteid=7, protocol=JobProtocol.GRIDFTP),
    }
    if exclusions.drained == {7}:
        kept_out = (*kept_out, "other")
    expected = {job.id: 3 if name == "copy" else 1 for name, job in jobs_.items() if name not in kept_out}
    assert begun(store, exclusions) == expected


def test_nothing_of_a_banned_user_begins(store: Store) -> None:
    store.worker()
    banned, free = store.user("banned"), store.user("free")
    store.submit(banned, JobType.LIST)
    store.submit(banned)
    mine = store.submit(free)
    assert begun(store, ClaimExclusions(banned=frozenset({banned}))) == {mine.id: 1}


def test_one_element_in_all_tries_a_site_that_may_be_back(store: Store) -> None:
    store.worker()
    alice, bob = store.user("alice"), store.user("bob")
    for user in (alice, bob):
        store.copy_job(user, [1] * 20)
    store.submit(alice, JobType.LIST, src_siteid=1)
    elsewhere = store.submit(bob, src_siteid=7)
    exclusions = ClaimExclusions(probed=frozenset({(1, DUMMY)}))
    (listing,) = store.claim(types=LIST_LANE, exclusions=exclusions)
    # While that runs nothing else may begin there.
    assert [batch.job.id for batch in store.claim(exclusions=exclusions)] == [elsewhere.id]
    store.settle(ended(JobStatus.SUBMITTED, listing, counts=False))
    (probe,) = store.claim(types=WORK_LANE, exclusions=exclusions)
    assert len(probe.elements) == 1
    assert store.claim(exclusions=exclusions) == []
    store.settle(done(probe))
    assert sum(len(batch.elements) for batch in store.claim(types=WORK_LANE)) == 39


def test_other_protocols_of_a_site_that_may_be_back_go_on(store: Store) -> None:
    """What runs there by another protocol is no probe, and is not slowed down to one at a time."""
    store.worker()
    user = store.user()
    busy = store.copy_job(user, [1] * 20, src_siteid=7)
    waiting = store.submit(user, src_siteid=7, protocol=JobProtocol.GRIDFTP)
    exclusions = ClaimExclusions(probed=frozenset({(7, JobProtocol.GRIDFTP)}))
    taken = Counter(
        element.job_id
        for _ in range(3)
        for batch in store.claim(types=WORK_LANE, exclusions=exclusions, batch_elements=4, batches=2)
        for element in batch.elements
    )
    assert taken[busy.id] > 1
    assert taken[waiting.id] == 1


def test_what_may_not_begin_hides_no_other_work_however_much_it_is(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.worker()
    user = store.user()
    monkeypatch.setattr(claim_queries, "MOST_PASSED_OVER", 3)
    for _ in range(10):
        store.submit(user, src_siteid=7)
    other = store.submit(user, src_siteid=8)
    closed = only({(LimitKind.INTO, 9): 0})
    for exclusions in (ClaimExclusions(drained=frozenset({7})), ClaimExclusions(paused=frozenset({(7, DUMMY)}))):
        (batch,) = store.claim(batches=1, exclusions=exclusions, quota=closed)
        assert batch.job.id == other.id
        store.settle(ended(JobStatus.SUBMITTED, batch, counts=False))


# -- turns


def shares(store: Store, turns: FairQueue, batches: list[Batch], worker: str = "w") -> Counter[int]:
    """As the claimer does: count what was given, and end it."""
    given_to: Counter[int] = Counter()
    for batch in batches:
        turns.charge(batch.job.user_id, len(batch.elements) / 5)
        given_to[batch.job.user_id] += len(batch.elements)
    store.settle(done(*batches), worker)
    return given_to


def test_users_get_their_weights_over_many_claims(store: Store) -> None:
    store.worker()
    users = [store.user(name) for name in ("alice", "bob", "carol")]
    for number, user in enumerate(users):
        store.copy_job(user, [1] * 200, src_siteid=1 + number % 2, priority=9 if number == 0 else 1)
    turns = FairQueue({users[1]: 3.0})
    given_to: Counter[int] = Counter()
    for _ in range(25):
        given_to += shares(store, turns, store.claim(batches=1, batch_elements=5, fair_queue=turns))
    # Whatever the priority: that counts within a user.
    assert given_to == {users[0]: 25, users[1]: 75, users[2]: 25}


def test_users_get_their_weights_over_all_nodes(store: Store) -> None:
    """Each node counts for itself what it gave; together they keep the weights, whatever they claim and how often."""
    workers = ["n1", "n2", "n3"]
    for worker in ("w", *workers):
        store.worker(worker)
    users = [store.user(name) for name in ("alice", "bob", "carol")]
    for user in users:
        store.copy_job(user, [1] * 600)
    turns = {worker: FairQueue({users[1]: 3.0}) for worker in workers}
    given_to: Counter[int] = Counter()
    for at in range(60):
        # The first node claims more often, and the last one more at once.
        worker = workers[(0, 0, 1, 2)[at % 4]]
        batches = store.claim(
            worker, batches=3 if worker == "n3" else 1, batch_elements=5, fair_queue=turns[worker].copy()
        )
        given_to += shares(store, turns[worker], batches, worker)
    assert given_to.total() == 450
    for user, expected in zip(users, (90, 270, 90), strict=True):
        # Each node may be a batch ahead for a user.
        assert abs(given_to[user] - expected) <= 5 * len(workers)


def test_work_that_was_done_counts_not_only_what_runs(store: Store) -> None:
    store.worker()
    alice, bob = store.user("alice"), store.user("bob")
    store.copy_job(alice, [1] * 100)
    store.copy_job(bob, [1] * 100)
    turns = FairQueue()
    owners = []
    for _ in range(10):
        (batch,) = store.claim(batches=1, batch_elements=5, fair_queue=turns)
        owners.append(batch.job.user_id)
        shares(store, turns, [batch])
    assert sorted(owners) == [alice] * 5 + [bob] * 5
    assert all(set(owners[at : at + 2]) == {alice, bob} for at in range(0, 10, 2))


def test_a_late_user_is_served_next_and_then_in_turn(store: Store) -> None:
    store.worker()
    alice, bob = store.user("alice"), store.user("bob")
    store.copy_job(alice, [1] * 100)
    turns = FairQueue()
    for batch in store.claim(batches=3, batch_elements=5, fair_queue=turns):
        turns.charge(batch.job.user_id, 1.0)
    store.copy_job(bob, [1] * 100)
    owners = [batch.job.user_id for batch in store.claim(batches=6, batch_elements=5, fair_queue=turns)]
    assert owners[:2] == [bob] * 2
    assert Counter(owners) == {alice: 2, bob: 4}


def test_a_limited_user_leaves_their_turns_to_others(store: Store) -> None:
    store.worker()
    alice, bob = store.user("alice"), store.user("bob")
    store.copy_job(alice, [1] * 100)
    store.copy_job(bob, [1] * 100)
    batches = store.claim(batches=8, batch_elements=5, quota=only({(LimitKind.USER, alice): 1}))
    assert Counter(batch.job.user_id for batch in batches) == {alice: 1, bob: 7}


def test_shares_are_weights_whatever_routes_and_priorities(store: Store) -> None:
    store.worker()

    @settings(max_examples=8, deadline=None)
    @given(
        weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=2, max_size=4),
        priorities=st.lists(st.integers(0, 9), min_size=4, max_size=4),
        batches=st.integers(1, 4),
    )
    def hold(weights: list[float], priorities: list[int], batches: int) -> None:
        users = [store.user(f"u{number}") for number in range(len(weights))]
        submitted = [
            store.copy_job(user, [1] * 120, src_siteid=10 + number, priority=priorities[number])
            for number, user in enumerate(users)
        ]
        turns = FairQueue(dict(zip(users, weights, strict=True)))
        given_to: Counter[int] = Counter()
        for _ in range(24 // batches):
            given_to += shares(store, turns, store.claim(batches=batches, batch_elements=5, fair_queue=turns))
        each = [(given_to[user] / weight, 5 / weight) for user, weight in zip(users, weights, strict=True)]
        for (one, turn), (other, other_turn) in itertools.permutations(each, 2):
            assert one - other <= turn + other_turn + 1e-6
        for job in submitted:
            store.run(job_changes.cancel, job.id, store.now)

    hold()


def test_what_is_handed_over_takes_no_streams(store: Store) -> None:
    store.worker()
    user = store.user()
    handed = store.copy_job(user, [2**40] * 50, protocol=JobProtocol.GRIDFTP)
    own = store.submit(user, src_siteid=7)
    url = "https://fts:8446"

    def claimed(at_service: int, of_own: int, size: int = 40) -> list[tuple[int, int]]:
        left: dict[LimitKey, int] = {
            (LimitKind.SERVICE, url): at_service,
            ALL_SERVICES: 10,
            OWN_STREAMS: of_own,
            (LimitKind.USER, user): 0 if not of_own else 9,
            (LimitKind.ROUTE, Route(1, 2)): 0,
        }
        hand_overs = HandOvers(
            service_of=lambda job: url if job.id == handed.id else None,
            sites={url: {(2, None)}},
            sizes={url: size},
            left=left,
        )
        batches = store.claim(batch_elements=4, batches=20, quota=only(left), hand_overs=hand_overs)
        for batch in batches:
            store.settle(ended(JobStatus.SUBMITTED, batch, counts=False))
        return sorted((batch.job.id, len(batch.elements)) for batch in batches)

    # Whatever the bytes, the agents that are there, and the closed route.
    assert claimed(1, 1) == [(handed.id, 40), (own.id, 1)]
    assert claimed(5, 0) == [(handed.id, 10), (handed.id, 40)]
    assert claimed(0, 1) == [(own.id, 1)]
    # While it is not known whether the service works, one element tries it.
    assert claimed(1, 0, size=1) == [(handed.id, 1)]


def test_jobs_for_a_service_that_is_full_hide_no_others(store: Store) -> None:
    store.worker()
    user = store.user()
    url = "https://fts:8446"
    closed: dict[LimitKey, int] = {(LimitKind.SERVICE, url): 0, ALL_SERVICES: 10}
    numbers = {store.copy_job(user, [1], protocol=JobProtocol.GRIDFTP).id for _ in range(10)}
    kept_here = store.copy_job(user, [1], protocol=JobProtocol.GRIDFTP, options={"mover": "native"})
    hand_overs = HandOvers(
        service_of=lambda job: url if job.id in numbers else None, sites={url: {(1, None)}}, sizes={url: 9}, left=closed
    )
    claimed = store.claim(batches=1, quota=only(closed), hand_overs=hand_overs)
    assert [batch.job.id for batch in claimed] == [kept_here.id]
