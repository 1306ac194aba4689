"""Credentials; secrets are encrypted by `pdm.workqueue.certificates.vault` before they are stored here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

import attrs
import sqlalchemy as sa
from attrs import field, frozen
from sqlalchemy.orm import Session

from pdm.workqueue.domain.credentials import ALL_SITES, CredentialKind
from pdm.workqueue.store.records import (
    credentials,
    key_checks,
    matched,
    oidc_logins,
    pending_delegations,
    sites,
    workers,
)


@frozen
class PendingDelegation:
    """A delegation that waits for the signed proxy; ``key`` is the encrypted private key."""

    id: str
    user_id: int
    key: bytes
    csr_pem: str
    created_at: datetime


@frozen
class CredentialRecord:
    """A user's credential of one kind for one site.

    Attributes:
        site_id: `ALL_SITES` for every site.
        label: chosen by the user.
        subject: a certificate's subject, or the fingerprint of a key.
        valid_until: None for no expiry.
        details: shown to the user.
        secret: encrypted.
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

    @property
    def is_renewed(self) -> bool:
        """Whether a login at a token issuer renews it before its end."""
        return bool(self.details.get("login"))


@frozen
class EncryptedCredential:
    """A credential to be stored; see `CredentialRecord`."""

    kind: CredentialKind
    subject: str
    valid_until: datetime | None
    secret: bytes = field(repr=False)
    site_id: int = ALL_SITES
    label: str | None = None
    details: Mapping[str, Any] = field(factory=dict)


_PENDING = tuple(pending_delegations.c[each.name] for each in attrs.fields(PendingDelegation))
_CREDENTIAL = tuple(credentials.c[each.name] for each in attrs.fields(CredentialRecord))


def put_pending(session: Session, pending: PendingDelegation) -> None:
    """Store a delegation in place of an earlier one of the user."""
    drop_pending(session, pending.user_id)
    session.execute(sa.insert(pending_delegations).values(attrs.asdict(pending)))


def find_pending(session: Session, user_id: int) -> PendingDelegation | None:
    row = session.execute(sa.select(*_PENDING).where(pending_delegations.c.user_id == user_id)).one_or_none()
    return None if row is None else PendingDelegation(**row._mapping)


def drop_pending(session: Session, user_id: int) -> None:
    session.execute(sa.delete(pending_delegations).where(pending_delegations.c.user_id == user_id))


def put(session: Session, user_id: int, new: EncryptedCredential, now: datetime) -> CredentialRecord:
    """Store a credential in place of the user's earlier one of that kind for that site."""
    place = _at(user_id, new.kind, new.site_id)
    values = {**attrs.asdict(new, recurse=False), "kind": new.kind.value, "stored_at": now}
    if not matched(session, sa.update(credentials).where(*place).values(values)):
        session.execute(sa.insert(credentials).values(user_id=user_id, **values))
    return _record(session.execute(sa.select(*_CREDENTIAL).where(*place)).one())


def find(session: Session, user_id: int, kind: CredentialKind, site_id: int = ALL_SITES) -> CredentialRecord | None:
    """The user's credential of a kind for a site, expired or not."""
    row = session.execute(sa.select(*_CREDENTIAL).where(*_at(user_id, kind, site_id))).one_or_none()
    return None if row is None else _record(row)


def of_kind(session: Session, user_id: int, kind: CredentialKind) -> list[CredentialRecord]:
    return _some(session, credentials.c.user_id == user_id, credentials.c.kind == kind.value)


def of_user(session: Session, user_id: int) -> list[CredentialRecord]:
    """All credentials of a user, by ascending id."""
    return _some(session, credentials.c.user_id == user_id)


def remove(session: Session, user_id: int, kind: CredentialKind, site_id: int = ALL_SITES) -> bool:
    """Delete the user's credential of a kind for a site; returns whether there was one."""
    return bool(matched(session, sa.delete(credentials).where(*_at(user_id, kind, site_id))))


def remove_number(session: Session, user_id: int, number: int) -> bool:
    """Delete the user's credential of an id; returns whether there was one."""
    return bool(
        matched(session, sa.delete(credentials).where(credentials.c.user_id == user_id, credentials.c.id == number))
    )


def fetch_many(session: Session, numbers: Collection[int]) -> dict[int, CredentialRecord]:
    """Those of some credentials that still exist, by id."""
    return {record.id: record for record in _some(session, credentials.c.id.in_(sorted(numbers)))}


def last_stored(session: Session, user_id: int, sites: Collection[int]) -> datetime | None:
    """When a user last stored a credential that applies to one of these sites; None if there is none."""
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


def _record(row: sa.Row[Any]) -> CredentialRecord:
    return CredentialRecord(**{**row._mapping, "kind": CredentialKind(row.kind)})


_KEY_CHECK = 1


def key_check(session: Session, sealed: bytes, worker: str) -> tuple[bytes, bool]:
    """Compare the encryption keys of the daemons on this database; the first daemon stores its own sealed text.

    ``sealed``: the known text, sealed by this daemon. ``worker``: incarnation of this daemon.

    Returns:
        The stored text, and whether it may be replaced: nothing else is encrypted, and no other daemon has a lease.
    """
    present: bytes | None = session.scalar(sa.select(key_checks.c.secret).where(key_checks.c.id == _KEY_CHECK))
    if present is None:
        session.execute(sa.insert(key_checks).values(id=_KEY_CHECK, secret=sealed))
        return sealed, False
    in_use = (
        sa.exists().select_from(credentials),
        sa.exists().select_from(pending_delegations),
        sa.exists().where(sa.or_(oidc_logins.c.secret.is_not(None), oidc_logins.c.device.is_not(None))),
        sa.exists().where(sites.c.oidc_secret.is_not(None)),
        sa.exists().where(workers.c.lease_until.is_not(None), workers.c.incarnation != worker),
    )
    return present, not any(session.scalar(sa.select(condition)) for condition in in_use)


def change_key_check(session: Session, sealed: bytes) -> None:
    """Store the text as another key has sealed it."""
    session.execute(sa.update(key_checks).where(key_checks.c.id == _KEY_CHECK).values(secret=sealed))
