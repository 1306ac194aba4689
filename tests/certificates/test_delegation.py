"""Delegation: a round trip with our client and with plain openssl, and all that must not be taken."""

from __future__ import annotations

import base64
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pdm.workqueue.certificates.authority import Credential
from pdm.workqueue.certificates.delegation import DelegationError, accept_proxy, new_request, sign_request
from pdm.workqueue.certificates.pem import to_pem
from pdm.workqueue.certificates.proxies import is_limited, is_proxy, sign_proxy
from pdm.workqueue.certificates.tls_client import ClientCredentialError
from pdm.workqueue.certificates.trust import Trust, read_trust

NOW = datetime.now(UTC).replace(microsecond=0)
ALICE = "/DC=org/DC=test/CN=Alice Jones"
HOURS = timedelta(hours=1)

_PROXY_EXTENSIONS = """
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature, keyEncipherment
1.3.6.1.5.5.7.1.14 = critical, DER:300c300a06082b06010505071501
"""


@pytest.fixture(scope="module", autouse=True)
def now_is_when_the_tests_run(pki: Any) -> None:
    """Tests may have been collected long before, when the certificates were not valid yet."""
    global NOW  # noqa: PLW0603 - a constant for all tests here
    NOW = datetime.now(UTC).replace(microsecond=0)


@pytest.fixture(scope="module")
def request_pems() -> tuple[bytes, bytes]:
    return new_request(ALICE)


@pytest.fixture(scope="module")
def trust(pki: Any, tmp_path_factory: pytest.TempPathFactory) -> Trust:
    directory = tmp_path_factory.mktemp("trust")
    pki.authority.write_trust(directory)
    pki.authority.write_crl(directory, pki.authority.crl([pki.bob.serial]))
    return read_trust(directory, "require")


@pytest.fixture
def files(pki: Any, tmp_path: Path) -> Path:
    pki.alice.write_certificate(tmp_path / "alice.crt")
    pki.alice.write_key(tmp_path / "alice.key")
    pki.alice_proxy.write_bundle(tmp_path / "proxy")
    return tmp_path


def proxy_for(request_pem: bytes, signer: Credential, **more: Any) -> bytes:
    """What a client sends; unlike `sign_request` it signs any request."""
    key = more.pop("public_key", None) or x509.load_pem_x509_csr(request_pem).public_key()
    start, end = more.pop("start", NOW - HOURS / 12), more.pop("end", NOW + HOURS)
    proxy = sign_proxy(signer.certificate, signer.key, key, start, end, **more)
    return to_pem(proxy, signer.certificate, *signer.chain)


@pytest.mark.parametrize(("certificate", "key"), [("alice.crt", "alice.key"), ("proxy", None)])
def test_round_trip(
    request_pems: tuple[bytes, bytes], trust: Trust, files: Path, pki: Any, certificate: str, key: str | None
) -> None:
    private, request = request_pems
    signed = sign_request(request, files / certificate, files / key if key else None, 2 * HOURS, NOW)
    taken = accept_proxy(private, signed, ALICE, trust, NOW)
    assert (taken.subject, taken.valid_until) == (ALICE, NOW + 2 * HOURS)
    # What agents get: proxy, its key, the certificates behind it, without the root.
    leaf, *behind = x509.load_pem_x509_certificates(taken.bundle_pem)
    shown = load_pem_private_key(taken.bundle_pem[len(to_pem(leaf)) :], None)
    assert shown.public_key() == leaf.public_key()
    assert [is_proxy(each) for each in (leaf, *behind)] == [True] * (len(behind)) + [False]
    assert behind[-1] == pki.alice.certificate
    assert "PRIVATE" not in repr(taken)


