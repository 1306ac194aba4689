"""How many streams a route gets, shown on simulated routes whose best number is known."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given, settings
from hypothesis import strategies as st

from pdm.workqueue.domain.pacing import MIN_STREAMS, BatchRun, Breaker, BreakerPolicy, BreakerState, Pacer

BEGIN = datetime(2026, 3, 1, 12, tzinfo=UTC)
WINDOW_S = 5.0


class Line:
    """A route that carries so many streams at full speed, and no more whatever their number.

    Attributes:
        carries: streams that it has room for.
        rate: elements/s of a stream while there is room for it.
        share: of the attempts that fail with more streams than it carries.
    """

    def __init__(self, pacer: Pacer, carries: int, rate: float = 100.0, share: float = 0.0, size: int = 0) -> None:
        self.pacer = pacer
        self.carries = carries
        self.rate = rate
        self.share = share
        self.size = size
        self.now = pacer.changed_at
        self.limits = [pacer.limit]
        self.noise: list[float] = [1.0]
        self._rounds = 0

    def go(self, rounds: int, work_for: int | None = None) -> None:
        """Let each of the streams end a batch of two seconds, so many times."""
        for _ in range(rounds):
            streams = self.pacer.limit if work_for is None else min(work_for, self.pacer.limit)
            self.pacer.runs(streams, self.now)
            self.now += timedelta(seconds=2)
            noise = self.noise[self._rounds % len(self.noise)]
            self._rounds += 1
            speed = self.rate * noise * min(streams, max(self.carries, 1)) / streams
            for _ in range(streams):
                attempts = max(int(speed * 2), 4)
                failed = int(attempts * self.share) if streams > self.carries else 0
                done = attempts - failed
                before = self.pacer.limit
                self.pacer.ended(BatchRun(2.0, done, done * self.size, attempts, failed), self.now)
                assert MIN_STREAMS <= self.pacer.limit <= self.pacer.most
                assert self.pacer.reason and self.pacer.decided_at <= self.now
                assert (self.pacer.changed_at == self.now) or self.pacer.limit == before
            self.limits.append(self.pacer.limit)


def pacer(limit: int = 2, most: int = 16) -> Pacer:
    return Pacer(limit, most, WINDOW_S, BEGIN)


def test_it_climbs_while_each_stream_brings_more_and_no_further() -> None:
    line = Line(pacer(), carries=6)
    line.go(60)
    assert max(line.limits) == 7
    assert line.pacer.limit in (6, 7)
    assert "taken back" in line.pacer.reason or "tried again" in line.pacer.reason


def test_it_stays_where_it_is_when_more_bring_nothing() -> None:
    line = Line(pacer(), carries=1)
    line.go(200)
    assert max(line.limits) == 3
    # One trial now and then, ever more seldom.
    assert sum(limit == 3 for limit in line.limits) < len(line.limits) / 6


def test_it_never_goes_beyond_the_bound() -> None:
    line = Line(pacer(most=3), carries=10)
    line.go(50)
    assert (line.pacer.limit, max(line.limits)) == (3, 3)
    assert "there may be no more" in line.pacer.reason
    assert line.pacer.bound(1, line.now)
    assert (line.pacer.limit, line.pacer.changed_at) == (1, line.now)
    assert "1 at most" in line.pacer.reason
    assert not line.pacer.bound(8, line.now)
    line.go(100)
    assert line.pacer.limit == 8


def test_failures_halve_it_down_to_one_and_it_comes_back() -> None:
    line = Line(pacer(), carries=8)
    line.go(80)
    assert line.pacer.limit in (8, 9)
    line.carries, line.share = 0, 1.0
    before = line.pacer.limit
    while line.pacer.limit == before:
        line.go(1)
    assert line.pacer.limit == before // 2
    assert "attempts failed" in line.pacer.reason and "halved" in line.pacer.reason
    line.go(20)
    assert line.pacer.limit == 1
    line.carries, line.share = 8, 0.0
    line.go(100)
    assert line.pacer.limit in (8, 9)


def test_what_was_begun_under_the_old_limit_does_not_halve_it_twice() -> None:
    one = pacer(limit=8)
    one.runs(8, BEGIN)
    now = BEGIN + timedelta(seconds=10)
    bad = BatchRun(10.0, 0, 0, 20, 20)
    assert one.ended(bad, now)
    assert [one.ended(bad, now) for _ in range(7)] == [False] * 7
    assert one.limit == 4


def test_few_failures_and_those_of_files_change_nothing() -> None:
    one = pacer(limit=4)
    one.runs(4, BEGIN)
    assert not one.ended(BatchRun(2.0, 78, 0, 80, 2), BEGIN + timedelta(seconds=2))
    assert not one.ended(BatchRun(2.0, 0, 0, 80, 0), BEGIN + timedelta(seconds=2))
    assert one.limit == 4


def test_a_clear_fall_of_throughput_halves_it() -> None:
    line = Line(pacer(), carries=4)
    line.go(60)
    assert line.pacer.limit in (4, 5)
    line.go(4)
    line.rate = 20.0
    reasons = []
    for _ in range(10):
        line.go(1)
        reasons.append(line.pacer.reason)
    assert any("fell from" in reason or "taken back" in reason for reason in reasons)
    assert min(line.limits[-10:]) <= 3


def test_without_enough_work_nothing_is_learned() -> None:
    line = Line(pacer(limit=4), carries=8)
    line.go(50, work_for=1)
    assert set(line.limits) == {4}
    assert "there was work for 1.0 of its 4 streams only" in line.pacer.reason


def test_large_files_are_measured_in_bytes() -> None:
    line = Line(pacer(), carries=2, rate=2.0, size=2**30)
    line.go(10)
    assert line.pacer.unit == "bytes/s"
    assert line.pacer.throughput is not None and line.pacer.throughput > 2**30
    small = Line(pacer(), carries=2, size=1024)
    small.go(10)
    assert small.pacer.unit == "elements/s"


def test_before_the_first_window_there_is_no_rate() -> None:
    one = pacer()
    assert (one.throughput, one.unit, one.reason) == (None, None, "as many as a route begins with")


@given(
    start=st.integers(-3, 40),
    most=st.integers(-3, 20),
    runs=st.lists(
        st.tuples(
            st.floats(0, 100),
            st.integers(0, 500),
            st.integers(0, 2**40),
            st.integers(0, 100),
            st.integers(0, 30),
            st.integers(1, 20),
        ),
        max_size=60,
    ),
)
def test_whatever_happens_it_stays_between_one_and_the_bound(
    start: int, most: int, runs: list[tuple[float, int, int, int, int, int]]
) -> None:
    one, now = Pacer(start, most, WINDOW_S, BEGIN), BEGIN
    for seconds, elements, moved, failed, pause, bound in runs:
        one.runs(bound % (one.limit + 1), now)
        now += timedelta(seconds=pause)
        before = one.limit
        if pause == 0:
            one.bound(bound, now)
        changed = one.ended(BatchRun(seconds, elements, moved, elements + failed, failed), now)
        assert MIN_STREAMS <= one.limit <= one.most
        assert changed or one.limit == min(before, one.most)
        # Never more than one up; down by half at most, or to the bound.
        assert one.limit <= before + 1
        assert one.limit >= min(before // 2, one.most) or one.limit == MIN_STREAMS


@settings(max_examples=30)
@given(carries=st.integers(1, 12), noise=st.lists(st.floats(0.99, 1.01), min_size=1, max_size=7))
def test_it_settles_on_what_the_route_carries(carries: int, noise: list[float]) -> None:
    """Noise below what one of twelve streams must bring to be kept."""
    line = Line(pacer(limit=1, most=16), carries=carries)
    line.noise = noise
    line.go(250)
    # Adding one to many brings little: it may stop a little early, never far beyond.
    assert carries - 1 <= line.pacer.limit <= carries + 1
    assert max(line.limits) <= carries + 1


# -- the circuit breaker, under any order of outcomes and times

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
