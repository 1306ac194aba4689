"""The door for clients of FTS3: ids, states, fields, statuses and error bodies."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Collection, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import pytest_twisted
from twisted.internet.threads import deferToThread

from pdm.testgrid.ports import reserve_port
from pdm.workqueue.certificates.delegation import sign_request
from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.fts import BASE_ID
from pdm.workqueue.http.fts.calls import ServersOfUrls, read_url
from tests.http.service import Answer, Certificates, Service, running
from tests.http.test_surface import raw_exchange

SOURCE = "dummy://north/store"
DESTINATION = "dummy://south/store"


@pytest.fixture(scope="module")
def service(certificates: Certificates, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with a door."""
    yield from running(
        Service(
            tmp_path_factory.mktemp("fts"),
            certificates,
            configuration=f"[fts]\nport = {reserve_port()}\n[sites]\nlocal_addresses = yes\n",
        )
    )


async def ask(service: Service, user: str, method: str, path: str, body: Any = None, **more: Any) -> Answer:
    port = int(service.assembly.server.fts_port.url.rpartition(":")[2])
    return await service.call(user, method, path, body, root="", port=port, **more)


def pair(name: str, **more: Any) -> dict[str, Any]:
    return {"sources": [f"{SOURCE}/{name}"], "destinations": [f"{DESTINATION}/{name}"], **more}


async def submitted(service: Service, user: str, *files: dict[str, Any], **params: Any) -> str:
    answer = await ask(service, user, "POST", "/jobs", {"files": list(files), "params": params})
    assert answer.status == 200, answer.body
    return answer.json["job_id"]


@pytest_twisted.ensureDeferred
async def test_who_calls(service: Service) -> None:
    door = (await ask(service, "alice", "GET", "/")).json
    assert door["api"]["major"] == 3
    me = (await ask(service, "alice", "GET", "//whoami")).json
    assert me["user_dn"] == me["dn"][0] == service.certificates.of("alice").dn
    assert me["vos_id"] == [str(uuid.uuid5(BASE_ID, me["vos"][0]))]
    own = (await service.call("alice", "GET", "/whoami")).json
    assert me["delegation_id"] == own["delegation_id"]


async def _element(service: Service, user: str, fts_id: str, number: int = 0) -> dict[str, Any]:
    return (await ask(service, user, "GET", f"/jobs/{fts_id}/files")).json[number]


@pytest_twisted.ensureDeferred
async def test_a_job_from_its_submission_to_its_end(service: Service) -> None:
    metadata = {"request_id": "r1"}
    files = [pair("a", metadata=metadata, filesize=10, checksum="ADLER32:1234"), pair("b", activity="test")]
    fts_id = await submitted(service, "bob", *files, job_metadata={"issuer": "x"}, priority=5, retry=3, overwrite=True)
    job = (await ask(service, "bob", "GET", f"/jobs/{fts_id}")).json
    assert (job["job_id"], job["job_state"], job["http_status"]) == (fts_id, "SUBMITTED", "200 Ok")
    assert (job["priority"], job["retry"], job["overwrite_flag"], job["verify_checksum"]) == (5, 3, "Y", "t")
    assert job["job_metadata"] == {"issuer": "x", "auth_method": "certificate"}
    assert (job["source_se"], job["dest_se"], job["reason"]) == ("dummy://north", "dummy://south", None)
    first, second = (await ask(service, "bob", "GET", f"/jobs/{fts_id}/files")).json
    assert (first["file_state"], first["file_metadata"], first["filesize"]) == ("SUBMITTED", metadata, 10)
    assert (first["source_surl"], first["file_index"], second["activity"]) == (f"{SOURCE}/a", 0, "test")

    own = (await service.call("bob", "GET", "/jobs?label=" + fts_id)).json
    assert [(each["extra_opts"], each["max_tries"], each["priority"]) for each in own] == [
        ({"items": 2, "overwrite": "always", "checksum": "ADLER32"}, 4, 1),
    ], own
    tokens = await service.claim(own[0]["id"])
    assert (await ask(service, "bob", "GET", f"/jobs/{fts_id}/job_state")).json == "ACTIVE"
    exists = AttemptFailure(FailureScope.DESTINATION, FailureCode.EXISTS, "it is there")
    await service.settle(tokens[0], transferred=10)
    await service.settle(tokens[1], JobStatus.FAILED, exists)
    job = (await ask(service, "bob", "GET", f"/jobs/{fts_id}")).json
    assert (job["job_state"], bool(job["job_finished"])) == ("FINISHEDDIRTY", True)
    done, failed = (await ask(service, "bob", "GET", f"/jobs/{fts_id}/files")).json
    assert (done["file_state"], done["reason"], done["recoverable"]) == ("FINISHED", "", None)
    assert (failed["file_state"], failed["recoverable"]) == ("FAILED", False)
    assert "Destination file exists and overwrite is not enabled" in failed["reason"]
    assert len(done["start_time"]) == len(done["finish_time"]) == len("2026-01-01T00:00:00")


