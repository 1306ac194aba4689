"""Whether a credential outlasts a job that runs, as far as it can be told how long that will take."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import TypeVar

from attrs import define, field, frozen

from pdm.workqueue.domain.credentials import CredentialKind, OfKind, earliest_end
from pdm.workqueue.domain.progress import JobProgress

_K = TypeVar("_K", bound=OfKind)
#: A job is asked for once a second, and its credential seldom changes.
_KNOWN_FOR = timedelta(seconds=10)
#: With more known ones all are forgotten.
_MOST_KNOWN = 10_000


@frozen
class End:
    """When the first of the credentials of a job ends, and which kind of one that is."""

    at: datetime
    kind: CredentialKind


@define
class KnownEnds:
    """What was found out a moment ago, by user, sites and what is needed there."""

    _ends: dict[object, tuple[datetime, End | None]] = field(factory=dict)

    def find(self, key: object, now: datetime) -> tuple[End | None] | None:
        """What is known; None if nothing is, or not any more."""
        asked_at, end = self._ends.get(key, (None, None))
        return None if asked_at is None or abs(now - asked_at) > _KNOWN_FOR else (end,)

    def note(self, key: object, now: datetime, end: End | None) -> None:
        """Remember for a moment."""
        if len(self._ends) >= _MOST_KNOWN:
            self._ends.clear()
        self._ends[key] = (now, end)


def end_of(chosen: Mapping[int, _K]) -> End | None:
    """The first end of some credentials; None if none ends."""
    at = earliest_end(chosen)
    return None if at is None else End(at, next(each.kind for each in chosen.values() if each.valid_until == at))


def outlasted_by(progress: JobProgress, end: End | None, now: datetime) -> str | None:
    """What a user should know of a credential that ends before the job does; None for nothing."""
    if end is None or progress.eta is None or end.at >= now + timedelta(seconds=progress.eta):
        return None
    return (
        f"the {end.kind.words} ends at {end.at:%Y-%m-%dT%H:%M:%SZ}, and at the present rate this job needs until"
        f" {now + timedelta(seconds=progress.eta):%Y-%m-%dT%H:%M:%SZ}: what is left is held then, and goes on by itself"
        f" when it is renewed ({end.kind.remedy})"
    )
