"""Webhooks and their deliveries.

Events of one job are sent in order: of its deliveries to a webhook that have not ended, only the oldest is due. One
daemon at a time sends for a webhook, under a lease that is a column of the webhook's row; it ends with its time, and
when the daemon that has it is replaced by a later start of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from attrs import frozen
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.domain.notifications import (
    KEPT_DELIVERIES,
    MOST_WEBHOOKS,
    DeliveryPolicy,
    DeliveryRecord,
    DeliveryState,
    NewWebhook,
    SendResult,
    WebhookRecord,
)
from pdm.workqueue.store.idempotency import IdempotencyKey, earlier_row
from pdm.workqueue.store.leases import is_free, lease_clock
from pdm.workqueue.store.records import columns_of, deliveries, events, matched, webhooks
from pdm.workqueue.WorkqueueDB import IS_UNDELIVERED

#: Webhooks that are considered at once.
_CANDIDATES = 500

_COLUMNS = columns_of(
    *(webhooks, "id", "user_id", "uid", "url", "kinds", "job_id", "secret", "created_at"),
    *("failing_since", "failures", "disabled_at", "disabled_why"),
)
_DELIVERY_COLUMNS = columns_of(
    *(deliveries, "id", "webhook_id", "event_id", "job_id", "kind", "body", "created_at", "attempts"),
    *("first_tried_at", "due_at", "ended_at", "state", "status", "error"),
)
_FETCH = sa.select(*_COLUMNS).where(webhooks.c.id == bindparam("number"))
_LOCK = _FETCH.with_for_update()
_IS_WAITING = sa.text(IS_UNDELIVERED)

_earlier = deliveries.alias("earlier")
_IS_FIRST_OF_JOB = ~sa.exists().where(
    _earlier.c.webhook_id == deliveries.c.webhook_id,
    _earlier.c.job_id == deliveries.c.job_id,
    _earlier.c.id < deliveries.c.id,
    _earlier.c.due_at.is_not(None),
)


class TooManyWebhooksError(Exception):
    """The user has `MOST_WEBHOOKS` webhooks."""


@frozen
class DueDelivery:
    """A delivery that is to be tried now, and its webhook."""

    webhook: WebhookRecord
    delivery: DeliveryRecord


@frozen
class Settled:
    """What became of a delivery after a try.

    Attributes:
        state: None if webhook or delivery were removed meanwhile.
        disabled_why: why the webhook was disabled by it; None if it was not.
    """

    state: DeliveryState | None
    disabled_why: str | None = None


def create(session: Session, new: NewWebhook, key: IdempotencyKey | None, now: datetime) -> WebhookRecord:
    """Create a webhook, or return that of an earlier request with the same key; events from now on are sent.

    Raises:
        IdempotencyConflictError: the key was used for another webhook.
        TooManyWebhooksError: the user has too many.
    """
    of_user = webhooks.c.user_id == new.user_id
    known = None if key is None else earlier_row(session, key, webhooks, _COLUMNS)
    if known is not None:
        return _record(known)
    if (session.scalar(sa.select(sa.func.count()).select_from(webhooks).where(of_user)) or 0) >= MOST_WEBHOOKS:
        raise TooManyWebhooksError(f"you have {MOST_WEBHOOKS} webhooks: remove some that you do not use any more")
    row = session.execute(
        sa.insert(webhooks)
        .values(
            user_id=new.user_id,
            uid=new.uid,
            url=new.url,
            kinds=list(new.kinds),
            job_id=new.job_id,
            secret=new.secret,
            created_at=now,
            after_event=last_event(session),
            request_key=None if key is None else key.key,
            fingerprint=None if key is None else key.fingerprint,
            failures=0,
        )
        .returning(*_COLUMNS)
    ).one()
    return _record(row)


def last_event(session: Session) -> int:
    """The number of the newest event; 0 if there is none."""
    return session.scalar(sa.select(sa.func.max(events.c.id))) or 0


def fetch(session: Session, number: int, owner_id: int | None) -> WebhookRecord | None:
    """A webhook; None if it does not exist or its owner is not ``owner_id``. ``owner_id`` None: any owner."""
    row = session.execute(_FETCH, {"number": number}).one_or_none()
    return None if row is None or owner_id not in (None, row.user_id) else _record(row, waiting(session, [number]))


def of_user(session: Session, user_id: int) -> list[WebhookRecord]:
    """The webhooks of a user, by id; at most `MOST_WEBHOOKS`."""
    rows = session.execute(sa.select(*_COLUMNS).where(webhooks.c.user_id == user_id).order_by(webhooks.c.id)).all()
    counts = waiting(session, [row.id for row in rows])
    return [_record(row, counts) for row in rows]


def waiting(session: Session, numbers: Collection[int]) -> dict[int, int]:
    """How many deliveries of some webhooks wait; those without any are left out."""
    rows = session.execute(
        sa.select(deliveries.c.webhook_id, sa.func.count())
        .where(_IS_WAITING, deliveries.c.webhook_id.in_(numbers))
        .group_by(deliveries.c.webhook_id)
    )
    return dict(iter(rows))


def latest_deliveries(session: Session, webhook_id: int) -> list[DeliveryRecord]:
    """The newest deliveries of a webhook, the newest first; at most `KEPT_DELIVERIES`."""
    statement = sa.select(*_DELIVERY_COLUMNS).where(deliveries.c.webhook_id == webhook_id)
    rows = session.execute(statement.order_by(deliveries.c.id.desc()).limit(KEPT_DELIVERIES))
    return [_delivery(row) for row in rows]


def remove(session: Session, number: int) -> None:
    """Remove a webhook with its deliveries."""
    session.execute(_LOCK, {"number": number})
    session.execute(sa.delete(deliveries).where(deliveries.c.webhook_id == number))
    session.execute(sa.delete(webhooks).where(webhooks.c.id == number))


def record_test(session: Session, webhook_id: int, body: str, result: SendResult, now: datetime) -> bool:
    """Store what came of a test; returns whether the webhook, which was disabled, is enabled again by its success."""
    row = session.execute(_LOCK, {"number": webhook_id}).one_or_none()
    if row is None:
        return False
    accepted = result.error is None
    session.execute(
        sa.insert(deliveries).values(
            webhook_id=webhook_id,
            event_id=0,
            job_id=0,
            kind="test",
            body=body,
            created_at=now,
            attempts=1,
            first_tried_at=now,
            ended_at=now,
            state=(DeliveryState.DELIVERED if accepted else DeliveryState.GIVEN_UP).value,
            status=result.status,
            error=result.error,
        )
    )
    _prune(session, webhook_id)
    if not accepted or row.disabled_at is None:
        return False
    _change(
        session,
        webhook_id,
        disabled_at=None,
        disabled_why=None,
        failing_since=None,
        failures=0,
        rests_until=None,
        after_event=last_event(session),
    )
    return True


# -- sending


def claim(
    session: Session, incarnation: str, slots: int, busy: Collection[int], of_user: int, lease_s: float, now: datetime
) -> list[WebhookRecord]:
    """Lease webhooks that have something to send, those first that had a turn the longest ago.

    Args:
        slots: at most so many.
        busy: users of those that this daemon serves already, one entry for each.
        of_user: at most so many of a user, with the busy ones.
        lease_s: seconds for which the lease is valid.
    """
    timestamp = lease_clock(session, now)
    has_due = sa.exists().where(
        deliveries.c.webhook_id == webhooks.c.id, _IS_WAITING, deliveries.c.due_at <= now, _IS_FIRST_OF_JOB
    )
    rests = sa.and_(webhooks.c.rests_until.is_not(None), webhooks.c.rests_until > now)
    candidates = session.execute(
        sa.select(*_COLUMNS)
        .where(webhooks.c.disabled_at.is_(None), ~rests, is_free(webhooks, timestamp), has_due)
        .order_by(webhooks.c.leased_until.is_not(None), webhooks.c.leased_until, webhooks.c.id)
        .limit(_CANDIDATES)
    ).all()
    taken: list[WebhookRecord] = []
    counts = {user: list(busy).count(user) for user in busy}
    for row in candidates:
        if len(taken) >= slots:
            break
        if counts.get(row.user_id, 0) >= of_user:
            continue
        lease = sa.update(webhooks).where(webhooks.c.id == row.id, is_free(webhooks, timestamp))
        until = timestamp + timedelta(seconds=lease_s)
        if session.execute(lease.values(leased_by=incarnation, leased_until=until).returning(webhooks.c.id)).first():
            counts[row.user_id] = counts.get(row.user_id, 0) + 1
            taken.append(_record(row))
    return taken


def next_delivery(
    session: Session, incarnation: str, webhook_id: int, lease_s: float, now: datetime
) -> DueDelivery | None:
    """The next delivery of a leased webhook, whose lease is renewed; None if there is none, or the lease is lost."""
    until = lease_clock(session, now) + timedelta(seconds=lease_s)
    renewed = sa.update(webhooks).where(
        webhooks.c.id == webhook_id,
        webhooks.c.leased_by == incarnation,
        webhooks.c.disabled_at.is_(None),
        sa.or_(webhooks.c.rests_until.is_(None), webhooks.c.rests_until <= now),
    )
    row = session.execute(renewed.values(leased_until=until).returning(*_COLUMNS)).one_or_none()
    if row is None:
        return None
    found = session.execute(
        sa.select(*_DELIVERY_COLUMNS)
        .where(deliveries.c.webhook_id == webhook_id, _IS_WAITING, deliveries.c.due_at <= now, _IS_FIRST_OF_JOB)
        .order_by(deliveries.c.id)
        .limit(1)
    ).one_or_none()
    return None if found is None else DueDelivery(_record(row), _delivery(found))


def settle(
    session: Session, delivery: DeliveryRecord, result: SendResult, policy: DeliveryPolicy, jitter: float, now: datetime
) -> Settled:
    """Store what came of a try."""
    row = session.execute(_LOCK, {"number": delivery.webhook_id}).one_or_none()
    if row is None:
        return Settled(None)
    first = delivery.first_tried_at or now
    attempts = delivery.attempts + 1
    values: dict[str, Any] = {
        "attempts": attempts,
        "first_tried_at": first,
        "status": result.status,
        "error": result.error,
    }
    due_at = None
    if result.error is None:
        state = DeliveryState.DELIVERED
        _change(session, row.id, failing_since=None, failures=0, rests_until=None)
    else:
        due_at = policy.next_try(attempts, first, now, jitter, result.retry_after_s)
        state = DeliveryState.GIVEN_UP if due_at is None else DeliveryState.WAITING
        failures = row.failures + 1 if result.status is None else 0
        _change(
            session,
            row.id,
            failing_since=row.failing_since or now,
            failures=failures,
            rests_until=policy.rest_until(failures, now) if failures else None,
        )
    values |= {"due_at": due_at, "state": state.value, "ended_at": now if due_at is None else None}
    # One that was given up meanwhile, because its webhook was disabled, stays so; unless it has arrived.
    is_open = deliveries.c.due_at.is_not(None) if result.error else sa.true()
    statement = sa.update(deliveries).where(deliveries.c.id == delivery.id, is_open)
    if not matched(session, statement.values(values)):
        return Settled(None)
    why = None
    if result.error is not None and row.disabled_at is None:
        if result.is_gone:
            why = "the receiver answered 410 Gone: it wants no more events"
        elif policy.is_hopeless(row.failing_since or now, now):
            why = f"no event was accepted since {row.failing_since:%Y-%m-%dT%H:%M:%SZ}; the last error: {result.error}"
        if why is not None:
            disable(session, row.id, why, now)
            state = DeliveryState.GIVEN_UP
    if state is not DeliveryState.WAITING:
        _prune(session, row.id)
    return Settled(state, why)


def disable(session: Session, webhook_id: int, why: str, now: datetime) -> None:
    """Send no more events to a webhook, and give up what waits for it."""
    _change(session, webhook_id, disabled_at=now, disabled_why=why)
    given_up = {"due_at": None, "ended_at": now, "state": DeliveryState.GIVEN_UP.value}
    waits = sa.update(deliveries).where(deliveries.c.webhook_id == webhook_id, deliveries.c.due_at.is_not(None))
    session.execute(
        waits.values(given_up | {"error": sa.func.coalesce(deliveries.c.error, "the webhook was disabled")})
    )


def release(session: Session, incarnation: str, webhook_id: int, now: datetime) -> None:
    """End the turn of a webhook."""
    ended = sa.update(webhooks).where(webhooks.c.id == webhook_id, webhooks.c.leased_by == incarnation)
    session.execute(ended.values(leased_by=None, leased_until=lease_clock(session, now)))


def next_due(session: Session, now: datetime) -> datetime | None:
    """When something is due after ``now``; None if nothing is."""
    enabled = sa.select(webhooks.c.id).where(webhooks.c.disabled_at.is_(None))
    later = sa.select(sa.func.min(deliveries.c.due_at)).where(
        _IS_WAITING, deliveries.c.due_at > now, deliveries.c.webhook_id.in_(enabled)
    )
    rested = sa.select(sa.func.min(webhooks.c.rests_until)).where(
        webhooks.c.rests_until > now, webhooks.c.disabled_at.is_(None)
    )
    return min((found for found in (session.scalar(later), session.scalar(rested)) if found is not None), default=None)


def _change(session: Session, webhook_id: int, **values: Any) -> None:
    session.execute(sa.update(webhooks).where(webhooks.c.id == webhook_id).values(values))


def _prune(session: Session, webhook_id: int) -> None:
    """Keep only the newest deliveries that have ended."""
    ended = sa.and_(deliveries.c.webhook_id == webhook_id, deliveries.c.due_at.is_(None))
    oldest = sa.select(deliveries.c.id).where(ended).order_by(deliveries.c.id.desc()).offset(KEPT_DELIVERIES - 1)
    kept = session.scalar(oldest.limit(1))
    if kept is not None:
        session.execute(sa.delete(deliveries).where(ended, deliveries.c.id < kept))


def _record(row: Any, counts: dict[int, int] | None = None) -> WebhookRecord:
    values = dict(zip((column.name for column in _COLUMNS), row, strict=False))
    values["kinds"] = tuple(values["kinds"])
    return WebhookRecord(**values, waiting=None if counts is None else counts.get(row.id, 0))


def _delivery(row: Iterable[Any]) -> DeliveryRecord:
    values = dict(zip((column.name for column in _DELIVERY_COLUMNS), row, strict=False))
    values["state"] = DeliveryState(values["state"])
    values["job_id"] = values["job_id"] or None
    return DeliveryRecord(**values)
