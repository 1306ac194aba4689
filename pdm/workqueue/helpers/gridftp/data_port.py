"""Addresses of data connections (RFC 959, RFC 2428), and what a control channel has agreed upon for them.

A server may name another address than its own: a data node of a cluster does so, but also a hostile server that wants
the service to connect to a third machine, and one behind an address translation, which names a private address.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import Protocol

from pdm.workqueue.helpers.gridftp.replies import Reply


class DataConnections(Protocol):
    """Data connections of a channel."""

    @property
    def is_dead(self) -> bool:
        """Whether the server has closed one of them."""

    def close(self) -> None: ...


class DataPort:
    """The settings of data connections.

    Attributes:
        mode: transmission mode that was last set: ``S`` (stream) or ``E`` (extended blocks).
        authenticates: whether both ends log in, as servers with proxies do by default (DCAU).
        encrypts: whether both ends encrypt the bytes (PROT P): only if the server requires it.
        kept: connections for further transfers; closed together with the channel.
        local_host: our address, as the server's network sees it unless it is translated.
        peer_host: the server's address.
    """

    def __init__(self) -> None:
        self.mode = b"S"
        self.authenticates = False
        self.encrypts = False
        self.kept: DataConnections | None = None
        self.local_host = self.peer_host = ""

    def connected(self, control: socket.socket, *, authenticates: bool) -> None:
        """The control channel is open."""
        self.local_host, self.peer_host = str(control.getsockname()[0]), str(control.getpeername()[0])
        self.authenticates = authenticates

    @property
    def is_dead(self) -> bool:
        """Whether the server has closed a connection that was kept: it fails at the next transfer."""
        return self.kept is not None and self.kept.is_dead

    @property
    def passive_command(self) -> bytes:
        """The command that makes the server listen."""
        return passive_command(self.peer_host)

    def keep(self, connections: DataConnections | None) -> None:
        """Keep connections, and close those before; the server must have dropped its ends (PASV, PORT)."""
        before, self.kept = self.kept, connections
        if before is not None:
            before.close()


_EXTENDED = re.compile(r"229 [^\n]{0,200}?\((.)(?:\1\1|1\1[0-9.]{7,15}\1|2\1[0-9A-Fa-f:.]{2,45}\1)([0-9]{1,5})\1\)")


def passive_command(peer: str) -> bytes:
    """The command that makes a server listen, by the kind of its address."""
    return b"EPSV" if _address(peer).version == 6 else b"PASV"


def passive_address(reply: Reply, peer: str, *, authenticated: bool) -> tuple[str, int] | None:
    """Host and port to connect to; None if there are none in the reply.

    Args:
        reply: to PASV or EPSV.
        peer: address of the server.
        authenticated: whether both ends of the data connection prove their identity: only then the address may be that
            of another machine.
    """
    extended = _EXTENDED.match(reply.text)
    if extended is not None:
        # The port alone: data nodes are named by PASV only.
        return _valid(peer, int(extended.group(2)))
    named = reply.data_address
    if named is None:
        return None
    _, (host, port) = named
    try:
        is_usable = authenticated and _may_be_data_node(_address(host), _address(peer))
    except ValueError:
        return None
    return _valid(host if is_usable else peer, port)


def _valid(host: str, port: int) -> tuple[str, int] | None:
    return (host, port) if 0 < port < 2**16 else None


def _may_be_data_node(host: _Address, peer: _Address) -> bool:
    """Whether a server may have a data node at an address: not on this machine or link, nor in our private network."""
    if host == peer:
        return True
    if host.is_loopback or host.is_link_local or host.is_multicast or host.is_unspecified or host.is_reserved:
        return False
    return host.is_global or not peer.is_global


def port_command(host: str, port: int) -> bytes:
    """The command that makes a server connect to an address of ours."""
    address = _address(host)
    if isinstance(address, ipaddress.IPv6Address):
        return f"EPRT |2|{address}|{port}|".encode()
    return b"PORT %s,%d,%d" % (str(address).replace(".", ",").encode(), *divmod(port, 256))


_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _address(host: str) -> _Address:
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
