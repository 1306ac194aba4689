"""Events are entered for webhooks and mail: each is read once, and queued for all that it concerns in one transaction.

The number of the last event that was entered is a row, which that transaction locks and changes: of several daemons one
enters an event, and a daemon that is killed has entered an event either for all or for none. Events that concern
nothing cost no transaction.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from attrs import frozen
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.notifications import MOST_NOTICES, MOST_WAITING, DeliveryState, Event, EventKind, Notify
from pdm.workqueue.store import events as event_store
from pdm.workqueue.store import mail
from pdm.workqueue.store import webhooks as webhook_store
from pdm.workqueue.store.events import events_after
from pdm.workqueue.store.records import (
    FINAL,
    deliveries,
    events,
    jobs,
    mail_notices,
    mail_subscriptions,
    notified,
    sites,
    webhooks,
)

#: Events that are read in one transaction.
EVENTS_AT_ONCE = 500
#: The row of `notified`.
_ONLY = 1
_ENDS = frozenset(status.name for status in FINAL)

_POSITION = sa.select(notified.c.event_id).where(notified.c.id == _ONLY)
_HAS_LISTENERS = sa.select(
    sa.or_(
        sa.exists().where(webhooks.c.disabled_at.is_(None)),
        sa.exists().where(mail_subscriptions.c.confirmed_at.is_not(None)),
    )
)


@frozen
class Wanted:
    """What was found after an event.

    Attributes:
        last: the last event that was read; the given one if there is none.
        count: how many were read.
        concerns: whether one of them is to be sent.
        more: whether there are more.
        has_listeners: whether anybody has a webhook or gets mail.
    """

    last: int
    count: int
    concerns: bool
    more: bool
    has_listeners: bool = True


@frozen
class Entered:
    """What `enter` has done.

    Attributes:
        deliveries: queued for webhooks.
        notices: queued for mail.
        disabled: webhooks for which too many deliveries wait.
    """

    last: int
    deliveries: int
    notices: int
    disabled: Sequence[int]
    more: bool


def position(session: Session) -> int:
    """The last event that was entered."""
    return session.scalar(_POSITION) or 0


def find_wanted(session: Session, after: int, file_sites: Collection[int]) -> Wanted:
    """Whether some of the next events concern a webhook or mail.

    ``file_sites``: numbers of the sites in the configuration, which all users may see.
    """
    # Before the listeners: both a webhook and an event of it may be committed between the two statements.
    latest, _ = event_store.position(session, None)
    if not session.scalar(_HAS_LISTENERS):
        return Wanted(latest or after, int(latest > after), concerns=False, more=False, has_listeners=False)
    found = events_after(session, after, EVENTS_AT_ONCE)
    if not found:
        return Wanted(after, 0, concerns=False, more=False)
    of_webhooks, of_mail = _for_webhooks(session, found, file_sites), _for_mail(session, found)
    concerns = next(of_webhooks, None) is not None or next(of_mail, None) is not None
    return Wanted(_number(found[-1]), len(found), concerns, len(found) == EVENTS_AT_ONCE)


def enter(session: Session, read: int, file_sites: Collection[int], now: datetime) -> Entered:
    """Queue the next events for all webhooks and mail that they concern.

    ``read``: events up to this one that were not entered concern nothing.
    """
    after = _later(session, _locked_position(session), read)
    found = events_after(session, after, EVENTS_AT_ONCE)
    rows = list(_for_webhooks(session, found, file_sites))
    full = _full(session, rows)
    rows = [row for row in rows if row["webhook_id"] not in full]
    if rows:
        session.execute(sa.insert(deliveries), [row | {"created_at": now, "due_at": now} for row in rows])
    for number in full:
        why = f"{MOST_WAITING} events wait for it: its receiver does not accept them, or not quickly enough"
        webhook_store.disable(session, number, why, now)
    notices = _enter_notices(session, found, now)
    last = _number(found[-1]) if found else after
    session.execute(sa.update(notified).where(notified.c.id == _ONLY).values(event_id=last))
    return Entered(last, len(rows), notices, sorted(full), len(found) == EVENTS_AT_ONCE)


def _locked_position(session: Session) -> int:
    last: int | None = session.scalar(_POSITION.with_for_update())
    if last is None:
        # A database without rows, as a restored dump without this table.
        session.execute(sa.insert(notified).values(id=_ONLY, event_id=0))
    return last or 0


def _later(session: Session, stored: int, read: int) -> int:
    """The later one of two events, in the order in which events are read."""
    rows = session.execute(sa.select(events.c.xact, events.c.id).where(events.c.id.in_([stored, read])))
    order = {row.id: (row.xact, row.id) for row in rows}
    # One that is not stored any more is older than one that is.
    return max(stored, read, key=lambda number: order.get(number, (-1, number)))


def _number(event: Event) -> int:
    assert event.id is not None, "a stored event has a number"
    return event.id


def _for_webhooks(session: Session, found: Sequence[Event], file_sites: Collection[int]) -> Iterator[dict[str, Any]]:
    """Rows of `deliveries`, in the order of the events."""
    owners = {event.owner for event in found if event.owner is not None}
    of_sites = any(event.kind is EventKind.SITE for event in found)
    listening = session.execute(
        sa.select(webhooks.c.id, webhooks.c.user_id, webhooks.c.kinds, webhooks.c.job_id, webhooks.c.after_event)
        .where(webhooks.c.disabled_at.is_(None), sa.true() if of_sites else webhooks.c.user_id.in_(owners))
        .order_by(webhooks.c.id)
    ).all()
    if not listening:
        return
    owner_of_site = _private_sites(session, found) if of_sites else {}
    for event in found:
        for webhook in listening:
            if event.kind not in webhook.kinds or _number(event) <= webhook.after_event:
                continue
            if event.kind is EventKind.SITE:
                site = event.data.get("site")
                is_visible = site in file_sites or owner_of_site.get(site, webhook.user_id) == webhook.user_id
                concerned = is_visible and webhook.job_id is None
            else:
                concerned = event.owner == webhook.user_id and webhook.job_id in (None, event.job)
            if concerned:
                yield {
                    "webhook_id": webhook.id,
                    "event_id": event.id,
                    "job_id": event.job or 0,
                    "kind": event.kind.value,
                    "body": message_body(event),
                    "attempts": 0,
                    "state": DeliveryState.WAITING.value,
                }


def _private_sites(session: Session, found: Iterable[Event]) -> Mapping[Any, int | None]:
    """Sites of some events that are not for all → owner; None for sites that were removed."""
    numbers = {event.data.get("site") for event in found if event.kind is EventKind.SITE}
    rows = session.execute(sa.select(sites.c.id, sites.c.owner_id, sites.c.public).where(sites.c.id.in_(numbers))).all()
    public = {row.id for row in rows if row.public}
    private = {row.id: row.owner_id for row in rows if not row.public}
    return {number: private.get(number) for number in numbers if number not in public}


def message_body(event: Event) -> str:
    """What is sent for an event, as JSON text."""
    data = {"event": event.id, "job": event.job, **event.data}
    at = event.at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps({"type": event.kind.value, "timestamp": at, "data": data}, separators=(",", ":"))


def _full(session: Session, rows: Iterable[Mapping[str, Any]]) -> set[int]:
    """Webhooks for which too many deliveries would wait."""
    new: dict[int, int] = {}
    for row in rows:
        new[row["webhook_id"]] = new.get(row["webhook_id"], 0) + 1
    counts = webhook_store.waiting(session, list(new)) if new else {}
    return {number for number, count in new.items() if counts.get(number, 0) + count > MOST_WAITING}


def _for_mail(session: Session, found: Sequence[Event]) -> Iterator[dict[str, Any]]:
    """Rows of `mail_notices`, in the order of the events."""
    concerned = [(event, what) for event in found if (what := _notices_of(event))]
    owners = {event.owner for event, _ in concerned}
    if not owners:
        return
    rows = session.execute(
        sa.select(mail_subscriptions.c.user_id, mail_subscriptions.c.notify, mail_subscriptions.c.after_event).where(
            mail_subscriptions.c.user_id.in_(owners), mail_subscriptions.c.confirmed_at.is_not(None)
        )
    )
    subscribed = {row.user_id: row for row in rows}
    if not subscribed:
        return
    numbers = {event.job for event, _ in concerned if event.owner in subscribed}
    asked = {
        row.id: row.extra_opts.get("notify")
        for row in session.execute(sa.select(jobs.c.id, jobs.c.extra_opts).where(jobs.c.id.in_(numbers)))
    }
    for event, what in concerned:
        row = subscribed.get(event.owner)
        if row is None or _number(event) <= row.after_event:
            continue
        wanted = asked.get(event.job) or row.notify
        chosen = next((each for each in what if each.value in wanted), None)
        if chosen is not None:
            details = json.dumps(dict(event.data), separators=(",", ":"))
            yield {
                "user_id": event.owner,
                "job_id": event.job or 0,
                "what": chosen.value,
                "at": event.at,
                "details": details,
            }


def _notices_of(event: Event) -> Sequence[Notify]:
    """What an event is to users, the strongest first."""
    if event.kind is EventKind.HELD:
        return (Notify.HELD,)
    status = event.data.get("status")
    if event.kind is not EventKind.JOB or status not in _ENDS:
        return ()
    # A job with a reason was cancelled by the service, not by its user.
    if status == JobStatus.FAILED.name or event.data.get("reason"):
        return (Notify.FAILED, Notify.ENDED)
    return (Notify.ENDED,)


def _enter_notices(session: Session, found: Sequence[Event], now: datetime) -> int:
    rows = list(_for_mail(session, found))
    if not rows:
        return 0
    users = {row["user_id"] for row in rows}
    counts = mail.waiting(session, users)
    kept, seen = [], mail.pending_notices(session, users)
    for row in rows:
        key = (row["user_id"], row["job_id"], row["what"])
        # A job that is held again and again, or retried and failed again, is one line of the next mail.
        if key not in seen and counts.get(row["user_id"], 0) < MOST_NOTICES:
            seen.add(key)
            counts[row["user_id"]] = counts.get(row["user_id"], 0) + 1
            kept.append(row)
    if kept:
        session.execute(sa.insert(mail_notices), kept)
        mail.schedule(session, {row["user_id"] for row in kept}, now)
    return len(kept)
