"""Credentials, encrypted by `pdm.workqueue.certificates.vault` before they come here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

import attrs
import sqlalchemy as sa
from attrs import field, frozen
from sqlalchemy.orm import Session

from pdm.workqueue.domain.credentials import ALL_SITES, CredentialKind
from pdm.workqueue.store.records import credentials, key_checks, matched, pending_delegations, workers


@frozen
class PendingDelegation:
    """A delegation that waits for the signed proxy.

    Attributes:
        key: the private key, encrypted.
        csr_pem: the request that the user is to sign.
    """

    id: str
    user_id: int
    key: bytes
    csr_pem: str
    created_at: datetime


@frozen
class CredentialRecord:
    """A user's credential of one kind for one site.

    Attributes:
        site_id: `ALL_SITES` for every one.
        label: the user's own word for it.
        subject: whose it is, or what it is known by: a certificate's subject, the fingerprint of a key.
        valid_until: None for one that does not end.
        details: what is shown besides.
        secret: what is needed to use it, encrypted.
    """

    id: int
    user_id: int
    kind: CredentialKind
    site_id: int
    label: str | None
    subject: str
    valid_until: datetime | None
    details: Mapping[str, Any]
    stored_at: datetime
    secret: bytes = field(repr=False)


@frozen
class EncryptedCredential:
    """What is to be stored; see `CredentialRecord`."""

    kind: CredentialKind
    subject: str
    valid_until: datetime | None
    secret: bytes = field(repr=False)
    site_id: int = ALL_SITES
    label: str | None = None
    details: Mapping[str, Any] = field(factory=dict)


_PENDING = tuple(pending_delegations.c[name] for name in ("id", "user_id", "key", "csr_pem", "created_at"))
_CREDENTIAL = tuple(credentials.c[each.name] for each in attrs.fields(CredentialRecord))


def put_pending(session: Session, pending: PendingDelegation) -> None:
    """Keep a delegation; one that the user began earlier is dropped."""
    drop_pending(session, pending.user_id)
    session.execute(
        sa.insert(pending_delegations).values(
            id=pending.id,
            user_id=pending.user_id,
            key=pending.key,
            csr_pem=pending.csr_pem,
            created_at=pending.created_at,
        )
    )


def find_pending(session: Session, user_id: int) -> PendingDelegation | None:
    """The delegation that a user has begun."""
    row = session.execute(sa.select(*_PENDING).where(pending_delegations.c.user_id == user_id)).one_or_none()
    return None if row is None else PendingDelegation(*row)


def drop_pending(session: Session, user_id: int) -> None:
    """Forget the delegation that a user has begun, if there is one."""
    session.execute(sa.delete(pending_delegations).where(pending_delegations.c.user_id == user_id))


def put(session: Session, user_id: int, new: EncryptedCredential, now: datetime) -> CredentialRecord:
    """Store a credential in place of the user's earlier one of that kind for that site."""
    place = _at(user_id, new.kind, new.site_id)
    values = {**attrs.asdict(new, recurse=False), "kind": new.kind.value, "stored_at": now}
    if not matched(session, sa.update(credentials).where(*place).values(values)):
        session.execute(sa.insert(credentials).values(user_id=user_id, **values))
    return _record(session.execute(sa.select(*_CREDENTIAL).where(*place)).one())


def find(session: Session, user_id: int, kind: CredentialKind, site_id: int = ALL_SITES) -> CredentialRecord | None:
    """The user's credential of a kind for a site, whether it is still valid or not."""
    row = session.execute(sa.select(*_CREDENTIAL).where(*_at(user_id, kind, site_id))).one_or_none()
    return None if row is None else _record(row)


def of_kind(session: Session, user_id: int, kind: CredentialKind) -> list[CredentialRecord]:
    """All credentials of a kind that a user has."""
    return _some(session, credentials.c.user_id == user_id, credentials.c.kind == kind.value)


def of_user(session: Session, user_id: int) -> list[CredentialRecord]:
    """All credentials of a user, in the order of their numbers."""
    return _some(session, credentials.c.user_id == user_id)


def remove(session: Session, user_id: int, kind: CredentialKind, site_id: int = ALL_SITES) -> bool:
    """Forget the user's credential of a kind for a site; says whether there was one."""
    return bool(matched(session, sa.delete(credentials).where(*_at(user_id, kind, site_id))))


def remove_number(session: Session, user_id: int, number: int) -> bool:
    """Forget the user's credential of a number; says whether there was one."""
    return bool(
        matched(session, sa.delete(credentials).where(credentials.c.user_id == user_id, credentials.c.id == number))
    )


def fetch_many(session: Session, numbers: Collection[int]) -> dict[int, CredentialRecord]:
    """Those of some credentials that are still there, by number."""
    return {record.id: record for record in _some(session, credentials.c.id.in_(sorted(numbers)))}


def last_stored(session: Session, user_id: int, sites: Collection[int]) -> datetime | None:
    """When a user has last given a credential that one of these sites takes; None if there is none."""
    statement = sa.select(sa.func.max(credentials.c.stored_at)).where(
        credentials.c.user_id == user_id, credentials.c.site_id.in_([ALL_SITES, *sites])
    )
    timestamp: datetime | None = session.scalar(statement)
    return timestamp


def _at(user_id: int, kind: CredentialKind, site_id: int) -> tuple[sa.ColumnElement[bool], ...]:
    return credentials.c.user_id == user_id, credentials.c.kind == kind.value, credentials.c.site_id == site_id


def _some(session: Session, *conditions: sa.ColumnElement[bool]) -> list[CredentialRecord]:
    statement = sa.select(*_CREDENTIAL).where(*conditions).order_by(credentials.c.id)
    return [_record(row) for row in session.execute(statement)]


def _record(row: Sequence[Any]) -> CredentialRecord:
    values = [*row[:2], CredentialKind(row[2]), *row[3:]]
    return CredentialRecord(*values)


_KEY_CHECK = 1


def key_check(session: Session, sealed: bytes, worker: str) -> tuple[bytes, bool]:
    """What the first daemon on this database has sealed with its key; kept now if there is nothing.

    Args:
        session: of the database.
        sealed: the same, sealed by the daemon that asks.
        worker: its incarnation.

    Returns:
        What is kept, and whether another key may take its place: nothing else was sealed, and nobody else works here.
    """
    present: bytes | None = session.scalar(sa.select(key_checks.c.secret).where(key_checks.c.id == _KEY_CHECK))
    if present is None:
        session.execute(sa.insert(key_checks).values(id=_KEY_CHECK, secret=sealed))
        return sealed, False
    in_use = (
        sa.exists().select_from(credentials),
        sa.exists().select_from(pending_delegations),
        sa.exists().where(workers.c.lease_until.is_not(None), workers.c.incarnation != worker),
    )
    return present, not any(session.scalar(sa.select(condition)) for condition in in_use)


def change_key_check(session: Session, sealed: bytes) -> None:
    """Keep what another key has sealed."""
    session.execute(sa.update(key_checks).where(key_checks.c.id == _KEY_CHECK).values(secret=sealed))
