"""Failed MyProxy logons of each user, of all daemons that share the database."""

from __future__ import annotations

from datetime import datetime, timedelta

import sqlalchemy as sa
from attrs import frozen
from sqlalchemy.orm import Session

from pdm.workqueue.store.records import logon_failures, users
from pdm.workqueue.WorkqueueDB import CLOCK_SKEW


@frozen
class LogonPermit:
    """Whether a user may try to log on.

    Attributes:
        number: of the row that counts the logon as failed, until `forget_failure`; None if the user must wait.
        wait_s: seconds until the next try.
    """

    number: int | None
    wait_s: int = 0


def begin_logon(session: Session, user_id: int, now: datetime, *, most: int, window: timedelta) -> LogonPermit:
    """Permit a logon unless too many have failed lately. It counts as failed while it runs.

    ``most``: failures within ``window``.
    """
    # Two daemons must not permit the last try at once.
    session.execute(sa.select(users.c.id).where(users.c.id == user_id).with_for_update())
    session.execute(
        sa.delete(logon_failures).where(
            logon_failures.c.user_id == user_id,
            # A time in the future is that of a clock that was set back since.
            sa.or_(logon_failures.c.failed_at <= now - window, logon_failures.c.failed_at > now + CLOCK_SKEW),
        )
    )
    of_user = sa.select(logon_failures.c.failed_at).where(logon_failures.c.user_id == user_id)
    failures = session.scalars(of_user.order_by(logon_failures.c.failed_at)).all()
    if len(failures) >= most:
        return LogonPermit(None, max(int((failures[-most] + window - now).total_seconds()) + 1, 1))
    number = session.scalar(
        sa.insert(logon_failures).values(user_id=user_id, failed_at=now).returning(logon_failures.c.id)
    )
    return LogonPermit(number)


def forget_failure(session: Session, number: int) -> None:
    """A permitted logon was not refused. Earlier failures remain: it may be at a server that the user controls."""
    session.execute(sa.delete(logon_failures).where(logon_failures.c.id == number))