@pytest_twisted.ensureDeferred
async def test_an_id_that_the_client_knows_before_is_taken_once(service: Service) -> None:
    me = (await ask(service, "carol", "GET", "/whoami")).json
    expected = str(uuid.uuid5(uuid.uuid5(uuid.UUID(me["base_id"]), me["vos"][0]), "sid 1"))
    body = {"files": [pair("det")], "params": {"id_generator": "deterministic", "sid": "sid 1"}}
    assert (await ask(service, "carol", "POST", "/jobs", body)).json == {"job_id": expected}
    again = await ask(service, "carol", "PUT", "/jobs", body)
    assert (again.status, again.json) == (
        409,
        {"status": "409 Conflict", "message": "The sid provided by the user is duplicated"},
    )
    assert (await ask(service, "carol", "GET", f"/jobs/{expected}")).json["job_state"] == "SUBMITTED"
    assert len((await service.call("carol", "GET", "/jobs")).json) == 1


@pytest_twisted.ensureDeferred
async def test_several_sources_are_tried_in_turn(service: Service) -> None:
    sources = ["dummy://north/store/one", "dummy://north/store/two", "dummy://north/store/three"]
    fts_id = await submitted(
        service, "dave", {"sources": sources, "destinations": [f"{DESTINATION}/one"], "selection_strategy": "orderly"}
    )

    async def states() -> tuple[str, list[str]]:
        files = (await ask(service, "dave", "GET", f"/jobs/{fts_id}/files")).json
        assert [each["source_surl"] for each in files] == sources
        assert {each["file_index"] for each in files} == {0}
        job = (await ask(service, "dave", "GET", f"/jobs/{fts_id}")).json
        assert job["job_type"] == "R"
        return job["job_state"], [each["file_state"] for each in files]

    assert await states() == ("SUBMITTED", ["SUBMITTED", "NOT_USED", "NOT_USED"])
    numbers = [each["id"] for each in (await service.call("dave", "GET", "/jobs")).json]
    (token,) = await service.claim(numbers[0])
    gone = AttemptFailure(FailureScope.SOURCE, FailureCode.NOT_FOUND, "no such file")
    await service.settle(token, JobStatus.FAILED, gone)
    await service.assembly.timed.chains.sweep()
    (token,) = await service.claim(numbers[1])
    assert await service.claim(numbers[2]) == []
    assert await states() == ("ACTIVE", ["FAILED", "ACTIVE", "NOT_USED"])
    await service.settle(token)
    await service.assembly.timed.chains.sweep()
    assert await states() == ("FINISHED", ["FAILED", "FINISHED", "NOT_USED"])


@pytest_twisted.ensureDeferred
async def test_several_destinations_are_copies_of_their_own(service: Service) -> None:
    file = {"sources": [f"{SOURCE}/x"], "destinations": [f"{DESTINATION}/x1", f"{DESTINATION}/x2"]}
    fts_id = await submitted(service, "erin", file)
    files = (await ask(service, "erin", "GET", f"/jobs/{fts_id}/files")).json
    assert [(each["dest_surl"][-2:], each["file_state"]) for each in files] == [
        ("x1", "SUBMITTED"),
        ("x2", "SUBMITTED"),
    ]


