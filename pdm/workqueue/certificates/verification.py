"""Verification of one chain by OpenSSL: its errors in words, and what it accepts and we refuse."""

from __future__ import annotations

from collections.abc import Sequence

from cryptography import x509
from OpenSSL.crypto import X509, X509Store, X509StoreContext, X509StoreContextError
from OpenSSL.crypto import Error as OpenSSLError
from OpenSSL.SSL import X509VerificationCodes as Code

from pdm.workqueue.certificates.names import PARSE_ERRORS, dn
from pdm.workqueue.certificates.proxies import is_legacy_proxy, is_proxy, proxy_problem

#: What a malformed certificate raises: OpenSSL may refuse what `cryptography` accepts.
UNREADABLE = (*PARSE_ERRORS, OpenSSLError)

# pyOpenSSL has no names for these: X509_V_ERR_EE_KEY_TOO_SMALL and its neighbours.
_EE_KEY_TOO_SMALL, _CA_KEY_TOO_SMALL, _WEAK_DIGEST, _PROXY_SUBJECT = 66, 67, 68, 72

_UNKNOWN_AUTHORITY = "its authority is not trusted here, or part of the chain is missing"
_REASONS = {
    Code.ERR_CERT_HAS_EXPIRED: "certificate expired",
    Code.ERR_CERT_NOT_YET_VALID: "certificate not yet valid",
    Code.ERR_CERT_REVOKED: "certificate revoked",
    Code.ERR_CERT_SIGNATURE_FAILURE: "certificate has a bad signature",
    Code.ERR_DEPTH_ZERO_SELF_SIGNED_CERT: "certificate is self-signed and not trusted here",
    Code.ERR_SELF_SIGNED_CERT_IN_CHAIN: _UNKNOWN_AUTHORITY,
    Code.ERR_UNABLE_TO_GET_ISSUER_CERT: _UNKNOWN_AUTHORITY,
    Code.ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY: _UNKNOWN_AUTHORITY,
    Code.ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE: _UNKNOWN_AUTHORITY,
    Code.ERR_INVALID_CA: "signed by a certificate that is no authority",
    Code.ERR_INVALID_NON_CA: "a proxy of an authority's certificate",
    Code.ERR_INVALID_PURPOSE: "certificate is not meant for clients",
    Code.ERR_PATH_LENGTH_EXCEEDED: "chain is longer than an authority allows",
    Code.ERR_PROXY_PATH_LENGTH_EXCEEDED: "chain of proxies is longer than one of them allows",
    Code.ERR_PROXY_CERTIFICATES_NOT_ALLOWED: "proxy not allowed",
    Code.ERR_KEYUSAGE_NO_DIGITAL_SIGNATURE: "a proxy of a certificate that may not sign",
    Code.ERR_UNABLE_TO_GET_CRL: "no usable revocation list of its authority",
    Code.ERR_CRL_HAS_EXPIRED: "the revocation list of its authority has expired",
    Code.ERR_CRL_NOT_YET_VALID: "the revocation list of its authority is not yet valid",
    Code.ERR_CRL_SIGNATURE_FAILURE: "the revocation list of its authority has a bad signature",
    Code.ERR_UNABLE_TO_GET_CRL_ISSUER: "the revocation list of its authority is signed by somebody else",
    Code.ERR_UNHANDLED_CRITICAL_EXTENSION: "it has a critical extension that is not known here (a draft proxy of GT3?)",
    Code.ERR_PERMITTED_VIOLATION: "an authority of its chain may not sign such a subject (name constraints)",
    Code.ERR_EXCLUDED_VIOLATION: "an authority of its chain may not sign such a subject (name constraints)",
    _EE_KEY_TOO_SMALL: "key too short (2048 bits are needed)",
    _CA_KEY_TOO_SMALL: "the key of its authority is too short",
    _WEAK_DIGEST: "signed with an algorithm that is too weak",
    _PROXY_SUBJECT: "the subject of a proxy is not that of its issuer plus one CN",
}


def reason_of(error: int) -> str:
    """The reason for one of OpenSSL's verification errors."""
    return _REASONS.get(error, f"OpenSSL verification error {error}")


def misuse(certificate: x509.Certificate, issuer: x509.Certificate | None, *, is_leaf: bool) -> str | None:
    """What OpenSSL lets pass in a chain it trusts, and we do not: an authority as a client, a proxy without rights.

    Args:
        issuer: the one that signed it, None for the root.

    Returns:
        The reason to refuse it, None if there is none.
    """
    if is_leaf and _is_authority(certificate):
        return "certificate of an authority, not of a client"
    if is_proxy(certificate) and issuer is not None and _is_authority(issuer):
        return _REASONS[Code.ERR_INVALID_NON_CA]
    if problem := proxy_problem(certificate):
        return problem
    return "certificate has no subject" if not certificate.subject.rdns else None


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


class ChainRefusedError(Exception):
    """A chain of certificates is not trusted.

    Attributes:
        subject: whose certificate it is, slash form.
    """

    def __init__(self, reason: str, subject: str) -> None:
        super().__init__(f"{reason} ({subject})")
        self.reason = reason
        self.subject = subject


def verify_chain(store: X509Store, leaf: X509, others: Sequence[X509]) -> tuple[x509.Certificate, ...]:
    """Have OpenSSL verify a chain.

    Returns:
        From the leaf to the root.

    Raises:
        ChainRefusedError: it is not trusted.
    """
    try:
        chain = X509StoreContext(store, leaf, others).get_verified_chain()
    except X509StoreContextError as error:
        for certificate in (leaf, *others):
            # OpenSSL would only say that who signed it is no authority.
            if is_legacy_proxy(certificate.to_cryptography()):
                legacy = certificate.to_cryptography()
                raise ChainRefusedError(proxy_problem(legacy) or "a legacy proxy", dn(legacy.subject)) from error
        raise ChainRefusedError(reason_of(error.errors[0]), dn(error.certificate.to_cryptography().subject)) from error
    return tuple(each.to_cryptography() for each in chain)
