"""What a fault means: what the helper knows first, then the error number; text only where nothing else is given."""

from __future__ import annotations

import re
from collections.abc import Sequence

from attrs import frozen

from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, Scope, code_for_errno, shows_no_server
from pdm.workqueue.wire.agent_messages import Fault

_LONGEST_MESSAGE = 2000


@frozen
class Reading:
    """A text that has a meaning.

    Attributes:
        pattern: searched for in the message.
        code: what it means.
        scope: whose fault it then is, whatever the helper thought; None to leave that.
        unreachable: whether no server answered.
    """

    pattern: re.Pattern[str]
    code: FailureCode
    scope: Scope | None = None
    unreachable: bool = False

    @classmethod
    def of(cls, pattern: str, code: FailureCode, scope: Scope | None = None, *, unreachable: bool = False) -> Reading:
        """One whose pattern sees each line of a message, and reaches over them."""
        return cls(re.compile(pattern, re.DOTALL | re.MULTILINE), code, scope, unreachable)


def judge(fault: Fault, readings: Sequence[Reading] = ()) -> AttemptFailure:
    """The failure behind a fault.

    Args:
        fault: as the helper gives it.
        readings: for messages without code and error number; the first that fits counts.
    """
    scope = Scope(fault.scope)
    message = fault.message[:_LONGEST_MESSAGE]
    if fault.code is not None and fault.code in FailureCode.__members__:
        return AttemptFailure(scope, FailureCode(fault.code), message, fault.retry_after_s, fault.unreachable)
    code = code_for_errno(fault.errno)
    if code is not FailureCode.UNKNOWN:
        unreachable = fault.unreachable or shows_no_server(fault.errno)
        return AttemptFailure(scope, code, message, fault.retry_after_s, unreachable)
    for reading in readings:
        if reading.pattern.search(message):
            return AttemptFailure(
                reading.scope or scope, reading.code, message, unreachable=fault.unreachable or reading.unreachable
            )
    return AttemptFailure(scope, FailureCode.UNKNOWN, message)
