"""Finds the sites that URLs belong to, and makes those that are missing: of one user, by host and protocol."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from attrs import evolve

from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.paths import StorageUrl, decoded
from pdm.workqueue.domain.sites import SiteRecord
from pdm.workqueue.http.access import Caller
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.endpoints.sites import actor, log_audit, may_be_local, site_from_body
from pdm.workqueue.http.fts.calls import FileUrl, ServerOfUrl
from pdm.workqueue.http.problems import ConflictError, InvalidInputError
from pdm.workqueue.movers.mover import destination_protocol
from pdm.workqueue.sites.registry import Site
from pdm.workqueue.store import sites
from pdm.workqueue.store.sites import NameTakenError, TooManySitesError
from pdm.workqueue.wire.sites import SiteBody

#: Sites that one request may make.
_MOST_NEW = 50
_LONGEST_NAME = 64
_NOT_OF_NAMES = re.compile(r"[^a-z0-9.-]+")


class LocatedFile(NamedTuple):
    """A file at a site: ``path`` is as the site knows it."""

    site: Site
    path: str


class _Candidate(NamedTuple):
    """A site and the path, as text, below which its endpoint is; without a slash at its end."""

    site: Site
    root: str


def _server_key(server: ServerOfUrl) -> tuple[JobProtocol, str, str, int]:
    # davs is another name of https, but roots is not root.
    scheme = "" if server.protocol is JobProtocol.HTTPS else server.scheme
    return server.protocol, scheme, server.host, server.port


class SitesOfUrls:
    """The sites at which a user may reach servers.

    Args:
        known: sites that the user may use.
        user_id: whose own sites are preferred to those of others.
    """

    def __init__(self, known: Iterable[Site], user_id: int) -> None:
        self._candidates: dict[tuple[JobProtocol, str, str, int], list[_Candidate]] = {}
        for site in known:
            for protocol in site.endpoints:
                for text in site.endpoint_urls(protocol):
                    url = StorageUrl(text)
                    port = int(url.port) if url.port else protocol.info.default_port or 0
                    server = ServerOfUrl(protocol, url.scheme, url.host.lower(), port)
                    candidate = _Candidate(site, decoded(url.encoded_path).rstrip("/"))
                    self._candidates.setdefault(_server_key(server), []).append(candidate)
        #: Those that jobs of a protocol write to, by server and protocol.
        self._writable: dict[tuple[ServerOfUrl, JobProtocol], list[_Candidate]] = {}
        for candidates in self._candidates.values():
            candidates.sort(
                key=lambda each: (
                    -len(each.root),
                    each.site.unlisted,
                    each.site.owner_id != user_id,
                    each.site.id,
                )
            )

    def of_source(self, url: FileUrl) -> LocatedFile | None:
        """The site at which a URL is read; None if there is none."""
        return _located(self._candidates.get(_server_key(url.server), ()), url.path)

    def of_destination(self, url: FileUrl, by: JobProtocol, relays_to: Collection[JobProtocol]) -> LocatedFile | None:
        """The site at which a URL is written by jobs of a protocol, which can write to others as well, always the same.

        A site that these jobs would reach by another protocol than that of the URL is none.
        """
        server = url.server
        writable = self._writable.get((server, by))
        if writable is None:
            writable = self._writable[server, by] = [
                each
                for each in self._candidates.get(_server_key(server), ())
                if (reached := destination_protocol(each.site.endpoints, by, relays_to)) is server.protocol
                or (reached is None and len(each.site.endpoints) == 1)
            ]
        return _located(writable, url.path)


def _located(candidates: Iterable[_Candidate], path: str) -> LocatedFile | None:
    """The path at the first site that has it; None if none has."""
    for site, root in candidates:
        if not root:
            return LocatedFile(site, path)
        if path.startswith(root + "/"):
            return LocatedFile(site, path[len(root) :])
    return None


async def sites_of_user(api: ApiContext, caller: Caller) -> SitesOfUrls:
    """All sites that a caller may use."""
    found = [site for site in api.sites.all() if site.is_open_to(caller.user_id)]
    return await api.in_thread(SitesOfUrls, found, caller.user_id)


async def make_sites(api: ApiContext, caller: Caller, servers: Sequence[ServerOfUrl]) -> None:
    """Make sites of the caller for servers, and wait until this daemon knows them.

    Raises:
        InvalidInputError: a server is none that a site may have, or there are too many.
        ForbiddenError: a server is of this machine, and the caller is not an operator.
    """
    if len(servers) > _MOST_NEW:
        raise InvalidInputError(f"the job has {len(servers)} storages that are new here: at most {_MOST_NEW} at once")
    for server in servers:
        await _make_site(api, caller, server)
    await api.site_directory.refresh()


async def _make_site(api: ApiContext, caller: Caller, server: ServerOfUrl) -> None:
    protocol = server.protocol
    if protocol in (JobProtocol.DUMMY, JobProtocol.FILE):
        raise InvalidInputError(f"no site serves {server.scheme}://{server.host}")
    plain, marked = _names(server)
    for name in (plain, marked):
        body = SiteBody(
            name=name,
            endpoints={protocol.name: server.url},
            description="made of the URLs of jobs of FTS",
            default_folder="/",
        )
        try:
            new = site_from_body(caller, body, local=may_be_local(api, caller))
        except InvalidInputError as error:
            raise InvalidInputError(f"{server.url}: {error.detail}") from error
        if api.sites.has_file_name(name):
            continue

        def then(record: SiteRecord) -> None:
            log_audit(api, caller, "site.create", f"site {record.id}", record.content.name)

        try:
            await api.commit(
                "create a site", sites.create, evolve(new, unlisted=True), actor(caller), api.clock(), then=then
            )
        except NameTakenError:
            continue
        except TooManySitesError as error:
            raise ConflictError(str(error)) from None
        return
    raise ConflictError(f"there is a site {marked} already: remove it, then submit again")


def _names(server: ServerOfUrl) -> tuple[str, str]:
    """Names of the site of a server: a plain one, and one that no user would choose."""
    words = f"{server.scheme}-{server.host}"
    if server.port != server.protocol.info.default_port:
        words += f"-{server.port}"
    if server.bucket:
        words += f"-{server.bucket}"
    name = _NOT_OF_NAMES.sub("-", words)
    digest = hashlib.sha256(server.url.encode()).hexdigest()[:12]
    marked = f"{name[: _LONGEST_NAME - 13]}-{digest}"
    return (name if len(name) <= _LONGEST_NAME else marked), marked
