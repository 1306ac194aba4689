"""What a submission makes of its keys, and when it is refused."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
import pytest_twisted

from tests.http.service import Service

_COPY = {"src_siteid": 1, "src_filepath": "a", "dst_siteid": 2, "dst_filepath": "b", "protocol": "DUMMY"}


@pytest_twisted.ensureDeferred
async def test_defaults(service: Service) -> None:
    await service.give_credential("defaults")
    job = (await service.call("defaults", "POST", "/list", {"src_siteid": 1, "src_filepath": "~/a"})).json
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", job.pop("timestamp"))
    assert re.fullmatch(r"[0-9a-f]{32}", job.pop("log_uid"))
    del job["id"], job["user_id"]
    assert job == {
        "src_siteid": 1,
        "src_filepath": "~/a",
        "type": "LIST",
        "status": "SUBMITTED",
        "extra_opts": {},
        "priority": 5,
        "protocol": "GRIDFTP",
        "label": None,
        "max_tries": 2,
        "finished_at": None,
        "cancel_requested": False,
        "num_elements": 1,
        "num_new": 0,
        "num_submitted": 1,
        "num_running": 0,
        "num_done": 0,
        "num_failed": 0,
        "num_cancelled": 0,
        "held": 0,
        "skipped": 0,
        "already_there": 0,
        "bytes_already_there": 0,
        "bytes_total": 0,
        "bytes_done": 0,
        "progress": {
            "listing": False,
            "bytes_done": 0,
            "bytes_total": 0,
            "bytes_moving": 0,
            "files_done": 0,
            "files_total": 1,
            "instant": None,
            "average": None,
            "files_per_second": None,
            "elapsed": None,
            "eta": None,
        },
    }


@pytest_twisted.ensureDeferred
async def test_everything_given_is_kept(service: Service) -> None:
    body = _COPY | {
        "priority": 0,
        "max_tries": 10,
        "label": "run 7 – ä",
        "extra_opts": {"overwrite": "different", "verify": "size", "dummy": {"files": 3}},
    }
    job = (await service.call("giving", "POST", "/copy", body)).json
    assert body.items() <= job.items()
    assert (await service.call("giving", "GET", f"/jobs/{job['id']}")).json == job
    nothing = dict.fromkeys(("priority", "max_tries", "label", "extra_opts", "protocol"))
    await service.give_credential("giving")
    job = (await service.call("giving", "POST", "/copy", _COPY | nothing)).json
    assert (job["priority"], job["max_tries"], job["label"], job["extra_opts"]) == (5, 2, None, {})


@pytest.mark.parametrize("word", [1, "1", "COPY", "copy"])
@pytest_twisted.ensureDeferred
async def test_types_and_protocols_in_all_spellings(service: Service, word: Any) -> None:
    job = (await service.call("spelling", "POST", "/jobs", _COPY | {"type": word})).json
    assert job["type"] == "COPY"
    protocol = {1: 3, "1": "3", "COPY": "FILE", "copy": "file"}[word]
    job = (await service.call("spelling", "POST", "/jobs", _COPY | {"type": 1, "protocol": protocol})).json
    assert job["protocol"] == "FILE"


@pytest_twisted.ensureDeferred
async def test_site_numbers_as_digits(service: Service) -> None:
    job = (await service.call("digits", "POST", "/copy", _COPY | {"src_siteid": "1", "dst_siteid": "02"})).json
    assert (job["src_siteid"], job["dst_siteid"]) == (1, 2)


_NAMES = (
    "a b%20c",
    "quo'te\"s",
    "#?*&=;",
    "new\nline",
    "-rf",
    "ä/日本/\U0001f600",
    "\x7f\x01",
    "x" * 255,
    "..",
    "~",
    "\uef80",
)


@pytest_twisted.ensureDeferred
async def test_any_legal_name_comes_back_as_it_was(service: Service) -> None:
    for path in _NAMES:
        job = (await service.call("naming", "POST", "/copy", _COPY | {"src_filepath": path})).json
        assert job["src_filepath"] == path
        element = (await service.call("naming", "GET", f"/jobs/{job['id']}/elements/0")).json
        assert element["src_filepath"] == path


@pytest_twisted.ensureDeferred
async def test_destinations(service: Service) -> None:
    async def refused(path: str, body: dict[str, Any]) -> str:
        answer = await service.call("destined", "POST", path, body)
        assert answer.status == 400, answer.body
        return answer.problem.removeprefix("invalid-input ")

    rename = {key: value for key, value in _COPY.items() if key != "dst_siteid"}
    job = (await service.call("destined", "POST", "/rename", rename)).json
    assert (job["src_siteid"], job["dst_siteid"], job["dst_filepath"]) == (1, 1, "b")
    assert (await service.call("destined", "POST", "/rename", rename | {"dst_siteid": "1"})).status == 200
    assert await refused("/rename", rename | {"dst_siteid": 2}) == "$.dst_siteid"
    assert await refused("/jobs", rename | {"type": "COPY"}) == "$.dst_siteid"
    assert await refused("/jobs", _COPY | {"type": "RENAME"}) == "$.dst_siteid"
    source = {key: value for key, value in _COPY.items() if key.startswith("src") or key == "protocol"}
    for type_ in ("COPY", "RENAME"):
        assert await refused("/jobs", source | {"type": type_}) == "$.dst_filepath"
    for type_ in ("LIST", "REMOVE", "MKDIR"):
        assert await refused("/jobs", source | {"type": type_, "dst_filepath": "b"}) == "$.dst_filepath"
        assert await refused("/jobs", source | {"type": type_, "dst_siteid": 1}) == "$.dst_siteid"
        job = (await service.call("destined", "POST", "/jobs", source | {"type": type_, "dst_siteid": None})).json
        assert not {"dst_siteid", "dst_filepath"} & set(job)


@pytest.mark.parametrize(
    ("source", "destination", "bad"),
    [
        ("a", "a", True),
        ("a", "/store/user/a", True),
        ("a/", "./a/../a", True),
        ("a", "a/b", True),
        ("a", "ab", False),
        ("a/b", "a", False),
        ("/", "/anywhere", True),
        ("~/a", "~/a/b", True),
        ("~/a", "a", False),
    ],
)
@pytest_twisted.ensureDeferred
async def test_nothing_is_copied_into_itself(service: Service, source: str, destination: str, bad: bool) -> None:
    for path, body in (("/copy", _COPY | {"dst_siteid": 1}), ("/rename", {**_COPY, "dst_siteid": 1})):
        answer = await service.call("self", "POST", path, body | {"src_filepath": source, "dst_filepath": destination})
        assert answer.status == (400 if bad else 200)
        if bad:
            assert answer.problem == "invalid-input $.dst_filepath"
            assert "is inside" in answer.json["detail"]
    answer = await service.call("self", "POST", "/copy", _COPY | {"src_filepath": source, "dst_filepath": destination})
    assert answer.status == 200, "at two sites the same path is two places"


@pytest.mark.parametrize("path", ["/", "//", "~", "~/", "/a/..", "/.//"])
@pytest_twisted.ensureDeferred
async def test_a_whole_site_is_not_removed(service: Service, path: str) -> None:
    for protocol in ("FILE", "DUMMY"):
        answer = await service.call(
            "self", "POST", "/remove", {"src_siteid": 1, "src_filepath": path, "protocol": protocol}
        )
        assert answer.problem == "invalid-input $.src_filepath"
        assert "root of the whole site" in answer.json["detail"]


@pytest_twisted.ensureDeferred
async def test_two_doors_to_one_directory_are_one_place(service: Service) -> None:
    body = {
        "src_siteid": 1,
        "src_filepath": "/directories/x",
        "dst_siteid": 3,
        "dst_filepath": "/x/y",
        "protocol": "FILE",
    }
    assert (await service.call("doors", "POST", "/copy", body)).problem == "invalid-input $.dst_filepath"


@pytest_twisted.ensureDeferred
async def test_a_directory_cannot_be_left(service: Service) -> None:
    body = _COPY | {"protocol": "FILE", "src_filepath": "/a/../../etc"}
    assert (await service.call("leaving", "POST", "/copy", body)).problem == "invalid-input $.src_filepath"
    assert (await service.call("leaving", "POST", "/copy", body | {"protocol": "DUMMY"})).status == 200


@pytest_twisted.ensureDeferred
async def test_protocols_that_are_not_to_be_had(service: Service) -> None:
    answer = await service.call("protocols", "POST", "/list", {"src_siteid": 3, "src_filepath": "a"})
    assert answer.problem == "invalid-input $.protocol"
    assert answer.json["detail"] == "site DIRECTORIES does not offer GRIDFTP: it offers FILE"
    answer = await service.call("protocols", "POST", "/copy", _COPY | {"dst_siteid": 3})
    assert answer.problem == "invalid-input $.protocol"
    answer = await service.call("protocols", "POST", "/list", {"src_siteid": 4, "src_filepath": "a", "protocol": "SSH"})
    assert answer.problem == "invalid-input $.protocol"
    assert answer.json["detail"] == "this service cannot LIST by SSH; it can by GRIDFTP, DUMMY, FILE"
    answer = await service.call("protocols", "POST", "/list", {"src_siteid": 5, "src_filepath": "a"})
    assert answer.json["detail"] == "there is no site 5; GET /sites lists all"


@pytest_twisted.ensureDeferred
async def test_gridftp_needs_a_credential(service: Service) -> None:
    body = {"src_siteid": 1, "src_filepath": "a"}

    async def refused() -> str:
        answer = await service.call("poor", "POST", "/list", body)
        assert (answer.status, answer.problem) == (409, "delegation-needed")
        assert "run 'pdm delegate'" in answer.json["detail"]
        return answer.json["detail"]

    assert "holds no credential" in await refused()
    await service.give_credential("poor", timedelta(seconds=-1))
    assert "expired at" in await refused()
    await service.give_credential("poor", timedelta(seconds=500))
    assert "at least 600 s" in await refused()
    assert (await service.call("poor", "GET", "/jobs")).json == []
    await service.give_credential("poor", timedelta(seconds=700))
    assert (await service.call("poor", "POST", "/list", body)).status == 200


@pytest_twisted.ensureDeferred
async def test_a_key_makes_one_job(service: Service) -> None:
    first = (await service.call("keyed", "POST", "/copy", _COPY, Idempotency_Key="k 1")).json
    spaced = b'{ "dst_filepath":"b", "dst_siteid":2,"src_siteid":1,"src_filepath":"a","protocol":"DUMMY" }'
    assert (await service.call("keyed", "POST", "/copy", raw=spaced, Idempotency_Key="k 1")).json == first
    assert (await service.call("somebody else", "POST", "/copy", _COPY, Idempotency_Key="k 1")).json != first
    for path, body in (("/copy", _COPY | {"priority": 1}), ("/jobs", _COPY | {"type": 1})):
        answer = await service.call("keyed", "POST", path, body, Idempotency_Key="k 1")
        assert (answer.status, answer.problem) == (422, "idempotency-key-used Idempotency-Key")
    second = (await service.call("keyed", "POST", "/copy", _COPY, Idempotency_Key="k 2")).json
    assert [job["id"] for job in (await service.call("keyed", "GET", "/jobs")).json] == [first["id"], second["id"]]


@pytest_twisted.ensureDeferred
async def test_a_repetition_does_not_ask_for_the_credential_again(service: Service) -> None:
    body = {"src_siteid": 1, "src_filepath": "a"}
    await service.give_credential("repeating")
    first = (await service.call("repeating", "POST", "/list", body, Idempotency_Key="r")).json
    await service.give_credential("repeating", timedelta(seconds=-1))
    assert (await service.call("repeating", "POST", "/list", body, Idempotency_Key="r")).json == first
    assert (await service.call("repeating", "POST", "/list", body, Idempotency_Key="s")).status == 409
    assert len((await service.call("repeating", "GET", "/jobs")).json) == 1


@pytest_twisted.ensureDeferred
async def test_a_submission_wakes_the_claimer(service: Service) -> None:
    before = service.events["wake"]
    await service.submit("waking")
    assert service.events["wake"] == before + 1


@pytest_twisted.ensureDeferred
async def test_cancel_and_retry(service: Service) -> None:
    job = await service.submit("cancelling", "/copy")
    cancelled = await service.call("cancelling", "DELETE", f"/jobs/{job['id']}")
    assert (cancelled.status, cancelled.json["status"]) == (200, "CANCELLED")
    assert cancelled.json["num_cancelled"] == cancelled.json["num_elements"] == 1
    assert cancelled.json["finished_at"]
    assert service.events[f"cancelled {job['id']}"] == 1
    again = await service.call("cancelling", "DELETE", f"/jobs/{job['id']}")
    assert (again.status, again.json) == (200, cancelled.json)
    retried = (await service.call("cancelling", "POST", f"/jobs/{job['id']}/retry")).json
    assert (retried["status"], retried["retried"], retried["finished_at"]) == ("SUBMITTED", 1, None)
    assert (await service.call("cancelling", "POST", f"/jobs/{job['id']}/retry")).json["retried"] == 0


@pytest_twisted.ensureDeferred
async def test_cancel_of_what_runs_waits_for_its_end(service: Service) -> None:
    job = await service.submit("interrupting")
    (token,) = await service.claim(job["id"])
    answer = (await service.call("interrupting", "DELETE", f"/jobs/{job['id']}")).json
    assert (answer["status"], answer["cancel_requested"], answer["num_running"]) == ("RUNNING", True, 1)
    assert token.element_id == 0