def test_round_trip_with_plain_openssl(request_pems: tuple[bytes, bytes], trust: Trust, files: Path, pki: Any) -> None:
    """Any client can delegate with the two commands that grid users know from FTS3."""
    private, request = request_pems
    (files / "request.pem").write_bytes(request)
    (files / "proxy.ext").write_text(_PROXY_EXTENSIONS)
    told = subprocess.run(
        ["openssl", "req", "-in", str(files / "request.pem"), "-noout", "-verify", "-subject"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "Alice Jones" in told.stdout
    subprocess.run(
        [
            "openssl", "x509", "-req", "-in", "request.pem", "-CA", "alice.crt", "-CAkey", "alice.key",
            "-set_serial", "1", "-days", "1", "-sha256", "-extfile", "proxy.ext",
            "-subj", "/DC=org/DC=test/CN=Alice Jones/CN=123", "-out", "signed.pem",
        ],
        cwd=files, check=True, capture_output=True,
    )  # fmt: skip
    body = (files / "signed.pem").read_bytes() + to_pem(pki.alice.certificate)
    taken = accept_proxy(private, body, ALICE, trust, datetime.now(UTC))
    assert taken.subject == ALICE
    assert timedelta(hours=23) < taken.valid_until - datetime.now(UTC) <= timedelta(hours=24)
    (files / "bundle").write_bytes(taken.bundle_pem)
    pki.authority.write_trust(files / "trust")
    verified = subprocess.run(
        ["openssl", "verify", "-allow_proxy_certs", "-CApath", "trust", "-untrusted", "bundle", "bundle"],
        cwd=files, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert verified.stdout == "bundle: OK\n"


def test_proxy_never_outlives_what_is_behind_it(
    request_pems: tuple[bytes, bytes], trust: Trust, files: Path, pki: Any
) -> None:
    private, request = request_pems
    signed = sign_request(request, files / "proxy", None, timedelta(days=30), NOW)
    ends = pki.alice_proxy.certificate.not_valid_after_utc
    assert accept_proxy(private, signed, ALICE, trust, NOW).valid_until == ends
    # A client that does not care: the chain ends with its first certificate all the same.
    careless = proxy_for(request, pki.alice_proxy, end=NOW + timedelta(days=30))
    assert accept_proxy(private, careless, ALICE, trust, NOW).valid_until == ends


def test_limited_stays_limited(request_pems: tuple[bytes, bytes], trust: Trust, pki: Any, tmp_path: Path) -> None:
    private, request = request_pems
    pki.alice.proxy(limited=True).write_bundle(tmp_path / "limited")
    taken = accept_proxy(private, sign_request(request, tmp_path / "limited", None, HOURS, NOW), ALICE, trust, NOW)
    assert is_limited(x509.load_pem_x509_certificates(taken.bundle_pem)[0])


def test_all_above_the_user_is_kept_but_the_root(request_pems: tuple[bytes, bytes], pki: Any, tmp_path: Path) -> None:
    private, request = request_pems
    below = pki.authority.subordinate("Below")
    dave = below.user("Dave")
    pki.authority.write_trust(tmp_path)
    taken = accept_proxy(private, proxy_for(request, dave), dave.dn, read_trust(tmp_path), NOW)
    assert len(x509.load_pem_x509_certificates(taken.bundle_pem)) == 3


def _without_proxy_extension(request: bytes, signer: Credential) -> bytes:
    name = x509.Name([*signer.certificate.subject, x509.NameAttribute(x509.NameOID.COMMON_NAME, "proxy")])
    return to_pem(_signed(request, signer, name, critical=None), signer.certificate)


def _signed(
    request: bytes, signer: Credential, name: x509.Name, critical: bool | None = True, key: Any = None
) -> x509.Certificate:
    public = x509.load_pem_x509_csr(request).public_key()
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(signer.certificate.subject)
        .public_key(public)
        .serial_number(1)
        .not_valid_before(NOW - HOURS)
        .not_valid_after(NOW + HOURS)
    )
    if critical is not None:
        extension = x509.UnrecognizedExtension(
            x509.ObjectIdentifier("1.3.6.1.5.5.7.1.14"), bytes.fromhex("300c300a06082b06010505071501")
        )
        builder = builder.add_extension(extension, critical=critical)
    return builder.sign(key or signer.key, hashes.SHA256())


def _refused_bodies(request: bytes, pki: Any) -> dict[str, tuple[bytes, str]]:
    """Name → body, a part of the words that must help."""
    alice, bob = pki.alice, pki.bob
    other_key = rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key()
    good = proxy_for(request, alice)
    name = x509.Name([*alice.certificate.subject, x509.NameAttribute(x509.NameOID.COMMON_NAME, "1")])
    ended = pki.alice.proxy(start=-2 * HOURS, lifetime=HOURS)
    return {
        "another key": (proxy_for(request, alice, public_key=other_key), "get the request again"),
        "own certificate first": (to_pem(alice.certificate) + good, "get the request again"),
        "expired": (proxy_for(request, alice, start=NOW - 2 * HOURS, end=NOW - HOURS), "expired at"),
        "of an expired proxy": (proxy_for(request, ended), "expired at"),
        "not yet valid": (proxy_for(request, alice, start=NOW + HOURS, end=NOW + 2 * HOURS), "not yet valid"),
        "somebody else's": (proxy_for(request, pki.authority.user("Eve")), "the proxy is one of"),
        "revoked": (proxy_for(request, bob), "certificate revoked"),
        "unknown authority": (proxy_for(request, pki.stranger), "not trusted here"),
        "alone": (good[: good.index(b"-----END") + 26], "behind the proxy is missing"),
        "no proxy": (_without_proxy_extension(request, alice), "no RFC 3820 proxy"),
        "subject of another": (
            to_pem(_signed(request, bob, name), bob.certificate),
            "must be that of its issuer plus one CN",
        ),
        "signed by another": (
            to_pem(_signed(request, alice, name, key=bob.key), alice.certificate),
            "bad signature",
        ),
        "form": (b"proxy=" + good.replace(b" ", b"+").replace(b"\n", b"%0A"), "form data"),
        "escaped form": (b"proxy=" + good.replace(b" ", b"%20").replace(b"\n", b"%0A"), "form data"),
        "multipart": (b'--x\r\nContent-Disposition: form-data; name="f"\r\n\r\n@proxy.pem', "form data"),
        "html": (b"<!DOCTYPE html><html><body>Login</body></html>", "HTML"),
        "json": (b'{"proxy": "..."}', "JSON"),
        "request": (request, "signing request"),
        "private key": (alice.bundle_pem(), "must never leave you"),
        "empty": (b"", "holds no certificate"),
        "text": (b"hello", "holds no certificate"),
        "damaged": (good[:200] + b"!!!!" + good[204:], "cannot be read"),
        "cut": (good[:300], "cannot be read"),
        "huge": (good + b"x" * (1 << 20), "bytes"),
        "crowd": (good + to_pem(alice.certificate) * 20, "certificates"),
    }


_NAMES = (
    "another key", "own certificate first", "expired", "of an expired proxy", "not yet valid", "somebody else's",
    "revoked", "unknown authority", "alone", "no proxy", "subject of another", "signed by another", "form",
    "escaped form", "multipart", "html", "json", "request", "private key", "empty", "text", "damaged", "cut", "huge",
    "crowd",
)  # fmt: skip


@pytest.fixture(scope="module")
def refused_bodies(request_pems: tuple[bytes, bytes], pki: Any) -> dict[str, tuple[bytes, str]]:
    return _refused_bodies(request_pems[1], pki)


def test_all_refused_bodies_are_tried(refused_bodies: dict[str, Any]) -> None:
    assert set(refused_bodies) == set(_NAMES)


@pytest.mark.parametrize("name", _NAMES)
def test_refused_in_words_that_help(
    request_pems: tuple[bytes, bytes], trust: Trust, refused_bodies: dict[str, tuple[bytes, str]], name: str
) -> None:
    body, words = refused_bodies[name]
    with pytest.raises(DelegationError) as caught:
        accept_proxy(request_pems[0], body, ALICE, trust, NOW)
    assert words in str(caught.value)


def test_proxy_of_an_authority_is_refused(request_pems: tuple[bytes, bytes], trust: Trust, pki: Any) -> None:
    root = Credential(pki.authority.certificate, pki.authority.key)
    with pytest.raises(DelegationError, match="refused"):
        accept_proxy(request_pems[0], proxy_for(request_pems[1], root), root.dn, trust, NOW)


@pytest.fixture(scope="module")
def good_der(request_pems: tuple[bytes, bytes], pki: Any) -> bytes:
    proxy = x509.load_pem_x509_certificates(proxy_for(request_pems[1], pki.alice))[0]
    return proxy.public_bytes(Encoding.DER)


# cryptography warns of oddities, such as a serial number of 0, before we refuse the certificate.
@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
@settings(max_examples=40, deadline=None)
@example(at=68, change=1)  # cryptography reads it, OpenSSL does not
@example(at=100, change=1)  # a BIT STRING in the issuer's name
@given(at=st.integers(0, 10_000), change=st.integers(1, 255))
def test_changed_bodies_never_get_through(
    request_pems: tuple[bytes, bytes], trust: Trust, pki: Any, good_der: bytes, at: int, change: int
) -> None:
    """Whatever is changed within the proxy: it is refused, by the one exception that the API knows."""
    der = bytearray(good_der)
    der[at % len(der)] ^= change
    body = _as_pem(bytes(der)) + to_pem(pki.alice.certificate)
    with pytest.raises(DelegationError):
        accept_proxy(request_pems[0], body, ALICE, trust, NOW)


def _as_pem(der: bytes) -> bytes:
    return b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"


@pytest.mark.parametrize("subject", [ALICE, "", "no subject", "/CN=" + "x" * 100, r"/O=a/CN=b\+UID=c"])
def test_every_caller_gets_a_request(subject: str) -> None:
    private, request = new_request(subject)
    loaded = x509.load_pem_x509_csr(request)
    assert loaded.is_signature_valid
    assert load_pem_private_key(private, None).public_key() == loaded.public_key()


def test_client_refuses_what_is_no_good_request(files: Path, request_pems: tuple[bytes, bytes]) -> None:
    weak = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    short = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(weak, hashes.SHA256())
    for request in (b"", b"<html>", short.public_bytes(Encoding.PEM), request_pems[1][:-60]):
        with pytest.raises(DelegationError, match="service's request"):
            sign_request(request, files / "alice.crt", files / "alice.key", HOURS, NOW)


def test_client_says_what_is_wrong_with_its_files(files: Path, request_pems: tuple[bytes, bytes]) -> None:
    with pytest.raises(ClientCredentialError, match="make a new proxy"):
        sign_request(request_pems[1], files / "proxy", None, HOURS, NOW + timedelta(hours=13))
    with pytest.raises(ClientCredentialError, match="cannot be read"):
        sign_request(request_pems[1], files / "none", None, HOURS, NOW)
