"""Credentials, encrypted by `pdm.workqueue.certificates.vault` before they come here."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from attrs import frozen
from sqlalchemy.orm import Session

from pdm.workqueue.store.tables import credentials, matched, pending_delegations


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
    """A user's credential of one kind.

    Attributes:
        subject: of the credential itself.
        secret: what is needed to use it, encrypted.
    """

    id: int
    user_id: int
    kind: str
    subject: str
    valid_until: datetime
    secret: bytes


_PENDING = tuple(pending_delegations.c[name] for name in ("id", "user_id", "key", "csr_pem", "created_at"))
_CREDENTIAL = tuple(credentials.c[name] for name in ("id", "user_id", "kind", "subject", "valid_until", "secret"))


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


def put(
    session: Session, user_id: int, kind: str, subject: str, valid_until: datetime, secret: bytes, now: datetime
) -> CredentialRecord:
    """Store a credential in place of the user's earlier one of that kind."""
    values = {"subject": subject, "valid_until": valid_until, "secret": secret, "stored_at": now}
    replaced = matched(session, sa.update(credentials).where(*_of(user_id, kind)).values(values))
    if not replaced:
        session.execute(sa.insert(credentials).values(user_id=user_id, kind=kind, **values))
    return CredentialRecord(*session.execute(sa.select(*_CREDENTIAL).where(*_of(user_id, kind))).one())


def find(session: Session, user_id: int, kind: str) -> CredentialRecord | None:
    """The user's credential of a kind, whether it is still valid or not."""
    row = session.execute(sa.select(*_CREDENTIAL).where(*_of(user_id, kind))).one_or_none()
    return None if row is None else CredentialRecord(*row)


def remove(session: Session, user_id: int, kind: str) -> bool:
    """Forget the user's credential of a kind; says whether there was one."""
    return bool(matched(session, sa.delete(credentials).where(*_of(user_id, kind))))


def _of(user_id: int, kind: str) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
    return credentials.c.user_id == user_id, credentials.c.kind == kind
