"""From elements to requests: URLs, temporary names, and what the options change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import msgspec
import pytest

from pdm.workqueue.domain.enums import JobProtocol, JobType, PlannedAction
from pdm.workqueue.domain.jobs import Batch, ElementRecord
from pdm.workqueue.domain.paths import checked, encoded
from pdm.workqueue.movers import MOVERS
from pdm.workqueue.movers.mover import Access
from pdm.workqueue.wire.agent_requests import (
    AgentRequest,
    CopyItem,
    CopyRequest,
    ListRequest,
    MkdirRequest,
    PathItem,
    RemoveRequest,
    RenameItem,
    RenameRequest,
    TimeLimits,
    WorkRequest,
)
from pdm.workqueue.wire.options import read_options
from tests.support.records import NOW, element_record, job_record

LIMITS = TimeLimits()
UID = "abcdefghijklmnopqrstuvwxyz"


def url(site: int, path: str) -> str:
    return f"gsiftp://site{site}:2811{encoded(path) if path.startswith('/') else '/' + encoded(path)}"


def batch(job_type: JobType, *elements: ElementRecord, element_type: JobType | None = None, **options: Any) -> Batch:
    copies = job_type is JobType.COPY
    job = job_record(
        id=7,
        type=job_type,
        protocol=JobProtocol.GRIDFTP,
        src_filepath="/from",
        dst_siteid=2 if copies else None,
        dst_filepath="/to" if copies else None,
        options=options,
        log_uid=UID,
    )
    return Batch.of_one(job, job_type if element_type is None else element_type, elements)


def element(number: int, source: str, destination: str | None = None, attempts: int = 1, **more: Any) -> ElementRecord:
    fields = {"job_id": 7, "id": number, "src_filepath": source, "dst_filepath": destination, "size": 3}
    return element_record(attempts=attempts, **{**fields, **more})


def request(claimed: Batch, protocol: JobProtocol = JobProtocol.GRIDFTP) -> WorkRequest:
    options = read_options(claimed.job.type, claimed.job.options)
    built = MOVERS[protocol].request_for(claimed, url, options, LIMITS, 9)
    assert not built.refused
    made = built.request
    assert made is not None
    # What is sent must be what is read.
    assert msgspec.json.decode(msgspec.json.encode(made), type=AgentRequest) == made
    return made


def test_copies_arrive_under_a_name_of_their_attempt() -> None:
    claimed = batch(
        JobType.COPY,
        element(4, "/from/a b", "/to/a b"),
        element(5, "/from/x%", "/to/x%", attempts=3),
        overwrite="always",
    )
    part = "gsiftp://site2:2811/to/.pdm-abcdefghijklmnop"
    assert request(claimed) == CopyRequest(
        9,
        [
            CopyItem(0, "gsiftp://site1:2811/from/a%20b", "gsiftp://site2:2811/to/a%20b", f"{part}.4.1.part", [], 3),
            CopyItem(
                1,
                "gsiftp://site1:2811/from/x%25",
                "gsiftp://site2:2811/to/x%25",
                f"{part}.5.3.part",
                [f"{part}.5.1.part", f"{part}.5.2.part"],
                3,
            ),
        ],
        "always",
        "checksum",
        LIMITS,
    )


@pytest.mark.parametrize(("options", "algorithm"), [({}, "ADLER32"), ({"checksum": "MD5"}, "MD5")])
def test_copies_are_proven_by_the_chosen_checksum(options: dict[str, Any], algorithm: str) -> None:
    made = request(batch(JobType.COPY, element(1, "/from", "/to"), **options))
    assert isinstance(made, CopyRequest) and made.checksum == algorithm


@pytest.mark.parametrize(
    ("destination", "temporary"),
    [
        ("/top", "/.pdm-abcdefghijklmnop.1.1.part"),
        ("~/top", "/~/.pdm-abcdefghijklmnop.1.1.part"),
        ("top", "/.pdm-abcdefghijklmnop.1.1.part"),
        ("a/b", "/a/.pdm-abcdefghijklmnop.1.1.part"),
    ],
)
def test_the_temporary_file_lies_beside_the_final_one(destination: str, temporary: str) -> None:
    made = request(batch(JobType.COPY, element(1, "/from", destination)))
    assert made.items[0].temporary == f"gsiftp://site2:2811{temporary}"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("type_", "options", "depth", "follow"),
    [
        (JobType.LIST, {}, None, True),
        (JobType.LIST, {"depth": 0}, 0, True),
        (JobType.COPY, {}, None, True),
        (JobType.REMOVE, {}, None, False),
        (JobType.REMOVE, {"recursive": False}, 0, False),
    ],
)
def test_listings(type_: JobType, options: dict[str, Any], depth: int | None, follow: bool) -> None:
    made = request(batch(type_, element(0, "/from"), element_type=JobType.LIST, **options))
    space_at = "gsiftp://site2:2811/to" if type_ is JobType.COPY else None
    owners = type_ is JobType.LIST
    expected = ListRequest(9, 0, "gsiftp://site1:2811/from", depth, LIMITS, follow, None, space_at, owners)
    assert made == expected


def test_removals() -> None:
    made = request(batch(JobType.REMOVE, element(1, "/from/f"), element(2, "/from", is_directory=True)))
    items = [
        PathItem(0, "gsiftp://site1:2811/from/f", listed_at=NOW.timestamp()),
        PathItem(1, "gsiftp://site1:2811/from", directory=True, listed_at=NOW.timestamp()),
    ]
    assert made == RemoveRequest(9, items, LIMITS)


def test_a_rename() -> None:
    made = request(batch(JobType.RENAME, element(0, "/from/f", "/from/g"), overwrite="always"))
    item = RenameItem(0, "gsiftp://site1:2811/from/f", "gsiftp://site1:2811/from/g")
    assert made == RenameRequest(9, [item], "always", LIMITS)


def test_new_directories_of_a_job_and_of_a_copied_tree() -> None:
    own = request(batch(JobType.MKDIR, element(0, "/from/new")))
    assert own == MkdirRequest(9, [PathItem(0, "gsiftp://site1:2811/from/new", True)], False, LIMITS)
    copied = request(batch(JobType.COPY, element(3, "/from/e", "/to/e"), element_type=JobType.MKDIR))
    assert copied == MkdirRequest(9, [PathItem(0, "gsiftp://site2:2811/to/e", True)], True, LIMITS)


@pytest.mark.parametrize("protocol", MOVERS)
@pytest.mark.parametrize("type_", JobType)
def test_every_mover_asks_for_every_job_type(protocol: JobProtocol, type_: JobType) -> None:
    destination = "/to" if type_ in (JobType.COPY, JobType.RENAME) else None
    assert type_ in MOVERS[protocol].job_types
    made = request(batch(type_, element(0, "/from", destination)), protocol)
    assert made.id == 9


def site_url(site: int, path: str) -> str:
    """As the daemon makes it: refuses what no site can hold."""
    return url(site, checked(path))


@pytest.mark.parametrize("protocol", MOVERS)
@pytest.mark.parametrize("type_", [JobType.COPY, JobType.REMOVE, JobType.RENAME, JobType.MKDIR])
def test_an_element_that_no_site_can_hold_fails_alone(protocol: JobProtocol, type_: JobType) -> None:
    """A destination of more than 4,096 bytes, a source of them, and one whose temporary name would have them."""
    long = "/".join(["x" * 200] * 20)
    destinations = [f"/to/{number}" if type_ in (JobType.COPY, JobType.RENAME) else None for number in range(5)]
    elements = [element(number, f"/from/{number}", destinations[number], type=type_) for number in range(5)]
    elements[1] = element(1, f"/{long}/{long}", destinations[1], type=type_)
    bad = {1}
    if type_ in (JobType.COPY, JobType.RENAME):
        elements[3] = element(3, "/from/3", f"/{long}/{long}", type=type_)
        bad.add(3)
    if type_ is JobType.COPY:
        elements[4] = element(4, "/from/4", f"/{long}/{'y' * 50}/z", type=type_)
        bad.add(4)
    claimed = batch(JobType.COPY if type_ is JobType.COPY else type_, *elements)
    built = MOVERS[protocol].request_for(
        claimed, site_url, read_options(claimed.job.type, claimed.job.options), LIMITS, 9
    )
    assert {key: failure.code for key, failure in built.refused.items()} == dict.fromkeys(bad, "INVALID_NAME")
    assert built.request is not None
    assert {item.key for item in built.request.items} == set(range(5)) - bad  # type: ignore[union-attr]
    whole = MOVERS[protocol].request_for(
        batch(claimed.job.type, elements[1]), site_url, read_options(claimed.job.type, {}), LIMITS, 9
    )
    assert whole.request is None
    assert set(whole.refused) == {0}


def test_what_has_no_room_in_a_line_waits_for_the_next_batch() -> None:
    directory = "/" + "/".join(["%" * 250] * 15)
    claimed = batch(
        JobType.COPY, *[element(n, f"{directory}/{n}", f"{directory}/{n}", attempts=11) for n in range(400)]
    )
    built = MOVERS[JobProtocol.GRIDFTP].request_for(claimed, url, read_options(JobType.COPY, {}), LIMITS, 9)
    assert built.request is not None
    asked = [item.key for item in built.request.items]  # type: ignore[union-attr]
    assert asked == list(range(len(asked)))
    assert built.postponed == frozenset(range(len(asked), 400))
    assert built.postponed
    # A helper ends when a line is longer than this.
    assert len(msgspec.json.encode(built.request)) < 64 * 1024 * 1024


def test_dummies_carry_their_behaviour_and_attempt() -> None:
    dummy = {"files": 3, "delay": 0.5, "fail": "NO_SPACE", "fail_times": 1}
    made = request(batch(JobType.COPY, element(1, "/from", "/to", attempts=2), dummy=dummy), JobProtocol.DUMMY)
    query = dict(parse_qsl(made.items[0].source.partition("?")[2]))  # type: ignore[union-attr]
    assert query | {"fail": "NO_SPACE", "fail_times": "1", "attempt": "2", "delay": "0.5"} == query


def test_the_listing_of_a_dummy_tree_does_not_fail_with_its_elements() -> None:
    dummy = {"files": 3, "fail": "NO_SPACE", "crash": True, "hang": True, "list_delay": 1}
    for type_, fails in ((JobType.COPY, False), (JobType.LIST, True)):
        made = request(batch(type_, element(0, "/from"), element_type=JobType.LIST, dummy=dummy), JobProtocol.DUMMY)
        query = dict(parse_qsl(made.url.partition("?")[2]))  # type: ignore[union-attr]
        assert {name in query for name in ("fail", "crash", "hang")} == {fails}
        assert query["list_delay"] == "1.0"


def test_environments() -> None:
    proxy, trust = Path("/run/proxy"), Path("/etc/trust")
    gridftp = MOVERS[JobProtocol.GRIDFTP].environment(Access(proxy, trust, ["/srv"]))
    assert gridftp == {"X509_USER_PROXY": "/run/proxy", "X509_CERT_DIR": "/etc/trust"}
    assert MOVERS[JobProtocol.GRIDFTP].environment(Access()) == {}
    file = MOVERS[JobProtocol.FILE].environment(Access(proxy, trust, ["/srv/a b", "/srv/\uefe9"]))
    assert json.loads(file["PDM_FILE_ROOTS"]) == ["/srv/a%20b", "/srv/%E9"]
    assert MOVERS[JobProtocol.DUMMY].environment(Access(proxy, trust, ["/srv"])) == {}


@pytest.mark.parametrize("options", [{"sync": "size"}, {"dry_run": True}])
def test_a_destination_that_is_compared_is_listed(options: dict[str, Any]) -> None:
    made = request(batch(JobType.COPY, element(0, "/from"), element_type=JobType.LIST, **options))
    there = "gsiftp://site2:2811/to"
    assert made == ListRequest(9, 0, "gsiftp://site1:2811/from", None, LIMITS, True, there, there)


def test_moved_sources_and_extra_files_are_removed_where_they_are() -> None:
    moved = element(1, "/from/f", mtime=1000, planned=PlannedAction.MOVED)
    directory = element(2, "/from/d", is_directory=True, planned=PlannedAction.MOVED)
    extra = element(3, "/to/x", "/to/x", mtime=2000, planned=PlannedAction.DELETE)
    made = request(batch(JobType.COPY, moved, directory, extra, element_type=JobType.REMOVE, move=True))
    assert isinstance(made, RemoveRequest)
    assert made.items == [
        PathItem(0, "gsiftp://site1:2811/from/f", again=True, listed_size=3, listed_mtime=1000, may_stay=True),
        PathItem(1, "gsiftp://site1:2811/from/d", directory=True, again=True, may_stay=True),
        PathItem(2, "gsiftp://site2:2811/to/x", again=True, listed_size=3, listed_mtime=2000, at_destination=True),
    ]
    assert [item.scope for item in made.items] == ["source", "source", "destination"]
