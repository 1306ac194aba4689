"""Takes in a listing while it arrives: keeps it, or turns it into elements, at the pace of the database."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from attrs import frozen
from twisted.internet.defer import Deferred

from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, Scope
from pdm.workqueue.domain.jobs import Entry, NewElement, Token
from pdm.workqueue.domain.paths import decoded
from pdm.workqueue.domain.planning import BadListingError, Plan, Planned, Skipped
from pdm.workqueue.store import claims, listings
from pdm.workqueue.store.database import Database
from pdm.workqueue.telemetry.background import start_background
from pdm.workqueue.wire.agent_messages import RawEntry

#: Pieces that may wait for the database before the agent is paused.
_MOST_WAITING = 4
#: Unreadable folders that are named in a failure.
_MOST_NAMED = 3
#: What says nothing of the folder itself.
_NOT_SEEN = frozenset(
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
    """What came of a listing: entries seen, entries not carried out, and why it failed, if it did."""

    entries: int
    skipped: int
    failure: AttemptFailure | None


def entry_from_wire(raw: RawEntry) -> Entry:
    """A listing's entry in the words of the domain."""
    return Entry(
        decoded(raw.path),
        raw.type,
        raw.size,
        raw.mode,
        raw.mtime,
        decoded(raw.target) if raw.target is not None else None,
        raw.target_is_file,
    )


class ListingIntake:
    """One listing.

    Args:
        database: where to.
        worker, token: the claim under which it is written.
        plan: what elements follow; None keeps the listing itself.
        known: elements that an earlier attempt has planned already, as `claims.path_mark`.
        pause, resume: stop and go on reading from the agent.
        on_elements: called when there are new elements to claim.
    """

    def __init__(
        self,
        database: Database,
        worker: str,
        token: Token,
        plan: Plan | None,
        known: set[bytes],
        pause: Callable[[], None],
        resume: Callable[[], None],
        on_elements: Callable[[], None],
    ) -> None:
        self._database = database
        self._worker = worker
        self._token = token
        self._plan = plan
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
        self._unreadable: list[tuple[str, AttemptFailure]] = []

    @property
    def is_paused(self) -> bool:
        """Whether the agent has been told to wait for the database."""
        return self._paused

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
        self._unreadable.append((decoded(path), failure))

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
        notes = [Skipped(path, f"{failure.code}: {failure.message}") for path, failure in self._unreadable]
        failure = None
        if self._plan is None:
            # A folder that stays closed is noted. One behind a server that went away is not known to be closed: the
            # listing would pass for whole.
            failure = self._unreadable_failure([each for each in self._unreadable if each[1].code in _NOT_SEEN])
            if notes and failure is None:
                await self._note(notes)
        else:
            planned = self._plan.end(path for path, _ in self._unreadable)
            await self._store(planned, notes)
            failure = planned.failure or self._unreadable_failure(self._unreadable)
        return ListingOutcome(self._entries, self._skipped, failure)

    @staticmethod
    def _unreadable_failure(folders: Sequence[tuple[str, AttemptFailure]]) -> AttemptFailure | None:
        if not folders:
            return None
        names = ", ".join(repr(path) for path, _ in folders[:_MOST_NAMED])
        more = f" and {len(folders) - _MOST_NAMED} more" if len(folders) > _MOST_NAMED else ""
        first = folders[0][1]
        return AttemptFailure(
            Scope.SOURCE, first.code, f"these folders could not be listed: {names}{more} ({first.message})"
        )

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
        if self._plan is None:
            kept = await self._database.run("keep a listing", listings.add, self._token, self._sequence, entries)
            self._sequence += 1
            if not kept:
                raise ClaimLostError
            return
        await self._store(self._plan.take(entries), ())

    async def _store(self, planned: Planned, notes: Iterable[Skipped]) -> None:
        notes = [*notes, *planned.skipped]
        self._skipped += len(planned.skipped)
        if notes:
            await self._note(notes)
        new = [element for element in planned.elements if not self._is_known(element)]
        if new:
            if not await self._database.run("extend a job", claims.extend, self._worker, self._token, new):
                raise ClaimLostError
            self._on_elements()

    def _is_known(self, element: NewElement) -> bool:
        return bool(self._known) and claims.path_mark(element.type, element.src_filepath) in self._known

    async def _note(self, notes: Sequence[Skipped]) -> None:
        await self._database.run(
            "note on a listing",
            listings.add_notes,
            self._token,
            [{"path": note.path, "reason": note.reason} for note in notes],
        )


def bad_listing(error: BadListingError) -> AttemptFailure:
    """The failure of a listing that cannot be true."""
    return AttemptFailure(Scope.SOURCE, FailureCode.BAD_LISTING, str(error))
