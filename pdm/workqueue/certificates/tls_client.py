"""TLS of a client: shows its certificate or proxy, and verifies the service's.

The service's certificate must lead to a trusted authority that may sign its subject, and carry the host's name or
address; revocation lists of host certificates are not checked.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from attrs import frozen
from cryptography import x509
from OpenSSL import SSL
from OpenSSL.crypto import X509
from OpenSSL.SSL import X509VerificationCodes as Code
from service_identity import CertificateError, VerificationError
from service_identity.cryptography import verify_certificate_hostname, verify_certificate_ip_address
from twisted.internet.interfaces import IOpenSSLClientConnectionCreator
from twisted.internet.ssl import Certificate, CertificateOptions, TLSVersion, platformTrust, trustRootFromCertificates
from twisted.python.failure import Failure
from twisted.web.iweb import IPolicyForHTTPS
from zope.interface import implementer

from pdm.workqueue.certificates.names import dn, host_names
from pdm.workqueue.certificates.pem import (
    CertificateFilesError,
    TlsIdentity,
    WeakKeyError,
    read_identity,
    require_valid,
)
from pdm.workqueue.certificates.proxies import proxy_problem
from pdm.workqueue.certificates.trust import Trust, read_trust
from pdm.workqueue.certificates.verification import UNREADABLE, reason_of

# What a server says about the client's certificate when it ends a handshake (the end of OpenSSL's text of an alert).
_ALERTS = {
    "certificate required": "the service wants a certificate and got none",
    "certificate expired": "the service refused your certificate: it, one of its chain, or the service's revocation"
    " list of its authority has expired",
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


# What OpenSSL says where the certificate at the end of a chain is not among the trusted ones.
_UNKNOWN = frozenset(
    {
        Code.ERR_UNABLE_TO_GET_ISSUER_CERT,
        Code.ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY,
        Code.ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE,
    }
)
_SELF_SIGNED = frozenset({Code.ERR_DEPTH_ZERO_SELF_SIGNED_CERT, Code.ERR_SELF_SIGNED_CERT_IN_CHAIN})
#: Names of a certificate that a message shows.
_MOST_NAMES = 5


_NOT_TRUSTED = "the service's certificate is not trusted: it has expired, or its authority is unknown here"


class ClientCredentialError(Exception):
    """The client's certificate, key or authorities cannot be used. The text says why, and what to do."""


class WeakCredentialError(ClientCredentialError):
    """The key of the client's certificate is shorter than TLS allows today."""


@frozen
class CertificateRefusal:
    """Why one side refused the other's certificate.

    Attributes:
        what: a sentence, without its full stop.
        advice: what to do about it, a sentence, or empty.
    """

    what: str
    advice: str = ""


def client_policy(
    ca: Path | None,
    certificate: Path | None = None,
    key: Path | None = None,
    *,
    passphrase: bytes | None = None,
    ca_named_by: str = "",
) -> IPolicyForHTTPS:
    """How a client's agent speaks TLS.

    Args:
        ca: PEM file or grid-style directory of the authorities that may vouch for the service; None for those of the
            system.
        certificate: PEM of the caller's certificate with its chain; a proxy file will do. None to show none.
        key: PEM of its key; None if it is in the file of the certificate.
        ca_named_by: what has named `ca` (``PDM_CA``), for messages.

    Raises:
        ClientCredentialError: a file is missing, has expired or does not fit.
    """
    where = f"{ca} ({ca_named_by})" if ca_named_by else str(ca)
    try:
        trust = None if ca is None else read_trust(ca, "off")
    except CertificateFilesError as error:
        named = f"{ca_named_by}: " if ca_named_by else ""
        raise ClientCredentialError(f"{named}{error}") from error
    try:
        identity = None if certificate is None else read_valid_identity(certificate, key, datetime.now(UTC), passphrase)
        policy = _ClientPolicy(trust, where, identity)
        # What OpenSSL does not accept is found now, not when a connection is made.
        policy.creatorForNetloc(b"localhost", 0)
    except WeakKeyError as error:
        raise WeakCredentialError(str(error)) from error
    except CertificateFilesError as error:
        raise ClientCredentialError(str(error)) from error
    except SSL.Error as error:
        said = ", ".join(_openssl_texts(error)) or "no reason given"
        raise ClientCredentialError(f"the certificate in {certificate} cannot be used for TLS ({said})") from error
    return policy


