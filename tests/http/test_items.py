"""COPY jobs of many pairs of paths: validated whole, stored in one transaction, one element a pair."""

from __future__ import annotations

import json
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred, gatherResults

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from tests.http.service import Service

_BODY = {"src_siteid": 1, "dst_siteid": 2, "protocol": "DUMMY"}


def _items(count: int) -> list[dict[str, Any]]:
    return [{"src": f"/data/run{n % 7}/f{n}", "dst": f"/copy/f{n}", "size": 10} for n in range(count)]


def _body(items: Any, **more: Any) -> dict[str, Any]:
    return _BODY | {"extra_opts": {"items": items} | more}


@pytest_twisted.ensureDeferred
async def test_each_pair_is_an_element(service: Service) -> None:
    items = [*_items(3), {"src": "/data/last", "dst": "/copy/into/", "checksum": "adler32:ab"}]
    job = (await service.call("pairs", "POST", "/copy", _body(items))).json
    assert (job["num_elements"], job["num_submitted"], job["bytes_total"]) == (4, 4, 30)
    assert (job["src_filepath"], job["dst_filepath"]) == ("/data", "/copy")
    assert job["extra_opts"] == {"items": 4}
    elements = (await service.call("pairs", "GET", f"/jobs/{job['id']}/elements")).json
    assert [(each["id"], each["type"], each["src_filepath"], each["dst_filepath"]) for each in elements] == [
        (0, "COPY", "/data/run0/f0", "/copy/f0"),
        (1, "COPY", "/data/run1/f1", "/copy/f1"),
        (2, "COPY", "/data/run2/f2", "/copy/f2"),
        (3, "COPY", "/data/last", "/copy/into/last"),
    ]
    # What was asked for is not proven yet.
    assert elements[3]["checksum"] is None
    progress = (await service.call("pairs", "GET", f"/jobs/{job['id']}")).json["progress"]
    assert (progress["listing"], progress["files_total"], progress["bytes_total"]) == (False, 4, 30)
    tokens = await service.claim(job["id"])
    assert len(tokens) == 4
    mismatch = AttemptFailure(FailureScope.SOURCE, FailureCode.CHECKSUM_MISMATCH, "another")
    for token in tokens[:3]:
        await service.settle(token, transferred=10)
    await service.settle(tokens[3], JobStatus.FAILED, mismatch)
    assert (await service.job(job["id"])).status is JobStatus.FAILED
    await service.call("pairs", "POST", f"/jobs/{job['id']}/retry")
    (again,) = await service.claim(job["id"])
    # The size is known only now.
    await service.settle(again, transferred=5, checksum="ADLER32:000000ab")
    ended = (await service.call("pairs", "GET", f"/jobs/{job['id']}")).json
    assert (ended["status"], ended["bytes_total"], ended["bytes_done"]) == ("DONE", 35, 35)
    assert (ended["progress"]["files_done"], ended["progress"]["files_total"]) == (4, 4)
    last = (await service.call("pairs", "GET", f"/jobs/{job['id']}/elements/3")).json
    assert (last["size"], last["checksum"]) == (5, "ADLER32:000000ab")


