"""Passwords are not tried here: who sends too many wrong ones to a MyProxy server has to wait."""

from __future__ import annotations

from collections import deque
from datetime import datetime, timedelta

from attrs import define, field

#: So many wrong passwords or names of one user are sent on within the time.
MOST_FAILURES = 5
WITHIN = timedelta(minutes=10)
#: Users that are remembered; beyond that, those longest quiet are forgotten.
_MOST_USERS = 10_000


@define(eq=False)
class LogonGuard:
    """Failed logons of users, in this daemon; nothing of what they sent.

    Only time makes them forgotten: a logon that succeeds may be at a server of the user's own.
    """

    _failures: dict[int, deque[datetime]] = field(factory=dict)

    def wait_s(self, user_id: int, now: datetime) -> int:
        """Seconds until a user may try again; 0 for now."""
        failures = self._failures.get(user_id)
        while failures and failures[0] + WITHIN <= now:
            failures.popleft()
        if failures is None or len(failures) < MOST_FAILURES:
            return 0
        return max(int((failures[0] + WITHIN - now).total_seconds()) + 1, 1)

    def clock_was_set(self, step: timedelta) -> None:
        """The time of day was moved: nobody waits longer, or less, for that."""
        for failures in self._failures.values():
            for number, moment in enumerate(failures):
                failures[number] = moment + step

    def failed(self, user_id: int, now: datetime) -> None:
        """A server has refused a user's name or password."""
        failures = self._failures.pop(user_id, None) or deque(maxlen=MOST_FAILURES)
        failures.append(now)
        # At the end again: the first ones are those longest quiet.
        self._failures[user_id] = failures
        if len(self._failures) > _MOST_USERS:
            del self._failures[next(iter(self._failures))]