@pytest_twisted.ensureDeferred
async def test_cancel(service: Service) -> None:
    fts_id = await submitted(service, "frank", pair("c1"), pair("c2"))
    cancelled = await ask(service, "frank", "DELETE", f"/jobs/{fts_id}")
    assert (cancelled.status, cancelled.json["job_state"], cancelled.json["http_status"]) == (200, "CANCELED", "200 Ok")
    assert cancelled.json["reason"] == "Job canceled by the user"
    again = await ask(service, "frank", "DELETE", f"/jobs/{fts_id}")
    assert (again.status, again.json["job_state"], again.json["http_status"]) == (200, "CANCELED", "304 Not Modified")
    several = await ask(service, "frank", "DELETE", f"/jobs/{fts_id},none")
    assert (several.status, [each["http_status"] for each in several.json]) == (
        207,
        ["304 Not Modified", "404 Not Found"],
    )


@pytest_twisted.ensureDeferred
async def test_cancel_of_files(service: Service) -> None:
    fts_id = await submitted(service, "nina", *(pair(f"n{number}") for number in range(4)))
    ids = [each["file_id"] for each in (await ask(service, "nina", "GET", f"/jobs/{fts_id}/files")).json]
    assert (await ask(service, "nina", "DELETE", f"/jobs/{fts_id}/files/{ids[0]}")).json == "CANCELED"
    (own,) = (await service.call("nina", "GET", f"/jobs?label={fts_id}")).json
    tokens = await service.claim(own["id"])
    await service.settle(tokens[0])
    ended: list[tuple[int, list[int]]] = []

    def cancel_elements(job_id: int, numbers: Collection[int]) -> bool:
        ended.append((job_id, list(numbers)))
        # No daemon runs them but the test.
        return False

    service.context.cancel_elements = cancel_elements
    states = await ask(service, "nina", "DELETE", f"/jobs/{fts_id}/files/{ids[0]},{ids[1]},{ids[2]},7,x")
    assert ended == [(own["id"], [2])]
    assert states.json == [
        *("CANCELED", "FINISHED", "ACTIVE"),
        *["File does not belong to the job"] * 2,
    ]
    await ask(service, "nina", "DELETE", f"/jobs/{fts_id}/files/{ids[2]},{ids[3]}")
    assert (await service.job(own["id"])).cancel_requested
    assert (await ask(service, "oscar", "DELETE", f"/jobs/{fts_id}/files/{ids[0]}")).status == 403


@pytest_twisted.ensureDeferred
async def test_jobs_of_others(service: Service) -> None:
    fts_id = await submitted(service, "grace", pair("g", metadata={"k": 1}))
    for method in ("GET", "DELETE"):
        refused = await ask(service, "heidi", method, f"/jobs/{fts_id}")
        assert (refused.status, refused.json["status"]) == (403, "403 Forbidden")
        assert refused.json["message"] == f'Not enough permissions to check the job "{fts_id}"'
    assert (await ask(service, "heidi", "GET", f"/jobs/{fts_id}/files")).status == 403
    missing = await ask(service, "heidi", "GET", "/jobs/no-such-job")
    assert (missing.status, missing.json["http_status"], missing.json["job_id"]) == (
        404,
        "404 Not Found",
        "no-such-job",
    )
    bulk = await ask(service, "grace", "GET", f"/jobs/{fts_id},no-such-job?files=file_state,file_metadata")
    assert bulk.status == 207
    assert bulk.json[0]["files"] == [{"file_state": "SUBMITTED", "file_metadata": {"k": 1}}]
    assert (await ask(service, "operator", "GET", f"/jobs/{fts_id}")).json["user_dn"] == service.certificates.of(
        "grace"
    ).dn


