"""Who is at the other end of a TLS connection."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from weakref import WeakKeyDictionary

from attrs import define, field, frozen
from cryptography import x509
from OpenSSL import SSL

from pdm.workqueue.certificates.names import dn
from pdm.workqueue.certificates.proxies import end_entity, is_limited, lifetime_end


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
        shown: the certificates that OpenSSL has found good, the root first: it shows one at a time.
        condemned: why the chain is refused as soon as its leaf has been seen; None if it is not.
        constrained: whether its authorities are all bound by policies.
    """

    shown: list[x509.Certificate] = field(factory=list)
    condemned: str | None = None
    constrained: bool = False


#: By the protocol that speaks TLS on the connection.
handshakes: WeakKeyDictionary[Any, Handshake] = WeakKeyDictionary()

# To read a chain costs as much as the rest of a request; a connection keeps its certificate for life.
_known: WeakKeyDictionary[Any, PeerIdentity] = WeakKeyDictionary()


def peer_identity(transport: Any) -> PeerIdentity | None:
    """The identity that a peer proved in its handshake.

    Args:
        transport: of the connection, once the handshake is over (``request.channel.transport``).

    Returns:
        None if the peer showed no certificate, or the connection has no TLS.
    """
    known = _known.get(transport)
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
    _known[transport] = identity
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
