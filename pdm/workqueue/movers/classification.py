"""Classify a fault: by the code of the helper, else by the error number, else by patterns in the error text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from attrs import frozen

from pdm.workqueue.domain.failures import (
    AttemptFailure,
    FailureCode,
    FailureScope,
    code_for_errno,
    is_unreachable_errno,
)
from pdm.workqueue.wire.agent_messages import Fault

_LONGEST_MESSAGE = 2000


@frozen
class ErrorPattern:
    """A text that has a meaning.

    Attributes:
        pattern: searched for in the message.
        code: what it means.
        scope: whose fault it then is, whatever the helper thought; None to leave that.
        unreachable: whether no server answered.
    """

    pattern: re.Pattern[str]
    code: FailureCode
    scope: FailureScope | None = None
    unreachable: bool = False

    @classmethod
    def of(
        cls, pattern: str, code: FailureCode, scope: FailureScope | None = None, *, unreachable: bool = False
    ) -> ErrorPattern:
        """One whose pattern sees each line of a message, and reaches over them."""
        return cls(re.compile(pattern, re.DOTALL | re.MULTILINE), code, scope, unreachable)


def classify(fault: Fault, patterns: Sequence[ErrorPattern] = ()) -> AttemptFailure:
    """The failure behind a fault.

    Args:
        fault: as the helper gives it.
        patterns: for messages without code and error number; the first that fits counts.
    """
    scope = FailureScope(fault.scope)
    message = fault.message[:_LONGEST_MESSAGE]
    if fault.code is not None and fault.code in FailureCode.__members__:
        return AttemptFailure(scope, FailureCode(fault.code), message, fault.retry_after_s, fault.unreachable)
    code = code_for_errno(fault.errno)
    if code is not FailureCode.UNKNOWN:
        unreachable = fault.unreachable or is_unreachable_errno(fault.errno)
        return AttemptFailure(scope, code, message, fault.retry_after_s, unreachable)
    for candidate in patterns:
        if candidate.pattern.search(message):
            return AttemptFailure(
                candidate.scope or scope,
                candidate.code,
                message,
                unreachable=fault.unreachable or candidate.unreachable,
            )
    return AttemptFailure(scope, FailureCode.UNKNOWN, message)