@pytest_twisted.ensureDeferred
async def test_delegation(service: Service) -> None:
    me = (await ask(service, "ivan", "GET", "/whoami")).json
    place = f"/delegation/{me['delegation_id']}"
    grid = {"sources": ["gsiftp://a.example.org/f"], "destinations": ["gsiftp://b.example.org/f"]}
    needed = await ask(service, "ivan", "POST", "/jobs", {"files": [grid]})
    assert (needed.status, needed.json["status"]) == (419, "419 Authentication Timeout")
    assert (await ask(service, "ivan", "GET", place)).json is None
    assert (await ask(service, "ivan", "GET", "/delegation/0123456789abcdef")).status == 403
    request = await ask(service, "ivan", "GET", f"{place}/request")
    bundle: Path = service.directory / "ivan.pem"
    service.certificates.of("ivan").write_bundle(bundle)
    signed = sign_request(request.body, bundle, None, timedelta(hours=3))
    other = (await ask(service, "judy", "GET", "/whoami")).json["delegation_id"]
    foreign = (await ask(service, "judy", "GET", f"/delegation/{other}/request")).body
    wrong = sign_request(foreign, bundle, None, timedelta(hours=3))
    refused = await ask(service, "ivan", "PUT", f"{place}/credential", raw=wrong)
    assert (refused.status, refused.json["message"].partition(":")[0]) == (400, "Could not process the proxy")
    assert (await ask(service, "ivan", "PUT", f"{place}/credential", raw=signed)).status == 201
    assert len((await ask(service, "ivan", "GET", place)).json["termination_time"]) == 19
    fts_id = await submitted(service, "ivan", grid)
    own = (await service.call("ivan", "GET", f"/jobs?label={fts_id}")).json[0]
    sites = {each["id"]: each["name"] for each in (await service.call("ivan", "GET", "/sites")).json}
    assert own["src_siteid"] not in sites
    made = (await service.call("ivan", "GET", f"/sites/{own['src_siteid']}")).json
    assert (made["name"], made["endpoints"]) == ("gsiftp-a.example.org", {"GRIDFTP": "gsiftp://a.example.org:2811"})
    assert (await service.call("judy", "GET", f"/sites/{own['src_siteid']}")).status == 404
    again = (await service.call("ivan", "GET", f"/jobs?label={await submitted(service, 'ivan', grid)}")).json[0]
    assert again["src_siteid"] == own["src_siteid"]
    known = {"sources": ["gsiftp://north.example.org:2811/store/user/f"], "destinations": grid["destinations"]}
    named = (await service.call("ivan", "GET", f"/jobs?label={await submitted(service, 'ivan', known)}")).json[0]
    assert named["src_siteid"] == 1
    assert (await ask(service, "ivan", "DELETE", place)).status == 204
    assert (await ask(service, "ivan", "DELETE", place)).status == 404


