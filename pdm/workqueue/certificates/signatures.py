"""Detached signatures (JWS, RFC 7515) by the host key of a service, and their verification without the service.

The header has the certificate and its chain (``x5c``): who verifies needs the authority only.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from datetime import datetime, timedelta

from attrs import frozen
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID
from joserfc import jws
from joserfc.errors import BadSignatureError, JoseError
from joserfc.jwk import ECKey, OKPKey, RSAKey
from joserfc.jws import JWSRegistry

from pdm.workqueue.certificates.names import PARSE_ERRORS, dn, host_names
from pdm.workqueue.certificates.pem import TlsIdentity
from pdm.workqueue.certificates.proxies import is_proxy
from pdm.workqueue.certificates.trust import Trust
from pdm.workqueue.certificates.verification import ChainRefusedError

_ALGORITHMS = ("RS256", "ES256", "ES384", "ES512", "Ed25519", "Ed448")
_EC_ALGORITHMS = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
_LONGEST_CHAIN = 16
#: A signature may be from so far in the future: clocks differ.
_CLOCK_SKEW = timedelta(minutes=5)
_THIS_MACHINE = frozenset({"localhost", "127.0.0.1", "::1"})
_JoseKey = RSAKey | ECKey | OKPKey


class _Registry(JWSRegistry):
    """Room for a chain of certificates in the header, and for the signature of an RSA key of 16,384 bits."""

    max_header_length = 128 * 1024
    max_signature_length = 4096


_REGISTRY = _Registry(algorithms=_ALGORITHMS)


class SignatureInvalidError(Exception):
    """A signature does not prove what it should; the text says why."""


@frozen
class Signer:
    """The service that has signed.

    Attributes:
        subject: of its certificate, slash form.
        names: the hosts that its certificate is for.
        authority: subject of the trusted root.
        ended_at: end of the first certificate of the chain to expire, if that is in the past.
    """

    subject: str
    names: Sequence[str]
    authority: str
    ended_at: datetime | None


def service_name(identity: TlsIdentity) -> str:
    """The host name in a service's certificate; one that other machines can use is preferred."""
    names = host_names(identity.certificate) or [dn(identity.certificate.subject)]
    return next((name for name in names if name not in _THIS_MACHINE), names[0])


def sign_detached(identity: TlsIdentity, payload: bytes) -> str:
    """Sign some bytes with a host key; takes milliseconds, so to be called in a thread.

    Returns:
        A compact JWS without its payload: ``HEADER..SIGNATURE``.
    """
    pem = identity.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    chain = (identity.certificate, *identity.chain)
    x5c = [base64.b64encode(each.public_bytes(Encoding.DER)).decode("ascii") for each in chain]
    protected = {"alg": _algorithm(identity.certificate), "x5c": x5c}
    signed = jws.serialize_compact(protected, payload, _jose_key(identity.certificate, pem), registry=_REGISTRY)
    return jws.detach_content(signed)