def node_policy(trust: Trust, identity: TlsIdentity) -> IPolicyForHTTPS:
    """How a node speaks TLS to other nodes: it shows its host certificate.

    Args:
        trust: authorities of the nodes' host certificates.
    """
    return _ClientPolicy(trust, "[node] peers_trust", identity)


def read_valid_identity(
    certificate: Path, key: Path | None, now: datetime, passphrase: bytes | None = None
) -> TlsIdentity:
    """Read the caller's certificate and key, and check that they can be used now.

    Raises:
        CertificateFilesError: they cannot.
    """
    identity = read_identity(certificate, key, passphrase)
    chain = (identity.certificate, *identity.chain)
    require_valid(certificate, chain, now)
    for each in chain:
        if problem := proxy_problem(each):
            raise CertificateFilesError(
                f"{certificate} holds {problem.partition(':')[0]}: make an RFC 3820 proxy (grid-proxy-init -rfc,"
                " voms-proxy-init -rfc, arcproxy)"
            )
    return identity


def refusal_of(failure: Failure, policy: object = None) -> CertificateRefusal | None:
    """Why a certificate was refused, with what the client's policy knows; None if a request failed otherwise.

    Args:
        policy: the one that made the connection, from `client_policy`.
    """
    reason = refusal_reason(failure)
    if reason is None:
        return None
    if isinstance(policy, _ClientPolicy):
        if reason == _NOT_TRUSTED and policy.problem is not None:
            return policy.problem
        if reason == _ALERTS["certificate expired"] and (end := policy.valid_until()) > datetime.now(UTC):
            return CertificateRefusal(
                f"the service refused your certificate as expired, and by this machine's clock it is valid until"
                f" {end:%Y-%m-%dT%H:%M:%SZ}: the service's revocation list of its authority has expired, or a clock is"
                " wrong",
                "Tell an operator of the service (fetch-crl).",
            )
    return CertificateRefusal(reason)


def refusal_reason(failure: Failure) -> str | None:
    """Why a certificate was refused, in words; None if a request failed for another reason.

    With TLS 1.3 a client has finished its side of the handshake when the service refuses its certificate: the refusal
    arrives in place of the answer, inside the reasons of `ResponseNeverReceived`.
    """
    for error in _errors_within(failure.value):
        if isinstance(error, VerificationError):
            return "the service's certificate is for another host name"
        if isinstance(error, SSL.Error):
            for text in _openssl_texts(error):
                if text == "certificate verify failed":
                    return _NOT_TRUSTED
                for alert, sentence in _ALERTS.items():
                    if text.endswith(f"alert {alert}"):
                        return sentence
    return None


