"""Sites of users and restrictions in the database: versions, numbers, names, locks."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from attrs import evolve
from sqlalchemy.orm import Session

from pdm.workqueue.domain.credentials import ALL_SITES, CredentialKind
from pdm.workqueue.domain.enums import JobProtocol, JobStatus, JobType
from pdm.workqueue.domain.jobs import NewElement
from pdm.workqueue.domain.sites import LAST_FILE_SITE, Actor, NewSite, RestrictionKind, SiteSnapshot
from pdm.workqueue.store import credentials, held_elements, job_changes, jobs, results, sites, users
from pdm.workqueue.store.credentials import EncryptedCredential
from tests.store.stores import BROKEN, EXPIRED, Store, done, ended, token_of
from tests.support.records import new_job


@pytest.fixture
def owner(store: Store) -> Actor:
    return Actor(store.user("owner"), "/CN=owner")


def content(owner: Actor, name: str = "LAB", **changes: Any) -> NewSite:
    made = NewSite(
        owner.user_id, False, name, "", "~", {JobProtocol.GRIDFTP: ("gsiftp://a:1", "gsiftp://b:1")}, 3, None, ""
    )
    return evolve(made, **changes)


def loaded(store: Store, known: int | None = None) -> SiteSnapshot | None:
    return store.run(sites.load_snapshot, known)


def test_each_change_is_a_new_version(store: Store, owner: Actor) -> None:
    assert loaded(store) == SiteSnapshot(0)
    assert loaded(store, 0) is None
    site = store.run(sites.create, content(owner), owner, store.now)
    first = loaded(store, 0)
    assert first is not None
    assert list(first.sites) == [site]
    assert site.id == LAST_FILE_SITE + 1
    assert loaded(store, first.version) is None
    store.run(sites.restrict, RestrictionKind.SITE, site.id, "disks", owner, store.now)
    second = loaded(store, first.version)
    assert second is not None
    assert [(one.kind, one.number, one.message) for one in second.restrictions] == [("site", site.id, "disks")]
    assert store.run(sites.remove, site.id, owner, store.now)
    third = loaded(store, second.version)
    # With the site goes what was said about it.
    assert third == SiteSnapshot(third.version if third else 0)
    assert not store.run(sites.lift_restriction, RestrictionKind.SITE, site.id, owner, store.now)
    acts = store.run(users.page_audit, 0, 10)
    assert [act.action for act in acts] == ["site.create", "site.drain", "site.remove"]
    assert store.run(sites.create, content(owner), owner, store.now).id == site.id + 1


def test_names_are_ones_own_unless_public(store: Store, owner: Actor) -> None:
    other = Actor(store.user("other"), "/CN=other")
    mine = store.run(sites.create, content(owner), owner, store.now)
    assert store.run(sites.create, content(owner), owner, store.now) == mine
    theirs = store.run(sites.create, content(other), other, store.now)
    public = content(owner, "Open", public=True)
    store.run(sites.create, public, owner, store.now)
    with pytest.raises(sites.NameTakenError):
        store.run(sites.create, content(other, "OPEN"), other, store.now)
    with pytest.raises(sites.NameTakenError):
        store.run(sites.change, theirs.id, lambda _: content(other, "open"), other, store.now)
    assert store.run(sites.change, 7, lambda _: content(other), other, store.now) is None


def test_a_change_is_made_to_what_is_there(store: Store, owner: Actor) -> None:
    """Two daemons change different things, and neither has seen the other's change."""
    site = store.run(sites.create, content(owner), owner, store.now)
    store.run(sites.change, site.id, lambda seen: evolve(seen, limit_in=9), owner, store.now)
    last = store.run(sites.change, site.id, lambda seen: evolve(seen, myproxy="m:7512"), owner, store.now)
    assert last is not None
    assert (last.content.limit_in, last.content.myproxy) == (9, "m:7512")
    known = loaded(store)
    assert known is not None
    assert list(known.sites) == [last]
    # What changes nothing is no act.
    assert store.run(sites.change, site.id, lambda seen: seen, owner, store.now) == last
    acts = store.run(users.page_audit, 0, 10)
    assert [act.action for act in acts] == ["site.create", "site.change", "site.change"]
    assert "logon at m:7512" in acts[-1].details