_REFUSED: Sequence[tuple[Any, str]] = (
    ([], "an object is expected"),
    ({}, "No transfers operations specified"),
    ({"files": []}, "No valid pairs available"),
    ({"files": 7}, "an array is expected"),
    ({"files": [7]}, "files[0]: an object is expected"),
    ({"files": [{"sources": [f"{SOURCE}/a"]}]}, "Missing parameter: files[0].destinations"),
    ({"files": [{"sources": "x", "destinations": "y"}]}, "an array of URLs"),
    ({"files": [{"sources": [3], "destinations": [4]}]}, "a URL is a text"),
    ({"files": [pair("a") | {"sources": ["file:///etc/passwd"]}]}, "Can not transfer local files"),
    ({"files": [pair("a") | {"sources": ["gopher://h/x"]}]}, "the scheme gopher is not spoken here"),
    ({"files": [pair("a") | {"sources": ["no url"]}]}, "Missing scheme"),
    ({"files": [pair("a") | {"sources": ["https:///x"]}]}, "Missing host"),
    ({"files": [pair("a") | {"sources": ["https://h"]}]}, "Missing path"),
    ({"files": [pair("a") | {"sources": ["https://u:p@h/x"]}]}, "without user and password"),
    ({"files": [pair("a") | {"sources": ["https://h:99999/x"]}]}, "a port"),
    ({"files": [pair("a") | {"sources": ["https://h/x?authz=1"]}]}, "a query"),
    ({"files": [pair("a") | {"sources": ["dummy://north/a%00b"]}]}, "NUL"),
    ({"files": [pair("a"), pair("a")]}, "files[0] and files[1] have the same destination"),
    (
        # Two algorithms make two jobs.
        {"files": [pair("a", checksum="ADLER32:1"), pair("./a", checksum="MD5:1")]},
        "files[0] and files[1] have the same destination",
    ),
    ({"files": [pair("a") | {"destinations": [f"{SOURCE}/b/"]}]}, "does not end with a slash"),
    ({"files": [pair("a", checksum="CRC32C:1")]}, "CRC32C is not computed here"),
    ({"files": [pair("a", checksum="ADLER32:xyz")]}, "a checksum is"),
    ({"files": [pair("a", filesize="many")]}, "a number of bytes"),
    ({"files": [pair("a", filesize=-1)]}, "a number of bytes"),
    ({"files": [pair("a", selection_strategy="luck")]}, "luck algorithm is not supported by Scheduler"),
    ({"files": [pair("a", source_tokens=["x"])]}, "files[0].source_tokens"),
    ({"files": [pair("a", wish=1)]}, "unknown key 'wish'"),
    ({"files": [pair("a"), pair("b") | {"sources": [f"{SOURCE}/1", f"{SOURCE}/2"]}]}, "only have one unique file"),
    ({"files": [pair("a")], "params": {"multihop": True}}, "multihop: this service copies without hops"),
    ({"files": [pair("a")], "params": {"archive_timeout": 60}}, "archive needs a tape API"),
    ({"files": [pair("a")], "params": {"bring_online": 60}}, "stage needs a tape API"),
    ({"files": [pair("a")], "params": {"bring_online": "soon"}}, "bring_online: a whole number"),
    ({"files": [pair("a")], "params": {"archive_timeout": 10**9}}, "archive_timeout: at most"),
    ({"staging": [pair("a")]}, "staging: submit the files as transfers with bring_online"),
    ({"files": [pair("a")], "params": {"wish": 1}}, "unknown parameter 'wish'"),
    ({"files": [pair("a")], "params": {"verify_checksum": "perhaps"}}, "verify_checksum"),
    ({"files": [pair("a")], "params": {"max_time_in_queue": "soon"}}, "max_time_in_queue"),
    ({"files": [pair("a")], "params": {"retry": {}}}, "retry: a whole number"),
    ({"files": [pair("a")], "params": {"id_generator": "deterministic"}}, "Need sid"),
    ({"files": [pair("a")], "params": {"id_generator": "deterministic", "sid": {}}}, "sid"),
)


@pytest_twisted.ensureDeferred
async def test_what_is_no_good_is_refused_by_name(service: Service) -> None:
    for body, words in _REFUSED:
        answer = await ask(service, "kim", "POST", "/jobs", body)
        assert (answer.status, answer.json["status"]) == (400, "400 Bad Request"), (body, answer.body)
        assert words in answer.json["message"], body
    deletion = await ask(service, "kim", "POST", "/jobs", {"delete": ["https://h/x"], "params": {}})
    assert (deletion.status, deletion.json["message"]) == (405, "Deletion jobs are no longer supported by FTS")
    broken = await ask(service, "kim", "POST", "/jobs", raw=b"{")
    assert (broken.status, broken.json["status"]) == (400, "400 Bad Request")


@pytest_twisted.ensureDeferred
async def test_only_an_id_that_is_taken_is_a_conflict(service: Service) -> None:
    """Clients go on with the job of that id, as if it were there."""
    server = "gsiftp://taken.example.org:2811"
    digest = hashlib.sha256(server.encode()).hexdigest()[:12]
    for name in ("gsiftp-taken.example.org", f"gsiftp-taken.example.org-{digest}"):
        body = {"name": name, "endpoints": {"DUMMY": "dummy://elsewhere"}}
        assert (await service.call("operator", "POST", "/sites", {**body, "public": True})).status == 201
    files = [{"sources": [f"{server}/x"], "destinations": ["gsiftp://north.example.org:2811/store/user/x"]}]
    refused = await ask(service, "operator", "POST", "/jobs", {"files": files, "params": {}})
    assert refused.status == 400
    assert "remove it, then submit again" in refused.json["message"]


