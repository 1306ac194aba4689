"""The circuit breaker, under any order of outcomes and times."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from pdm.workqueue.domain.pacing import Breaker, BreakerPolicy, BreakerState

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
POLICY = BreakerPolicy(threshold=3, first_pause_s=5.0, longest_pause_s=120.0)

#: Whether it worked, and how many seconds after the last outcome.
OUTCOMES = st.lists(st.tuples(st.booleans(), st.floats(0, 300)), max_size=60)
POLICIES = st.builds(
    BreakerPolicy,
    threshold=st.integers(1, 10),
    first_pause_s=st.floats(0.1, 60),
    longest_pause_s=st.floats(60, 1000),
)


def after(*outcomes: tuple[bool, float]) -> tuple[Breaker, datetime]:
    breaker, now = Breaker(), NOW
    for worked, seconds in outcomes:
        now += timedelta(seconds=seconds)
        breaker = breaker.worked() if worked else breaker.failed(POLICY, now)
    return breaker, now


def test_it_opens_after_failures_in_a_row_and_not_before() -> None:
    assert after((False, 0), (False, 0))[0].phase(NOW) is BreakerState.CLOSED
    assert after((False, 0), (False, 0), (True, 0), (False, 0), (False, 0))[0].phase(NOW) is BreakerState.CLOSED
    breaker, now = after((False, 0), (False, 0), (False, 0))
    assert breaker.phase(now) is BreakerState.OPEN
    assert breaker.open_until == now + timedelta(seconds=5)
    assert breaker.phase(now + timedelta(seconds=5)) is BreakerState.HALF_OPEN


def test_pauses_grow_with_failed_probes_up_to_the_longest() -> None:
    breaker, now = after((False, 0), (False, 0), (False, 0))
    pauses = []
    for _ in range(60):
        assert breaker.open_until is not None
        pauses.append((breaker.open_until - now).total_seconds())
        now = breaker.open_until
        breaker = breaker.failed(POLICY, now)
    assert pauses[:6] == [5, 10, 20, 40, 80, 120]
    assert set(pauses[6:]) == {120}


@given(POLICIES, OUTCOMES)
def test_whatever_happens(policy: BreakerPolicy, outcomes: list[tuple[bool, float]]) -> None:
    breaker, now, in_a_row = Breaker(), NOW, 0
    since: datetime | None = None
    for worked, seconds in outcomes:
        now += timedelta(seconds=seconds)
        before = breaker
        breaker = before.worked() if worked else before.failed(policy, now)
        in_a_row = 0 if worked else in_a_row + 1
        since = None if worked else since or now
        assert (breaker.failures, breaker.failing_since) == (in_a_row, since)
        if worked:
            assert breaker == Breaker()
        # It is open exactly after so many failures in a row.
        assert (breaker.open_until is not None) == (in_a_row >= policy.threshold)
        if before.phase(now) is BreakerState.OPEN and not worked:
            # What comes late prolongs nothing, so that a probe is never put off for ever.
            assert breaker.open_until == before.open_until
        if breaker.open_until is not None:
            assert breaker.open_until <= now + timedelta(seconds=policy.longest_pause_s)
            assert breaker.phase(breaker.open_until) is BreakerState.HALF_OPEN
        if before.phase(now) is BreakerState.HALF_OPEN and not worked:
            assert breaker.phase(now) is BreakerState.OPEN
