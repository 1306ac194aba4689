"""Mail to users: what they are notified of, and how often."""

from __future__ import annotations

import enum
import re
from datetime import datetime

from attrs import frozen

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
