"""Receipts as they are streamed, and what their verification finds."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_twisted
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from joserfc import jws
from joserfc.jwk import RSAKey
from twisted.internet.defer import Deferred

from pdm.workqueue.certificates.authority import Credential
from pdm.workqueue.certificates.pem import TlsIdentity
from pdm.workqueue.certificates.signatures import sign_detached
from pdm.workqueue.certificates.trust import Trust
from pdm.workqueue.client.receipts import Receipt, ReceiptInvalidError, receipt_trust, verify_receipt
from pdm.workqueue.domain.enums import JobStatus, JobType, PlannedAction
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import NewElement
from pdm.workqueue.domain.planning import Skipped
from pdm.workqueue.http import receipts, transactions
from pdm.workqueue.store import listings, selected_retries
from pdm.workqueue.wire.receipts import SIGNATURE_MEMBER
from pdm.workqueue.WorkqueueDB import Job
from tests.http.service import Certificates, Service

_DENIED = AttemptFailure(FailureScope.DESTINATION, FailureCode.PERMISSION_DENIED, "550 denied")


async def _partly(service: Service, user: str) -> int:
    """A COPY job with a file that was copied, one that was there, one that failed, and one left out."""
    job = await service.submit(user, "/copy")
    (listing,) = await service.claim(job["id"])
    await service.extend(listing, *(NewElement(JobType.COPY, f"data/{n}", f"copy/{n}", size=10) for n in "abc"))
    skipped = Skipped("data/pipe", "other", "SPECIAL_FILE", "a pipe")
    assert await service.database.run("note", listings.add_notes, listing, [skipped])
    await service.settle(listing, skipped=1)
    first, second, third = await service.claim(job["id"])
    await service.settle(first, checksum="adler32:00000001", transferred=10)
    await service.settle(second, already_there=True, transferred=10)
    await service.settle(third, JobStatus.FAILED, _DENIED)
    return int(job["id"])


@pytest.fixture(scope="module")
def trust(service: Service) -> Trust:
    return receipt_trust(service.directory / "trust")


@pytest.fixture(scope="module")
def written(service: Service) -> bytes:
    """A receipt."""

    async def get() -> bytes:
        number = await _partly(service, "ada")
        answer = await service.call("ada", "GET", f"/jobs/{number}/receipt")
        assert answer.status == 200
        assert answer.header("Content-Type") == "application/x-ndjson"
        return answer.body

    content: bytes = pytest_twisted.blockon(Deferred.fromCoroutine(get()))
    return content


def _verify(content: bytes, trust: Trust, now: datetime | None = None) -> Receipt:
    return verify_receipt(io.BytesIO(content), trust, now)


def test_a_receipt_says_what_became_of_every_file(written: bytes, trust: Trust) -> None:
    job, listing, *elements, skipped, end = map(json.loads, written.splitlines())
    assert job["user"] == "/DC=org/DC=test/CN=ada"
    assert job["source"] == {"id": 1, "name": "NORTH", "url": "dummy://north"}
    assert (job["job"]["status"], job["final"], job["service"]["name"]) == ("FAILED", True, "localhost")
    assert (listing["element"], listing["type"], listing["outcome"]) == (0, "LIST", "done")
    assert [(each["source"], each["destination"], each["size"], each["outcome"]) for each in elements] == [
        ("data/a", "copy/a", 10, "done"),
        ("data/b", "copy/b", 10, "already there"),
        ("data/c", "copy/c", 10, "failed"),
    ]
    assert elements[0]["checksum"] == "adler32:00000001"
    reason = elements[2]["reason"]
    assert (reason["scope"], reason["code"], reason["retryable"]) == ("destination", "PERMISSION_DENIED", False)
    assert reason["hint"]
    for each in elements:
        assert each["attempts"] == 1
        assert datetime.fromisoformat(each["start"]) < datetime.fromisoformat(each["end"])
    assert (skipped["path"], skipped["outcome"], skipped["code"]) == ("data/pipe", "skip", "SPECIAL_FILE")
    assert (end["lines"], end["elements"], end["skipped"], end["bytes"]) == (6, 4, 1, 20)
    assert end["outcomes"] == {"already there": 1, "done": 2, "failed": 1}
    receipt = _verify(written, trust)
    assert receipt.signer.names == ["localhost", "127.0.0.1"]
    assert receipt.signer.ended_at is None
    assert receipt.end.final


def _without_line(content: bytes, number: int) -> bytes:
    lines = content.splitlines(keepends=True)
    return b"".join(lines[:number] + lines[number + 1 :])


def _with_line(content: bytes, number: int) -> bytes:
    lines = content.splitlines(keepends=True)
    return b"".join([*lines[:number], lines[number], *lines[number:]])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda all_: all_.replace(b'"data/a"', b'"data/x"'), "a line was changed"),
        (lambda all_: all_.replace(b'"outcome":"failed"', b'"outcome":"done"'), "a line was changed"),
        (lambda all_: all_.replace(b"CN=ada", b"CN=bob"), "a line was changed"),
        (lambda all_: all_.replace(b'{"line":"element"', b'{"line":"elemens"', 1), "line 2 is damaged"),
        (lambda all_: all_.replace(b'{"line":"job"', b'{"line":"job",,', 1), "line 1 is damaged"),
        (lambda all_: _without_line(all_, 3), "1 lines are missing.*line 4 has element 3, not 2"),
        (lambda all_: _without_line(all_, 5), "1 lines are missing"),
        (lambda all_: _without_line(all_, 0), "the first line, about the job, is missing"),
        (lambda all_: _with_line(all_, 3), "1 lines were added.*line 5 has element 2, not 3"),
        (lambda all_: _with_line(all_, 6), "comes after the signed last line"),
        (lambda all_: _with_line(all_, 0), "line 2 is about the job"),
        (lambda all_: _without_line(all_, 6), "truncated: the signed last line is missing"),
        (lambda all_: all_[:-200], "truncated: it ends in the middle of line 7"),
        (lambda all_: all_[:900], "truncated: it ends in the middle of line"),
        (lambda all_: b"", "truncated"),
        (lambda all_: all_.replace(b'"bytes":20', b'"bytes":30'), "last line or its certificate was changed"),
        (lambda all_: all_[:-30] + b"AAAA" + all_[-26:], "the last line or its certificate was changed"),
        (lambda all_: all_.rpartition(SIGNATURE_MEMBER)[0] + b"}\n", "has no signature"),
        (lambda all_: all_.rpartition(SIGNATURE_MEMBER)[0] + SIGNATURE_MEMBER + b'a..b"}\n', "is damaged"),
        (lambda all_: b'{"line":"job"' + b" " * 300_000, "line 1 is longer than any of a receipt"),
        (lambda all_: b"line,number\njob,1\n", "only that form is signed"),
    ],
)
def test_what_was_changed_is_found(written: bytes, trust: Trust, change: Callable[[bytes], bytes], words: str) -> None:
    with pytest.raises(ReceiptInvalidError, match=words):
        _verify(change(written), trust)


def _signed_by(content: bytes, credential: Any) -> bytes:
    """The receipt as somebody else would sign it."""
    *before, last = content.splitlines(keepends=True)
    signed = last.rpartition(SIGNATURE_MEMBER)[0] + b"}"
    identity = TlsIdentity(credential.certificate, credential.key, tuple(credential.chain))
    return b"".join(before) + signed[:-1] + SIGNATURE_MEMBER + sign_detached(identity, signed).encode() + b'"}\n'


def test_who_may_sign(written: bytes, trust: Trust, certificates: Certificates) -> None:
    authority = certificates.authority
    _verify(_signed_by(written, certificates.host), trust)
    ended = authority.host(["localhost"], start=timedelta(days=-2), lifetime=timedelta(days=1))
    stranger = type(authority).create(authority.dn).host(["localhost"])
    other = authority.host(["other.example.org"])
    stolen = Credential(certificates.host.certificate, stranger.key)
    for credential, words in (
        (certificates.of("mallory"), "not that of a service"),
        (certificates.host.proxy(), "not that of a service"),
        (stranger, "not accepted: its authority is not trusted here|bad signature"),
        (other, "is for other.example.org, not for the service localhost"),
        (ended, "was not valid when it signed"),
        (stolen, "the last line or its certificate was changed"),
    ):
        with pytest.raises(ReceiptInvalidError, match=words):
            _verify(_signed_by(written, credential), trust)


def test_a_certificate_may_end_after_it_has_signed(written: bytes, trust: Trust) -> None:
    """The time is the signer's word, as documented; who verifies gets to know it."""
    later = datetime.now(UTC) + timedelta(days=400)
    receipt = _verify(written, trust, later)
    assert receipt.signer.ended_at is not None
    assert receipt.signer.ended_at < later
    with pytest.raises(ReceiptInvalidError, match="in the future"):
        _verify(written, trust, datetime.now(UTC) - timedelta(hours=1))


