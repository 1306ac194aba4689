"""What users give the service: listed without secrets, one's own only, refused in words; and what it does to jobs."""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import timedelta
from typing import Any

import pytest
import pytest_twisted
from cryptography.hazmat.primitives.asymmetric import dsa, ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope, hint_for
from tests.http.service import Service
from tests.security import canary

_EXPIRED = AttemptFailure(FailureScope.SERVICE, FailureCode.CREDENTIAL_EXPIRED, "the token of x expired")


def jwt(**claims: object) -> str:
    parts = [{"alg": "none"}, claims]
    return (
        ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts) + ".c2ln"
    )


@pytest_twisted.ensureDeferred
async def test_a_key_is_made_shown_and_removed(service: Service) -> None:
    asked = {"kind": "ssh-key", "site": 1, "account": "alice", "label": "mine"}
    answer = await service.call("keeper", "POST", "/credentials", asked)
    assert answer.status == 201
    made = answer.json
    assert {
        "kind": "ssh-key",
        "site": 1,
        "account": "alice",
        "label": "mine",
        "valid_until": None,
    }.items() <= made.items()
    digest = hashlib.sha256(base64.b64decode(made["public_key"].split()[1])).digest()
    assert made["subject"] == "SHA256:" + base64.b64encode(digest).decode().rstrip("=")
    assert made["public_key"].startswith("ssh-ed25519 ")
    assert (await service.call("keeper", "POST", "/credentials", asked)).json == made, "asked again, the same"
    assert (await service.call("keeper", "GET", "/credentials")).json == [made]
    assert (await service.call("operator", "GET", "/credentials")).json == []
    assert (await service.call("operator", "DELETE", f"/credentials/{made['id']}")).status == 404
    assert (await service.call("keeper", "DELETE", f"/credentials/{made['id']}")).status == 204
    assert (await service.call("keeper", "DELETE", f"/credentials/{made['id']}")).status == 404
    again = (await service.call("keeper", "POST", "/credentials", asked)).json
    assert again["public_key"] != made["public_key"]


@pytest_twisted.ensureDeferred
async def test_what_is_delegated_is_listed_with_the_rest(service: Service) -> None:
    await service.give_credential("delegating")
    await service.call("delegating", "POST", "/credentials", {"kind": "token", "secret": "opaque"})
    found = (await service.call("delegating", "GET", "/credentials")).json
    assert [(each["kind"], each["site"]) for each in found] == [("proxy", None), ("token", None)]
    assert found[0]["subject"] == service.certificates.of("delegating").dn
    assert not any("secret" in each for each in found)


@pytest_twisted.ensureDeferred
async def test_a_token_has_its_expiry(service: Service) -> None:
    until = service.now() + timedelta(hours=2)
    secret = jwt(exp=int(until.timestamp()), sub="me", iss="https://issuer")
    answer = (await service.call("tokens", "POST", "/credentials", {"kind": "token", "secret": secret})).json
    assert answer["valid_until"] == f"{until:%Y-%m-%dT%H:%M:%SZ}"
    assert answer["subject"] == "me at https://issuer"
    odd = jwt(exp="soon", sub=[1])
    answer = (await service.call("tokens", "POST", "/credentials", {"kind": "token", "secret": odd})).json
    assert (answer["valid_until"], answer["subject"]) == (None, "a token without a subject")


#: Made for this test and used nowhere; the library writes such a key only with one package more.
_LOCKED = """\
-----BEGIN OPENSSH PRIVATE KEY-----
b3BlbnNzaC1rZXktdjEAAAAACmFlczI1Ni1jdHIAAAAGYmNyeXB0AAAAGAAAABDbFAM+FW
wZCv937eVggug/AAAAEAAAAAEAAAAzAAAAC3NzaC1lZDI1NTE5AAAAIKHxU8FB7to8rGL3
kxVBFKAzTjtn9kkMFr3+ifafUpXPAAAAkIhtu3J4kKnLN7uQDawNz6bZQluXUmqn/fPYnS
yDDVbIdKzr/IdcTh436gkqU1gZcwmndiqY6AYUuwBTSQGQwEeywEitH2h4jBgOUk9ovEQh
5GM2Kg+UBzRXxGoJB8aUkNZnZXcRKNXVhmpgLLqtCc7ll5txRC1aY3r7a5Zf4Agcbi0bt1
82d1EHRV9C9c68oQ==
-----END OPENSSH PRIVATE KEY-----
"""


