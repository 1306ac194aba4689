"""Addresses to which the service does not connect for users: those of its own machine, and of the link."""

from __future__ import annotations

import ipaddress
import re
import socket

from attrs import frozen

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

#: Names of this machine in the usual /etc/hosts, and in resolvers.
_LOCAL_NAMES = frozenset({"localhost", "localhost4", "localhost6", "ip6-localhost", "ip6-loopback"})
_LOCAL_DOMAINS = (".localhost", ".localdomain", ".localdomain4", ".localdomain6")
_THIS_NETWORK = ipaddress.IPv4Network("0.0.0.0/8")
_BROADCAST = ipaddress.IPv4Address("255.255.255.255")
#: Networks of IPv6 whose last 32 bits are an IPv4 address: translated by NAT64, and "IPv4-compatible".
_EMBEDDING = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("::/96"))
_RANGE = re.compile(r"(?:\[(?P<v6>[^\]]+)\]|(?P<v4>[^:]+)|(?P<bare>[^\[\]]+))(?::(?P<port>[0-9]{1,5}))?", re.ASCII)


@frozen
class AddressRange:
    """Addresses of a network, at one port or (None) at all."""

    network: IpNetwork
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> AddressRange:
        """Read ``10.0.0.0/8``, ``127.0.0.1:8080``, ``fd00::/8`` or ``[::1]:8080``.

        Raises:
            ValueError: it is none of these.
        """
        try:
            network, port = ipaddress.ip_network(text), None
        except ValueError:
            match = _RANGE.fullmatch(text)
            port = int(match["port"]) if match is not None and match["port"] else None
            if match is None or (port is not None and not 0 < port <= 65535):
                raise ValueError(f"{text[:60]!r}: an address or a network is expected, such as 10.0.0.0/8") from None
            network = ipaddress.ip_network(match["v6"] or match["v4"] or match["bare"])
        return cls(network, port)

    def has(self, address: IpAddress, port: int) -> bool:
        return self.port in (None, port) and address.version == self.network.version and address in self.network


def literal_address(host: str) -> IpAddress | None:
    """The address that a host is written as; None if it is a name.

    Other notations that resolvers accept are understood, too: ``127.1``, ``0x7f000001``, ``2130706433``.
    """
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except (OSError, UnicodeEncodeError):
            return None


def embedded_address(address: IpAddress) -> IpAddress:
    """The IPv4 address that an IPv6 address leads to (mapped, 6to4, Teredo, NAT64); others as they are."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    # ``::`` and ``::1`` are no IPv4 addresses.
    if any(address in network for network in _EMBEDDING) and int(address) > 1:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def is_local_address(address: IpAddress) -> bool:
    """Whether an address is of this machine or its link whatever machine it is, or no single machine's."""
    found = embedded_address(address)
    if isinstance(found, ipaddress.IPv4Address) and (found in _THIS_NETWORK or found == _BROADCAST):
        return True
    return found.is_loopback or found.is_link_local or found.is_unspecified or found.is_multicast


def is_local_host(host: str, own_name: str) -> bool:
    """Whether a host, as it is written, is this machine or on its link; ``own_name`` is the machine's host name."""
    name, own = host.rstrip(".").lower(), own_name.lower()
    if name in _LOCAL_NAMES or name.endswith(_LOCAL_DOMAINS) or name in (own, own.partition(".")[0]):
        return True
    found = literal_address(name)
    return found is not None and is_local_address(found)
