"""TLS of a client: shows its certificate or proxy, and judges the service's.

The service's certificate must lead to a trusted authority and carry the host's name or address; revocation lists of
host certificates are not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from OpenSSL import SSL
from OpenSSL.crypto import X509
from service_identity import VerificationError
from twisted.internet.interfaces import IOpenSSLClientConnectionCreator
from twisted.internet.ssl import Certificate, optionsForClientTLS, platformTrust, trustRootFromCertificates
from twisted.python.failure import Failure
from twisted.web.iweb import IPolicyForHTTPS
from zope.interface import implementer

from pdm.workqueue.certificates.pem_files import CertificateFilesError, Identity, read_identity, require_valid
from pdm.workqueue.certificates.trust_files import read_trust

# What a server says about the client's certificate when it ends a handshake (the end of OpenSSL's text of an alert).
_ALERTS = {
    "certificate required": "the service wants a certificate and got none",
    "certificate expired": "the service refused your certificate: it, or one of its chain, has expired",
    "certificate revoked": "the service refused your certificate: it has been revoked",
    "unknown ca": "the service refused your certificate: it does not know its authority, has no revocation list of it,"
    " or the chain you sent is not complete",
    "unsupported certificate": "the service refused your certificate: it is not meant for clients",
    "bad certificate": "the service refused your certificate: it is damaged, or not signed as it says",
    "decrypt error": "the service refused your certificate: a signature of its chain is wrong",
    "certificate unknown": "the service refused your certificate; its operator finds the reason in the service's log",
    # What OpenSSL says when it is our own server, not OpenSSL itself, that refuses a certificate.
    "internal error": "the service ended the handshake; its operator finds the reason in the service's log",
}


class ClientCredentialError(Exception):
    """The client's certificate, key or authorities cannot be used. The text says why, and what to do."""


def client_policy(ca: Path | None, certificate: Path | None = None, key: Path | None = None) -> IPolicyForHTTPS:
    """How a client's agent speaks TLS.

    Args:
        ca: PEM file or grid-style directory of the authorities that may vouch for the service; None for those of the
            system.
        certificate: PEM of the caller's certificate with its chain; a proxy file will do. None to show none.
        key: PEM of its key; None if it stands in the file of the certificate.

    Raises:
        ClientCredentialError: a file is missing, has expired or does not fit.
    """
    try:
        authorities = None if ca is None else read_trust(ca, "off").authorities
        identity = None if certificate is None else read_valid_identity(certificate, key, datetime.now(UTC))
    except CertificateFilesError as error:
        raise ClientCredentialError(str(error)) from error
    roots = (
        platformTrust()
        if authorities is None
        else trustRootFromCertificates([Certificate(X509.from_cryptography(each)) for each in authorities])
    )
    return _ClientPolicy(roots, identity)


def read_valid_identity(certificate: Path, key: Path | None, now: datetime) -> Identity:
    """Read the caller's certificate and key, and check that they can be used now.

    Raises:
        CertificateFilesError: they cannot.
    """
    identity = read_identity(certificate, key)
    require_valid(certificate, (identity.certificate, *identity.chain), now)
    return identity


def refusal_reason(failure: Failure) -> str | None:
    """Why a certificate was refused, in words; None if a request failed for another reason.

    With TLS 1.3 a client has finished its side of the handshake when the service refuses its certificate: the refusal
    arrives in place of the answer, inside the reasons of `ResponseNeverReceived`.
    """
    for error in _errors_within(failure.value):
        if isinstance(error, VerificationError):
            return "the service's certificate is for another host name"
        if isinstance(error, SSL.Error):
            for text in _texts_of(error):
                if text == "certificate verify failed":
                    return "the service's certificate is not trusted: it has expired, or its authority is unknown here"
                for alert, sentence in _ALERTS.items():
                    if text.endswith(f"alert {alert}"):
                        return sentence
    return None


@implementer(IPolicyForHTTPS)
class _ClientPolicy:
    def __init__(self, roots: Any, identity: Identity | None) -> None:
        self._roots = roots
        self._more = (
            {}
            if identity is None
            else {
                "certificate": identity.certificate,
                "privateKey": identity.key,
                "extraCertChain": list(identity.chain),
            }
        )
        self._creators: dict[bytes, IOpenSSLClientConnectionCreator] = {}

    def creatorForNetloc(self, hostname: bytes, port: int) -> IOpenSSLClientConnectionCreator:
        """Make what makes connections to a host; called by Twisted for each one, and made once for each host."""
        creator = self._creators.get(hostname)
        if creator is None:
            name = hostname.decode("ascii").removeprefix("[").removesuffix("]")
            creator = optionsForClientTLS(name, trustRoot=self._roots, extraCertificateOptions=self._more)
            self._creators[hostname] = creator
        return creator


def _errors_within(error: BaseException | None) -> Iterator[BaseException]:
    if error is None:
        return
    yield error
    for reason in getattr(error, "reasons", None) or ():
        yield from _errors_within(reason.value if isinstance(reason, Failure) else reason)


def _texts_of(error: SSL.Error) -> Iterator[str]:
    """The texts in OpenSSL's queue of errors: ``[(library, function, text), ...]``."""
    queue = error.args[0] if error.args else ()
    for entry in queue if isinstance(queue, list) else ():
        yield str(entry[-1])