def _private(key: Any, *, locked: bool = False, form: PrivateFormat = PrivateFormat.OpenSSH) -> str:
    encryption = BestAvailableEncryption(b"secret") if locked else NoEncryption()
    return key.private_bytes(Encoding.PEM, form, encryption).decode()


@pytest.fixture(scope="module")
def keys() -> dict[str, tuple[str, str]]:
    """What is sent → a word of the refusal; empty for what is taken."""
    curve = ec.generate_private_key(ec.SECP256R1())
    small = rsa.generate_private_key(65537, 1024)
    public = curve.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    return {
        "ecdsa": (_private(curve), ""),
        "PKCS#8": (_private(curve, form=PrivateFormat.PKCS8), ""),
        "byte order mark": ("\ufeff" + _private(curve), ""),
        "lines of Windows": (_private(curve).replace("\n", "\r\n"), ""),
        "UTF-16": (_private(curve).encode("utf-16-le").decode("latin-1"), "no plain text"),
        "locked": (_LOCKED, "passphrase"),
        "locked, of Windows": ("\ufeff" + _LOCKED.replace("\n", "\r\n"), "passphrase"),
        "locked PKCS#8": (_private(curve, locked=True, form=PrivateFormat.PKCS8), "passphrase"),
        "small": (_private(small), "1024 bits"),
        "dsa": (_private(dsa.generate_private_key(1024), form=PrivateFormat.PKCS8), "DSA"),
        "secp256k1": (_private(ec.generate_private_key(ec.SECP256K1()), form=PrivateFormat.PKCS8), "curve"),
        "public": (public, "public key"),
        "words": ("hello", "no private key"),
        "damaged": (_private(curve).replace("b3BlbnNzaC1r", "b3BlbnNzaC1s"), "damaged"),
    }


@pytest_twisted.ensureDeferred
async def test_uploaded_keys_are_checked(service: Service, keys: dict[str, tuple[str, str]]) -> None:
    for what, (text, words) in keys.items():
        answer = await service.call("uploader", "POST", "/credentials", {"kind": "ssh-key", "secret": text})
        if words:
            assert (answer.status, answer.problem) == (400, "invalid-input $.secret"), what
            assert words in answer.json["detail"], what
        else:
            assert answer.status == 201, (what, answer.body)
            assert answer.json["public_key"].startswith("ecdsa-sha2-nistp256 ")


@pytest_twisted.ensureDeferred
async def test_accounts_of_windows_domains(service: Service) -> None:
    asked = {"kind": "ssh-key", "account": "DOM\\some.user"}
    answer = await service.call("windows", "POST", "/credentials", asked)
    assert (answer.status, answer.json["account"]) == (201, "DOM\\some.user")
    refused = await service.call("windows", "POST", "/credentials", {"kind": "ssh-key", "account": "DOM\\a b"})
    assert refused.problem == "invalid-input $.account"
    assert "DOMAIN\\alice" in refused.json["detail"]
    assert "regex" not in refused.json["detail"]


@pytest_twisted.ensureDeferred
async def test_s3_keys_are_sealed_and_shown_by_their_id(service: Service) -> None:
    secret = canary.watched("canary/secret/4711")
    asked = {"kind": "s3-key", "access_key": "AKIA4711", "secret": secret, "label": "mine"}
    answer = await service.call("s3 user", "POST", "/credentials", asked)
    assert (answer.status, answer.json["subject"], answer.json["valid_until"]) == (201, "AKIA4711", None)
    assert secret not in answer.body.decode()