def test_a_revoked_certificate_proves_nothing(
    written: bytes, service: Service, certificates: Certificates, tmp_path: Any
) -> None:
    certificates.authority.write_trust(tmp_path)
    crl = certificates.authority.crl([certificates.host.serial])
    certificates.authority.write_crl(tmp_path, crl)
    with pytest.raises(ReceiptInvalidError, match="certificate revoked"):
        _verify(written, receipt_trust(tmp_path))
    # A list of today says nothing against what was signed before it.
    certificates.authority.write_crl(tmp_path, certificates.authority.crl([1], start=timedelta(seconds=-1)))
    _verify(written, receipt_trust(tmp_path))


@pytest.mark.parametrize(
    ("make", "algorithm"),
    [
        (lambda: ec.generate_private_key(ec.SECP256R1()), "ES256"),
        (lambda: ec.generate_private_key(ec.SECP384R1()), "ES384"),
        (lambda: ec.generate_private_key(ec.SECP521R1()), "ES512"),
        (ed25519.Ed25519PrivateKey.generate, "Ed25519"),
    ],
)
def test_host_keys_of_every_kind(
    written: bytes,
    trust: Trust,
    certificates: Certificates,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], Any],
    algorithm: str,
) -> None:
    """The algorithm is that of the certificate's key, never one that the signature chooses."""
    monkeypatch.setattr("pdm.workqueue.certificates.authority.new_key", make)
    host = certificates.authority.host(["localhost"])
    signed = _signed_by(written, host)
    _verify(signed, trust)
    head = signed.rpartition(SIGNATURE_MEMBER)[2].partition(b".")[0]
    assert json.loads(base64.urlsafe_b64decode(head + b"=="))["alg"] == algorithm


