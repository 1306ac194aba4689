"""Outages of the database: what cannot be used, since when; and the transactions of one request.

An outage has two lines of the log, one at its begin and one at its end, however many transactions fail: otherwise many
clients would fill the log with one fault.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from contextvars import ContextVar

from attrs import define, field
from twisted.logger import Logger

from pdm.workqueue.store.errors import DatabaseUnavailableError

_log = Logger()

#: An outage that is over for a shorter time than this is the same one if it returns: a full disk takes small writes.
_QUIET_S = 5.0
#: Single failures are over after so many seconds without one: a statement or lock timeout is seldom shorter.
_QUIET_ALONE_S = 30.0
#: Seconds until another reason of a long outage is logged.
_LOG_AGAIN_AFTER_S = 60.0


class DatabaseUse(enum.StrEnum):
    """What a transaction does; the values are shown in the log."""

    READING = "read"
    WRITING = "written"


@define(eq=False)
class FailedTransactions:
    """Failures of one kind in a row that belong together.

    Attributes:
        began: monotonic seconds.
        last: the latest failure, or the end of the outage.
        reason: that was logged last.
    """

    began: float
    last: float
    reason: str
    logged: float
    count: int = 0


@define(eq=False, kw_only=True)
class Availability:
    """Whether the database can be used; reactor thread only.

    Attributes:
        seconds: monotonic clock.
        on_outage: called with the reason when an outage begins.
        on_recovery: called when all uses work again.
        on_alone: called with the reason when single transactions fail, while others succeed.
    """

    seconds: Callable[[], float]
    on_outage: Callable[[str], None] = lambda reason: None
    on_recovery: Callable[[], None] = lambda: None
    on_alone: Callable[[str], None] = lambda reason: None
    _failing: dict[DatabaseUse, str] = field(factory=dict)
    _confirmed: set[DatabaseUse] = field(factory=set)
    _outage: FailedTransactions | None = None
    _alone: FailedTransactions | None = None

    @property
    def reason(self) -> str | None:
        """Why the database cannot be used; None while it can."""
        return next(iter(self._failing.values()), None)

    @property
    def reason_alone(self) -> str | None:
        """Why single transactions have failed lately; None if none has."""
        return None if self._alone is None else self._alone.reason

    @property
    def failing(self) -> list[DatabaseUse]:
        """What cannot be done."""
        return list(self._failing)

    def refusal(self, use: DatabaseUse) -> str | None:
        """Why transactions that read or write would fail; None while that is not certain.

        A single connection may have been lost: only a probe that has failed, too, shows an outage.
        """
        return self._failing.get(use) if use in self._confirmed else None

    def failed(self, use: DatabaseUse, error: DatabaseUnavailableError, *, is_probe: bool = False) -> None:
        """A transaction has failed."""
        now, reason = self.seconds(), str(error)
        if error.alone and self._outage is not None and self._failing:
            # Others do not succeed either.
            self._outage.last = now
            self._outage.count += 1
            return
        if error.alone:
            self._failed_alone(now, reason)
            return
        began = not self._failing
        self._failing[use] = reason
        if is_probe:
            self._confirmed.add(use)
        outage = self._outage
        if outage is None:
            outage = self._outage = FailedTransactions(now, now, reason, now)
            _log.error(
                "the database cannot be {use}: {reason}; requests are answered 503, nothing is claimed, and results"
                " are kept until it can",
                use=use.value,
                reason=reason,
            )
        elif reason != outage.reason and now - outage.logged >= _LOG_AGAIN_AFTER_S:
            outage.reason, outage.logged = reason, now
            _log.error("the database cannot be {use} yet: {reason}", use=use.value, reason=reason)
        outage.last = now
        outage.count += 1
        if began:
            self.on_outage(reason)

    def worked(self, use: DatabaseUse) -> None:
        """A transaction has succeeded."""
        self._confirmed.discard(use)
        if self._failing and self._failing.pop(use, None) is not None and not self._failing:
            if self._outage is not None:
                self._outage.last = self.seconds()
            self.on_recovery()

    def log_ends(self) -> None:
        """Log the end of what is over; to be called every second or so."""
        now = self.seconds()
        outage, alone = self._outage, self._alone
        if outage is not None and not self._failing and now - outage.last >= _QUIET_S:
            self._end_outage(outage)
        if alone is not None and now - alone.last >= _QUIET_ALONE_S:
            self._alone = None
            _log.info(
                "no transaction has failed alone for {quiet:.0f} s; {failed} had within {seconds:.0f} s",
                quiet=_QUIET_ALONE_S,
                failed=alone.count,
                seconds=alone.last - alone.began,
            )

    def close(self) -> None:
        """The service stops: log the end of an outage that is over already."""
        if self._outage is not None and not self._failing:
            self._end_outage(self._outage)

    def _end_outage(self, outage: FailedTransactions) -> None:
        self._outage = None
        _log.info(
            "the database can be used again, after {seconds:.0f} s and {failed} failed transactions",
            seconds=outage.last - outage.began,
            failed=outage.count,
        )

    def _failed_alone(self, now: float, reason: str) -> None:
        alone = self._alone
        if alone is None:
            alone = self._alone = FailedTransactions(now, now, reason, now)
            _log.warn(
                "a transaction has failed while others succeed: {reason}; such requests are answered 503, and such"
                " work is tried again",
                reason=reason,
            )
            self.on_alone(reason)
        alone.last = now
        alone.count += 1


@define(eq=False)
class RequestTransactions:
    """The transactions of one request, whose client does not wait for long.

    Attributes:
        longest_s: seconds for each.
        has_written: whether one of them was committed.
        is_over: the request is answered; what it has started in the background may take as long as it needs.
    """

    longest_s: float
    has_written: bool = False
    is_over: bool = False


#: Seconds that one more row may take, on a busy machine.
_ROW_S = 0.00015

_request: ContextVar[RequestTransactions | None] = ContextVar("transactions of a request", default=None)


def request_transactions() -> RequestTransactions | None:
    """The transactions of the request that this is called for; None for work in the background."""
    found = _request.get()
    return None if found is None or found.is_over else found


def expect_rows(count: int) -> None:
    """Let the transactions of this request take longer, because it writes so many rows."""
    found = request_transactions()
    if found is not None:
        found.longest_s += count * _ROW_S


def begin_request(longest_s: float) -> RequestTransactions:
    """Begin the transactions of a request, in the context of the caller alone; set `is_over` at its end."""
    begun = RequestTransactions(longest_s)
    _request.set(begun)
    return begun