@implementer(IPolicyForHTTPS)
class _ClientPolicy:
    """Makes connections that show the client's certificate.

    Args:
        trust: authorities of the service's certificate; None for those of the system.
    """

    def __init__(self, trust: Trust | None, where: str, identity: TlsIdentity | None) -> None:
        self._trust = trust
        self._where = where
        self._identity = identity
        self._roots: Any = (
            platformTrust()
            if trust is None
            else trustRootFromCertificates([Certificate(X509.from_cryptography(each)) for each in trust.authorities])
        )
        #: What was wrong with the certificate of the last service that was refused.
        self.problem: CertificateRefusal | None = None
        self._more: dict[str, Any] = (
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
            options = CertificateOptions(trustRoot=self._roots, raiseMinimumTo=TLSVersion.TLSv1_2, **self._more)
            creator = _ConnectionCreator(name, options.getContext(), self)
            self._creators[hostname] = creator
        return creator

    def valid_until(self) -> datetime:
        """When the client's certificate, or the first of its chain, expires."""
        shown = () if self._identity is None else (self._identity.certificate, *self._identity.chain)
        return min((each.not_valid_after_utc for each in shown), default=datetime.min.replace(tzinfo=UTC))

    def refusal_of_certificate(self, host: str, certificate: x509.Certificate, error: int) -> CertificateRefusal:
        """What is said about a certificate that OpenSSL refuses."""
        which = f"the certificate of {host}"
        subject, issuer = _display_name(certificate.subject), _display_name(certificate.issuer)
        if error in _UNKNOWN | _SELF_SIGNED:
            known = (
                "the authorities of this system (nothing names others: PDM_CA, ca in client.conf, X509_CERT_DIR,"
                " /etc/grid-security/certificates)"
                if self._trust is None
                else f"the authorities in {self._where}"
            )
            missing = issuer if error in _UNKNOWN else subject
            return CertificateRefusal(
                f"{which} is not trusted: it was issued by {missing}, which is not among {known}",
                "If that is the right service, set PDM_CA to the file, or the directory, of its authority.",
            )
        if error == Code.ERR_CERT_HAS_EXPIRED:
            end = certificate.not_valid_after_utc
            return CertificateRefusal(
                f"{which} is not trusted: that of {subject} expired at {end:%Y-%m-%dT%H:%M:%SZ}",
                "Tell an operator of the service, or check this machine's clock.",
            )
        return CertificateRefusal(f"{which} is not trusted: {reason_of(error)} ({subject}, issued by {issuer})")

    def refusal_of_chain(self, host: str, chain: list[x509.Certificate]) -> CertificateRefusal | None:
        """What is said about a chain that OpenSSL accepts: another host's, or signed by the wrong authority."""
        try:
            try:
                verify_certificate_ip_address(chain[0], str(ipaddress.ip_address(host)))
            except ValueError:
                verify_certificate_hostname(chain[0], host)
        except (VerificationError, CertificateError):
            names = _names_of(chain[0])
            return CertificateRefusal(
                f"the certificate of {host} is for another host: {', '.join(names) or 'none at all'}"
                f" (issued by {_display_name(chain[0].issuer)})",
                "If that is the right service, use that name in PDM_URL, or in the url of client.conf."
                if names
                else "",
            )
        refusal = None if self._trust is None else self._trust.check_signatures(chain).refusal
        return None if refusal is None else CertificateRefusal(f"the certificate of {host} is not trusted: {refusal}")


@implementer(IOpenSSLClientConnectionCreator)
class _ConnectionCreator:
    """Makes the client side of connections to one host, and verifies its certificate."""

    def __init__(self, host: str, context: SSL.Context, policy: _ClientPolicy) -> None:
        self._host = host
        self._context = context
        self._policy = policy
        # Connections, each with the certificates that OpenSSL has found good, the root first.
        self._shown: WeakKeyDictionary[Any, list[x509.Certificate]] = WeakKeyDictionary()
        context.set_verify(SSL.VERIFY_PEER, self._verify)

    def clientConnectionForTLS(self, tlsProtocol: Any) -> SSL.Connection:
        """Make the OpenSSL side of a new connection; called by Twisted."""
        connection = SSL.Connection(self._context, None)
        connection.set_app_data(tlsProtocol)
        self._shown[tlsProtocol] = []
        if not _is_address(self._host):
            connection.set_tlsext_host_name(self._host.encode("ascii"))
        return connection

    def _verify(self, connection: SSL.Connection, shown: X509, error: int, depth: int, ok: int) -> bool:
        chain = self._shown[connection.get_app_data()]
        problem: CertificateRefusal | None = None
        try:
            certificate = shown.to_cryptography()
            if not ok:
                problem = self._policy.refusal_of_certificate(self._host, certificate, error)
            else:
                chain.insert(0, certificate)
                problem = self._policy.refusal_of_chain(self._host, chain) if depth == 0 else None
        except UNREADABLE as unreadable:
            problem = CertificateRefusal(f"the certificate of {self._host} cannot be read: {unreadable}")
        if problem is not None:
            self._policy.problem = problem
        return problem is None


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _names_of(certificate: x509.Certificate) -> list[str]:
    """The hosts that a certificate is for; the first few of them."""
    found = host_names(certificate)
    more = len(found) - _MOST_NAMES
    return found[:_MOST_NAMES] + ([f"{more} more"] if more > 0 else [])


def _display_name(name: x509.Name) -> str:
    return dn(name)[:300] or "an empty name"


def _errors_within(error: BaseException | None) -> Iterator[BaseException]:
    if error is None:
        return
    yield error
    for reason in getattr(error, "reasons", None) or ():
        yield from _errors_within(reason.value if isinstance(reason, Failure) else reason)


def _openssl_texts(error: SSL.Error) -> Iterator[str]:
    """The texts in OpenSSL's queue of errors: ``[(library, function, text), ...]``."""
    queue = error.args[0] if error.args else ()
    for entry in queue if isinstance(queue, list) else ():
        yield str(entry[-1])
