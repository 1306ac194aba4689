"""From what a client says about a site to one that can be stored; every refusal names the key that is wrong."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from attrs import evolve
from msgspec import UNSET

from pdm.workqueue.certificates.pem_files import to_pem
from pdm.workqueue.certificates.site_trust import read_authorities
from pdm.workqueue.domain.catalogue import NewSite
from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.http.access import Caller, Role
from pdm.workqueue.http.problems import ForbiddenError, InvalidInputError
from pdm.workqueue.sites.registry import (
    check_default_folder,
    check_description,
    check_endpoint,
    check_host_and_port,
    check_name,
)
from pdm.workqueue.wire.sites import SiteBody, SiteChanges

#: What /etc/hosts of usual systems, and resolvers by themselves, call this machine.
_LOCAL_NAMES = frozenset({"localhost", "localhost4", "localhost6", "ip6-localhost", "ip6-loopback"})
_LOCAL_DOMAINS = (".localhost", ".localdomain", ".localdomain4", ".localdomain6")


def site_from(caller: Caller, body: SiteBody, *, local: bool) -> NewSite:
    """The site that a body describes.

    Args:
        caller: whose it will be.
        body: what it says.
        local: whether it may lead to this machine and its link.

    Raises:
        InvalidInputError: it cannot be; names the key.
        ForbiddenError: it has a folder of the service's own machine, and the caller is no operator.
    """
    return NewSite(
        owner_id=caller.user_id,
        public=body.public,
        name=_checked(check_name, body.name, "$.name"),
        description=_checked(check_description, body.description or "", "$.description"),
        default_folder=_checked(check_default_folder, body.default_folder or "~", "$.default_folder"),
        endpoints=_endpoints(caller, body.endpoints, local=local),
        limit_in=body.limit_in,
        limit_out=body.limit_out,
        authorities=_authorities(body.authorities or ""),
        myproxy=_myproxy(body.myproxy, local=local),
    )


def changed(caller: Caller, body: SiteChanges, content: NewSite, *, local: bool) -> NewSite:
    """A site as it is to be.

    Args:
        caller: who changes it.
        body: what shall be different.
        content: the site as it is.
        local: whether it may lead to this machine and its link.

    Raises:
        InvalidInputError, ForbiddenError: as for a new one.
    """
    if body.public is not UNSET:
        content = evolve(content, public=body.public)
    if body.name is not UNSET:
        content = evolve(content, name=_checked(check_name, body.name, "$.name"))
    if body.description is not UNSET:
        content = evolve(content, description=_checked(check_description, body.description, "$.description"))
    if body.default_folder is not UNSET:
        folder = _checked(check_default_folder, body.default_folder, "$.default_folder")
        content = evolve(content, default_folder=folder)
    if body.endpoints is not UNSET:
        content = evolve(content, endpoints=_endpoints(caller, body.endpoints, local=local))
    if body.limit_in is not UNSET:
        content = evolve(content, limit_in=body.limit_in)
    if body.limit_out is not UNSET:
        content = evolve(content, limit_out=body.limit_out)
    if body.authorities is not UNSET:
        content = evolve(content, authorities=_authorities(body.authorities))
    if body.myproxy is not UNSET:
        content = evolve(content, myproxy=_myproxy(body.myproxy, local=local))
    return content


def _checked(check: Callable[[str], str], text: str, pointer: str) -> str:
    try:
        return check(text)
    except ValueError as error:
        raise InvalidInputError(str(error), pointer) from error


def _myproxy(server: str | None, *, local: bool) -> str | None:
    if server is None:
        return None
    return _elsewhere(_checked(check_host_and_port, server, "$.myproxy"), "$.myproxy", local=local)


def _elsewhere(address: str, pointer: str, *, local: bool) -> str:
    """An address (``HOST:PORT``, or a URL), unless it is of this machine, or of its link, and may not be."""
    authority = address.partition("://")[2].partition("/")[0] or address
    if not local and _is_local(authority):
        # Users would reach what trusts connections from here.
        raise ForbiddenError("an address of the service's own machine, or of its link, is for operators", pointer)
    return address


def _is_local(authority: str) -> bool:
    host = authority[1:].partition("]")[0] if authority.startswith("[") else authority.partition(":")[0]
    host = host.rstrip(".").lower()
    own = socket.gethostname().lower()
    if host in _LOCAL_NAMES or host.endswith(_LOCAL_DOMAINS) or host in (own, own.partition(".")[0]):
        return True
    try:
        found: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(host)
    except ValueError:
        try:
            # Other ways to write an address, which resolvers know: 127.1, 0x7f000001.
            found = ipaddress.IPv4Address(socket.inet_aton(host))
        except OSError:
            return False
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    return found.is_loopback or found.is_link_local or found.is_unspecified or found.is_multicast


def _endpoints(
    caller: Caller, given: Mapping[str, str | list[str]], *, local: bool
) -> dict[JobProtocol, Sequence[str]]:
    found: dict[JobProtocol, Sequence[str]] = {}
    for word, urls in given.items():
        pointer = f"$.endpoints.{word}"
        try:
            protocol = JobProtocol.parse(word)
        except ValueError as error:
            raise InvalidInputError(str(error), pointer) from error
        if protocol in found:
            raise InvalidInputError("the protocol is given twice", pointer)
        if protocol is JobProtocol.FILE and caller.role is not Role.OPERATOR:
            # It would open the disk of this machine.
            raise ForbiddenError("only operators may make sites of folders of this machine", pointer)
        lines = [urls] if isinstance(urls, str) else urls
        checked = [_checked(partial(check_endpoint, protocol), line, pointer) for line in lines]
        if protocol is not JobProtocol.FILE:
            checked = [_elsewhere(url, pointer, local=local) for url in checked]
        if len(set(checked)) < len(checked):
            raise InvalidInputError("an endpoint is given twice", pointer)
        if protocol is JobProtocol.FILE and len(checked) > 1:
            raise InvalidInputError("one folder is expected", pointer)
        found[protocol] = tuple(checked)
    return {protocol: found[protocol] for protocol in sorted(found)}


def _authorities(pem: str) -> str:
    if not pem:
        return ""
    try:
        return to_pem(*read_authorities(pem)).decode("ascii")
    except ValueError as error:
        raise InvalidInputError(str(error), "$.authorities") from error