@pytest_twisted.ensureDeferred
async def test_a_receipt_of_a_job_that_runs_is_not_final(service: Service, trust: Trust) -> None:
    job = await service.submit("grace", "/copy")
    (listing,) = await service.claim(job["id"])
    await service.extend(listing, NewElement(JobType.COPY, "data/a", "copy/a", size=10))
    answer = await service.call("grace", "GET", f"/jobs/{job['id']}/receipt")
    receipt = _verify(answer.body, trust)
    assert not receipt.end.final
    assert receipt.end.outcomes == {"running": 1, "waiting": 1}


@pytest_twisted.ensureDeferred
async def test_pages_and_changes_between_them(service: Service, trust: Trust, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transactions, "PAGE_SIZE", 2)
    monkeypatch.setattr(receipts, "PAGE_SIZE", 2)
    number = await service.copied("paged", *"abcdefg", status=JobStatus.FAILED)
    answer = await service.call("paged", "GET", f"/jobs/{number}/receipt")
    receipt = _verify(answer.body, trust)
    assert (receipt.end.elements, receipt.end.final) == (8, True)
    page = transactions.receipt_page

    def retried_meanwhile(session: Any, job_id: int, scope: int | None, after: int | None) -> Any:
        if after == 3:
            transactions.retry(session, job_id, None, service.now())
        return page(session, job_id, scope, after)

    monkeypatch.setattr(transactions, "receipt_page", retried_meanwhile)
    monkeypatch.setattr(service.database, "read", service.database.run)
    answer = await service.call("paged", "GET", f"/jobs/{number}/receipt")
    receipt = _verify(answer.body, trust)
    assert receipt.job.final
    assert not receipt.end.final
    assert receipt.end.outcomes == {"done": 1, "failed": 3, "waiting": 4}


@pytest_twisted.ensureDeferred
async def test_a_table_for_spreadsheets(service: Service) -> None:
    number = await service.copied("tabular", "=cmd()", "b,c", 'd"\n')
    answer = await service.call("tabular", "GET", f"/jobs/{number}/receipt", Accept="text/csv;q=0.9, text/html")
    assert answer.header("Content-Type") == "text/csv"
    rows = list(csv.DictReader(io.StringIO(answer.body.decode(), newline="")))
    assert [row["line"] for row in rows] == ["job", *["element"] * 4, "end"]
    assert [row["source"] for row in rows[2:5]] == ["data/=cmd()", "data/b,c", 'data/d"\n']
    assert rows[5]["message"] == "4 done; 0 skipped"


