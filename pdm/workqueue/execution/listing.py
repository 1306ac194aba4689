"""Takes in a listing while it arrives: keeps it, or turns it into elements, at the pace of the database."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

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

#: Pieces that may wait for the database before the agent is paused.
_MOST_WAITING = 4
#: Notes that may wait for the next piece of the listing.
_MOST_NOTES = 1000
#: Unreadable folders that are named in a failure.
_MOST_NAMED = 3
#: What says nothing of the folder itself.
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
    """What came of a listing: entries seen, and why it failed, if it did."""

    entries: int
    failure: AttemptFailure | None


def entry_from_wire(raw: RawEntry) -> ListedEntry:
    """A listing's entry in the words of the domain."""
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
        count: how many.
        named: the first of them.
        message: what was said of the first.
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
        text = f"these folders could not be listed: {names}{more} ({self.message})"
        return AttemptFailure(FailureScope.SOURCE, self.code, text)


class ListingIntake:
    """One listing.

    Args:
        database: where to.
        worker, token: the claim under which it is written.
        plan: what elements follow; None keeps the listing itself.
        source: the listed path, as the user gave it.
        known: elements that an earlier attempt has planned already, as `claims.path_mark`.
        pause, resume: stop and go on reading from the agent.
        on_elements: called when there are new elements to claim.
    """

    def __init__(
        self,
        database: Database,
        worker: str,
        token: ClaimToken,
        plan: Plan | None,
        source: str,
        known: set[bytes],
        pause: Callable[[], None],
        resume: Callable[[], None],
        on_elements: Callable[[], None],
    ) -> None:
        self._database = database
        self._worker = worker
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
        #: Paths only: planning has to know them, what was said of each is noted.
        self._unreadable: list[str] = []
        self._closed: _Unreadable | None = None
        self._not_seen: _Unreadable | None = None

    @property
    def is_paused(self) -> bool:
        """Whether the agent has been told to wait for the database."""
        return self._paused

    @property
    def skipped(self) -> int:
        """Entries that are left out, as far as is known."""
        return self._skipped

    def locate(self, path: str) -> None:
        """Note where the listed directory is, links resolved; ``path`` is percent-encoded."""
        if self._plan is not None:
            self._plan.locate(decoded(path))

    def feed(self, entries: list[RawEntry]) -> None:
        """Take the next piece; returns at once."""
        self._waiting.append(entries)
        if len(self._waiting) >= _MOST_WAITING and not self._paused:
            self._paused = True
            self._pause()
        if not self._busy:
            self._busy = True
            start_background("take in a listing", self._work())

    def unreadable(self, path: str, failure: AttemptFailure) -> None:
        """Note a folder that could not be listed; ``path`` is percent-encoded."""
        name = decoded(path)
        self._unreadable.append(name)
        self._closed = self._closed or _Unreadable(failure.code, failure.message)
        self._closed.add(name)
        if failure.code in _INCONCLUSIVE:
            self._not_seen = self._not_seen or _Unreadable(failure.code, failure.message)
            self._not_seen.add(name)
        self._note(unreadable(joined(self._source, name), failure))

    def unnamed(self, path: str, count: int) -> None:
        """Note entries of a folder that its server counts and does not name; ``path`` is percent-encoded."""
        self._note(unnamed(joined(self._source, decoded(path)), count))

    def _note(self, note: Skipped) -> None:
        self._skipped += note.count
        self._notes.append(note)
        if len(self._notes) % _MOST_NOTES == 0:
            # With what is there of the listing, so that the agent waits for the database.
            self.feed([])

    async def finish(self) -> ListingOutcome:
        """Wait until all is stored, and add what follows from the end of the listing.

        Raises:
            BadListingError: it cannot be true.
            ClaimLostError: it is another daemon's now.
        """
        if self._busy:
            self._idle = Deferred()
            await self._idle
        if self._error is not None:
            raise self._error
        await self._keep_notes(())
        failure = None
        if self._plan is None:
            # A folder that stays closed is noted. One behind a server that went away is not known to be closed: the
            # listing would pass for whole.
            failure = None if self._not_seen is None else self._not_seen.failure
        else:
            planned = self._plan.end(self._unreadable)
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
            # The listing as a whole fails with it; it is not lost here.
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
            kept = await self._database.run("keep a listing", listings.add, self._token, self._sequence, entries)
            self._sequence += 1
            if not kept:
                raise ClaimLostError

    async def _add(self, elements: Sequence[NewElement]) -> None:
        new = [element for element in elements if not self._is_known(element)]
        if new:
            if not await self._database.run("extend a job", results.add_elements, self._worker, self._token, new):
                raise ClaimLostError
            self._on_elements()

    def _is_known(self, element: NewElement) -> bool:
        return bool(self._known) and results.path_hash(element.type, element.src_filepath) in self._known

    async def _keep_notes(self, skipped: Sequence[Skipped]) -> None:
        notes, self._notes = [*self._notes, *skipped], []
        for first in range(0, len(notes), _MOST_NOTES):
            piece = notes[first : first + _MOST_NOTES]
            if not await self._database.run("note on a listing", listings.add_notes, self._token, piece):
                raise ClaimLostError


def bad_listing(error: BadListingError) -> AttemptFailure:
    """The failure of a listing that cannot be true."""
    return AttemptFailure(FailureScope.SOURCE, FailureCode.BAD_LISTING, str(error))
