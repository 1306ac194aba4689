"""Webhooks, their deliveries, and when a delivery is tried again."""

from __future__ import annotations

import enum
from datetime import datetime, timedelta

from attrs import frozen

#: Webhooks of one user; deliveries of one that may wait; ended ones that are kept.
MOST_WEBHOOKS, MOST_WAITING, KEPT_DELIVERIES = 20, 20_000, 100
#: Seconds before the second try of a delivery; doubles with each try, up to the second number.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 3600.0
#: Seconds for which a receiver that gave no answer is left alone; doubles likewise.
_FIRST_REST_S, _LONGEST_REST_S = 1.0, 60.0
#: The largest power of two in these pauses; larger ones only overflow.
_MOST_DOUBLINGS = 20
#: Longest pause that a receiver can ask for by ``Retry-After``, in seconds.
_LONGEST_ASKED_S = 3600.0


class DeliveryState(enum.StrEnum):
    """What became of a delivery."""

    WAITING = "WAITING"
    DELIVERED = "DELIVERED"
    #: Tried for as long as the configuration says, or its webhook was disabled.
    GIVEN_UP = "GIVEN_UP"


@frozen(kw_only=True)
class NewWebhook:
    """A webhook to be stored.

    Attributes:
        uid: random; part of the ids of its messages.
        kinds: of events.
        job_id: the only job whose events are sent; None for all of the user's.
        secret: encrypted.
    """

    user_id: int
    uid: str
    url: str
    kinds: tuple[str, ...]
    job_id: int | None
    secret: bytes


@frozen(kw_only=True)
class WebhookRecord:
    """A webhook as the database knows it.

    Attributes:
        failing_since: when the first delivery failed after the last success; None if the last one succeeded.
        failures: deliveries in a row that got no answer.
        disabled_at: None while events are sent.
        disabled_why: a sentence.
        waiting: deliveries that were not counted: None; otherwise how many wait.
    """

    id: int
    user_id: int
    uid: str
    url: str
    kinds: tuple[str, ...]
    job_id: int | None
    secret: bytes
    created_at: datetime
    failing_since: datetime | None
    failures: int
    disabled_at: datetime | None
    disabled_why: str | None
    waiting: int | None = None


@frozen(kw_only=True)
class DeliveryRecord:
    """One event for one webhook.

    Attributes:
        event_id: 0 for a test.
        body: JSON text that is sent.
        attempts: tries so far.
        due_at: the next try; None if it has ended.
        status: of HTTP, of the last try; None if there was no answer.
        error: why the last try failed.
    """

    id: int
    webhook_id: int
    event_id: int
    job_id: int | None
    kind: str
    body: str
    created_at: datetime
    attempts: int
    first_tried_at: datetime | None
    due_at: datetime | None
    ended_at: datetime | None
    state: DeliveryState
    status: int | None
    error: str | None


@frozen(kw_only=True)
class SendResult:
    """What came of sending one message.

    Attributes:
        status: of HTTP; None if there was no answer.
        error: None if the receiver has accepted it.
        retry_after_s: what the receiver has asked for.
        elapsed_s: seconds that it took.
    """

    status: int | None = None
    error: str | None = None
    retry_after_s: float = 0.0
    elapsed_s: float = 0.0

    @property
    def is_gone(self) -> bool:
        """Whether the receiver wants no more messages."""
        return self.status == 410


@frozen(kw_only=True)
class DeliveryPolicy:
    """For how many seconds a delivery is tried, and a webhook may fail before it is disabled."""

    give_up_s: float
    disable_s: float

    def next_try(
        self, attempts: int, first_tried_at: datetime, now: datetime, jitter: float, asked_s: float = 0.0
    ) -> datetime | None:
        """When a delivery that has failed ``attempts`` times is tried again; None for never.

        ``jitter``: a random number from 0 to 1. ``asked_s``: pause that the receiver has asked for, in seconds.
        """
        if now - first_tried_at >= timedelta(seconds=self.give_up_s):
            return None
        pause_s = min(_FIRST_PAUSE_S * 2 ** min(attempts - 1, _MOST_DOUBLINGS), _LONGEST_PAUSE_S)
        pause_s = max(pause_s * (0.5 + jitter), min(asked_s, _LONGEST_ASKED_S))
        # The last try is at the end of that time, not long before it.
        return min(now + timedelta(seconds=pause_s), first_tried_at + timedelta(seconds=self.give_up_s))

    def rest_until(self, failures: int, now: datetime) -> datetime:
        """Until when a receiver is left alone that gave no answer ``failures`` times in a row."""
        return now + timedelta(seconds=min(_FIRST_REST_S * 2 ** min(failures - 1, _MOST_DOUBLINGS), _LONGEST_REST_S))

    def is_hopeless(self, failing_since: datetime, now: datetime) -> bool:
        return now - failing_since >= timedelta(seconds=self.disable_s)
