"""When a failed attempt is tried again: a pure decision."""

from __future__ import annotations

from datetime import datetime, timedelta

from attrs import frozen

from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, Remedy

#: Limits, in seconds, of what a server can ask for by ``Retry-After``: its next try comes neither in the same second,
#: nor after the user has forgotten the job.
_SOONEST_S, _LATEST_S = 1.0, 3600.0
#: A server that says these is not asked again within the same second, whatever the policy.
_OF_A_BUSY_SERVER = frozenset({FailureCode.BUSY, FailureCode.LOCKED, FailureCode.SERVER_ERROR})


@frozen
class RetryPolicy:
    """Exponential back-off."""

    first_pause_s: float = 5.0
    longest_pause_s: float = 600.0


@frozen
class RetryAt:
    """Try again, not before this time (UTC)."""

    not_before: datetime


@frozen
class Hold:
    """HELD until something outside is corrected; the attempt is not counted."""


@frozen
class GiveUp:
    """The element has failed."""


def decide_retry(
    policy: RetryPolicy,
    failure: AttemptFailure,
    tries: int,
    max_tries: int,
    now: datetime,
    jitter: float,
    uncounted: int = 0,
) -> RetryAt | Hold | GiveUp:
    """What follows a failed attempt.

    Args:
        tries: attempts that count so far, this one included (1 or more).
        jitter: chance, 0 to 1; spreads the retries of many elements over half of each pause.
        uncounted: attempts that do not count; they make the pause longer all the same.
    """
    if failure.remedy is Remedy.HOLD:
        return Hold()
    if failure.remedy is Remedy.GIVE_UP or tries >= max_tries:
        return GiveUp()
    pause = min(policy.first_pause_s * 2.0 ** min(tries + uncounted - 1, 40), policy.longest_pause_s)
    pause *= 0.5 + 0.5 * jitter
    if failure.retry_after_s is not None:
        # A little later for each: all elements were given the same time.
        asked_for = min(max(failure.retry_after_s, _SOONEST_S), _LATEST_S)
        pause = max(pause, asked_for * (1.0 + 0.1 * jitter))
    elif failure.code in _OF_A_BUSY_SERVER:
        pause = max(pause, _SOONEST_S)
    return RetryAt(now + timedelta(seconds=pause))


#: So many attempts of an element may stay uncounted because the service, or a site, was to blame; what fails more often
#: by itself must come to an end.
MOST_UNCOUNTED = 10
#: So many attempts in a row may end with the death of who runs them; then the element has failed.
MOST_CRASHES = 20
#: So many are tried again at once: a daemon is killed now and then, whatever it runs.
_CRASHES_AT_ONCE = 2


def after_crash(policy: RetryPolicy, crashes: int, now: datetime) -> RetryAt | GiveUp:
    """Decide about an attempt without a result (its daemon died); it does not count.

    Args:
        crashes: attempts that crashed without any other end between, this one included.
    """
    if crashes >= MOST_CRASHES:
        return GiveUp()
    if crashes <= _CRASHES_AT_ONCE:
        return RetryAt(now)
    pause = min(policy.first_pause_s * 2.0 ** (crashes - _CRASHES_AT_ONCE - 1), policy.longest_pause_s)
    return RetryAt(now + timedelta(seconds=pause))
