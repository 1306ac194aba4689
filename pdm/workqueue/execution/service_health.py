"""Faults of the daemon's own parts: its disk, its descriptors, its database, its helper programs.

Faults of this machine are kept apart from those of sites and elements. A failed part is reported here, and no attempt
counts for it. While a required part is faulty, nothing is claimed. Faulty parts are checked until they work again.
"""

from __future__ import annotations

import enum
import errno
import os
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from functools import partial

from attrs import define, field, frozen
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.node_reports import AttemptTally
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.errors import DatabaseUnavailableError
from pdm.workqueue.telemetry.background import Periodic

_log = Logger()

#: Seconds between two checks of a faulty part.
_CHECK_PERIOD_S = 1.0
#: Free descriptors, and free bytes for temporary files, that are required before work begins again.
_FREE_DESCRIPTORS, _FREE_BYTES = 64, 256 * 1024
#: Error numbers of exhausted resources of this machine, whatever the operation.
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


class ServicePart(enum.StrEnum):
    """Parts of the service; the values are shown by ``GET /health``."""

    DATABASE = "database"
    CONNECTIONS = "connections to the database"
    TRANSACTIONS = "single database transactions"
    CREDENTIAL_FILES = "credential files"
    HELPERS = "helpers"
    ATTEMPT_LOGS = "attempt logs"


#: Required parts; attempts can run without their logs.
_REQUIRED = frozenset(
    {ServicePart.DATABASE, ServicePart.CONNECTIONS, ServicePart.CREDENTIAL_FILES, ServicePart.HELPERS}
)

#: Parts whose faults the database logs itself.
_LOGGED_ELSEWHERE = frozenset({ServicePart.DATABASE, ServicePart.TRANSACTIONS})


class PartFaultyError(Exception):
    """A part still does not work; the text says why."""


#: Raises if a part still does not work.
PartCheck = Callable[[], Awaitable[object]]


@frozen
class PartFault:
    """A faulty part.

    Attributes:
        reason: for the daemon's log; may name files and servers.
        check: raises while the part does not work.
    """

    part: ServicePart
    since: datetime
    reason: str
    check: PartCheck


@define(eq=False, kw_only=True)
class ServiceHealth:
    """Faulty parts of the service.

    Attributes:
        database: tells of its outages itself.
        checks: other part → check whether it works.
        on_change: called when work may begin again.
    """

    reactor: IReactorTime
    clock: Callable[[], datetime]
    database: Database
    checks: Mapping[ServicePart, PartCheck]
    on_change: Callable[[], None] = lambda: None
    tally: AttemptTally = field(factory=AttemptTally)
    _faults: dict[ServicePart, PartFault] = field(factory=dict)
    _periodic: Periodic | None = None

    def __attrs_post_init__(self) -> None:
        found = self.database.availability
        self.checks = {
            **self.checks,
            ServicePart.DATABASE: partial(_check_reason, lambda: found.reason),
            ServicePart.TRANSACTIONS: partial(_check_reason, lambda: found.reason_alone),
        }
        found.on_outage = partial(self.report, ServicePart.DATABASE)
        found.on_recovery = partial(self.repaired, ServicePart.DATABASE)
        found.on_alone = partial(self.report, ServicePart.TRANSACTIONS)

    def start(self) -> None:
        self._periodic = Periodic(self.reactor, "check faulty parts", _CHECK_PERIOD_S, self._check)
        self._periodic.start()

    async def stop(self) -> None:
        if self._periodic is not None:
            await self._periodic.stop()

    @property
    def may_claim(self) -> bool:
        """Whether all required parts work."""
        return _REQUIRED.isdisjoint(self._faults)

    @property
    def faults(self) -> list[PartFault]:
        return list(self._faults.values())

    def report(self, part: ServicePart, reason: str, check: PartCheck | None = None) -> None:
        """Report a faulty part.

        ``reason`` is one line for the daemon's log; ``check`` replaces the check of the part.
        """
        known = self._faults.get(part)
        check = check or self.checks[part]
        if known is None:
            stops = "nothing is claimed until it works again" if part in _REQUIRED else "work continues without it"
            if part not in _LOGGED_ELSEWHERE:
                _log.error("{part} do not work: {reason}; {stops}", part=part.value, reason=reason, stops=stops)
            self._faults[part] = PartFault(part, self.clock(), reason, check)
        else:
            self._faults[part] = PartFault(part, known.since, reason, check)

    def repaired(self, part: ServicePart) -> None:
        """A part works again."""
        if self._faults.pop(part, None) is None:
            return
        if part not in _LOGGED_ELSEWHERE:
            _log.info("{part} work again", part=part.value)
        if self.may_claim:
            self.on_change()

    def blame(self, error: BaseException, part: ServicePart, check: PartCheck | None = None) -> AttemptFailure:
        """The failure of an attempt that could not begin. Reports ``part`` if the error is one of this machine.

        The failure's text is shown to the user: it has no path, no host, no SQL.
        """
        if isinstance(error, DatabaseUnavailableError):
            self.report(ServicePart.DATABASE, str(error))
            why = "the database of the service cannot be used"
        elif isinstance(error, OSError):
            self.report(part, f"{type(error).__name__}: {error}", check)
            why = f"{part.value} of the service do not work: {error.strerror or type(error).__name__}"
        else:
            why = f"a fault of the service ({type(error).__name__}): its log says more"
        return AttemptFailure(FailureScope.SERVICE, FailureCode.INTERNAL, why)

    async def _check(self) -> None:
        for fault in self.faults:
            try:
                await fault.check()
            except Exception as error:
                reason = str(error) if isinstance(error, PartFaultyError) else f"{type(error).__name__}: {error}"
                self._faults[fault.part] = PartFault(fault.part, fault.since, reason, fault.check)
                continue
            if self._faults.get(fault.part) is fault:
                self.repaired(fault.part)


async def _check_reason(reason: Callable[[], str | None]) -> None:
    found = reason()
    if found is not None:
        raise DatabaseUnavailableError(found)


def is_exhausted(number: int | None) -> bool:
    """Whether an error number means an exhausted resource of this machine."""
    return number in _EXHAUSTED


def check_resources() -> None:
    """Check that a process of this account could open descriptors and temporary files; blocks.

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