@pytest_twisted.ensureDeferred
async def test_temporary_s3_keys_have_an_end(service: Service) -> None:
    token = canary.watched("canary+session/token==")
    asked = {"kind": "s3-key", "access_key": "ASIA4711", "secret": "x", "session_token": token}
    answer = await service.call(
        "sts user", "POST", "/credentials", {**asked, "valid_until": "2099-01-01T01:00:00+01:00"}
    )
    assert (answer.status, answer.json["valid_until"]) == (201, "2099-01-01T00:00:00Z")
    assert token not in answer.body.decode()
    answer = await service.call("sts user", "POST", "/credentials", asked)
    assert (answer.status, answer.json["valid_until"]) == (201, None)


_BAD_CREDENTIALS: list[tuple[dict[str, Any], str]] = [
    ({}, "$.kind"),
    ({"kind": "proxy"}, "$.kind"),
    ({"kind": 1}, "$.kind"),
    ({"kind": "token"}, "$.secret"),
    ({"kind": "token", "secret": ""}, "$.secret"),
    ({"kind": "token", "secret": 5}, "$.secret"),
    ({"kind": "token", "secret": "a b"}, "$.secret"),
    ({"kind": "token", "secret": "x\n"}, "$.secret"),
    ({"kind": "token", "secret": "é"}, "$.secret"),
    ({"kind": "token", "secret": "x" * 16385}, "$.secret"),
    ({"kind": "token", "secret": jwt(exp=1)}, "$.secret"),
    ({"kind": "token", "secret": "x", "site": 77}, "$.site"),
    ({"kind": "token", "secret": "x", "site": -1}, "$.site"),
    ({"kind": "token", "secret": "x", "site": "9" * 19}, "$.site"),
    ({"kind": "token", "secret": "x", "site": "one"}, "$.site"),
    ({"kind": "token", "secret": "x", "account": "me"}, "$.account"),
    ({"kind": "token", "secret": "x", "label": "a\nb"}, "$.label"),
    ({"kind": "token", "secret": "x", "label": ""}, "$.label"),
    ({"kind": "s3-key", "access_key": "x"}, "$.secret"),
    ({"kind": "s3-key", "secret": "x"}, "$.access_key"),
    ({"kind": "s3-key", "access_key": "a/b", "secret": "x"}, "$.access_key"),
    ({"kind": "s3-key", "access_key": "x", "secret": "a b"}, "$.secret"),
    ({"kind": "s3-key", "access_key": "x", "secret": "x", "account": "me"}, "$.account"),
    ({"kind": "s3-key", "access_key": "x", "secret": "x", "session_token": "a b"}, "$.session_token"),
    ({"kind": "s3-key", "access_key": "x", "secret": "x", "valid_until": "2020-01-01T00:00:00Z"}, "$.valid_until"),
    ({"kind": "s3-key", "access_key": "x", "secret": "x", "valid_until": "2099-01-01T00:00:00"}, "$.valid_until"),
    ({"kind": "token", "secret": "x", "session_token": "x"}, "$.session_token"),
    ({"kind": "ssh-key", "account": "-oProxyCommand=x"}, "$.account"),
    ({"kind": "ssh-key", "account": "a\n"}, "$.account"),
    ({"kind": "ssh-key", "account": "a b"}, "$.account"),
    ({"kind": "ssh-key", "account": "a" * 65}, "$.account"),
    ({"kind": "ssh-key", "colour": "red"}, "$.colour"),
]
_LOGON: dict[str, Any] = {"username": "me", "password": "long enough"}
_BAD_LOGONS: list[tuple[dict[str, Any], str]] = [
    ({"username": "me"}, "$.password"),
    ({"password": "long enough"}, "$.username"),
    *((_LOGON | {"username": bad}, "$.username") for bad in ("", "-S", "a\nb", "a\n", "é", 1, None, "x" * 256)),
    *((_LOGON | {"password": bad}, "$.password") for bad in ("", "a\nb", "a\n", "a\0", 1, None, "x" * 1025)),
    *((_LOGON | {"lifetime": bad}, "$.lifetime") for bad in (0, -1, 1.5, "1h", 10**9, True)),
    (_LOGON | {"colour": "red"}, "$.colour"),
]


