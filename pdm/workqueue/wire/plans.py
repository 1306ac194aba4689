"""What is planned for a copy, in counts, and what may become of it: parts of the job that the service answers."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import msgspec
from msgspec import Meta

SkipCounts = Annotated[
    dict[str, int], Meta(description="How many entries are left out, by code; of one job that has any, not in arrays.")
]


class PlannedView(msgspec.Struct, frozen=True, kw_only=True):
    """What has one action in a plan."""

    files: int
    directories: int
    bytes: Annotated[int, Meta(description="Of the files.")]


class PlanView(msgspec.Struct, frozen=True, kw_only=True):
    """What was planned for the files and directories of a copy."""

    actions: Annotated[
        dict[str, PlannedView],
        Meta(
            description="By action: COPY (nothing is there), OVERWRITE (another file is there), SAME (already there),"
            " DELETE (removed at the destination), MOVED (removed at the source)."
        ),
    ]
    filtered: Annotated[
        int, Meta(description="Entries of the source that filters leave out; what is in them is not counted.")
    ]
    skipped: SkipCounts


class EstimateView(msgspec.Struct, frozen=True, kw_only=True):
    """What a copy still has to move, how long that may take, and what may stop it; null where that is not known."""

    files: Annotated[int, Meta(description="Files and directories that are left to copy, or that a dry run would.")]
    bytes: int
    seconds: Annotated[
        float | None, Meta(description="At the rates of earlier copies: by bytes or files, whichever are slower.")
    ]
    bytes_per_second: float | None
    files_per_second: float | None
    based_on_jobs: Annotated[
        int,
        Meta(description="Copies of the same user between these sites that the rates are of: at most 20 of 14 days."),
    ]
    free_bytes: Annotated[
        int | None, Meta(description="Free at the destination, by quota or file system, when the source was listed.")
    ]
    credential_until: Annotated[datetime | None, Meta(description="When the first of its credentials expires.")]
