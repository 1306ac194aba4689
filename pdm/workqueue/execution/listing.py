"""Receives a listing while it arrives: stores it, or plans elements from it, at the pace of the database."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from attrs import Factory, define, frozen
from twisted.internet.defer import Deferred

from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import ClaimToken, ListedEntry, NewElement
from pdm.workqueue.domain.paths import decoded, joined
from pdm.workqueue.domain.planning import BadListingError, Plan, Skipped, unnamed, unreadable
from pdm.workqueue.store import listings, results
from pdm.workqueue.store.database import Database
from pdm.workqueue.telemetry.background import start_background
from pdm.workqueue.wire.agent_messages import RawEntry

#: Chunks that may wait for the database before the agent is paused.
_MOST_WAITING = 4
#: Notes that may wait for the next chunk.
_MOST_NOTES = 1000
#: Unreadable directories that are named in a failure.
_MOST_NAMED = 3
#: Failures that do not show that the directory itself is unreadable.
_INCONCLUSIVE = frozenset(
    {
        FailureCode.CONNECTION,
        FailureCode.STALLED,
        FailureCode.TIMEOUT,
        FailureCode.CREDENTIAL_EXPIRED,
        FailureCode.CREDENTIAL_MISSING,
    }
)


class ClaimLostError(Exception):
    """The LIST element belongs to another daemon now."""


@frozen
class ListingOutcome:
    """Result of a listing: number of entries, and why it failed, if it did."""

    entries: int
    failure: AttemptFailure | None


def entry_from_wire(raw: RawEntry) -> ListedEntry:
    """Convert an entry from the agent's message."""
    return ListedEntry(
        decoded(raw.path),
        raw.type,
        raw.size,
        raw.mode,
        raw.mtime,
        decoded(raw.target) if raw.target is not None else None,
        raw.target_is_file,
        raw.target_is_directory,
    )


@define
class _Unreadable:
    """Directories that could not be listed.

    Attributes:
        named: the first of them.
    """

    code: FailureCode
    message: str
    count: int = 0
    named: list[str] = Factory(list)

    def add(self, path: str) -> None:
        self.count += 1
        if len(self.named) < _MOST_NAMED:
            self.named.append(path)

    @property
    def failure(self) -> AttemptFailure:
        names = ", ".join(map(repr, self.named))
        more = f" and {self.count - len(self.named)} more" if self.count > len(self.named) else ""
        text = f"these directories could not be listed: {names}{more} ({self.message})"
        return AttemptFailure(FailureScope.SOURCE, self.code, text)


