"""Delegation: the service gets a proxy of the caller, and no private key is sent.

As in FTS3, the service makes a key and a signing request (`new_request`); the caller signs a proxy for that key
(`sign_request`, or plain openssl) and sends it with its chain; the service verifies it (`accept_proxy`).
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

from attrs import field, frozen
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from pdm.workqueue.certificates.names import PARSE_ERRORS, dn, parse_dn
from pdm.workqueue.certificates.pem import CertificateFilesError, to_pem
from pdm.workqueue.certificates.proxies import (
    VomsAttributes,
    end_entity,
    is_proxy,
    lifetime_end,
    lifetime_start,
    sign_proxy,
    voms_attributes,
)
from pdm.workqueue.certificates.tls_client import ClientCredentialError, read_valid_identity
from pdm.workqueue.certificates.trust import Trust
from pdm.workqueue.certificates.verification import ChainRefusedError

_LONGEST_BODY = 64 * 1024
_LONGEST_CHAIN = 16
_SHORTEST_KEY_BITS = 2048
#: A proxy starts a little in the past, because clocks differ.
_SKEW = timedelta(minutes=5)


class DelegationError(Exception):
    """The body is not a good proxy for the request. The text says why, and what to do."""


@frozen
class DelegatedProxy:
    """A proxy that the service may use.

    Attributes:
        subject: whose it is: subject of the end entity, slash form.
        valid_until: when the first certificate of its chain expires (UTC).
        voms: VOMS attributes that it, or one behind it, carries; shown, not verified.
        bundle_pem: proxy, key, chain, as grid tools read it; secret.
    """

    subject: str
    valid_until: datetime
    voms: tuple[VomsAttributes, ...]
    bundle_pem: bytes = field(repr=False)


def new_request(subject: str, key_bits: int = 2048) -> tuple[bytes, bytes]:
    """Make a key and a signing request for it. Takes some 0.1 s of computing: to be called in a thread.

    Args:
        subject: of the caller, slash form; informational: the signer chooses the proxy's subject.

    Returns:
        The private key and the request, PEM each.
    """
    key = rsa.generate_private_key(public_exponent=65537, key_size=key_bits)
    request = x509.CertificateSigningRequestBuilder().subject_name(_request_name(subject)).sign(key, hashes.SHA256())
    key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    return key_pem, request.public_bytes(Encoding.PEM)


def accept_proxy(
    private_key_pem: bytes, pem_from_client: bytes, caller_subject: str, trust: Trust, now: datetime
) -> DelegatedProxy:
    """Verify the proxy that a caller sent for a request.

    Args:
        pem_from_client: the proxy, followed by the caller's certificate and what is between.
        caller_subject: of the TLS peer (`peer_identity`).
        trust: authorities and revocation lists; those of the service's own TLS.

    Raises:
        DelegationError: it is not a proxy of the caller for this key, or not a good one.
    """
    chain = _read_chain(pem_from_client)
    proxy = chain[0]
    # Our own key out of the vault: no need to test its numbers, which takes 0.1 s.
    key = load_pem_private_key(private_key_pem, password=None, unsafe_skip_rsa_key_validation=True)
    if not _same_key(proxy, key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)):
        raise DelegationError(
            "the first certificate is not for the key of the pending request: get the request again and sign that one,"
            " and send the new proxy first, your own certificate after it"
        )
    _check_proxies(chain)
    end = lifetime_end(chain)
    if end <= now:
        raise DelegationError(
            f"the proxy, or a certificate behind it, expired at {end:%Y-%m-%dT%H:%M:%SZ}: sign with one that is valid"
        )
    try:
        verified = trust.verify(chain, now)
    except ChainRefusedError as error:
        raise DelegationError(f"the chain of the proxy is refused: {error.reason} ({error.subject})") from error
    subject = dn(end_entity(verified).subject)
    if subject != caller_subject:
        raise DelegationError(f"the proxy is one of {subject}, but you are {caller_subject}: delegate your own")
    bundle = to_pem(proxy) + private_key_pem + to_pem(*verified[1:-1])
    return DelegatedProxy(subject, lifetime_end(verified), voms_attributes(chain), bundle)


def sign_request(
    request_pem: bytes,
    certificate: Path,
    key: Path | None,
    lifetime: timedelta,
    now: datetime | None = None,
    passphrase: bytes | None = None,
) -> bytes:
    """Sign a proxy for a request: the caller's side of delegation.

    Args:
        certificate: PEM of the caller's certificate or proxy, with its chain.
        key: PEM of its key; None if it is in the file of the certificate.
        lifetime: of the new proxy; cut to what is left of the certificates behind it.

    Returns:
        What to send: the proxy and the certificates behind it, PEM.

    Raises:
        ClientCredentialError: certificate or key cannot be used.
        DelegationError: the request is none, or asks for a weak key.
    """
    at = now or datetime.now(UTC)
    try:
        signer = read_valid_identity(certificate, key, at, passphrase)
    except CertificateFilesError as error:
        raise ClientCredentialError(str(error)) from error
    try:
        request = x509.load_pem_x509_csr(request_pem)
        public_key = request.public_key()
        sound = request.is_signature_valid
    except PARSE_ERRORS as error:
        raise DelegationError(f"the service's request cannot be read ({error})") from error
    if not sound or not isinstance(public_key, rsa.RSAPublicKey) or public_key.key_size < _SHORTEST_KEY_BITS:
        raise DelegationError(f"the service's request is not signed by an RSA key of {_SHORTEST_KEY_BITS} bits or more")
    behind = (signer.certificate, *signer.chain)
    proxy = sign_proxy(
        signer.certificate,
        signer.key,
        public_key,
        max(at - _SKEW, lifetime_start(behind)),
        min(at + lifetime, lifetime_end(behind)),
    )
    return to_pem(proxy, *behind)


def _request_name(subject: str) -> x509.Name:
    try:
        return parse_dn(subject)
    except ValueError:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "delegation")])


def _read_chain(body: bytes) -> list[x509.Certificate]:
    """The certificates of a body; says what the body is if it is something else."""
    if len(body) > _LONGEST_BODY:
        raise DelegationError(
            f"the body has {len(body)} bytes, a proxy with its chain a few thousand: send nothing but their PEM"
        )
    if b"PRIVATE KEY-----" in body:
        raise DelegationError(
            "the body holds a private key, which must never leave you: send the new proxy, made for the service's key,"
            " and the certificates behind it; consider the key you sent as known to others"
        )
    if b"-----BEGIN CERTIFICATE-----" not in body:
        raise DelegationError(_what_it_looks_like(body))
    try:
        chain = x509.load_pem_x509_certificates(body)
        for certificate in chain:
            _ = certificate.extensions, certificate.subject, certificate.issuer, certificate.public_key()
        _ = lifetime_start(chain), lifetime_end(chain)
    except PARSE_ERRORS as error:
        raise DelegationError(_form_data(body) or f"a certificate in the body cannot be read ({error})") from error
    if len(chain) > _LONGEST_CHAIN:
        raise DelegationError(f"the body holds {len(chain)} certificates: send the proxy and those that it needs only")
    return chain


def _what_it_looks_like(body: bytes) -> str:
    start = body.lstrip()[:200].lower()
    if problem := _form_data(body):
        return problem
    if b"-----BEGIN CERTIFICATE REQUEST-----" in body or b"-----BEGIN NEW CERTIFICATE REQUEST-----" in body:
        return "the body is the signing request: sign it, and send the certificate that comes out"
    if start.startswith((b"<!doctype", b"<html", b"<")):
        return "the body looks like HTML: send the PEM as it is"
    if start.startswith((b"{", b"[", b'"')):
        return "the body looks like JSON: send the PEM as it is"
    return "the body holds no certificate: send the proxy as PEM (-----BEGIN CERTIFICATE-----), then your own"


def _form_data(body: bytes) -> str | None:
    start = body.lstrip()[:4096]
    urlencoded = b"BEGIN+CERTIFICATE" in start or b"BEGIN%20CERTIFICATE" in start
    if urlencoded or b"Content-Disposition: form-data" in start:
        return "the body looks like form data: send the PEM as it is (curl --data-binary @FILE)"
    return None


def _check_proxies(chain: list[x509.Certificate]) -> None:
    """Check the shape of the chain: proxies, each named after its issuer, then the caller's certificate."""
    if not is_proxy(chain[0]):
        raise DelegationError(
            "the first certificate is no RFC 3820 proxy (it lacks the extension 1.3.6.1.5.5.7.1.14): sign the request"
            " with a critical proxyCertInfo extension"
        )
    if all(is_proxy(certificate) for certificate in chain):
        raise DelegationError("the certificate behind the proxy is missing: send the proxy and then your own one")
    for certificate, issuer in pairwise(chain):
        if not is_proxy(certificate):
            return
        *parts, last = certificate.subject.rdns
        if parts != issuer.subject.rdns or [each.oid for each in last] != [NameOID.COMMON_NAME]:
            raise DelegationError(
                f"the subject of a proxy must be that of its issuer plus one CN: {dn(certificate.subject)} is not"
                f" {dn(issuer.subject)}/CN=..."
            )


def _same_key(certificate: x509.Certificate, public_der: bytes) -> bool:
    own = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return own == public_der


def main() -> None:
    """Sign a proxy for the request on standard input, for helpers: they have no library for certificates.

    Arguments: the file of a proxy, and hours.
    """
    _, proxy, hours = sys.argv
    try:
        signed = sign_request(sys.stdin.buffer.read(_LONGEST_BODY), Path(proxy), None, timedelta(hours=int(hours)))
    except (ClientCredentialError, DelegationError) as error:
        sys.exit(str(error))
    sys.stdout.buffer.write(signed)


if __name__ == "__main__":
    main()
