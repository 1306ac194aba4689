"""Which copies are handed over to an FTS3, and what happens while it does not answer."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from pdm.workqueue.domain.enums import JobProtocol, JobType, MoverKind
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.domain.limits import ALL_SERVICES, LimitKind
from pdm.workqueue.domain.pacing import BreakerPolicy
from pdm.workqueue.execution.transfer_services import ServiceLimits, TransferServices
from pdm.workqueue.sites.registry import Site, SiteRegistry
from tests.store.stores import START
from tests.support.records import job_record

GRIDFTP, SSH, HTTPS = JobProtocol.GRIDFTP, JobProtocol.SSH, JobProtocol.HTTPS
ONE, OTHER = "https://one:8446", "https://other:8446"
AWAY = AttemptFailure(FailureScope.SERVICE, FailureCode.CONNECTION, "no answer", unreachable=True)


class Services:
    """Sites 1 (source) and 2 (destination), and the FTS3 services that they name."""

    def __init__(self, tmp_path: Any, *, source: dict[str, Any], destination: dict[str, Any]) -> None:
        both = {GRIDFTP: "gsiftp://h:1", HTTPS: "https://h:2", SSH: "sftp://h:3"}
        sites = [
            Site(id=number, name=f"S{number}", description="", default_folder="~", **{"endpoints": both, **more})
            for number, more in ((1, source), (2, destination))
        ]
        self.now = START
        self.changes = 0
        self.services = TransferServices(
            sites=SiteRegistry(tmp_path, sites),
            limits=ServiceLimits(jobs=2, files=100, poll_s=1.0, patience_s=60.0, away_s=3600.0),
            policy=BreakerPolicy(first_pause_s=10.0),
            clock=lambda: self.now,
            on_change=self.changed,
        )

    def changed(self) -> None:
        self.changes += 1


def copy(**changes: Any) -> JobRecord:
    return job_record(**{"type": JobType.COPY, "protocol": GRIDFTP, "src_siteid": 1, "dst_siteid": 2, **changes})


@pytest.mark.parametrize(
    ("source", "destination", "job", "expected"),
    [
        ({}, {}, {}, None),
        ({"fts": ONE}, {}, {}, ONE),
        ({}, {"fts": ONE}, {}, ONE),
        ({"fts": ONE}, {"fts": OTHER}, {}, OTHER),
        ({"fts": ONE}, {}, {"protocol": HTTPS}, ONE),
        ({"fts": ONE}, {}, {"protocol": SSH}, None),
        ({"fts": ONE}, {}, {"type": JobType.REMOVE, "dst_siteid": None}, None),
        ({"fts": ONE}, {}, {"options": {"mover": "native"}}, None),
        ({"fts": ONE}, {}, {"options": {"items": [{}], "check": "source"}}, None),
        ({"fts": ONE}, {"mover": MoverKind.TOOLS}, {}, None),
        ({"fts": ONE}, {"endpoints": {SSH: "sftp://h:3"}}, {"protocol": HTTPS}, None),
        # The user's proxy goes to the FTS3: what a user's site says is for its owner only.
        ({"fts": ONE, "owner_id": 7}, {}, {"user_id": 7}, ONE),
        ({"fts": ONE, "owner_id": 7}, {"fts": OTHER, "owner_id": 8}, {"user_id": 7}, ONE),
        ({"fts": ONE, "owner_id": 7}, {}, {"user_id": 8}, None),
    ],
)
def test_which_copies_are_handed_over(tmp_path: Any, source: Any, destination: Any, job: Any, expected: Any) -> None:
    there = Services(tmp_path, source=source, destination=destination)
    assert there.services.service_of(copy(**job)) == expected


def test_batches_at_a_service_are_limited(tmp_path: Any) -> None:
    services = Services(tmp_path, source={"fts": ONE}, destination={"fts": OTHER}).services
    assert services.capacity == 6
    slots = [services.slot(ONE), services.slot(ONE)]
    assert services.hand_overs().left == {(LimitKind.SERVICE, ONE): 0, (LimitKind.SERVICE, OTHER): 2, ALL_SERVICES: 4}
    assert services.reached_limits(ONE) == [
        f"the FTS3 at {ONE} has as many batches of this daemon as it may have at once (2)"
    ]
    slots[0].leave()
    assert services.hand_overs().left[LimitKind.SERVICE, ONE] == 1
    assert services.reached_limits(ONE) == []


def test_an_fts_that_does_not_answer_gets_nothing_until_one_element_finds_it_well(tmp_path: Any) -> None:
    there = Services(tmp_path, source={}, destination={"fts": ONE})
    services, key = there.services, (LimitKind.SERVICE, ONE)
    assert not services.failed(ONE, AttemptFailure(FailureScope.SOURCE, FailureCode.CONNECTION, "", unreachable=True))
    assert services.waits(copy()) == []
    assert services.failed(ONE, AWAY)
    assert services.hand_overs().left[key] == 0
    assert services.next_change(there.now) == START + timedelta(seconds=10)
    (sentence,) = services.waits(copy())
    assert sentence.startswith(f"the FTS3 at {ONE} does not work since ")
    assert "it is tried again at" in sentence
    assert sentence.endswith("CONNECTION: no answer")
    there.now += timedelta(seconds=11)
    assert (services.hand_overs().left[key], services.hand_overs().sizes) == (1, {ONE: 1})
    assert "it is being tried" in services.waits(copy())[0]
    services.slot(ONE)
    assert services.hand_overs().left[key] == 0
    services.worked(ONE)
    assert (services.hand_overs().left[key], services.hand_overs().sizes) == (1, {ONE: 100})
    assert there.changes == 2
    # In the end, jobs end.
    assert services.failed(ONE, AWAY)
    there.now += timedelta(hours=2)
    assert not services.failed(ONE, AWAY)