@pytest_twisted.ensureDeferred
async def test_no_cell_of_a_table_is_a_formula(service: Service) -> None:
    job = await service.submit("formula", "/copy", src_filepath="=1+2", dst_filepath="@x")
    answer = await service.call("formula", "GET", f"/jobs/{job['id']}/receipt", Accept="text/csv")
    row = next(csv.DictReader(io.StringIO(answer.body.decode(), newline="")))
    assert (row["source"], row["destination"]) == ("'=1+2", "'@x")


@pytest_twisted.ensureDeferred
async def test_media_types(service: Service) -> None:
    number = await service.copied("picky", "a")
    for accept, expected in (
        ("*/*", "application/x-ndjson"),
        ("application/*", "application/x-ndjson"),
        ("text/*", "text/csv"),
        ("application/x-ndjson;q=0.1, text/csv", "text/csv"),
    ):
        answer = await service.call("picky", "GET", f"/jobs/{number}/receipt", Accept=accept)
        assert (answer.status, answer.header("Content-Type")) == (200, expected)
    for accept in ("text/html", "application/json", "nonsense"):
        answer = await service.call("picky", "GET", f"/jobs/{number}/receipt", Accept=accept)
        assert (answer.status, answer.problem) == (406, "not-acceptable Accept")
    answer = await service.call("other", "GET", f"/jobs/{number}/receipt")
    assert (answer.status, answer.problem) == (404, "job-not-found")


@pytest_twisted.ensureDeferred
async def test_failures_in_groups(service: Service) -> None:
    job = await service.submit("failing", "/copy")
    (listing,) = await service.claim(job["id"])
    await service.extend(listing, *(NewElement(JobType.COPY, f"data/{n}", f"copy/{n}") for n in range(6)))
    await service.settle(listing)
    tokens = await service.claim(job["id"])
    mismatch = AttemptFailure(FailureScope.TRANSFER, FailureCode.CHECKSUM_MISMATCH, "other bytes")
    expired = AttemptFailure(FailureScope.SOURCE, FailureCode.CREDENTIAL_EXPIRED, "ended")
    await service.settle(tokens[0])
    await service.settle(tokens[1], JobStatus.FAILED, mismatch)
    for token in tokens[2:5]:
        await service.settle(token, JobStatus.FAILED, _DENIED)
    await service.settle(tokens[5], JobStatus.HELD, expired, counts=False)
    answer = await service.call("failing", "GET", f"/jobs/{job['id']}/errors")
    groups = [
        (each["code"], each["scope"], each["count"], each["held"], each["retryable"], each["element"])
        for each in answer.json
    ]
    assert groups == [
        ("PERMISSION_DENIED", "destination", 3, 0, False, 3),
        ("CHECKSUM_MISMATCH", "transfer", 1, 0, True, 2),
        ("CREDENTIAL_EXPIRED", "source", 1, 1, True, 6),
    ]
    assert answer.json[0]["dst_filepath"] == "copy/2"
    assert answer.json[0]["message"] == "550 denied"
    path = f"/jobs/{job['id']}/elements"
    for query, expected in (
        ("code=PERMISSION_DENIED&status=FAILED", [3, 4, 5]),
        ("code=permission_denied,CHECKSUM_MISMATCH&limit=2", [2, 3]),
        ("code=NOT_FOUND", []),
    ):
        assert [each["id"] for each in (await service.call("failing", "GET", f"{path}?{query}")).json] == expected
    answer = await service.call("failing", "GET", f"{path}?code=WRONG")
    assert (answer.status, answer.problem) == (400, "invalid-input ?code")
    assert (await service.call("other", "GET", f"/jobs/{job['id']}/errors")).status == 404


def test_the_signature_is_a_standard_one(written: bytes, certificates: Certificates) -> None:
    """RFC 7515, appendix F: whoever puts the payload in gets a compact JWS."""
    signed, _, signature = written.splitlines()[-1].rpartition(SIGNATURE_MEMBER)
    payload = base64.urlsafe_b64encode(signed + b"}").rstrip(b"=").decode()
    head, _, tail = signature[:-2].decode().split(".")
    registry = jws.JWSRegistry(algorithms=["RS256"])
    registry.max_header_length = 10_000
    key = RSAKey.import_key(certificates.host.certificate_pem())
    assert jws.deserialize_compact(f"{head}.{payload}.{tail}", key, registry=registry).payload == signed + b"}"


