"""The client's side: files that fit, files that do not, and what is said about them."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from treq.client import HTTPClient
from twisted.internet import reactor
from twisted.python.failure import Failure
from twisted.web.client import Agent, ResponseNeverReceived

from pdm.workqueue.certificates.pem import to_pem
from pdm.workqueue.certificates.tls_client import ClientCredentialError, client_policy, refusal_reason


@pytest.fixture
def directory(pki: Any, tmp_path: Path) -> Path:
    """All the ways to keep a credential."""
    pki.alice.write_certificate(tmp_path / "alice.crt")
    pki.alice.write_key(tmp_path / "alice.key")
    pki.alice_proxy.write_bundle(tmp_path / "proxy")
    pki.bob.write_key(tmp_path / "bob.key")
    (tmp_path / "ca.pem").write_bytes(to_pem(pki.authority.certificate))
    return tmp_path


@pytest.mark.parametrize(
    ("ca", "certificate", "key"),
    [("trust", "alice.crt", "alice.key"), ("ca.pem", "alice.crt", "alice.key"), ("ca.pem", "proxy", None)],
)
@pytest_twisted.ensureDeferred
async def test_one_policy_serves_many_connections(
    serve: Any, directory: Path, ca: str, certificate: str, key: str | None
) -> None:
    server = serve()
    policy = client_policy(directory / ca, directory / certificate, directory / key if key else None)
    # No pool: each request is a connection of its own.
    client = HTTPClient(Agent(reactor, policy))
    peers = set()
    for host in ("localhost", "127.0.0.1", "localhost"):
        response = await client.get(f"https://{host}:{server.port}/")
        answer = json.loads(await response.content())
        assert answer["subject"] == "/DC=org/DC=test/CN=Alice Jones"
        peers.add(answer["peer"])
    assert len(peers) == 3


@pytest_twisted.ensureDeferred
async def test_no_certificate_is_a_choice(serve: Any, directory: Path) -> None:
    server = serve()
    response = await HTTPClient(Agent(reactor, client_policy(directory / "ca.pem"))).get(
        f"https://localhost:{server.port}"
    )
    assert response.code == 401
    await response.content()


@pytest_twisted.ensureDeferred
async def test_authorities_of_the_system_do_not_know_a_test_service(serve: Any) -> None:
    server = serve()
    with pytest.raises(ResponseNeverReceived) as caught:
        await HTTPClient(Agent(reactor, client_policy(None))).get(f"https://localhost:{server.port}")
    assert "not trusted" in (refusal_reason(Failure(caught.value)) or "")


def _encrypted(pki: Any) -> bytes:
    return bytes(pki.alice.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")))


def test_unfit_files_are_named(pki: Any, directory: Path, expired: dict[str, timedelta]) -> None:
    (directory / "encrypted.key").write_bytes(_encrypted(pki))
    (directory / "empty").write_bytes(b"")
    (directory / "damaged").write_bytes(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    block = b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"
    (directory / "damaged.key").write_bytes(block)
    pki.alice.proxy(**expired).write_bundle(directory / "expired")
    pki.alice.proxy(start=timedelta(hours=1)).write_bundle(directory / "future")
    for ca, certificate, key, words in (
        ("none", "proxy", None, "none cannot be read (No such file or directory)"),
        ("empty", "proxy", None, "empty holds no certificate"),
        ("ca.pem", "none", None, "none cannot be read"),
        ("ca.pem", "alice.crt", "none", "none cannot be read"),
        ("ca.pem", "alice.crt", None, "alice.crt holds no private key"),
        ("ca.pem", "alice.crt", "bob.key", "does not belong to the first certificate"),
        ("ca.pem", "alice.crt", "encrypted.key", "is encrypted with a passphrase"),
        ("ca.pem", "alice.crt", "damaged.key", "holds a damaged private key"),
        ("ca.pem", "damaged", None, "holds a damaged certificate"),
        ("ca.pem", "expired", None, "make a new proxy"),
        ("ca.pem", "future", None, "check this machine's clock"),
    ):
        with pytest.raises(ClientCredentialError) as caught:
            client_policy(directory / ca, directory / certificate, directory / key if key else None)
        assert words in str(caught.value)


def test_other_failures_are_no_refusals() -> None:
    assert refusal_reason(Failure(ConnectionRefusedError())) is None
    assert refusal_reason(Failure(ResponseNeverReceived([Failure(TimeoutError())]))) is None
