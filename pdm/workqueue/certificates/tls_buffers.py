"""The buffers between OpenSSL and the network, kept small: they grow with what passes them, and never shrink.

Else a handshake leaves 6 KiB in the two buffers of each connection, and a burst of data as much as it had. pyOpenSSL
has no public function for them: what is used of its internals stands here alone, and a version without these names is
left as it is.
"""

from __future__ import annotations

from typing import Any

from OpenSSL import SSL
from twisted.protocols.tls import BufferingTLSTransport

_ffi: Any = getattr(SSL, "_ffi", None)
_lib: Any = getattr(SSL, "_lib", None)
_NEEDED = ("BIO_new", "BIO_s_mem", "BIO_get_mem_data", "SSL_set_bio")
_CAN_RENEW = _ffi is not None and all(hasattr(_lib, name) for name in _NEEDED)
#: Bytes of a handshake that OpenSSL is given at once.
_PIECE = 512


class ServerProtocol(BufferingTLSTransport):
    """TLS of a server whose handshake leaves small buffers."""

    def dataReceived(self, bytes: bytes) -> None:  # noqa: A002 - Twisted's name
        if self._handshakeDone:
            super().dataReceived(bytes)
            return
        for start in range(0, len(bytes), _PIECE):
            if self._lostTLSConnection or self._aborted:
                return
            super().dataReceived(bytes[start : start + _PIECE])
            # Now, not after the handshake: what OpenSSL keeps of the certificates then fills the gap in the heap.
            renew_buffers(self)


def renew_buffers(transport: Any) -> bool:
    """Replace the buffers of a connection by new ones, if both are empty.

    Args:
        transport: of the connection (``request.channel.transport``); one without TLS is left alone.

    Returns:
        Whether they were replaced.
    """
    connection = transport.getHandle() if hasattr(transport, "getHandle") else None
    if not _CAN_RENEW or not isinstance(connection, SSL.Connection):
        return False
    old = [getattr(connection, name, None) for name in ("_into_ssl", "_from_ssl")]
    if None in old or any(map(_size, old)):
        return False
    new = [_lib.BIO_new(_lib.BIO_s_mem()) for _ in old]
    if _ffi.NULL in new:
        raise MemoryError("OpenSSL has no memory for the buffers of a connection")
    # OpenSSL frees the old ones.
    _lib.SSL_set_bio(connection._ssl, *new)
    connection._into_ssl, connection._from_ssl = new
    return True


def _size(buffer: Any) -> int:
    """Bytes that wait in a buffer."""
    size: int = _lib.BIO_get_mem_data(buffer, _ffi.new("char **"))
    return size