def test_servers_of_urls() -> None:
    paths, hosts = ServersOfUrls(buckets_in_paths=True), ServersOfUrls(buckets_in_paths=False)
    for text, servers, server, path in (
        ("s3s://s3.example.org/b/k", paths, "s3s://s3.example.org:443/b", "/b/k"),
        ("s3s://b.s3.example.org/k", hosts, "s3sv://b.s3.example.org:443", "/k"),
        ("davs://D.example.org//a%20b/c", hosts, "davs://d.example.org:443", "/a b/c"),
        ("gsiftp://[::1]:2811/~/x", paths, "gsiftp://[::1]:2811", "~/x"),
        ("root://x.example.org//store/f", paths, "root://x.example.org:1094", "/store/f"),
    ):
        found = read_url(text, servers)
        assert (found.server.url, found.path, found.text) == (server, path, text)


@pytest_twisted.ensureDeferred
async def test_lists(service: Service) -> None:
    first = await submitted(service, "lena", pair("l1"))
    second = await submitted(service, "lena", pair("l2"))
    await ask(service, "lena", "DELETE", f"/jobs/{first}")
    me = (await ask(service, "lena", "GET", "/whoami")).json

    async def listed(query: str) -> list[str]:
        answer = await ask(service, "lena", "GET", f"/jobs?{query}")
        assert answer.status == 200, answer.body
        return [each["job_id"] for each in answer.json]

    assert await listed("") == [second]
    assert await listed("state_in=CANCELED,FINISHED&time_window=1") == [first]
    assert await listed("state_in=CANCELED") == []
    assert await listed("state_in=CANCELED,SUBMITTED&limit=10") == [second, first]
    assert await listed("source_se=dummy://north&vo_name=" + me["vos"][0]) == [second]
    assert await listed("source_se=dummy://east") == []
    assert await listed("dlg_id=" + me["delegation_id"]) == [second]
    assert (await ask(service, "lena", "GET", "/jobs?limit=1&fields=job_id,nothing")).json == [{"job_id": second}]
    assert (await ask(service, "lena", "GET", "/jobs?dlg_id=0")).status == 403
    assert (await ask(service, "lena", "GET", "/jobs?limit=501")).status == 400
    assert (await ask(service, "lena", "GET", "/jobs?user_dn=/CN=x")).status == 400
    assert (await ask(service, "lena", "GET", "/nowhere")).json["status"] == "404 Not Found"
    assert (await ask(service, "lena", "PATCH", "/jobs")).status == 405


@pytest_twisted.ensureDeferred
async def test_priorities_and_retries(service: Service) -> None:
    fts_id = await submitted(service, "mona", pair("m"), retry=2)
    changed = await ask(service, "mona", "POST", f"/jobs/{fts_id}", {"params": {"priority": 5}})
    assert (changed.status, changed.json["priority"]) == (200, 5)
    own = (await service.call("mona", "GET", f"/jobs?label={fts_id}")).json[0]
    assert own["priority"] == 1
    assert (await ask(service, "mona", "POST", f"/jobs/{fts_id}", {"params": {"priority": "x"}})).status == 400
    (token,) = await service.claim(own["id"])
    away = AttemptFailure(FailureScope.SOURCE, FailureCode.CONNECTION, "away")
    await service.settle(token, JobStatus.SUBMITTED, away)
    file = await _element(service, "mona", fts_id)
    assert (file["file_state"], file["reason"]) == ("SUBMITTED", "SOURCE [CONNECTION] away")
    service.skip[0] += timedelta(minutes=10)
    await service.claim(own["id"])
    retries = (await ask(service, "mona", "GET", f"/jobs/{fts_id}/files/{file['file_id']}/retries")).json
    assert [(each["attempt"], each["reason"]) for each in retries] == [(1, "SOURCE [CONNECTION] away")]
    assert (await ask(service, "mona", "GET", f"/jobs/{fts_id}/files/7/retries")).status == 404
    assert (await ask(service, "mona", "GET", f"/jobs/{fts_id}/dm")).json == []


