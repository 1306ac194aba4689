"""Legal transitions of elements, and the status of a job from its counters."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from attrs import evolve

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.jobs import Counters

_S = JobStatus

#: Status of an element → what it may become.
TRANSITIONS: Mapping[JobStatus, frozenset[JobStatus]] = MappingProxyType(
    {
        _S.NEW: frozenset({_S.SUBMITTED}),
        # Claimed; or cancelled while it waits.
        _S.SUBMITTED: frozenset({_S.RUNNING, _S.CANCELLED}),
        # Settled; SUBMITTED is a retry, or what a dead daemon leaves.
        _S.RUNNING: frozenset({_S.DONE, _S.FAILED, _S.CANCELLED, _S.SUBMITTED, _S.HELD}),
        # What was missing is there again; or cancelled while it waits.
        _S.HELD: frozenset({_S.SUBMITTED, _S.CANCELLED}),
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


def job_status(counters: Counters, *, started: bool, cancel_requested: bool) -> JobStatus:
    """Status of a job.

    Args:
        counters: of its elements; the listing is one of them, so a job that still grows is never final.
    """
    if counters.submitted or counters.running:
        return JobStatus.RUNNING if started else JobStatus.SUBMITTED
    if counters.held:
        return JobStatus.HELD
    if counters.done == counters.elements:
        return JobStatus.DONE
    return JobStatus.CANCELLED if cancel_requested else JobStatus.FAILED


def _changed(counters: Counters, deltas: Mapping[str, int]) -> Counters:
    return evolve(counters, **{name: getattr(counters, name) + delta for name, delta in deltas.items()})