def test_numbers_are_given_once_by_many_at_a_time(store: Store, owner: Actor) -> None:
    made: list[int] = []
    faults: list[Exception] = []

    def make(number: int) -> None:
        for _ in range(20):
            try:
                made.append(store.run(sites.create, content(owner, f"S{number}"), owner, store.now).id)
                return
            except sa.exc.IntegrityError:
                # Both made the first row: the lane of the daemon runs it again, too.
                continue
            except Exception as error:
                faults.append(error)
                return

    threads = [threading.Thread(target=make, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert sorted(made) == list(range(LAST_FILE_SITE + 1, LAST_FILE_SITE + 7))


def test_a_site_is_not_removed_under_a_job(store: Store, owner: Actor) -> None:
    site = store.run(sites.create, content(owner), owner, store.now)
    job = store.submit(owner.user_id, dst_siteid=None, src_siteid=site.id)
    with pytest.raises(sites.SiteInUseError) as caught:
        store.run(sites.remove, site.id, owner, store.now)
    assert caught.value.jobs == 1
    store.run(job_changes.cancel, job.id, store.now)
    assert store.run(sites.remove, site.id, owner, store.now)
    assert store.run(sites.missing, [site.id]) == {site.id}


def test_whatever_an_unfinished_job_waits_for_its_site_stays(store: Store, owner: Actor) -> None:
    store.worker()
    site = store.run(sites.create, content(owner), owner, store.now)

    def used() -> int:
        try:
            store.run(sites.remove, site.id, owner, store.now)
        except sites.SiteInUseError as error:
            return error.jobs
        return 0

    job = store.submit(owner.user_id, JobType.REMOVE, src_siteid=site.id)
    assert used() == 1
    (listing,) = store.claim()
    assert used() == 1
    store.run(results.add_elements, "w", token_of(listing), [NewElement(JobType.REMOVE, "d", phase=1)])
    store.settle(done(listing))
    (work,) = store.claim()
    assert used() == 1
    store.settle(ended(JobStatus.HELD, work, failure=EXPIRED, counts=False))
    assert store.job(job.id).status is JobStatus.HELD
    assert used() == 1
    store.run(held_elements.resume_held, owner.user_id, store.now)
    store.settle(ended(JobStatus.SUBMITTED, *store.claim(), failure=BROKEN, not_before=store.now + timedelta(days=1)))
    assert used() == 1
    store.run(job_changes.cancel, job.id, store.now)
    assert used() == 0


def test_with_a_site_go_the_credentials_for_it(store: Store, owner: Actor) -> None:
    site = store.run(sites.create, content(owner), owner, store.now)
    for number in (ALL_SITES, site.id, 7):
        new = EncryptedCredential(CredentialKind.TOKEN, "a token", None, b"sealed", number)
        store.run(credentials.put, owner.user_id, new, store.now)
    assert store.run(sites.remove, site.id, owner, store.now)
    assert [record.site_id for record in store.run(credentials.of_user, owner.user_id)] == [ALL_SITES, 7]


@pytest.mark.postgresql
@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
def test_removing_waits_for_a_job_that_is_being_registered(store: Store, owner: Actor) -> None:
    site = store.run(sites.create, content(owner), owner, store.now)
    outcome: list[object] = []

    def remove() -> None:
        try:
            outcome.append(store.run(sites.remove, site.id, owner, store.now))
        except sites.SiteInUseError as error:
            outcome.append(error)

    remover = threading.Thread(target=remove)
    with Session(store.engine) as session, session.begin():
        jobs.submit(session, new_job(owner.user_id, src_siteid=site.id), None, store.now)
        assert sites.missing(session, [site.id]) == set()
        remover.start()
        remover.join(0.3)
        assert outcome == []
    remover.join()
    assert isinstance(outcome[0], sites.SiteInUseError)
