"""Delegation of a proxy: the key stays, the client signs, jobs go on."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest_twisted
from cryptography import x509
from twisted.internet.defer import Deferred, gatherResults

from pdm.workqueue.certificates.delegation import sign_request
from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.execution.credentials import PROXY, vault_context
from pdm.workqueue.store import credentials
from tests.http.service import Service


async def _place(service: Service, user: str) -> str:
    return "/delegation/" + (await service.call(user, "GET", "/whoami")).json["delegation_id"]


def _signed(service: Service, user: str, request: bytes, lifetime: timedelta = timedelta(hours=3)) -> bytes:
    bundle: Path = service.directory / "signer.pem"
    service.certificates.of(user).write_bundle(bundle)
    return sign_request(request, bundle, None, lifetime)


@pytest_twisted.ensureDeferred
async def test_the_whole_way(service: Service) -> None:
    place = await _place(service, "giver")
    assert (await service.call("giver", "GET", place)).json is None
    request = await service.call("giver", "GET", f"{place}/request")
    assert request.header("Content-Type").startswith("text/plain")
    assert x509.load_pem_x509_csr(request.body).is_signature_valid
    assert (await service.call("giver", "GET", f"{place}/request")).body == request.body, "asked again, the same"

    wakes = service.events["wake"]
    answer = await service.call("giver", "PUT", f"{place}/credential", raw=_signed(service, "giver", request.body))
    assert answer.status == 201
    assert answer.json["subject"] == service.certificates.of("giver").dn
    assert service.events["wake"] == wakes + 1
    assert (await service.call("giver", "GET", place)).json == answer.json
    me = (await service.call("giver", "GET", "/whoami")).json
    assert me["credential_valid_until"] == answer.json["termination_time"]
    assert (await service.call("giver", "POST", "/list", {"src_siteid": 1, "src_filepath": "a"})).status == 200
    assert (await service.call("giver", "GET", f"{place}/request")).body != request.body, "a key is used once"

    assert (await service.call("giver", "DELETE", place)).status == 204
    assert (await service.call("giver", "DELETE", place)).status == 204
    assert (await service.call("giver", "GET", place)).json is None
    assert (await service.call("giver", "POST", "/list", {"src_siteid": 1, "src_filepath": "a"})).status == 409


@pytest_twisted.ensureDeferred
async def test_a_proxy_for_too_long_is_refused_with_the_bound(service: Service) -> None:
    place = await _place(service, "patient")
    request = (await service.call("patient", "GET", f"{place}/request")).body
    long = _signed(service, "patient", request, timedelta(days=400))
    answer = await service.call("patient", "PUT", f"{place}/credential", raw=long)
    assert answer.status == 400
    assert "accepts at most 30d: sign a shorter one (pdm delegate --lifetime 30d)" in answer.json["detail"]
    # The request is still there to be signed for less.
    short = _signed(service, "patient", request, timedelta(days=30))
    assert (await service.call("patient", "PUT", f"{place}/credential", raw=short)).status == 201


@pytest_twisted.ensureDeferred
async def test_what_is_stored_is_sealed(service: Service) -> None:
    place = await _place(service, "sealed")
    request = await service.call("sealed", "GET", f"{place}/request")
    user_id = await service.user_id("sealed")
    pending = await service.database.read("find", credentials.find_pending, user_id)
    assert pending is not None
    assert b"PRIVATE KEY" not in pending.key
    await service.call("sealed", "PUT", f"{place}/credential", raw=_signed(service, "sealed", request.body))
    record = await service.database.read("find", credentials.find, user_id, PROXY)
    assert record is not None
    assert b"PRIVATE KEY" not in record.secret
    bundle = service.context.vault.unseal(record.secret, vault_context(user_id))
    assert bundle.count(b"BEGIN CERTIFICATE") == 2
    assert b"PRIVATE KEY" in bundle


@pytest_twisted.ensureDeferred
async def test_held_jobs_go_on(service: Service) -> None:
    job = await service.submit("resuming")
    (token,) = await service.claim(job["id"])
    failure = AttemptFailure(FailureScope.SERVICE, FailureCode.CREDENTIAL_MISSING, "none")
    await service.settle(token, JobStatus.HELD, failure, counts=False)
    place = await _place(service, "resuming")
    request = await service.call("resuming", "GET", f"{place}/request")
    await service.call("resuming", "PUT", f"{place}/credential", raw=_signed(service, "resuming", request.body))
    seen = (await service.call("resuming", "GET", f"/jobs/{job['id']}")).json
    assert (seen["held"], seen["num_submitted"]) == (0, 1)


@pytest_twisted.ensureDeferred
async def test_what_is_no_good_is_refused_in_words(service: Service) -> None:
    place = await _place(service, "wrong")
    early = await service.call("wrong", "PUT", f"{place}/credential", raw=b"x")
    assert (early.status, early.problem) == (409, "conflict")
    request = (await service.call("wrong", "GET", f"{place}/request")).body
    other = (await service.call("other", "GET", f"{await _place(service, 'other')}/request")).body
    good = _signed(service, "wrong", request)
    for body, words in (
        (b"", "no certificate"),
        (b"\xff\xfe\x00", "no certificate"),
        (b"data=" + good.replace(b" ", b"+"), "form data"),
        (request, "signing request"),
        (good[: len(good) // 3], "certificate"),
        (_signed(service, "wrong", other), "not for the key"),
        (_signed(service, "other", request), "but you are"),
        (service.certificates.of("wrong").bundle_pem(), "private key"),
    ):
        answer = await service.call("wrong", "PUT", f"{place}/credential", raw=body)
        assert (answer.status, answer.problem) == (400, "invalid-input $")
        assert words in answer.json["detail"]
    assert (await service.call("wrong", "GET", place)).json is None
    # None of it spoilt the delegation that was begun, and any content type will do: the content is what counts.
    odd = "application/x-www-form-urlencoded"
    assert (await service.call("wrong", "PUT", f"{place}/credential", raw=good, Content_Type=odd)).status == 201


@pytest_twisted.ensureDeferred
async def test_two_requests_at_once_give_one_key(service: Service) -> None:
    path = f"{await _place(service, 'hasty')}/request"
    calls = [Deferred.fromCoroutine(service.call("hasty", "GET", path)) for _ in range(3)]
    answers = await gatherResults(calls, consumeErrors=True)
    assert len({answer.body for answer in answers}) == 1
