"""Streams of one of several daemons: no more than its share, and nothing ahead while another one is idle."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path

from attrs import define, field

from pdm.workqueue.domain.enums import JobType
from pdm.workqueue.domain.jobs import Batch
from pdm.workqueue.domain.limits import LimitKey, LimitKind, Route
from pdm.workqueue.domain.node_reports import AttemptTally
from pdm.workqueue.execution.streams import StreamLimits, Streams
from pdm.workqueue.sites.registry import SiteRegistry
from tests.support.records import element_record, job_record

INTO: LimitKey = (LimitKind.INTO, 2)
ROUTE: LimitKey = (LimitKind.ROUTE, Route(1, 2))


@define
class Share:
    """A share that a test sets."""

    members: int = 2
    streams_of_all: int = 8
    idle_elsewhere: int = 0
    allowances: dict[LimitKey, int] = field(factory=dict)
    noted: list[LimitKey] = field(factory=list)

    def allowance(self, key: LimitKey, limit: int) -> int:
        return self.allowances.get(key, limit // self.members)

    def part(self, limit: int) -> int:
        return limit // self.members

    def named(self) -> Collection[LimitKey]:
        return self.allowances.keys()

    def note_running(self, key: LimitKey) -> None:
        self.noted.append(key)


def streams_of(share: Share | None) -> Streams:
    limits = StreamLimits(total=4, route=10, route_start=4, window_s=5.0, site_in=6, site_out=1000, user=1000, job=1000)
    streams = Streams(
        limits=limits, sites=SiteRegistry(Path("none"), ()), clock=lambda: datetime(2026, 1, 1, tzinfo=UTC)
    )
    streams.shares = share
    return streams


def batch() -> Batch:
    return Batch({1: job_record()}, JobType.COPY, (element_record(),))


def test_no_more_run_than_the_share_allows() -> None:
    share = Share(allowances={INTO: 1, ROUTE: 4})
    streams = streams_of(share)
    first, second = streams.slot(batch()), streams.slot(batch())
    assert first.start()
    assert not second.start()
    # It begins as the share grows.
    share.allowances[INTO] = 2
    assert second.start()
    assert streams.running(INTO) == 2
    assert INTO in share.noted


def test_a_share_that_shrinks_ends_with_its_streams() -> None:
    share = Share(allowances={INTO: 2, ROUTE: 4})
    streams = streams_of(share)
    first, second, third = (streams.slot(batch()) for _ in range(3))
    assert first.start() and second.start()
    share.allowances[INTO] = 1
    # Not even in place of one that runs.
    assert not third.follow(first)
    first.leave()
    assert not third.start()
    second.leave()
    assert third.start()


def test_nothing_is_claimed_ahead_while_another_is_idle() -> None:
    share = Share()
    streams = streams_of(share)
    assert streams.capacity() == 8
    share.idle_elsewhere = 4
    assert streams.capacity() == 4
    waiting = streams.slot(batch())
    assert streams.capacity() == 3
    assert waiting.start()
    assert streams.capacity() == 3
    # Three of six streams into the site are this daemon's.
    assert streams.quota().of((LimitKind.INTO, 7)) == 3
    assert streams.quota().of(INTO) == 2
    share.idle_elsewhere = 0
    assert streams.quota().of(INTO) == 5


def test_daemons_together_begin_a_route_as_one_would() -> None:
    streams, alone = streams_of(Share()), streams_of(None)
    assert [one.quota().of(ROUTE) for one in (streams, alone)] == [4, 8]
    assert (streams.total_of_all, alone.total_of_all) == (8, 4)


def test_what_waits_for_a_stream_is_demanded() -> None:
    streams = streams_of(Share(allowances={INTO: 1, ROUTE: 4}))
    slots = [streams.slot(batch()) for _ in range(3)]
    assert slots[0].start()
    usage = streams.usage()
    assert usage.running[INTO] == 1
    # As many as the route is worth, by what is known of it.
    assert usage.demand[INTO] == 2
    assert INTO in usage.claimed


def test_attempts_are_counted_for_a_minute() -> None:
    tally = AttemptTally()
    tally.add(100.0, worked=3)
    tally.add(125.0, failed=2)
    assert tally.counts(129.0) == (3, 2)
    tally.add(131.0, worked=1)
    assert tally.counts(131.0) == (4, 2)
    assert tally.counts(162.0) == (1, 0)
    assert tally.counts(1000.0) == (0, 0)