class ListingIntake:
    """One listing.

    Args:
        add_elements: adds elements to the job; False if the claim is lost.
        token: the claim under which it is stored.
        plan: which elements follow; None stores the listing itself.
        source: the listed path, as the user gave it.
        known: `results.path_hash` of elements that an earlier attempt has planned.
        pause, resume: stop and continue reading from the agent.
        on_elements: called when there are new elements to claim.
    """

    def __init__(
        self,
        *,
        database: Database,
        add_elements: Callable[[Sequence[NewElement]], Awaitable[bool]],
        token: ClaimToken,
        plan: Plan | None,
        source: str,
        known: set[bytes],
        pause: Callable[[], None],
        resume: Callable[[], None],
        on_elements: Callable[[], None],
    ) -> None:
        self._database = database
        self._add_elements = add_elements
        self._token = token
        self._plan = plan
        self._source = source
        self._known = known
        self._pause = pause
        self._resume = resume
        self._on_elements = on_elements
        self._waiting: deque[list[RawEntry]] = deque()
        self._busy = False
        self._paused = False
        self._error: Exception | None = None
        self._idle: Deferred[None] | None = None
        self._sequence = 0
        self._entries = 0
        self._skipped = 0
        self._notes: list[Skipped] = []
        #: Paths only, for planning; the failures are in notes.
        self._unreadable: list[str] = []
        self._closed: _Unreadable | None = None
        self._not_seen: _Unreadable | None = None

    @property
    def is_paused(self) -> bool:
        """Whether reading from the agent is paused."""
        return self._paused

    @property
    def skipped(self) -> int:
        """Number of skipped entries so far."""
        return self._skipped

    def locate(self, path: str) -> None:
        """Set the path of the listed directory after links were resolved; ``path`` is percent-encoded."""
        if self._plan is not None:
            self._plan.locate(decoded(path))

    def feed(self, entries: list[RawEntry]) -> None:
        """Queue the next chunk; returns at once."""
        self._waiting.append(entries)
        if len(self._waiting) >= _MOST_WAITING and not self._paused:
            self._paused = True
            self._pause()
        if not self._busy:
            self._busy = True
            start_background("take in a listing", self._work())

    def unreadable(self, path: str, failure: AttemptFailure) -> None:
        """Note a directory that could not be listed; ``path`` is percent-encoded."""
        name = decoded(path)
        self._unreadable.append(name)
        self._closed = self._closed or _Unreadable(failure.code, failure.message)
        self._closed.add(name)
        if failure.code in _INCONCLUSIVE:
            self._not_seen = self._not_seen or _Unreadable(failure.code, failure.message)
            self._not_seen.add(name)
        self._note(unreadable(joined(self._source, name), failure))

    def unnamed(self, path: str, count: int) -> None:
        """Note entries of a directory that its server counts but does not name; ``path`` is percent-encoded."""
        self._note(unnamed(joined(self._source, decoded(path)), count))

    def _note(self, note: Skipped) -> None:
        self._skipped += note.count
        self._notes.append(note)
        if len(self._notes) % _MOST_NOTES == 0:
            # Queued like a chunk, so that the agent waits for the database.
            self.feed([])

    async def finish(self) -> ListingOutcome:
        """Wait until all is stored, and add the elements that follow from the end of the listing.

        Raises:
            BadListingError: the listing is invalid.
            ClaimLostError: another daemon has the claim.
        """
        if self._busy:
            self._idle = Deferred()
            await self._idle
        if self._error is not None:
            raise self._error
        await self._keep_notes(())
        failure = None
        if self._plan is None:
            # An unreadable directory is noted only. If the server went away, the listing fails: it would seem complete.
            failure = None if self._not_seen is None else self._not_seen.failure
        else:
            for planned in self._plan.end(self._unreadable):
                await self._add(planned.elements)
                failure = planned.failure
            if failure is None and self._closed is not None:
                failure = (self._not_seen or self._closed).failure
        return ListingOutcome(self._entries, failure)

    async def _work(self) -> None:
        try:
            while self._waiting and self._error is None:
                await self._take(self._waiting.popleft())
                if self._paused and len(self._waiting) < _MOST_WAITING:
                    self._paused = False
                    self._resume()
        except (BadListingError, ClaimLostError) as error:
            self._error = error
        except Exception as error:
            # Logged by the background task; `finish` fails with it as well.
            self._error = error
            raise
        finally:
            self._busy = False
            if self._error is not None:
                self._waiting.clear()
                if self._paused:
                    self._paused = False
                    self._resume()
            if self._idle is not None:
                self._idle.callback(None)

    async def _take(self, raw: Sequence[RawEntry]) -> None:
        entries = [entry_from_wire(entry) for entry in raw]
        self._entries += len(entries)
        if self._plan is not None:
            planned = self._plan.take(entries)
            self._skipped += len(planned.skipped)
            await self._keep_notes(planned.skipped)
            await self._add(planned.elements)
            return
        await self._keep_notes(())
        if entries:
            kept = await self._database.run("store a listing", listings.add, self._token, self._sequence, entries)
            self._sequence += 1
            if not kept:
                raise ClaimLostError

    async def _add(self, elements: Sequence[NewElement]) -> None:
        new = elements
        if self._known:
            new = [one for one in elements if results.path_hash(one.type, one.src_filepath) not in self._known]
        if new:
            if not await self._add_elements(new):
                raise ClaimLostError
            self._on_elements()

    async def _keep_notes(self, skipped: Sequence[Skipped]) -> None:
        notes, self._notes = [*self._notes, *skipped], []
        for first in range(0, len(notes), _MOST_NOTES):
            piece = notes[first : first + _MOST_NOTES]
            if not await self._database.run("store notes of a listing", listings.add_notes, self._token, piece):
                raise ClaimLostError


def bad_listing(error: BadListingError) -> AttemptFailure:
    """The failure for an invalid listing."""
    return AttemptFailure(FailureScope.SOURCE, FailureCode.BAD_LISTING, str(error))