def verify_detached(
    signature: str, payload: bytes, *, service: str, signed_at: datetime, trust: Trust, now: datetime
) -> Signer:
    """Verify a signature and the certificate that it names, as of the time of signing.

    The time is the signer's own word. A certificate that has expired since is accepted, and `Signer.ended_at` says so.
    One that a revocation list names today is refused, whenever it has signed.

    Args:
        signature: of `sign_detached`.
        service: host name that the certificate must have.
        trust: read with the policy ``off``: lists of today say nothing about the time of signing.

    Raises:
        SignatureInvalidError: what is wrong.
    """
    chain = _chain_of(signature)
    leaf = chain[0]
    _check_signature(signature, payload, leaf)
    who = f"the certificate of {dn(leaf.subject)}"
    if signed_at > now + _CLOCK_SKEW:
        raise SignatureInvalidError(f"it was signed in the future ({signed_at:%Y-%m-%dT%H:%M:%SZ}): check the clock")
    begin, end = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    if not begin <= signed_at <= end:
        raise SignatureInvalidError(
            f"{who} was not valid when it signed: it is valid from {begin:%Y-%m-%dT%H:%M:%SZ} to"
            f" {end:%Y-%m-%dT%H:%M:%SZ}, and the signature is of {signed_at:%Y-%m-%dT%H:%M:%SZ}"
        )
    try:
        verified = trust.verify(chain, signed_at)
    except ChainRefusedError as error:
        raise SignatureInvalidError(f"{who} is not accepted: {error}") from error
    revoked = trust.revoked(verified)
    if revoked is not None:
        raise SignatureInvalidError(f"{who} is not accepted: certificate revoked ({dn(revoked.subject)})")
    names = host_names(leaf)
    if not _is_for_servers(leaf):
        raise SignatureInvalidError(f"{who} is not that of a service: it was signed by somebody else")
    if service.lower() not in [name.lower() for name in names]:
        raise SignatureInvalidError(f"{who} is for {', '.join(names) or 'no host'}, not for the service {service}")
    first_end = min(each.not_valid_after_utc for each in verified)
    return Signer(dn(leaf.subject), names, dn(verified[-1].subject), first_end if first_end <= now else None)


def _chain_of(signature: str) -> list[x509.Certificate]:
    try:
        headers = jws.extract_compact(signature.encode("ascii"), b"-", _REGISTRY).headers()
        encoded = headers["x5c"]
        if not isinstance(encoded, list) or not 1 <= len(encoded) <= _LONGEST_CHAIN:
            raise SignatureInvalidError("the signature has no certificate")
        chain = [x509.load_der_x509_certificate(base64.b64decode(each, validate=True)) for each in encoded]
        for each in chain:
            _ = each.not_valid_before_utc, each.extensions, dn(each.subject)
    except (JoseError, KeyError, TypeError, binascii.Error, UnicodeEncodeError, *PARSE_ERRORS) as error:
        raise SignatureInvalidError(f"the signature or its certificate is damaged ({error})") from error
    return chain


def _check_signature(signature: str, payload: bytes, leaf: x509.Certificate) -> None:
    try:
        public = leaf.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        registry = _Registry(algorithms=[_algorithm(leaf)])
        jws.deserialize_compact(signature, _jose_key(leaf, public), registry=registry, payload=payload)
    except BadSignatureError as error:
        raise SignatureInvalidError(
            f"the signature is not one of these bytes by the key of {dn(leaf.subject)}: the last line or its"
            " certificate was changed, or the line is forged"
        ) from error
    except (JoseError, ValueError, *PARSE_ERRORS) as error:
        raise SignatureInvalidError(f"the signature is damaged ({error})") from error


def _algorithm(certificate: x509.Certificate) -> str:
    """The algorithm for the key of a certificate.

    Raises:
        ValueError: none is known for it.
    """
    key = certificate.public_key()
    if isinstance(key, rsa.RSAPublicKey):
        return "RS256"
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _EC_ALGORITHMS:
        return _EC_ALGORITHMS[key.curve.name]
    if isinstance(key, ed25519.Ed25519PublicKey):
        return "Ed25519"
    if isinstance(key, ed448.Ed448PublicKey):
        return "Ed448"
    raise ValueError("a key of a kind that signs nothing here")


def _jose_key(certificate: x509.Certificate, pem: bytes) -> _JoseKey:
    """The key of a certificate, private or public, from its PEM."""
    key = certificate.public_key()
    if isinstance(key, rsa.RSAPublicKey):
        return RSAKey.import_key(pem)
    return ECKey.import_key(pem) if isinstance(key, ec.EllipticCurvePublicKey) else OKPKey.import_key(pem)


def _is_for_servers(certificate: x509.Certificate) -> bool:
    """Whether a service may show it; an old host certificate may lack the extension."""
    if is_proxy(certificate):
        return False
    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return True
    return ExtendedKeyUsageOID.SERVER_AUTH in usage