@pytest_twisted.ensureDeferred
async def test_bans(service: Service) -> None:
    assert (await ask(service, "pat", "POST", "/ban/se", {"storage": "dummy://south"})).status == 403
    fts_id = await submitted(service, "pat", pair("p"))
    waiting = {"storage": "dummy://south", "status": "wait", "allow_submit": True, "message": "moved"}
    assert fts_id in (await ask(service, "operator", "POST", "/ban/se", waiting)).json
    (ban,) = (await ask(service, "pat", "GET", "/ban/se")).json
    assert (ban["se"], ban["status"], ban["message"]) == ("dummy://south", "WAIT_AS", "moved")
    assert (await ask(service, "pat", "GET", f"/jobs/{fts_id}/job_state")).json == "SUBMITTED"
    await submitted(service, "pat", pair("p2"))
    affected = (await ask(service, "operator", "POST", "/ban/se", {"storage": "dummy://south"})).json
    assert fts_id in affected
    assert (await ask(service, "pat", "GET", f"/jobs/{fts_id}/job_state")).json == "CANCELED"
    refused = await ask(service, "pat", "POST", "/jobs", {"files": [pair("p3")]})
    assert (refused.status, refused.json["message"]) == (403, "dummy://south is banned")
    assert (await ask(service, "operator", "DELETE", "/ban/se?storage=dummy%3A%2F%2Fsouth")).status == 204
    assert (await ask(service, "pat", "GET", "/ban/se")).json == []
    fts_id = await submitted(service, "pat", pair("p3"))

    subject = service.certificates.of("pat").dn
    itself = {"user_dn": service.certificates.of("operator").dn}
    assert (await ask(service, "operator", "POST", "/ban/dn", itself)).status == 409
    assert (await ask(service, "operator", "POST", "/ban/dn", {"user_dn": subject})).json == [fts_id]
    assert [each["dn"] for each in (await ask(service, "operator", "GET", "/ban/dn")).json] == [subject]
    assert (await ask(service, "pat", "POST", "/jobs", {"files": [pair("p4")]})).status == 403
    assert (await ask(service, "operator", "DELETE", f"/ban/dn?{urlencode({'user_dn': subject})}")).status == 204
    await submitted(service, "pat", pair("p4"))
    (activity,) = (await ask(service, "operator", "GET", "/status/hosts")).json.values()
    assert activity["active"] >= 0


@pytest_twisted.ensureDeferred
async def test_what_is_refused_before_it_is_read_has_an_error_of_fts(service: Service) -> None:
    """Too long, of nobody, of a page of another site, and no HTTP at all."""
    port = int(service.assembly.server.fts_port.url.rpartition(":")[2])
    head = b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    close = b"Content-Length: 2\r\nConnection: close\r\n"
    cases = (
        ("413 Request Entity Too Large", "alice", head % b"/jobs" + b"Content-Length: 999999999999\r\n\r\n"),
        ("401 Unauthorized", None, head % b"/jobs" + b"Content-Length: 20000\r\n\r\n"),
        ("403 Forbidden", "alice", head % b"/jobs" + close + b"Origin: https://other.example.org\r\n\r\n{}"),
        ("400 Bad Request", "alice", b"nonsense\r\n\r\n"),
        ("404 Not Found", "alice", head % b"/nothing" + close + b"\r\n{}"),
    )
    for status, user, sent in cases:
        answer = await deferToThread(raw_exchange, service, sent, user=user, port=port)
        top, _, body = answer.partition(b"\r\n\r\n")
        assert top.startswith(f"HTTP/1.1 {status[:3]} ".encode()), answer
        assert b"\r\nContent-Type: application/json\r\n" in top, answer
        found = json.loads(body)
        assert set(found) == {"status", "message"}
        assert found["status"] == status