@pytest_twisted.ensureDeferred
async def test_selected_failures_are_retried(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selected_retries, "CHANGED_AT_ONCE", 2)
    job = await service.submit("choosy", "/copy")
    (listing,) = await service.claim(job["id"])
    await service.extend(listing, *(NewElement(JobType.COPY, f"data/{n}", f"copy/{n}") for n in range(8)))
    await service.settle(listing)
    mismatch = AttemptFailure(FailureScope.TRANSFER, FailureCode.CHECKSUM_MISMATCH, "other bytes")
    timeout = AttemptFailure(FailureScope.SOURCE, FailureCode.TIMEOUT, "too slow")
    tokens = await service.claim(job["id"])
    for token, failure in zip(tokens, [_DENIED] * 3 + [mismatch] * 4 + [timeout], strict=True):
        await service.settle(token, JobStatus.FAILED, failure)
    path = f"/jobs/{job['id']}/retry"

    async def retried(query: str) -> tuple[int, dict[str, int], int]:
        answer = (await service.call("choosy", "POST", f"{path}?{query}")).json
        assert answer["num_submitted"] + answer["num_failed"] + answer["num_done"] == 9, query
        assert (await service.job(job["id"])).counters.failed == answer["num_failed"]
        return answer["retried"], answer["left"], answer["num_failed"]

    assert await retried("force=0&code=PERMISSION_DENIED") == (0, {"PERMISSION_DENIED": 3}, 8)
    assert await retried("code=TIMEOUT") == (1, {}, 7)
    # More than one transaction changes at once.
    assert await retried("force=0") == (4, {"PERMISSION_DENIED": 3}, 3)
    tokens = await service.claim(job["id"])
    assert len(tokens) == 5
    assert {token.attempt for token in tokens} == {2}
    for token in tokens:
        await service.settle(token)
    assert (await service.job(job["id"])).status is JobStatus.FAILED
    assert (await retried("code=PERMISSION_DENIED,TIMEOUT"))[0] == 3
    answer = await service.call("choosy", "POST", f"{path}?code=WRONG")
    assert (answer.status, answer.problem) == (400, "invalid-input ?code")
    assert (await service.call("other", "POST", f"{path}?force=0")).status == 404
    # The retry of the reference knows nothing of this.
    assert "left" not in (await service.call("choosy", "POST", path)).json


@pytest_twisted.ensureDeferred
async def test_cancelled_elements_are_retried_with_what_can_be_helped(service: Service) -> None:
    job = await service.submit("cancelling", "/copy")
    await service.call("cancelling", "DELETE", f"/jobs/{job['id']}")
    answer = (await service.call("cancelling", "POST", f"/jobs/{job['id']}/retry?force=0")).json
    assert (answer["retried"], answer["status"]) == (1, "SUBMITTED")


@pytest_twisted.ensureDeferred
async def test_the_receipt_of_a_dry_run_is_the_plan(service: Service, trust: Trust) -> None:
    job = await service.submit("planner", "/copy")
    dry = sa.update(Job).where(Job.id == job["id"]).values(extra_opts={"sync": "size", "dry_run": True})
    await service.database.run("plan", lambda session: session.execute(dry).close())
    (listing,) = await service.claim(job["id"])
    actions = (PlannedAction.COPY, PlannedAction.OVERWRITE, PlannedAction.SAME)
    planned = [NewElement(JobType.COPY, f"data/{a}", f"copy/{a}", 10, planned=a, done=True) for a in actions]
    planned.append(NewElement(JobType.REMOVE, "copy/x", "copy/x", planned=PlannedAction.DELETE, done=True))
    await service.extend(listing, *planned)
    await service.settle(listing)
    answer = await service.call("planner", "GET", f"/jobs/{job['id']}/receipt")
    lines = [json.loads(line) for line in answer.body.splitlines()]
    assert [line["outcome"] for line in lines[2:-1]] == ["would copy", "would overwrite", "same", "would delete"]
    assert [line["planned"] for line in lines[2:-1]] == ["COPY", "OVERWRITE", "SAME", "DELETE"]
    receipt = _verify(answer.body, trust)
    assert (receipt.end.bytes, receipt.end.final) == (0, True)
