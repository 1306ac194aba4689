"""Events of jobs and sites, and how users are notified of them: by mail and by webhooks."""

from __future__ import annotations

import enum
import re
from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from typing import Any

from attrs import frozen


class EventKind(enum.StrEnum):
    """Kinds of events; the values are shown by the API."""

    #: The status of a job has changed.
    JOB = "job"
    #: The first failure of a job with some code, then the 10th, the 100th ...
    FAILURE = "failure"
    #: Elements of a job are HELD, of which none was before.
    HELD = "held"
    #: No element of a job is HELD any more.
    RESUMED = "resumed"
    #: An endpoint of a site does not work, or works again.
    SITE = "site"
    #: Bytes and files of a running job. Never stored, so it has no id and is not repeated.
    PROGRESS = "progress"

    @classmethod
    def parse(cls, text: str) -> EventKind:
        """The kind with this name.

        Raises:
            ValueError: there is none.
        """
        try:
            return cls(text.lower())
        except ValueError:
            raise ValueError(f"{text[:40]!r} is no kind of event: {', '.join(cls)}") from None


#: What the database has.
STORED_KINDS = frozenset(EventKind) - {EventKind.PROGRESS}


@frozen(eq=False, kw_only=True)
class Event:
    """Something that has happened.

    Attributes:
        id: null for progress, which is not stored.
        job: null for an event of a site; so is ``owner``, the user of the job.
        data: by kind; JSON values.
        order: position among all stored events. They are read in this order, which is that of their ids as long as one
            daemon writes them.
    """

    id: int | None
    at: datetime
    kind: EventKind
    job: int | None
    owner: int | None
    data: Mapping[str, Any]
    order: tuple[int, int] = (0, 0)


@frozen(kw_only=True)
class EventFilter:
    """Which events; None stands for all.

    Attributes:
        owner: only those of this user's jobs, so none of sites.
    """

    owner: int | None = None
    job: int | None = None
    kinds: Collection[EventKind] | None = None

    def matches(self, event: Event) -> bool:
        """Whether it is one of these."""
        return (
            (self.owner is None or self.owner == event.owner)
            and (self.job is None or self.job == event.job)
            and (self.kinds is None or event.kind in self.kinds)
        )


def is_milestone(before: int, after: int) -> bool:
    """Whether an event is written when a count goes from one value to another: at 1, 10, 100, 1000 ..."""
    return after > before and (before == 0 or len(str(after)) > len(str(before)))


#: Confirmations that are sent to one user in a day, and wrong codes that one of them takes.
MOST_CONFIRMATIONS, MOST_WRONG_CODES = 5, 5
#: Notices of one user that wait; further ones are only counted in the digest.
MOST_NOTICES = 500

#: RFC 5321 in ASCII, without quoted local parts, comments and address literals: no header can be made of it.
_ADDRESS = re.compile(
    r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(?:\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*"
    r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z][A-Za-z0-9-]{0,61}[A-Za-z0-9]"
)
_LONGEST_ADDRESS, _LONGEST_LOCAL_PART = 254, 64


class Notify(enum.StrEnum):
    """What a user is notified of."""

    #: A job has ended, in whatever state.
    ENDED = "ended"
    #: A job has ended FAILED or was cancelled by the service.
    FAILED = "failed"
    #: Elements of a job are HELD, and need the user.
    HELD = "held"


class DigestPer(enum.StrEnum):
    """How often mail is sent: for each job, or once a day for all."""

    JOB = "job"
    DAY = "day"


@frozen(kw_only=True)
class MailSubscription:
    """A user's address, and what is sent to it.

    Attributes:
        confirmed_at: None until the user has entered the code that was sent to it.
        code_digest: SHA-256 of that code, in hex; None if none is awaited.
        code_sent_at: when it was made.
        wrong_codes: that were entered since.
        confirmations: codes that were sent since ``confirmations_since``.
        error: why the last mail could not be sent; None if it was.
    """

    user_id: int
    address: str
    notify: tuple[Notify, ...]
    per: DigestPer
    confirmed_at: datetime | None
    code_digest: str | None
    code_sent_at: datetime | None
    wrong_codes: int
    confirmations: int
    confirmations_since: datetime | None
    sent_at: datetime | None
    failures: int
    error: str | None


@frozen(kw_only=True)
class MailNotice:
    """Something that the next mail says; ``job_id`` 0 and ``what`` None for a confirmation code."""

    id: int
    user_id: int
    job_id: int
    what: Notify | None
    at: datetime
    details: str


def check_address(text: str) -> str:
    """Validate a mail address.

    Raises:
        ValueError: it is none of the common form.
    """
    local = text.rpartition("@")[0]
    if len(text) > _LONGEST_ADDRESS or len(local) > _LONGEST_LOCAL_PART or not _ADDRESS.fullmatch(text):
        raise ValueError("a mail address is expected, such as name@example.org, in ASCII")
    return text


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
