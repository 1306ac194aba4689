"""Status of elements and jobs: allowed changes, the status of a job from its counts, and when to retry."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from types import MappingProxyType

from attrs import evolve, frozen

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, Remedy
from pdm.workqueue.domain.jobs import Counters

_S = JobStatus

#: Status of an element → what it may become.
TRANSITIONS: Mapping[JobStatus, frozenset[JobStatus]] = MappingProxyType(
    {
        _S.NEW: frozenset({_S.SUBMITTED}),
        # Claimed; cancelled while it waits; or set aside because its file is not on disk.
        _S.SUBMITTED: frozenset({_S.RUNNING, _S.CANCELLED, _S.HELD}),
        # Settled; SUBMITTED is a retry, or what a dead daemon leaves.
        _S.RUNNING: frozenset({_S.DONE, _S.FAILED, _S.CANCELLED, _S.SUBMITTED, _S.HELD}),
        # What was missing is there again; cancelled while it waits; or the result of what it was polled for.
        _S.HELD: frozenset({_S.SUBMITTED, _S.CANCELLED, _S.DONE, _S.FAILED}),
        # The user asks for a retry of the job.
        _S.FAILED: frozenset({_S.SUBMITTED}),
        _S.CANCELLED: frozenset({_S.SUBMITTED}),
        _S.DONE: frozenset(),
    }
)

_COUNTER_OF: Mapping[JobStatus, str] = MappingProxyType(
    {
        _S.SUBMITTED: "submitted",
        _S.RUNNING: "running",
        _S.DONE: "done",
        _S.FAILED: "failed",
        _S.CANCELLED: "cancelled",
        _S.HELD: "held",
    }
)


class IllegalTransitionError(Exception):
    """A change of status that the table does not allow: a bug of the service."""


def counters_after_adding(counters: Counters, status: JobStatus, count: int) -> Counters:
    """The counters after new elements have come."""
    return _changed(counters, {"elements": count, _COUNTER_OF[status]: count})


def counters_after_moving(counters: Counters, before: JobStatus, after: JobStatus, count: int) -> Counters:
    """The counters after elements have changed their status.

    Raises:
        IllegalTransitionError: the transition is not legal, or there are fewer elements.
    """
    if after not in TRANSITIONS[before]:
        raise IllegalTransitionError(f"an element cannot go from {before.name} to {after.name}")
    if getattr(counters, _COUNTER_OF[before]) < count:
        raise IllegalTransitionError(f"{count} elements leave {before.name}, which has fewer: {counters}")
    return _changed(counters, {_COUNTER_OF[before]: -count, _COUNTER_OF[after]: count})


def settled_status(verdict: JobStatus, *, cancel_requested: bool) -> JobStatus:
    """The next status of an element: one that would wait is cancelled if its job is being cancelled."""
    if cancel_requested and verdict in (JobStatus.SUBMITTED, JobStatus.HELD):
        return JobStatus.CANCELLED
    return verdict


def job_status(counters: Counters, *, started: bool, cancel_requested: bool, on_hold: bool = False) -> JobStatus:
    """Status of a job.

    Args:
        counters: of its elements; the listing is one of them, so a job that still grows is never final.
        on_hold: whether a person holds it: it is HELD once nothing of it runs any more.
    """
    if on_hold and not counters.running and counters.submitted:
        return JobStatus.HELD
    if counters.submitted or counters.running:
        return JobStatus.RUNNING if started else JobStatus.SUBMITTED
    if counters.held:
        return JobStatus.HELD
    if counters.done == counters.elements:
        return JobStatus.DONE
    return JobStatus.CANCELLED if cancel_requested else JobStatus.FAILED


_DURATION = re.compile(r"([0-9]{1,9})([smhdw])", re.ASCII)
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def duration_s(text: str) -> float:
    """Seconds of a number and a unit: ``90s``, ``5m``, ``12h``, ``7d``, ``2w``.

    Raises:
        ValueError: it is none.
    """
    found = _DURATION.fullmatch(text)
    if found is None or not int(found[1]):
        raise ValueError("a duration such as 90s, 30m, 12h, 7d or 2w is expected")
    return float(int(found[1]) * _UNITS_S[found[2]])


def deadline_from_text(text: str, now: datetime, what: str = "the deadline") -> datetime:
    """The deadline of a job, or another time in the future, UTC.

    Args:
        text: RFC 3339 with an offset from UTC, or a number and a unit (``s``, ``m``, ``h``, ``d``, ``w``) from now on.
        now: when the job is submitted.
        what: it is, in words.

    Raises:
        ValueError: it is neither, or not in the future.
    """
    deadline = None
    with contextlib.suppress(ValueError, OverflowError):
        if duration := _DURATION.fullmatch(text):
            deadline = now + timedelta(seconds=int(duration[1]) * _UNITS_S[duration[2]])
        else:
            parsed = datetime.fromisoformat(text)
            deadline = None if parsed.tzinfo is None else parsed.astimezone(UTC)
    if deadline is None:
        raise ValueError("a time such as 2026-03-01T00:00:00Z is expected, or a duration such as 12h or 7d")
    if deadline <= now:
        raise ValueError(f"{what} must be in the future")
    return deadline


def _changed(counters: Counters, deltas: Mapping[str, int]) -> Counters:
    return evolve(counters, **{name: getattr(counters, name) + delta for name, delta in deltas.items()})


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
