"""All encrypted texts of the database, for a change of the key: credentials, delegations, logins, other secrets."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from attrs import field, frozen
from sqlalchemy.orm import Session

from pdm.workqueue.store.records import (
    credentials,
    key_checks,
    matched,
    oidc_logins,
    pending_delegations,
    sites,
    webhooks,
    workers,
)


class SealedKind(enum.Enum):
    """What an encrypted text is."""

    CREDENTIAL = "credential"
    DELEGATION = "delegation"
    WEBHOOK = "webhook"
    LOGIN = "login"
    DEVICE_CODE = "device code"
    CLIENT = "client"
    KEY_CHECK = "key check"


@frozen
class SealedText:
    """An encrypted text with the columns to which it is bound.

    Attributes:
        id: primary key of its row.
        bound_to: names of columns → values.
    """

    kind: SealedKind
    id: int | str
    bound_to: Mapping[str, Any]
    secret: bytes = field(repr=False)


#: Kind → table, its column with the text, and the columns to which that is bound.
_PLACES: Mapping[SealedKind, tuple[sa.Table, str, tuple[str, ...]]] = {
    SealedKind.CREDENTIAL: (credentials, "secret", ("user_id", "kind", "site_id")),
    SealedKind.DELEGATION: (pending_delegations, "key", ("user_id",)),
    SealedKind.WEBHOOK: (webhooks, "secret", ("user_id", "uid")),
    SealedKind.LOGIN: (oidc_logins, "secret", ("user_id", "site_id")),
    SealedKind.DEVICE_CODE: (oidc_logins, "device", ("user_id", "site_id")),
    SealedKind.CLIENT: (sites, "oidc_secret", ("oidc",)),
    SealedKind.KEY_CHECK: (key_checks, "secret", ()),
}


def sealed_texts(session: Session) -> Iterator[SealedText]:
    """All encrypted texts; the check of the key first."""
    for kind in reversed(SealedKind):
        table, column, names = _PLACES[kind]
        for row in session.execute(sa.select(table).where(table.c[column].is_not(None))):
            values = row._mapping
            yield SealedText(kind, values["id"], {name: values[name] for name in names}, values[column])


def replace_secret(session: Session, text: SealedText, secret: bytes) -> bool:
    """Store a text as another key has sealed it; returns False if it was changed meanwhile."""
    table, column, _ = _PLACES[text.kind]
    is_same = sa.and_(table.c.id == text.id, table.c[column] == text.secret)
    return bool(matched(session, sa.update(table).where(is_same).values({column: secret})))


def forget_credentials(session: Session) -> int:
    """Delete what no key opens any more: credentials, logins, delegations; returns the number of credentials."""
    session.execute(sa.delete(pending_delegations))
    session.execute(sa.delete(oidc_logins))
    session.execute(sa.update(sites).values(oidc_secret=None))
    return matched(session, sa.delete(credentials))


def disable_webhooks(session: Session, why: str, now: datetime) -> int:
    """Disable the webhooks that are not disabled yet; returns how many."""
    change = sa.update(webhooks).where(webhooks.c.disabled_at.is_(None)).values(disabled_at=now, disabled_why=why)
    return matched(session, change)


def other_daemons(session: Session, name: str) -> list[str]:
    """Names of the workers with a valid lease, except one; none on SQLite, which has one daemon."""
    if session.get_bind().dialect.name != "postgresql":
        return []
    is_live = workers.c.lease_until > sa.func.clock_timestamp()
    return list(session.scalars(sa.select(workers.c.name).where(is_live, workers.c.name != name)))
