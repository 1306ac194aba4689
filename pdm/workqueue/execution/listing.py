"""Receives a listing while it arrives: stores it, or plans elements from it, at the pace of the database."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from attrs import Factory, define, frozen
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread

from pdm.workqueue.domain.enums import JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import ClaimToken, ListedEntry, NewElement
from pdm.workqueue.domain.paths import decoded, joined
from pdm.workqueue.domain.planning import (
    NOTHING,
    BadListingError,
    Plan,
    Planned,
    SkipCode,
    Skipped,
    unnamed,
    unreadable,
)
from pdm.workqueue.execution.destination_index import DestinationIndex
from pdm.workqueue.store import listings, results
from pdm.workqueue.store.database import Database
from pdm.workqueue.telemetry.background import following, start_background
from pdm.workqueue.wire.agent_events import EntriesEvent, RawEntry, RootEvent, UnnamedEvent, UnreadableEvent

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
        raw.owner,
        raw.group,
    )


@define
class _Unreadable:
    """Directories that could not be listed.

    Attributes:
        named: the first of them.
    """

    first: AttemptFailure
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
        where = " of the destination" if self.first.scope is FailureScope.DESTINATION else ""
        text = f"these directories{where} could not be listed: {names}{more} ({self.first.message})"
        return AttemptFailure(self.first.scope, self.first.code, text)


class ListingIntake:
    """One listing.

    Args:
        add_elements: adds elements to the job; False if the claim is lost.
        token: the claim under which it is stored.
        plan: which elements follow; None stores the listing itself.
        source: the listed path, as the user gave it.
        destination: of a COPY whose destination is listed: its path, as the user gave it.
        index: keeps the listing of the destination; closed at the end.
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
        destination: str = "",
        index: DestinationIndex | None = None,
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
        self._destination = destination
        self._index = index
        self._pause = pause
        self._resume = resume
        self._on_elements = on_elements
        #: Entries, and whether they are of the destination.
        self._waiting: deque[tuple[list[RawEntry], bool]] = deque()
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
        self._incomplete: FailureScope | None = None
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

    def locate(self, event: RootEvent) -> None:
        """Set the path of a listed directory after links were resolved."""
        if self._plan is not None:
            self._plan.locate(decoded(event.path), at_destination=event.destination)

    def feed(self, event: EntriesEvent) -> None:
        """Queue the next chunk; returns at once."""
        self._queue(event.entries, event.destination)

    def _queue(self, entries: list[RawEntry], at_destination: bool) -> None:
        self._waiting.append((entries, at_destination))
        if len(self._waiting) >= _MOST_WAITING and not self._paused:
            self._paused = True
            self._pause()
        if not self._busy:
            self._busy = True
            start_background("take in a listing", self._work())

    def unreadable(self, event: UnreadableEvent, failure: AttemptFailure) -> None:
        """Note a directory that could not be listed."""
        name = decoded(event.path)
        self._note_incomplete(event.destination)
        if not event.destination:
            self._unreadable.append(name)
            self._closed = self._closed or _Unreadable(failure)
            self._closed.add(name)
        if failure.code in _INCONCLUSIVE:
            self._not_seen = self._not_seen or _Unreadable(failure)
            self._not_seen.add(name)
        self._note(unreadable(joined(self._root(event.destination), name), failure))

    def unnamed(self, event: UnnamedEvent) -> None:
        """Note entries of a directory that its server counts but does not name."""
        self._note_incomplete(event.destination)
        self._note(unnamed(joined(self._root(event.destination), decoded(event.path)), event.count))

    def _note_incomplete(self, at_destination: bool) -> None:
        # If both ends are, the source is named: most often it is the user's own.
        if not at_destination:
            self._incomplete = FailureScope.SOURCE
        elif self._incomplete is None:
            self._incomplete = FailureScope.DESTINATION

    def _root(self, at_destination: bool) -> str:
        return self._destination if at_destination else self._source

    def _note(self, note: Skipped) -> None:
        self._skipped += note.count
        self._notes.append(note)
        if len(self._notes) % _MOST_NOTES == 0:
            # Queued like a chunk, so that the agent waits for the database.
            self._queue([], False)

    def close(self) -> None:
        """Free the listing of the destination; called at the end of the batch, whatever became of it."""
        index, self._index = self._index, None
        if index is not None:
            start_background("close the listing of a destination", self._close(index))

    async def _close(self, index: DestinationIndex) -> None:
        await self._until_idle()
        await deferToThread(index.close)

    async def _until_idle(self) -> None:
        if self._busy:
            if self._idle is None or self._idle.called:
                self._idle = Deferred()
            await following(self._idle)

    async def finish(self, free_bytes: int | None = None) -> ListingOutcome:
        """Wait until all is stored, and add the elements that follow from the end of the listing.

        Args:
            free_bytes: at the destination of a copy, if known.

        Raises:
            BadListingError: the listing is invalid.
            ClaimLostError: another daemon has the claim.
        """
        await self._until_idle()
        if self._error is not None:
            raise self._error
        failure = None
        if self._plan is None:
            # An unreadable directory is noted only. If the server went away, the listing fails: it would seem complete.
            failure = None if self._not_seen is None else self._not_seen.failure
        else:
            failure = await self._end_plan(self._plan)
            if failure is None and (incomplete := self._not_seen or self._closed) is not None:
                failure = incomplete.failure
        await self._keep_notes(())
        if free_bytes is not None:
            await self._database.run("store free space", listings.add_free_bytes, self._token, free_bytes)
        return ListingOutcome(self._entries, failure)

    async def _end_plan(self, plan: Plan) -> AttemptFailure | None:
        """Add what follows from the end of both listings, piece by piece."""
        index, failure = self._index, None
        extra = () if index is None else index.extra()
        pieces = plan.end(self._unreadable, extra, incomplete=self._incomplete)
        while True:
            # In a thread if the plan reads what is extra from the file.
            planned = next(pieces, None) if index is None else await deferToThread(next, pieces, None)
            if planned is None:
                return failure
            await self._keep(planned)
            failure = planned.failure

    async def _work(self) -> None:
        try:
            while self._waiting and self._error is None:
                await self._take(*self._waiting.popleft())
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
            if self._idle is not None and not self._idle.called:
                self._idle.callback(None)

    async def _take(self, raw: Sequence[RawEntry], at_destination: bool) -> None:
        entries = [entry_from_wire(entry) for entry in raw]
        if at_destination:
            if self._index is None:
                raise BadListingError("the listing of a destination that was not asked for")
            await deferToThread(self._index.put, entries)
            return
        self._entries += len(entries)
        if self._plan is not None:
            await self._keep(await self._plan_entries(self._plan, entries))
            return
        await self._keep_notes(())
        if entries:
            kept = await self._database.run("store a listing", listings.add, self._token, self._sequence, entries)
            self._sequence += 1
            if not kept:
                raise ClaimLostError

    async def _plan_entries(self, plan: Plan, entries: Sequence[ListedEntry]) -> Planned:
        there = NOTHING
        if self._index is not None and entries:
            places = plan.places(entries)
            there = await deferToThread(self._index.at, places)
            if self._known:
                # Since an earlier attempt has planned a file, its copy may have arrived.
                copied = {place for place, entry in zip(places, entries, strict=True) if self._is_known(entry)}
                there = {place: entry for place, entry in there.items() if place not in copied}
        return await deferToThread(plan.take, entries, there) if plan.is_slow else plan.take(entries, there)

    def _is_known(self, entry: ListedEntry) -> bool:
        return results.path_hash(JobType.COPY, joined(self._source, entry.path)) in self._known

    async def _keep(self, planned: Planned) -> None:
        # What filters leave out is no part of what was asked for: it is noted only.
        self._skipped += sum(note.count for note in planned.skipped if note.code != SkipCode.FILTERED)
        await self._keep_notes(planned.skipped)
        await self._add(planned.elements)

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