@pytest_twisted.ensureDeferred
async def test_bad_bodies_are_refused_by_their_place(service: Service) -> None:
    for path, cases in (("/credentials", _BAD_CREDENTIALS), ("/sites/1/session", _BAD_LOGONS)):
        for body, place in cases:
            answer = await service.call("bad giver", "POST", path, body)
            assert (answer.status, answer.problem) == (400, f"invalid-input {place}"), (body, answer.body)
        for raw in (b"", b"[]", b"null", b"kind=token", b"\xff", b"[" * 100_000):
            answer = await service.call("bad giver", "POST", path, raw=raw)
            assert (answer.status, answer.problem) == (400, "invalid-input $"), raw[:20]
    assert (await service.call("bad giver", "GET", "/credentials")).json == []


@pytest_twisted.ensureDeferred
async def test_sessions_of_sites_without_a_server_or_that_are_not_there(service: Service) -> None:
    assert (await service.call("wanderer", "POST", "/sites/1/session", _LOGON)).problem == "conflict"
    assert (await service.call("wanderer", "GET", "/sites/1/session")).json is None
    assert (await service.call("wanderer", "DELETE", "/sites/1/session")).status == 204
    for method in ("GET", "POST", "DELETE"):
        body = _LOGON if method == "POST" else None
        assert (await service.call("wanderer", method, "/sites/77/session", body)).problem == "not-found"


@pytest_twisted.ensureDeferred
async def test_a_new_credential_lets_go_on_what_its_site_holds(service: Service) -> None:
    jobs = []
    for site in (1, 2):
        jobs.append(job := await service.submit("waiting", src_siteid=site))
        (token,) = await service.claim(job["id"])
        service.skip[0] += timedelta(seconds=10)
        await service.settle(token, JobStatus.HELD, _EXPIRED, counts=False)
    first = (await service.call("waiting", "GET", f"/jobs/{jobs[0]['id']}")).json
    assert first["hold"] == {
        "count": 1,
        "code": "CREDENTIAL_EXPIRED",
        "reason": _EXPIRED.message,
        "hint": hint_for(_EXPIRED.code, JobType.LIST),
        "by": "service",
    }
    await service.call("waiting", "POST", "/credentials", {"kind": "token", "secret": "abc", "site": 2})
    held = [(await service.call("waiting", "GET", f"/jobs/{job['id']}")).json["held"] for job in jobs]
    assert held == [1, 0]


@pytest_twisted.ensureDeferred
async def test_a_credential_that_came_meanwhile_lets_an_element_go_on(service: Service) -> None:
    """The new one was there before the element was HELD: nothing would ever resume it."""
    job = await service.submit("quick")
    (token,) = await service.claim(job["id"])
    await service.call("quick", "POST", "/credentials", {"kind": "token", "secret": "abc"})
    await service.settle(token, JobStatus.HELD, _EXPIRED, counts=False)
    seen = (await service.call("quick", "GET", f"/jobs/{job['id']}")).json
    assert (seen["held"], seen["num_submitted"]) == (0, 1)


@pytest_twisted.ensureDeferred
async def test_a_short_credential_is_warned_of(service: Service) -> None:
    body = {"src_siteid": 1, "src_filepath": "a"}
    await service.give_credential("hurried", timedelta(seconds=900))
    job = (await service.call("hurried", "POST", "/list", body)).json
    assert "resume automatically" in job["warnings"][0]
    await service.give_credential("hurried", timedelta(hours=2))
    assert "warnings" not in (await service.call("hurried", "POST", "/list", body)).json
