"""What ``pdm`` says of the estimate of a copy."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from pdm.workqueue.cli.plans import announcement, estimate_lines
from tests.client.samples import job_view

NOW = datetime(2026, 3, 2, 11, 4, tzinfo=UTC)
ESTIMATE: dict[str, Any] = {
    "files": 1180,
    "bytes": 3 << 40,
    "seconds": 6600.0,
    "bytes_per_second": 520_000_000.0,
    "files_per_second": 80.0,
    "based_on_jobs": 14,
    "free_bytes": 120 << 40,
    "credential_until": "2026-03-02T12:14:00Z",
}


def test_all_that_is_known() -> None:
    warning = "the proxy expires at 2026-03-02T12:14:00Z, and at the rate of earlier copies this job will take longer"
    assert estimate_lines(job_view(estimate=ESTIMATE, warnings=[warning]), NOW) == [
        "estimate 1 h 50 m at 496 MiB/s, as your last 14 copies of this route;"
        " the destination has 120 TiB free; your credential ends in 1 h 10 m",
        f"warning: {warning}",
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"files": 528_000, "based_on_jobs": 1}, "estimate 1 h 50 m at 80 files/s, as your last copy of this route"),
        (
            {"seconds": None, "bytes_per_second": None, "files_per_second": None, "based_on_jobs": 0},
            "no estimate, for you have not copied between these sites for two weeks",
        ),
        ({"seconds": None, "files": 0, "bytes": 0}, ""),
    ],
)
def test_what_decides_and_what_is_not_known(changes: dict[str, Any], words: str) -> None:
    estimate = {**ESTIMATE, "free_bytes": None, "credential_until": None, **changes}
    assert " ".join(estimate_lines(job_view(estimate=estimate), NOW)) == words


@pytest.mark.parametrize(
    ("seconds", "more", "is_said"),
    [
        (3600.0, {}, True),
        (5.0, {}, False),
        (None, {}, False),
        (5.0, {"warnings": ["no space"]}, True),
        (3600.0, {"status": "DONE", "warnings": ["no space"]}, False),
    ],
)
def test_only_long_copies_and_what_may_stop_one_are_announced(
    seconds: float | None, more: dict[str, Any], is_said: bool
) -> None:
    job = job_view(estimate={**ESTIMATE, "seconds": seconds}, **more)
    assert bool(announcement(job, NOW)) is is_said
    assert not announcement(job_view(warnings=["no space"]), NOW), "nothing is estimated"
