"""From what a client says about a site to one that can be stored; every refusal names the key that is wrong."""

from __future__ import annotations

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


def site_from(caller: Caller, body: SiteBody) -> NewSite:
    """The site that a body describes.

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
        endpoints=_endpoints(caller, body.endpoints),
        limit_in=body.limit_in,
        limit_out=body.limit_out,
        authorities=_authorities(body.authorities or ""),
        myproxy=_myproxy(body.myproxy),
    )


def changed(caller: Caller, body: SiteChanges, content: NewSite) -> NewSite:
    """A site as it is to be.

    Args:
        caller: who changes it.
        body: what shall be different.
        content: the site as it is.

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
        content = evolve(content, endpoints=_endpoints(caller, body.endpoints))
    if body.limit_in is not UNSET:
        content = evolve(content, limit_in=body.limit_in)
    if body.limit_out is not UNSET:
        content = evolve(content, limit_out=body.limit_out)
    if body.authorities is not UNSET:
        content = evolve(content, authorities=_authorities(body.authorities))
    if body.myproxy is not UNSET:
        content = evolve(content, myproxy=_myproxy(body.myproxy))
    return content


def _checked(check: Callable[[str], str], text: str, pointer: str) -> str:
    try:
        return check(text)
    except ValueError as error:
        raise InvalidInputError(str(error), pointer) from error


def _myproxy(server: str | None) -> str | None:
    return None if server is None else _checked(check_host_and_port, server, "$.myproxy")


def _endpoints(caller: Caller, given: Mapping[str, str | list[str]]) -> dict[JobProtocol, Sequence[str]]:
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