@pytest.mark.parametrize(
    ("items", "more", "pointer", "words"),
    [
        ([], {}, "$.extra_opts.items", "length >= 1"),
        (3, {}, "$.extra_opts.items", "an array of items is expected"),
        ([{"src": "/a"}], {}, "$.extra_opts.items[0].dst", "'dst' is missing"),
        ([{"src": "/a", "dst": "/b", "sise": 1}], {}, "$.extra_opts.items[0].sise", "unknown key 'sise'"),
        ([{"src": "/a", "dst": "/b", "size": -1}], {}, "$.extra_opts.items[0].size", ">= 0"),
        ([{"src": "/a", "dst": "/b"}, {"src": "/a/", "dst": "/c"}], {}, "$.extra_opts.items[1].src", "item 2: src is"),
        ([{"src": "/a", "dst": "/b\0"}], {}, "$.extra_opts.items[0].dst", "item 1: "),
        (
            [{"src": "/a", "dst": "/x/"}, {"src": "/b", "dst": "/y"}, {"src": "/c", "dst": "/x/../x/a"}],
            {},
            "$.extra_opts.items[2].dst",
            "items 1 and 3 have the same destination",
        ),
        (
            [{"src": "/a", "dst": "/b", "checksum": "MD5:1"}],
            {},
            "$.extra_opts.items[0].checksum",
            "compared by ADLER32",
        ),
        ([{"src": "/a", "dst": "/b", "checksum": "CRC:1"}], {}, "$.extra_opts.items[0].checksum", "a checksum is"),
        ([{"src": "/a", "dst": "/b"}], {"check": "here"}, "$.extra_opts.check", "here"),
        ([{"src": "/a", "dst": "/b"}], {"check": "source"}, "$.extra_opts.items[0].size", "needs the size"),
        (
            [{"src": "/a", "dst": "/b", "size": 1}],
            {"check": "source", "overwrite": "always"},
            "$.extra_opts",
            "check and overwrite contradict",
        ),
        (
            [{"src": "/a", "dst": "/b", "size": 1}],
            {"check": "source", "move": True},
            "$.extra_opts.move",
            "move and items contradict",
        ),
        ([{"src": "/a", "dst": "/b"}], {"sync": "size"}, "$.extra_opts.sync", "sync and items contradict"),
        (
            [{"src": "/a", "dst": "/b", "checksum": "ADLER32:1"}],
            {"verify": "size"},
            "$.extra_opts.verify",
            "computes no checksum",
        ),
    ],
)
@pytest_twisted.ensureDeferred
async def test_wrong_items_are_named(service: Service, items: Any, more: Any, pointer: str, words: str) -> None:
    answer = await service.call("wrong", "POST", "/copy", _body(items, **more))
    assert (answer.status, answer.problem) == (400, f"invalid-input {pointer}"), answer.json
    assert words in answer.json["detail"]
    assert (await service.call("wrong", "GET", "/jobs")).json == []


@pytest_twisted.ensureDeferred
async def test_items_are_instead_of_the_paths(service: Service) -> None:
    for name in ("src_filepath", "dst_filepath"):
        answer = await service.call("both", "POST", "/copy", _body(_items(1)) | {name: "/a"})
        assert (answer.status, answer.problem) == (400, f"invalid-input $.{name}")
    for body, key in (
        (_BODY | {"dst_filepath": "/b"}, "src_filepath"),
        (_BODY | {"src_filepath": "/b"}, "dst_filepath"),
    ):
        answer = await service.call("both", "POST", "/copy", body)
        assert (answer.status, answer.problem) == (400, f"invalid-input $.{key}")


@pytest.mark.parametrize("count", [8_000, pytest.param(100_000, marks=pytest.mark.full)])
@pytest_twisted.ensureDeferred
async def test_many_items(service: Service, count: int) -> None:
    """Beyond the usual limit of a body; one wrong item among them, and nothing is stored."""
    items, user = _items(count), f"many {count}"
    at = count * 3 // 4
    wrong = [*items[:at], {"src": "/data/x", "dst": ""}, *items[at + 1 :]]
    answer = await service.call(user, "POST", "/copy", _body(wrong))
    assert (answer.status, answer.problem) == (400, f"invalid-input $.extra_opts.items[{at}].dst")
    assert (await service.call(user, "GET", "/jobs")).json == []
    answer = await service.call(user, "POST", "/copy", _body(items), Idempotency_Key="many")
    assert (answer.status, answer.json["num_elements"]) == (200, count)
    again = await service.call(user, "POST", "/copy", _body(items), Idempotency_Key="many")
    assert again.json["id"] == answer.json["id"]


@pytest.mark.full
@pytest_twisted.ensureDeferred
async def test_more_than_a_hundred_thousand_items_are_refused(service: Service) -> None:
    items = _items(100_000)
    answer = await service.call("many", "POST", "/copy", _body([*items, items[0]]))
    assert (answer.status, answer.problem) == (400, "invalid-input $.extra_opts.items")


@pytest_twisted.ensureDeferred
async def test_large_bodies_are_for_items_and_few_at_a_time(service: Service) -> None:
    answer = await service.call("large", "POST", "/list", _BODY | {"src_filepath": "x" * 1_100_000})
    assert (answer.status, answer.problem) == (413, "body-too-large")
    raw = json.dumps(_body(_items(15_000))).encode()
    answers = await gatherResults(
        [Deferred.fromCoroutine(service.call(f"large {n}", "POST", "/copy", raw=raw)) for n in range(4)]
    )
    assert {answer.status for answer in answers} <= {200, 503}
    assert [answer.status for answer in answers].count(200) >= 2
    assert service.assembly.tls is not None
    assert (await service.call("large", "POST", "/copy", raw=raw)).status == 200
