"""Whether the service itself can work: faults of this machine, kept apart from those of sites and of elements.

A part that fails is reported here, and no attempt counts for it. While a part is faulty without which nothing can be
carried out, nothing is claimed. Each faulty part is checked until it works again.
"""

from __future__ import annotations

import enum
import errno
import os
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime

from attrs import define, field, frozen
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, Scope
from pdm.workqueue.store.errors import DatabaseUnavailableError
from pdm.workqueue.telemetry.background import Periodic

_log = Logger()

#: Seconds between two checks of a part that is faulty.
_PERIOD_S = 1.0
#: Descriptors that must be free, and bytes that temporary files must have room for, before work begins again.
_FREE_DESCRIPTORS, _FREE_BYTES = 64, 256 * 1024
#: Error numbers that say that this machine lacks something, whatever was asked of it.
_EXHAUSTED = frozenset(
    {
        errno.EMFILE,
        errno.ENFILE,
        errno.EAGAIN,
        errno.ENOMEM,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EIO,
    }
)


class Part(enum.StrEnum):
    """What the service works with; the words are shown by ``GET /health``."""

    DATABASE = "database"
    CREDENTIAL_FILES = "credential files"
    HELPERS = "helpers"
    ATTEMPT_LOGS = "attempt logs"


#: Without these nothing can be carried out. Without its log an attempt can.
_NEEDED = frozenset({Part.DATABASE, Part.CREDENTIAL_FILES, Part.HELPERS})

#: Raises if a part still does not work.
Check = Callable[[], Awaitable[object]]


@frozen
class PartFault:
    """A part that does not work.

    Attributes:
        since: when it was reported first, UTC.
        reason: for the daemon's log; may name files and servers.
        check: finds out whether it works again.
    """

    part: Part
    since: datetime
    reason: str
    check: Check


@define(eq=False)
class ServiceCondition:
    """What is faulty at present.

    Attributes:
        checks: how it is found out that a part works again.
        on_change: called when work may begin again.
        log_errors: how many writes of attempt logs have failed so far.
    """

    reactor: IReactorTime
    clock: Callable[[], datetime]
    checks: Mapping[Part, Check]
    on_change: Callable[[], None] = lambda: None
    log_errors: Callable[[], int] = lambda: 0
    _faults: dict[Part, PartFault] = field(factory=dict)
    _log_errors_seen: int = 0
    _periodic: Periodic | None = None

    def start(self) -> None:
        self._periodic = Periodic(self.reactor, "check what is faulty", _PERIOD_S, self._check)
        self._periodic.start()

    async def stop(self) -> None:
        if self._periodic is not None:
            await self._periodic.stop()

    @property
    def may_claim(self) -> bool:
        """Whether all works without which nothing can be carried out."""
        return _NEEDED.isdisjoint(self._faults)

    @property
    def faults(self) -> list[PartFault]:
        """What does not work."""
        return list(self._faults.values())

    def report(self, part: Part, reason: str, check: Check | None = None) -> None:
        """A part has failed.

        Args:
            part: which.
            reason: one line for the daemon's log.
            check: finds out whether it works again; the part's own where it is left out.
        """
        known = self._faults.get(part)
        check = check or self.checks[part]
        if known is None:
            stops = "nothing is begun until it works again" if part in _NEEDED else "work goes on without"
            _log.error("{part} do not work: {reason}; {stops}", part=part.value, reason=reason, stops=stops)
            self._faults[part] = PartFault(part, self.clock(), reason, check)
        else:
            self._faults[part] = PartFault(part, known.since, reason, check)

    def blame(self, error: BaseException, part: Part, check: Check | None = None) -> AttemptFailure:
        """The failure of an attempt that could not be begun; the part is reported if the error is the machine's.

        Args:
            error: what was raised.
            part: what was being used.
            check: as of `report`.

        Returns:
            What the user is told: no path, no host, no SQL.
        """
        if isinstance(error, DatabaseUnavailableError):
            self.report(Part.DATABASE, str(error))
            why = "the database of the service cannot be used"
        elif isinstance(error, OSError):
            self.report(part, f"{type(error).__name__}: {error}", check)
            why = f"{part.value} of the service do not work: {error.strerror or type(error).__name__}"
        else:
            why = f"a fault of the service ({type(error).__name__}): its log says more"
        return AttemptFailure(Scope.SERVICE, FailureCode.INTERNAL, why)

    async def _check(self) -> None:
        failed = self.log_errors()
        if failed > self._log_errors_seen:
            self._log_errors_seen = failed
            self.report(Part.ATTEMPT_LOGS, f"{failed} writes have failed so far")
        for fault in self.faults:
            try:
                await fault.check()
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                self._faults[fault.part] = PartFault(fault.part, fault.since, reason, fault.check)
                continue
            if self._faults.get(fault.part) is fault:
                del self._faults[fault.part]
                _log.info("{part} work again", part=fault.part.value)
                if self.may_claim:
                    self.on_change()


def is_exhausted(number: int | None) -> bool:
    """Whether an error number says that this machine lacks something."""
    return number in _EXHAUSTED


def check_resources() -> None:
    """See that a process of this account could be given descriptors and temporary files; blocks.

    Raises:
        OSError: it could not.
    """
    taken: list[int] = []
    try:
        with tempfile.TemporaryFile() as file:
            file.write(bytes(_FREE_BYTES))
            file.flush()
            taken.extend(os.dup(file.fileno()) for _ in range(_FREE_DESCRIPTORS))
    finally:
        for descriptor in taken:
            os.close(descriptor)
