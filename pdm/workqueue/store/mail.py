"""Mail addresses of users, and what the next mail to each says.

One daemon at a time sends to a user, under a lease as of webhooks. A mail that was sent when its daemon was killed is
sent again, with the same Message-ID.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, time, timedelta
from typing import Any

import sqlalchemy as sa
from attrs import frozen
from sqlalchemy.orm import Session

from pdm.workqueue.domain.notifications import (
    MOST_CONFIRMATIONS,
    MOST_WRONG_CODES,
    DigestPer,
    MailNotice,
    MailSubscription,
    Notify,
)
from pdm.workqueue.store.leases import is_free, lease_clock
from pdm.workqueue.store.records import columns_of, mail_notices, mail_subscriptions, matched
from pdm.workqueue.store.webhooks import last_event
from pdm.workqueue.WorkqueueDB import IS_UNDELIVERED

#: Seconds for which more is waited for before a mail is sent, and between two mails to a user.
_SETTLE_S, _INTERVAL_S = 10.0, 300.0
#: UTC, when the mail of the day is sent.
_TIME_OF_DAY = time(6, 0)
_DAY = timedelta(days=1)
#: What `mail_notices` calls a confirmation code.
CODE = "code"

_COLUMNS = columns_of(
    *(mail_subscriptions, "user_id", "address", "notify", "per", "confirmed_at", "code_digest", "code_sent_at"),
    *("wrong_codes", "confirmations", "confirmations_since", "sent_at", "failures", "error"),
)
_of_user = mail_subscriptions.c.user_id == sa.bindparam("user")
_FETCH = sa.select(*_COLUMNS).where(_of_user)
_LOCK = _FETCH.with_for_update()


class TooManyCodesError(Exception):
    """The user has asked for too many confirmation codes."""


@frozen
class DueMail:
    """What a mail is to say now."""

    subscription: MailSubscription
    notices: tuple[MailNotice, ...]


def fetch(session: Session, user_id: int) -> MailSubscription | None:
    row = session.execute(_FETCH, {"user": user_id}).one_or_none()
    return None if row is None else _record(row)


def subscribe(
    session: Session,
    user_id: int,
    address: str,
    notify: Collection[Notify],
    per: DigestPer,
    code: str,
    code_digest: str,
    now: datetime,
) -> MailSubscription:
    """Set what a user is notified of; a new address gets a code first, which confirms it.

    Raises:
        TooManyCodesError: too many codes were sent within a day.
    """
    row = session.execute(_LOCK, {"user": user_id}).one_or_none()
    chosen = {"notify": [each.value for each in sorted(notify)], "per": per.value}
    if row is not None and row.address == address and (row.confirmed_at is not None):
        _change(session, user_id, **chosen)
        return _fetched(session, user_id)
    since, sent = (now, 0) if row is None else (row.confirmations_since or now, row.confirmations)
    if now - since >= _DAY:
        since, sent = now, 0
    if sent >= MOST_CONFIRMATIONS:
        raise TooManyCodesError(f"{sent} confirmation codes were sent to addresses of yours: try again in a day")
    values = chosen | {
        "address": address,
        "after_event": last_event(session),
        "confirmed_at": None,
        "code_digest": code_digest,
        "code_sent_at": now,
        "wrong_codes": 0,
        "confirmations": sent + 1,
        "confirmations_since": since,
        "due_at": now,
        "failures": 0,
        "error": None,
    }
    if row is None:
        session.execute(sa.insert(mail_subscriptions).values(user_id=user_id, **values))
    else:
        session.execute(sa.delete(mail_notices).where(mail_notices.c.user_id == user_id))
        _change(session, user_id, **values)
    session.execute(sa.insert(mail_notices).values(user_id=user_id, job_id=0, what=CODE, at=now, details=code))
    return _fetched(session, user_id)


def confirm(session: Session, user_id: int, code_digest: str, lifetime_s: float, now: datetime) -> bool:
    """Confirm an address by its code; returns whether it was the right one."""
    row = session.execute(_LOCK, {"user": user_id}).one_or_none()
    if row is None or row.code_digest is None or row.wrong_codes >= MOST_WRONG_CODES:
        return False
    if row.code_digest != code_digest or now - row.code_sent_at > timedelta(seconds=lifetime_s):
        _change(session, user_id, wrong_codes=row.wrong_codes + 1)
        return False
    _change(session, user_id, confirmed_at=now, code_digest=None, after_event=last_event(session))
    return True


def unsubscribe(session: Session, user_id: int) -> None:
    """Forget the address of a user; how many codes were sent stays, so that removing it does not allow more."""
    session.execute(_LOCK, {"user": user_id})
    session.execute(sa.delete(mail_notices).where(mail_notices.c.user_id == user_id))
    _change(session, user_id, address="", confirmed_at=None, code_digest=None, due_at=None, notify=[])


def waiting(session: Session, user_ids: Collection[int]) -> dict[int, int]:
    """How many notices of some users wait."""
    rows = session.execute(
        sa.select(mail_notices.c.user_id, sa.func.count())
        .where(mail_notices.c.user_id.in_(user_ids))
        .group_by(mail_notices.c.user_id)
    )
    return dict(iter(rows))


def pending_notices(session: Session, user_ids: Collection[int]) -> set[tuple[int, int, str]]:
    """User, job and kind of the notices that wait."""
    columns = columns_of(mail_notices, "user_id", "job_id", "what")
    rows = session.execute(sa.select(*columns).where(mail_notices.c.user_id.in_(user_ids)))
    return {(row.user_id, row.job_id, row.what) for row in rows}


def schedule(session: Session, user_ids: Collection[int], now: datetime) -> None:
    """Let a mail be sent to users for whom notices were added."""
    rows = session.execute(
        sa.select(mail_subscriptions.c.user_id, mail_subscriptions.c.per, mail_subscriptions.c.sent_at).where(
            mail_subscriptions.c.user_id.in_(user_ids), mail_subscriptions.c.due_at.is_(None)
        )
    ).all()
    for row in rows:
        _change(session, row.user_id, due_at=_next_mail(DigestPer(row.per), row.sent_at, now))


def _next_mail(per: DigestPer, sent_at: datetime | None, now: datetime) -> datetime:
    if per is DigestPer.DAY:
        today = datetime.combine(now.date(), _TIME_OF_DAY, now.tzinfo)
        return today if today > now else today + _DAY
    soon = now + timedelta(seconds=_SETTLE_S)
    return soon if sent_at is None else max(soon, sent_at + timedelta(seconds=_INTERVAL_S))


# -- sending


def claim(session: Session, incarnation: str, most: int, lease_s: float, now: datetime) -> list[DueMail]:
    """Lease users to whom mail is due, with what it is to say."""
    timestamp = lease_clock(session, now)
    unleased = is_free(mail_subscriptions, timestamp)
    due = session.scalars(
        sa.select(mail_subscriptions.c.user_id)
        .where(sa.text(IS_UNDELIVERED), mail_subscriptions.c.due_at <= now, unleased)
        .order_by(mail_subscriptions.c.due_at)
        .limit(most)
    ).all()
    taken = []
    lease = {"leased_by": incarnation, "leased_until": timestamp + timedelta(seconds=lease_s)}
    for user_id in due:
        statement = sa.update(mail_subscriptions).where(mail_subscriptions.c.user_id == user_id, unleased)
        if matched(session, statement.values(lease)):
            rows = session.execute(
                sa.select(mail_notices).where(mail_notices.c.user_id == user_id).order_by(mail_notices.c.id)
            )
            taken.append(DueMail(_fetched(session, user_id), tuple(_notice(row) for row in rows)))
    return taken


def sent(session: Session, incarnation: str, mail: DueMail, now: datetime) -> None:
    """Store that a mail was accepted by the smarthost."""
    user_id = mail.subscription.user_id
    if not matched(session, _leased(user_id, incarnation).values(leased_by=None, sent_at=now, failures=0, error=None)):
        return
    numbers = [notice.id for notice in mail.notices]
    session.execute(sa.delete(mail_notices).where(mail_notices.c.id.in_(numbers)))
    # More may have come meanwhile.
    more = waiting(session, [user_id]).get(user_id, 0)
    _change(session, user_id, due_at=_next_mail(mail.subscription.per, now, now) if more else None)


def failed(session: Session, incarnation: str, mail: DueMail, error: str, again_at: datetime | None) -> None:
    """Store that a mail could not be sent; ``again_at`` None: it is given up."""
    user_id = mail.subscription.user_id
    values: dict[str, Any] = {"leased_by": None, "failures": mail.subscription.failures + 1, "error": error}
    values["due_at"] = again_at
    if matched(session, _leased(user_id, incarnation).values(values)) and again_at is None:
        numbers = [notice.id for notice in mail.notices]
        session.execute(sa.delete(mail_notices).where(mail_notices.c.id.in_(numbers)))


def next_due(session: Session) -> datetime | None:
    """When the next mail is due; None if there is none."""
    due_at: datetime | None = session.scalar(
        sa.select(sa.func.min(mail_subscriptions.c.due_at)).where(sa.text(IS_UNDELIVERED))
    )
    return due_at


def _leased(user_id: int, incarnation: str) -> sa.Update:
    return sa.update(mail_subscriptions).where(
        mail_subscriptions.c.user_id == user_id, mail_subscriptions.c.leased_by == incarnation
    )


def _change(session: Session, user_id: int, **values: Any) -> None:
    session.execute(sa.update(mail_subscriptions).where(mail_subscriptions.c.user_id == user_id).values(values))


def _fetched(session: Session, user_id: int) -> MailSubscription:
    return _record(session.execute(_FETCH, {"user": user_id}).one())


def _record(row: Any) -> MailSubscription:
    values = dict(zip((column.name for column in _COLUMNS), row, strict=False))
    values["notify"] = tuple(Notify(each) for each in values["notify"])
    values["per"] = DigestPer(values["per"])
    return MailSubscription(**values)


def _notice(row: Any) -> MailNotice:
    return MailNotice(
        id=row.id,
        user_id=row.user_id,
        job_id=row.job_id,
        what=None if row.what == CODE else Notify(row.what),
        at=row.at,
        details=row.details,
    )
