"""Users, credentials, listings."""

from __future__ import annotations

from datetime import timedelta

import sqlalchemy as sa

from pdm.workqueue.domain.credentials import CredentialKind
from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.jobs import ClaimToken, ListedEntry
from pdm.workqueue.domain.planning import Skipped, unnamed
from pdm.workqueue.store import credentials, idempotency, jobs, leases, listings, users
from pdm.workqueue.store.credentials import EncryptedCredential, PendingDelegation
from pdm.workqueue.store.idempotency import IdempotencyKey
from pdm.workqueue.store.records import listing_notes
from tests.store.stores import BROKEN, START, Store, ended, name_of, token_of
from tests.support.records import new_job


def test_a_user_is_registered_once_and_keeps_the_role_of_today(store: Store) -> None:
    first = store.run(users.register, "/CN=a", "user", START)
    again = store.run(users.register, "/CN=a", "operator", START + timedelta(days=1))
    assert (again.id, again.role, again.registered_at) == (first.id, "operator", START)
    assert store.run(users.find, "/CN=a") == again == store.run(users.fetch, first.id)
    assert store.run(users.find, "/CN=b") is None
    assert store.run(users.fetch, first.id + 1) is None


def test_a_new_credential_replaces_the_old_one(store: Store) -> None:
    user = store.user()
    until = START + timedelta(hours=12)
    proxy, token = CredentialKind.PROXY, CredentialKind.TOKEN
    first = store.run(credentials.put, user, EncryptedCredential(proxy, "/CN=a/CN=1", START, b"\0old"), START)
    second = store.run(credentials.put, user, EncryptedCredential(proxy, "/CN=a/CN=2", until, b"\0new"), START)
    assert (second.id, second.secret, second.valid_until) == (first.id, b"\0new", until)
    assert store.run(credentials.find, user, proxy) == second
    assert store.run(credentials.find, user, token) is None
    assert store.run(credentials.remove, user, proxy)
    assert not store.run(credentials.remove, user, proxy)
    assert store.run(credentials.find, user, proxy) is None


def test_one_delegation_of_a_user_is_pending(store: Store) -> None:
    user = store.user()
    first = PendingDelegation("one", user, b"key", "csr", START)
    second = PendingDelegation("two", user, b"key", "csr", START)
    store.run(credentials.put_pending, first)
    store.run(credentials.put_pending, second)
    assert store.run(credentials.find_pending, user) == second
    store.run(credentials.drop_pending, user)
    assert store.run(credentials.find_pending, user) is None


ENTRIES = [
    ListedEntry("", "directory", mode=0o755, mtime=0),
    ListedEntry("a\nb \uef80 \udc80 \0", "file", 2**63 - 1, 0o644, 1_700_000_000),
    ListedEntry("l", "link", target="/x", target_is_file=True),
]


def test_a_listing_comes_back_as_it_went_in(store: Store) -> None:
    store.worker()
    job = store.submit(store.user(), JobType.LIST)
    (batch,) = store.claim()
    token = token_of(batch)
    assert store.run(listings.begin, token)
    assert store.run(listings.add, token, 0, ENTRIES)
    assert store.run(listings.add, token, 1, [])
    shut = Skipped("d \0\udc80", "directory", "PERMISSION_DENIED", "PERMISSION_DENIED: no")
    notes = [shut, unnamed("d", 3)]
    assert store.run(listings.add_notes, token, notes)
    assert store.run(listings.add_notes, token, notes)
    assert store.run(listings.chunks, job.id, 0) == [0, 1]
    assert store.run(listings.chunk, job.id, 0, 0) == ENTRIES
    assert store.run(listings.chunk, job.id, 0, 1) == []
    assert store.run(listings.chunk, job.id, 0, 2) == []
    found = store.run(listings.notes, job.id, 0, 0, 10)
    assert [note.skipped for note in found] == notes * 2
    for number, note in enumerate(found):
        assert store.run(listings.notes, job.id, 0, note.number, 10) == found[number + 1 :]
    assert store.run(listings.notes, job.id, 0, found[0].number, 2) == found[1:3]
    assert store.run(listings.notes, job.id, 0, 2**63 - 1, 2) == []
    assert store.run(listings.count_notes, job.id) == {"PERMISSION_DENIED": 2, "UNNAMED": 6}


def test_notes_of_an_earlier_version_are_counted_and_given_out(store: Store) -> None:
    store.worker()
    job = store.submit(store.user(), JobType.LIST)
    old = sa.insert(listing_notes).values(
        job_id=job.id, element_id=0, sequence=0, content='[{"path": "d", "reason": "no"}]'
    )
    store.run(lambda session: session.execute(old).close())
    (note,) = store.run(listings.notes, job.id, 0, 0, 10)
    assert note.skipped == Skipped("d", "unknown", "UNKNOWN", "no")
    assert store.run(listings.count_notes, job.id) == {"UNKNOWN": 1}


def test_a_second_attempt_begins_its_listing_anew(store: Store) -> None:
    store.worker()
    job = store.submit(store.user(), JobType.LIST)
    (first,) = store.claim()
    store.run(listings.add, token_of(first), 0, ENTRIES)
    store.run(listings.add_notes, token_of(first), [unnamed("d", 1)])
    store.settle(ended(JobStatus.SUBMITTED, first, failure=BROKEN))
    (second,) = store.claim()
    assert store.run(listings.begin, token_of(second))
    assert store.run(listings.chunks, job.id, 0) == []
    assert store.run(listings.notes, job.id, 0, 0, 10) == []


def test_a_lost_listing_writes_nothing(store: Store) -> None:
    store.worker()
    job = store.submit(store.user(), JobType.LIST)
    (batch,) = store.claim()
    token = token_of(batch)
    store.run(listings.add, token, 0, ENTRIES)
    store.run(leases.release_worker, name_of(), store.now)
    store.worker("heir")
    store.claim("heir")
    assert not store.run(listings.begin, token)
    assert not store.run(listings.add, token, 1, ENTRIES)
    assert not store.run(listings.add_notes, token, [unnamed("d", 1)])
    assert store.run(listings.chunks, job.id, 0) == [0]
    assert not store.run(listings.add, ClaimToken(job.id, 5, 1), 1, ENTRIES)


def test_keys_of_old_requests_are_forgotten(store: Store) -> None:
    users_ = [store.user(name) for name in ("alice", "bob")]
    for user in users_:
        for number in range(3):
            store.run(jobs.submit, new_job(user), IdempotencyKey(user, f"k{number}", "f"), store.now)
    store.pass_time(60)
    store.run(jobs.submit, new_job(users_[0]), IdempotencyKey(users_[0], "young", "f"), store.now)
    found, after = [], (0, "")
    while some := store.run(idempotency.expired_keys, store.now, after, 2):
        store.run(idempotency.delete_keys, some, store.now)
        found += some
        after = some[-1]
    assert found == [(user, f"k{number}") for user in users_ for number in range(3)]
    assert store.run(idempotency.expired_keys, store.now + timedelta(days=1), (0, ""), 10) == [(users_[0], "young")]
    store.run(idempotency.delete_keys, (), store.now)
