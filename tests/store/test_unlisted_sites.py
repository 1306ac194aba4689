"""Sites that were made of URLs are removed once nothing refers to them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from attrs import evolve

from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.sites import Actor, NewSite, RestrictionKind
from pdm.workqueue.store import sites, unlisted_sites
from pdm.workqueue.store.records import credentials
from pdm.workqueue.store.records import jobs as job_rows
from tests.store.stores import Store
from tests.store.test_retention import old_job, purge, remove_all

_LATER = timedelta(seconds=1)


@pytest.fixture
def owner(store: Store) -> Actor:
    return Actor(store.user(), "/DC=test/CN=alice")


def _made(store: Store, owner: Actor, name: str, **changes: Any) -> int:
    endpoints = {JobProtocol.GRIDFTP: (f"gsiftp://{name}:1",)}
    new = NewSite(owner.user_id, False, name, "", "/", endpoints, None, None, "")
    return store.run(sites.create, evolve(new, **{"unlisted": True, **changes}), owner, store.now).id


def _unused(store: Store) -> list[int]:
    found = []
    after = 0
    while step := store.run(unlisted_sites.unused, store.now + _LATER, after):
        after, numbers = step
        found += numbers
    return found


def _removed(store: Store, owner: Actor, numbers: list[int], newest: int = 10**6) -> int:
    return store.run(unlisted_sites.remove, owner.user_id, numbers, store.now + _LATER, newest).rows


def test_only_sites_to_which_nothing_refers_are_removed(store: Store, owner: Actor) -> None:
    idle = _made(store, owner, "idle")
    for name, changes in (
        ("named", {"unlisted": False}),
        ("limited", {"limit_in": 3}),
        ("fts", {"fts": "https://f:1"}),
    ):
        _made(store, owner, name, **changes)
    drained, keyed, used = (_made(store, owner, name) for name in ("drained", "keyed", "used"))
    store.run(sites.restrict, RestrictionKind.SITE, drained, "", owner, store.now)
    row = {"user_id": owner.user_id, "kind": "proxy", "site_id": keyed, "subject": "s", "details": {}, "secret": b""}
    store.run(lambda session: session.execute(sa.insert(credentials), {**row, "stored_at": store.now}))
    job = old_job(store, owner.user_id)
    store.run(lambda session: session.execute(sa.update(job_rows).values(dst_siteid=used)))
    other = Actor(store.user("bob"), "/DC=test/CN=bob")
    of_other = _made(store, other, "others")
    assert _unused(store) == [idle, of_other]
    assert store.run(unlisted_sites.unused, store.now - _LATER, 0) is None
    assert _removed(store, owner, [idle, drained, keyed]) == 1
    assert _unused(store) == [of_other]
    # Once the job is removed by its age, its site follows.
    assert purge(store) == [job.id]
    remove_all(store)
    assert _unused(store) == [used, of_other]


def test_a_site_that_is_used_again_meanwhile_stays(store: Store, owner: Actor) -> None:
    site = _made(store, owner, "again")
    newest = store.run(unlisted_sites.newest_job)
    assert _unused(store) == [site]
    old_job(store, owner.user_id)
    store.run(lambda session: session.execute(sa.update(job_rows).values(src_siteid=site)))
    assert _removed(store, owner, [site], newest) == 0
    assert {each.id for each in store.run(lambda session: list(sites.all_sites(session)))} == {site}
