"""Listings with unreadable directories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import ClaimToken
from pdm.workqueue.domain.planning import Skipped
from pdm.workqueue.execution.listing import ListingIntake
from pdm.workqueue.wire.agent_events import Fault, UnreadableEvent


class Notes:
    """A database that keeps what is noted."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    async def run(self, what: str, function: Any, token: ClaimToken, notes: list[Skipped]) -> bool:
        self.paths += [note.path for note in notes]
        return True


@pytest.mark.parametrize(
    ("codes", "failed", "noted"),
    [
        ([FailureCode.PERMISSION_DENIED], None, ["/top/directory 0"]),
        ([FailureCode.UNKNOWN], None, ["/top/directory 0"]),
        ([FailureCode.CONNECTION], FailureCode.CONNECTION, ["/top/directory 0"]),
        (
            [FailureCode.PERMISSION_DENIED, FailureCode.STALLED],
            FailureCode.STALLED,
            ["/top/directory 0", "/top/directory 1"],
        ),
    ],
)
def test_a_tree_whose_server_went_away_is_not_whole(
    result_of: Callable[[Any], Any], codes: list[FailureCode], failed: FailureCode | None, noted: list[str]
) -> None:
    notes: Any = Notes()
    intake = ListingIntake(
        database=notes,
        add_elements=cast(Any, None),
        token=ClaimToken(1, 0, 1),
        plan=None,
        source="/top",
        known=set(),
        pause=lambda: None,
        resume=lambda: None,
        on_elements=lambda: None,
    )
    for number, code in enumerate(codes):
        failure = AttemptFailure(FailureScope.SOURCE, code, "so it is")
        event = UnreadableEvent(1, 0, f"directory%20{number}", Fault(failure.scope, failure.message))
        intake.unreadable(event, failure)
    outcome = result_of(intake.finish())
    assert (outcome.failure and outcome.failure.code, notes.paths) == (failed, noted)
    assert intake.skipped == len(codes)
