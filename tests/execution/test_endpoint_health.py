"""Endpoint health: which endpoint is blamed, which attempt is excused, where the next batch goes."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from attrs import evolve

from pdm.workqueue.domain.enums import JobProtocol, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import ElementRecord
from pdm.workqueue.domain.pacing import BreakerPolicy, BreakerState
from pdm.workqueue.execution.endpoint_health import SiteEndpoint, SiteHealth, sites_of_element
from pdm.workqueue.sites.registry import Site
from tests.support.records import NOW, element_record, job_record

GRIDFTP = JobProtocol.GRIDFTP
ONE = Site(1, "ONE", "", "~", {GRIDFTP: "gsiftp://one:1"})
TWO = Site(2, "TWO", "", "~", {GRIDFTP: "gsiftp://two:1"}, {GRIDFTP: ("gsiftp://two:2",)})
AWAY = AttemptFailure(FailureScope.DESTINATION, FailureCode.CONNECTION, "refused", unreachable=True)
BROKEN = AttemptFailure(FailureScope.DESTINATION, FailureCode.CONNECTION, "reset")
JOB = job_record(protocol=GRIDFTP)


def element(type_: JobType = JobType.COPY, lost: int = 0) -> ElementRecord:
    return element_record(type=type_, lost=lost)


class Watched:
    """Breakers, and the endpoints that attempts use at present."""

    def __init__(self, patience_s: float = 1000.0) -> None:
        self.changes = 0
        self.health = SiteHealth(policy=BreakerPolicy(3, 5.0, 120.0), patience_s=patience_s, on_change=self._changed)
        self.endpoints = {site.id: self.health.choose(site, GRIDFTP, NOW) for site in (ONE, TWO)}

    def _changed(self) -> None:
        self.changes += 1

    def fail(self, failure: AttemptFailure = AWAY, at: float = 0.0, **changes: Any) -> bool:
        what = changes.pop("element", element())
        return self.health.failed(JOB, what, self.endpoints, failure, NOW + timedelta(seconds=at))


@pytest.fixture
def watched() -> Watched:
    return Watched()


def test_failures_in_a_row_pause_an_endpoint_and_burn_nothing(watched: Watched) -> None:
    assert [watched.fail() for _ in range(5)] == [True] * 5
    assert watched.health.phase(watched.endpoints[2], NOW) is BreakerState.OPEN
    assert watched.health.phase(watched.endpoints[1], NOW) is BreakerState.CLOSED
    assert watched.changes == 1
    # The other endpoint of the site is still there.
    assert watched.health.paused(NOW) == frozenset()
    assert watched.health.sentence(TWO, GRIDFTP, NOW) is None
    watched.endpoints[2] = watched.health.choose(TWO, GRIDFTP, NOW)
    assert watched.endpoints[2].url == "gsiftp://two:2"
    for _ in range(3):
        watched.fail()
    assert watched.health.paused(NOW) == {(2, GRIDFTP)}
    assert watched.health.next_change(NOW) == NOW + timedelta(seconds=5)
    sentence = watched.health.sentence(TWO, GRIDFTP, NOW)
    assert sentence is not None
    assert "site TWO (2) cannot be reached since 2026-03-01T12:00:00Z, it is tried again at" in sentence
    later = NOW + timedelta(seconds=5)
    assert watched.health.paused(later) == frozenset()
    assert watched.health.probed(later) == {(2, GRIDFTP)}
    watched.health.worked([watched.endpoints[2]], later)
    assert watched.health.probed(later) == frozenset()
    assert watched.health.sentence(TWO, GRIDFTP, later) is None
    assert watched.changes == 3


def test_an_element_that_always_breaks_the_connection_fails_in_the_end(watched: Watched) -> None:
    assert [watched.fail(BROKEN, element=element(lost=lost)) for lost in (0, 1, 1, 1)] == [True, False, False, False]
    # Nor does it pause the endpoint for others.
    assert watched.health.phase(watched.endpoints[2], NOW) is BreakerState.CLOSED


class Looks:
    """Stands for the looks at endpoints."""

    def __init__(self, watched: Watched) -> None:
        self.asked: list[tuple[str, int]] = []
        self._health = watched.health
        watched.health.probe = self._look

    def _look(self, endpoint: SiteEndpoint, user: int) -> None:
        self.asked.append((endpoint.url, user))
        self._health.begin_probe(endpoint)


def test_a_broken_connection_counts_once_a_look_has_found_the_server(watched: Watched) -> None:
    looks = Looks(watched)
    endpoint = watched.endpoints[2]
    assert watched.fail(BROKEN)
    assert looks.asked == [(endpoint.url, 1)]
    # What fails after the look has begun is not what it tells about.
    watched.health.probe = lambda endpoint, user: None
    assert watched.fail(BROKEN, element=element()._replace(id=2))
    watched.health.probe_ended(endpoint, None, True, NOW)
    assert watched.health.own_faults(1, 2) == 0
    # The first was not counted, and should have been.
    assert watched.health.own_faults(1, 1) == 1
    assert not watched.fail(BROKEN, element=element(lost=1))
    assert watched.health.phase(endpoint, NOW) is BreakerState.CLOSED


def test_a_look_that_finds_nothing_pauses_at_once_and_blames_no_element(watched: Watched) -> None:
    looks = Looks(watched)
    endpoint, pauses = watched.endpoints[2], []
    watched.health.on_pause = lambda endpoint, until: pauses.append((endpoint, until))
    assert watched.fail(BROKEN)
    watched.health.probe_ended(endpoint, AWAY, False, NOW)
    assert pauses == [(endpoint, NOW + timedelta(seconds=5))]
    assert watched.health.own_faults(1, 1) == 0
    # When the pause has ended a look comes first, and no element.
    watched.endpoints[2] = SiteEndpoint(2, GRIDFTP, "gsiftp://two:2")
    watched.fail(BROKEN)
    watched.health.probe_ended(watched.endpoints[2], AWAY, False, NOW)
    later = NOW + timedelta(seconds=6)
    assert watched.health.paused(later) == {(2, GRIDFTP)} and not watched.health.probed(later)
    # One that cannot tell leaves it to an element.
    watched.health.probe_ended(endpoint, None, None, later)
    assert watched.health.probed(later) == {(2, GRIDFTP)}
    watched.health.probe_ended(endpoint, None, True, later)
    assert not watched.health.paused(later) | watched.health.probed(later)
    assert len(looks.asked) == 2


def test_what_breaks_the_server_itself_each_time_comes_to_an_end(watched: Watched) -> None:
    Looks(watched)
    excused = []
    for lost in range(20):
        excused.append(watched.fail(BROKEN, element=element(lost=lost), at=lost))
        watched.health.probe_ended(watched.endpoints[2], AWAY, False, NOW + timedelta(seconds=lost))
    assert excused == [True] * 10 + [False] * 10
    # To wait for a server that is not there has no such end.
    assert watched.fail(element=element(lost=500), at=30)


def test_patience_ends() -> None:
    watched, away = Watched(patience_s=60.0), AWAY._replace(scope=FailureScope.SOURCE)
    assert [watched.fail(away, at=at) for at in (0, 1, 2, 30, 59)] == [True] * 5
    assert not watched.fail(away, at=60)
    assert not Watched(patience_s=0.0).fail(away)


def test_patience_is_for_sites_not_for_one_of_several_endpoints() -> None:
    """An endpoint is away for days; each probe of it costs no attempt while another one serves."""
    watched = Watched(patience_s=60.0)
    assert all(watched.fail(at=at) for at in (0, 1, 2, 500, 100_000))
    watched.endpoints[2] = watched.health.choose(TWO, GRIDFTP, NOW)
    for at in (100_001, 100_002, 100_003):
        assert watched.fail(at=at)
    assert not watched.fail(at=100_100)


def test_a_site_with_new_endpoints_is_used_at_once(watched: Watched) -> None:
    for site, url in ((ONE, "gsiftp://one:1"), (TWO, "gsiftp://two:1")):
        watched.endpoints = {2: SiteEndpoint(site.id, GRIDFTP, url)}
        for _ in range(3):
            watched.fail()
    assert watched.health.paused(NOW) == {(1, GRIDFTP)}
    moved = evolve(ONE, endpoints={GRIDFTP: "gsiftp://elsewhere:1"})
    watched.health.take_sites([moved, TWO])
    assert watched.health.paused(NOW) == frozenset()
    # What is said about the others stays; of a site that is gone, nothing.
    assert watched.health.phase(SiteEndpoint(2, GRIDFTP, "gsiftp://two:1"), NOW) is BreakerState.OPEN
    watched.health.take_sites([moved])
    assert watched.health.next_change(NOW) is None
    # The last attempts of what was there before are still heard of.
    assert watched.fail()
    watched.health.worked(watched.endpoints.values(), NOW)


@pytest.mark.parametrize(
    ("scope", "code", "excused"),
    [
        (FailureScope.TRANSFER, FailureCode.CONNECTION, False),
        (FailureScope.SERVICE, FailureCode.CONNECTION, False),
        (FailureScope.DESTINATION, FailureCode.TIMEOUT, False),
        (FailureScope.DESTINATION, FailureCode.NOT_FOUND, False),
        (FailureScope.DESTINATION, FailureCode.CRASHED, False),
    ],
)
def test_what_is_not_surely_the_endpoints_fault_counts(
    watched: Watched, scope: FailureScope, code: FailureCode, excused: bool
) -> None:
    assert watched.fail(AttemptFailure(scope, code, "")) is excused


def test_beside_an_endpoint_that_is_away_a_broken_transfer_is_excused_too(watched: Watched) -> None:
    for _ in range(3):
        watched.fail()
    for code in (FailureCode.CONNECTION, FailureCode.STALLED, FailureCode.TIMEOUT):
        assert watched.fail(AttemptFailure(FailureScope.TRANSFER, code, ""), element=element(lost=9))
    assert not watched.fail(AttemptFailure(FailureScope.SOURCE, FailureCode.NOT_FOUND, ""))


def test_a_login_that_hangs_pauses_too(watched: Watched) -> None:
    silent = AttemptFailure(FailureScope.DESTINATION, FailureCode.TIMEOUT, "no greeting")
    assert [watched.fail(silent) for _ in range(4)] == [False, False, True, True]


def test_a_refusing_server_counts_as_reachable(watched: Watched) -> None:
    for _ in range(3):
        watched.fail()
    watched.fail(AttemptFailure(FailureScope.DESTINATION, FailureCode.PERMISSION_DENIED, "no"))
    assert watched.health.phase(watched.endpoints[2], NOW) is BreakerState.CLOSED


def test_a_listing_says_nothing_of_the_destination(watched: Watched) -> None:
    for _ in range(3):
        watched.fail(AWAY._replace(scope=FailureScope.SOURCE), element=element(JobType.LIST))
    assert watched.health.phase(watched.endpoints[1], NOW) is BreakerState.OPEN
    # The work of one site may call it the destination.
    for _ in range(3):
        watched.fail(element=element(JobType.MKDIR))
    assert watched.health.phase(watched.endpoints[2], NOW) is BreakerState.OPEN


@pytest.mark.parametrize(
    ("options", "sites"),
    [({}, (1,)), ({"sync": "size"}, (1, 2)), ({"dry_run": True}, (1, 2)), ({"move": True}, (1, 2))],
)
def test_a_listing_of_both_ends_says_something_of_both(options: dict[str, Any], sites: tuple[int, ...]) -> None:
    assert sites_of_element(evolve(JOB, options=options), element(JobType.LIST)) == sites


@pytest.mark.parametrize(("at", "site"), [("source", 1), ("destination", 2)])
def test_a_check_says_nothing_of_the_other_end(at: str, site: int) -> None:
    assert sites_of_element(evolve(JOB, options={"items": 1, "check": at}), element()) == (site,)


def test_load_is_shared_and_what_was_away_is_probed_once() -> None:
    health = SiteHealth(policy=BreakerPolicy(1, 5.0, 120.0))
    first = health.choose(TWO, GRIDFTP, NOW)
    health.begin([first])
    second = health.choose(TWO, GRIDFTP, NOW)
    assert second != first
    health.failed(JOB, element(), {2: second}, AWAY, NOW)
    health.begin([first, first])
    assert health.choose(TWO, GRIDFTP, NOW) == first
    later = NOW + timedelta(seconds=5)
    assert health.choose(TWO, GRIDFTP, later) == second
    health.begin([second])
    assert health.choose(TWO, GRIDFTP, later) == first
    health.end([first, first, first, second])
    assert health.choose(TWO, GRIDFTP, later) == second
    with pytest.raises(LookupError):
        health.choose(ONE, JobProtocol.SSH, NOW)


def test_doors_know_their_place() -> None:
    health = SiteHealth()
    found = dict(health.of_site(TWO, NOW))
    assert list(found) == [SiteEndpoint(2, GRIDFTP, "gsiftp://two:1"), SiteEndpoint(2, GRIDFTP, "gsiftp://two:2")]
    assert {each.phase for each in found.values()} == {BreakerState.CLOSED}
