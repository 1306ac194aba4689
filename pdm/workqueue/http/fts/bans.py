"""Banned storages: what is submitted for them, and their sites, which are drained."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pdm.workqueue.domain.fts import storage_element
from pdm.workqueue.domain.sites import RestrictionKind
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.problems import ForbiddenError
from pdm.workqueue.sites.registry import Site
from pdm.workqueue.store import fts_bans, sites
from pdm.workqueue.store.fts_bans import FtsBan

#: What the message of a drained site begins with if its storage is banned.
BANNED_STORAGE = "banned as a storage of FTS: "


def sites_of_storage(api: ApiContext, storage: str) -> list[Site]:
    """The sites with an endpoint at ``SCHEME://HOST``."""
    return [
        site
        for site in api.sites.all()
        if any(storage_element(url) == storage for each in site.endpoints for url in site.endpoint_urls(each))
    ]


async def drain_banned(api: ApiContext, ban: FtsBan, concerned: Collection[Site]) -> None:
    """Drain the sites of a banned storage that are not."""
    words = BANNED_STORAGE + (ban.message or ban.storage)
    open_ = [site.id for site in concerned if api.site_directory.restriction(RestrictionKind.SITE, site.id) is None]
    for number in open_:
        await api.commit(
            "drain a site", sites.restrict, RestrictionKind.SITE, number, words, ban.by, api.clock(), then=_ignore
        )
    if open_:
        await api.site_directory.refresh()


def _ignore(_result: object) -> None:
    pass


async def check_bans(api: ApiContext, storages: Collection[str]) -> Sequence[FtsBan]:
    """The bans of some storages, all of which accept jobs.

    Raises:
        ForbiddenError: one does not.
    """
    found = [ban for ban in await api.database.read("banned storages", fts_bans.all_bans) if ban.storage in storages]
    for ban in found:
        if not ban.accepts_jobs:
            raise ForbiddenError(f"{ban.storage} is banned")
    return found


async def drain_sites_of_bans(api: ApiContext, bans: Sequence[FtsBan]) -> None:
    """Drain sites that were made after their storage was banned."""
    for ban in bans:
        await drain_banned(api, ban, sites_of_storage(api, ban.storage))
