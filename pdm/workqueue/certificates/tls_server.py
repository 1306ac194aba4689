"""TLS of the service: asks clients for a certificate, accepts RFC 3820 proxies, verifies chains, identifies peers.

Revocation lists and signing policies are applied to each certificate of the chain, once for a connection, and again to
open connections when the files have changed.

A client without a certificate may connect; the API answers it 401. A client with a bad one is refused in the handshake,
and the log says why. How the daemon uses it::

    tls = ServerTls(settings.certificate, settings.key, settings.trust, settings.crl)
    endpoint.listen(tls.wrap(site))
    Periodic(reactor, "tls", settings.crl_refresh_s, lambda: tls.refresh_if_changed(in_thread))
    peer_identity(request.channel.transport)
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from attrs import define, field, frozen
from cryptography import x509
from OpenSSL import SSL
from OpenSSL.crypto import X509
from twisted.internet.interfaces import IOpenSSLServerConnectionCreator, IProtocolFactory
from twisted.logger import Logger
from twisted.protocols.tls import TLSMemoryBIOFactory, TLSMemoryBIOProtocol
from zope.interface import implementer

from pdm.workqueue.certificates.names import dn
from pdm.workqueue.certificates.pem import CertificateFilesError, TlsIdentity, read_identity, require_valid
from pdm.workqueue.certificates.proxies import end_entity, is_limited, lifetime_end, proxy_problem
from pdm.workqueue.certificates.tls_buffers import ServerProtocol
from pdm.workqueue.certificates.trust import CrlPolicy, Trust, file_state, read_trust
from pdm.workqueue.certificates.verification import UNREADABLE, misuse, reason_of
from pdm.workqueue.domain.signing_policy import PolicyMode


@frozen
class PeerIdentity:
    """What a verified certificate says about the peer.

    Attributes:
        subject: of the end entity, the person or host behind all proxies, in slash form (`names.dn`).
        chain_ends_at: when the first certificate of the chain expires (UTC). A kept connection outlives it, and
            OpenSSL does not look again: compare with the clock on each request.
        limited: a limited proxy is in the chain; such a one may move files, but not start work.
        authority: subject of the trusted root to which the chain leads, slash form.
        constrained: whether signing policies say that the authorities of the chain may sign the subject.
    """

    subject: str
    chain_ends_at: datetime
    limited: bool
    authority: str = ""
    constrained: bool = True


@define(eq=False)
class Handshake:
    """What is known about a connection whose certificate is being verified.

    Attributes:
        shown: the certificates that OpenSSL has found good, the root first: it shows one at a time; empty once it has
            shown the leaf.
        condemned: why the chain is refused as soon as its leaf has been seen; None if it is not.
        constrained: whether its authorities are all bound by policies.
    """

    shown: list[x509.Certificate] = field(factory=list)
    condemned: str | None = None
    constrained: bool = False


#: By the protocol that speaks TLS on the connection.
handshakes: WeakKeyDictionary[Any, Handshake] = WeakKeyDictionary()

# To read a chain costs as much as the rest of a request; a connection keeps its certificate for life.
_identities: WeakKeyDictionary[Any, PeerIdentity] = WeakKeyDictionary()


def peer_identity(transport: Any) -> PeerIdentity | None:
    """The identity that a peer proved in its handshake.

    Args:
        transport: of the connection, once the handshake is over (``request.channel.transport``).

    Returns:
        None if the peer showed no certificate, or the connection has no TLS.
    """
    known = _identities.get(transport)
    if known is not None:
        return known
    chain = verified_chain(transport)
    if not chain:
        return None
    handshake = handshakes.get(transport)
    identity = PeerIdentity(
        dn(end_entity(chain).subject),
        lifetime_end(chain),
        any(is_limited(certificate) for certificate in chain),
        dn(chain[-1].subject),
        handshake is not None and handshake.constrained,
    )
    _identities[transport] = identity
    return identity


def verified_chain(transport: Any) -> list[x509.Certificate]:
    """The chain that OpenSSL verified, leaf first, root last; empty without a certificate or without TLS."""
    handle = transport.getHandle() if hasattr(transport, "getHandle") else None
    if not isinstance(handle, SSL.Connection):
        return []
    handshake = handshakes.get(transport)
    if handshake is not None and handshake.condemned is not None:
        return []
    return handle.get_verified_chain(as_cryptography=True) or []


_log = Logger()

# Forward secrecy and authenticated encryption only; TLS 1.3 has its own list, which is fine as it is.
_CIPHERS = b"ECDHE+AESGCM:ECDHE+CHACHA20"
_CRL_WARNING = timedelta(days=1)
_HOST_WARNING = timedelta(days=14)


@frozen(eq=False)
class _Loaded:
    """Everything read from the files, and the context made of it."""

    identity: TlsIdentity
    trust: Trust
    context: SSL.Context
    state: tuple[object, ...]


@implementer(IOpenSSLServerConnectionCreator)
class ServerTls:
    """Makes the server side of TLS connections.

    Args:
        trust: PEM file or grid-style directory of the authorities that may vouch for clients.
        refused: called with the reason of each refused certificate, for counting.

    Raises:
        CertificateFilesError: a file is missing or unfit; the text says which, and what to do.
    """

    def __init__(
        self,
        certificate: Path,
        key: Path,
        trust: Path,
        crl: CrlPolicy = "if-present",
        *,
        signing: PolicyMode = "if-present",
        refused: Callable[[str], None] = lambda reason: None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._certificate = certificate
        self._key = key
        self._trust = trust
        self._crl: CrlPolicy = crl
        self._signing: PolicyMode = signing
        self._refused = refused
        self._now = now
        self._open: WeakSet[TLSMemoryBIOProtocol] = WeakSet()
        self._warned: set[object] = set()
        self._loaded = self._load()
        # Only at the start: later an expired host certificate must not keep new revocation lists out.
        identity = self._loaded.identity
        require_valid(certificate, (identity.certificate, *identity.chain), now())
        self._log_problems(self._loaded)

    @property
    def trust(self) -> Trust:
        """The authorities and lists in force, for chains that do not arrive by TLS (`delegation.accept_proxy`)."""
        return self._loaded.trust

    @property
    def identity(self) -> TlsIdentity:
        """The certificate and key in force, for what is signed outside TLS (`signatures.sign_detached`)."""
        return self._loaded.identity

    def wrap(self, factory: IProtocolFactory) -> TLSMemoryBIOFactory:
        """The factory to listen with: speaks TLS, then hands over to `factory`."""
        return _ServerFactory(self, isClient=False, wrappedFactory=factory)

    def serverConnectionForTLS(self, tlsProtocol: TLSMemoryBIOProtocol) -> SSL.Connection:
        """Make the OpenSSL side of a new connection; called by Twisted."""
        connection = SSL.Connection(self._loaded.context, None)
        connection.set_app_data(tlsProtocol)
        handshakes[tlsProtocol] = Handshake()
        self._open.add(tlsProtocol)
        return connection

    def reload(self) -> None:
        """Read all files again, at once; for a start or a signal. What `swap` says holds here too.

        Raises:
            CertificateFilesError: a file is unfit; what was in force stays in force.
        """
        self.swap(self._load())

    async def refresh_if_changed(
        self, in_thread: Callable[[Callable[[], _Loaded | None]], Awaitable[_Loaded | None]]
    ) -> bool:
        """Read the files again if one of them, or one in the directory, was changed.

        Unfit files are logged, and what was in force stays in force.

        Args:
            in_thread: runs a function in a thread, off the reactor, and gives its result.

        Returns:
            Whether something new is in force.
        """
        try:
            loaded = await in_thread(self.load_if_changed)
        except CertificateFilesError as error:
            _log.error("tls files not taken, the former stay in force: {error}", error=str(error))
            return False
        if loaded is None:
            self._warn_of_expiry(self._loaded)
            return False
        self.swap(loaded)
        _log.info(
            "tls files read again: {authorities} authorities, {crls} revocation lists",
            authorities=len(loaded.trust.authorities),
            crls=len(loaded.trust.crls),
        )
        return True

    def load_if_changed(self) -> _Loaded | None:
        """What the files say now, None if nothing changed; may run in a thread.

        Raises:
            CertificateFilesError: a file is unfit.
        """
        return None if self._state() == self._loaded.state else self._load()

    def swap(self, loaded: _Loaded) -> None:
        """Put what was loaded into force; on the reactor's thread.

        It applies to new connections. Open ones stay open, except those that would be refused now: whose
        certificate is now revoked, whose authority is gone, or may not sign their subject any more.
        """
        before, self._loaded = self._loaded.trust, loaded
        self._log_problems(loaded)
        gone = frozenset(before.authorities).difference(loaded.trust.authorities)
        for protocol in list(self._open):
            try:
                found = self._outdated(verified_chain(protocol), loaded.trust, gone)
            except UNREADABLE:  # it was read in the handshake
                continue
            if found is not None:
                certificate, reason = found
                self._report("closed", protocol, dn(certificate.subject), reason)
                protocol.abortConnection()

    def _outdated(
        self, chain: list[x509.Certificate], trust: Trust, gone: frozenset[x509.Certificate]
    ) -> tuple[x509.Certificate, str] | None:
        """What is held against a chain that was good before: the certificate, and the reason.

        Args:
            gone: authorities that were trusted before.
        """
        if not chain:
            return None
        revoked = trust.revoked(chain) if self._crl != "off" else None
        if revoked is not None:
            return revoked, "certificate revoked"
        if not gone.isdisjoint(chain):
            return chain[0], "its authority is no longer trusted here"
        refusal = trust.check_signatures(chain).refusal
        return None if refusal is None else (chain[0], refusal)

    def _load(self) -> _Loaded:
        # Looked at before reading: a file that changes meanwhile is seen as changed the next time.
        state = self._state()
        identity = read_identity(self._certificate, self._key)
        trust = read_trust(self._trust, self._crl, self._signing)
        return _Loaded(identity, trust, self._make_context(identity, trust), state)

    def _state(self) -> tuple[object, ...]:
        return file_state(self._certificate), file_state(self._key), file_state(self._trust)

    def _make_context(self, identity: TlsIdentity, trust: Trust) -> SSL.Context:
        """Make the complete context: pyOpenSSL forbids changes after its first connection."""
        context = SSL.Context(SSL.TLS_SERVER_METHOD)
        context.set_min_proto_version(SSL.TLS1_2_VERSION)
        context.set_cipher_list(_CIPHERS)
        # Each connection shows its certificate and is checked by the lists of the day: no sessions, no tickets.
        context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
        context.set_session_id(b"pdm-workqueue")
        context.set_options(
            SSL.OP_NO_TICKET | SSL.OP_NO_COMPRESSION | SSL.OP_NO_RENEGOTIATION | SSL.OP_CIPHER_SERVER_PREFERENCE
        )
        context.set_mode(SSL.MODE_RELEASE_BUFFERS)
        context.use_certificate(identity.certificate)
        for certificate in identity.chain:
            context.add_extra_chain_cert(certificate)
        context.use_privatekey(identity.key)
        store = context.get_cert_store()
        assert store is not None
        trust.fill(store)

        def verify(connection: SSL.Connection, certificate: X509, error: int, depth: int, ok: int) -> bool:
            return self._verify(trust, connection, certificate, error, depth, bool(ok))

        context.set_verify(SSL.VERIFY_PEER, verify)
        return context

    def _verify(self, trust: Trust, connection: SSL.Connection, shown: X509, error: int, depth: int, ok: bool) -> bool:
        """Record why a certificate is refused, and never accept what OpenSSL refuses.

        There are two exceptions: the missing list of `Trust.fill`; and an issuer that is no authority, which is refused
        at depth 0, which is always verified last: only the leaf shows that it is a legacy proxy.
        """
        protocol: TLSMemoryBIOProtocol = connection.get_app_data()
        handshake = handshakes[protocol]
        try:
            certificate = shown.to_cryptography()
            subject = dn(certificate.subject)
            reason: str | None = None
            if handshake.condemned is not None:
                reason = None if depth else proxy_problem(certificate) or handshake.condemned
            elif ok:
                reason = self._reason_to_refuse(trust, handshake, certificate, is_leaf=depth == 0)
                handshake.shown.append(certificate)
                if depth == 0:
                    # All has been seen. What is read of a chain takes as much memory as the rest of a connection.
                    handshake.shown.clear()
            elif error == SSL.X509VerificationCodes.ERR_INVALID_CA and depth:
                handshake.condemned = reason_of(error)
            elif not _is_missing_list(error) or trust.must_be_listed(certificate.issuer):
                reason = reason_of(error)
        except UNREADABLE as unreadable:
            subject, reason = "(unreadable)", f"certificate cannot be read: {unreadable}"
        if reason is None:
            return True
        handshake.condemned = reason
        self._report("refused", protocol, subject, reason)
        self._refused(reason)
        return False

    def _reason_to_refuse(
        self, trust: Trust, handshake: Handshake, certificate: x509.Certificate, *, is_leaf: bool
    ) -> str | None:
        """The reason to refuse a certificate that OpenSSL accepts; at the leaf, to refuse the chain."""
        issuer = handshake.shown[-1] if handshake.shown else None
        reason = misuse(certificate, issuer, is_leaf=is_leaf)
        if reason is not None:
            return reason
        chain = [certificate, *reversed(handshake.shown)]
        if trust is not self.trust:
            # New files came in the middle of this handshake, too late for its context.
            if self.trust.revoked((certificate,)):
                return "certificate revoked"
            if is_leaf and chain[-1] not in self.trust.authorities:
                return "its authority is no longer trusted here"
        if is_leaf:
            verdict = self.trust.check_signatures(chain)
            handshake.constrained = verdict.constrained
            return verdict.refusal
        return None

    def _report(self, what: str, protocol: TLSMemoryBIOProtocol, subject: str, reason: str) -> None:
        _log.warn(
            "tls {what} peer={peer} subject={subject} reason={reason}",
            what=what,
            peer=_address(protocol.getPeer()),
            subject=subject,
            reason=reason,
        )

    def _log_problems(self, loaded: _Loaded) -> None:
        for problem in loaded.trust.problems:
            _log.warn("tls {problem}", problem=problem)
        if self._crl == "require":
            for subject in loaded.trust.unlisted():
                _log.warn(
                    "tls no revocation list of {subject}: its clients are refused (get one, or set crl = if-present)",
                    subject=subject,
                )
        unbound = loaded.trust.unbound()
        if unbound and len({each.subject for each in loaded.trust.authorities}) > 1:
            _log.warn(
                "tls these authorities have no signing policy, and may sign any subject: {subjects}."
                " Users are bound to the authority of their first connection",
                subjects=", ".join(unbound[:5]) + (f" and {len(unbound) - 5} more" if len(unbound) > 5 else ""),
            )
        self._warn_of_expiry(loaded)

    def _warn_of_expiry(self, loaded: _Loaded) -> None:
        """Warn once of each thing that is about to end."""
        now = self._now()
        if self._crl != "off":
            for subject, end in loaded.trust.ending(now, _CRL_WARNING):
                if (subject, end) not in self._warned:
                    self._warned.add((subject, end))
                    _log.warn(
                        "tls revocation list of {subject} is valid until {end} only:"
                        " without a newer one its clients are refused (run fetch-crl)",
                        subject=subject,
                        end=f"{end:%Y-%m-%dT%H:%M:%SZ}",
                    )
        certificate = loaded.identity.certificate
        if certificate.not_valid_after_utc <= now + _HOST_WARNING and certificate not in self._warned:
            self._warned.add(certificate)
            _log.warn(
                "tls host certificate {path} is valid until {end} only: renew it",
                path=self._certificate,
                end=f"{certificate.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}",
            )


class _ServerFactory(TLSMemoryBIOFactory):
    """A factory whose wrapped one may refuse a connection, by None."""

    def buildProtocol(self, addr: Any) -> Any:
        wrapped = self.wrappedFactory.buildProtocol(addr)
        return None if wrapped is None else ServerProtocol(self, wrapped)


def _is_missing_list(error: int) -> bool:
    return bool(error == SSL.X509VerificationCodes.ERR_UNABLE_TO_GET_CRL)


def _address(peer: Any) -> str:
    host = getattr(peer, "host", None)
    if host is None:
        return str(peer)
    return f"[{host}]:{peer.port}" if ":" in host else f"{host}:{peer.port}"
