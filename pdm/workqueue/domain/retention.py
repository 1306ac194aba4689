"""How long what has ended is kept, and what is said of a job that was purged."""

from __future__ import annotations

from datetime import datetime, timedelta

from attrs import frozen

from pdm.workqueue.domain.enums import JobStatus

#: Requests with an ``Idempotency-Key`` may be repeated for this time.
KEYS_KEPT = timedelta(days=7)
#: Credentials are removed so long after they have expired, and delegations that were not completed.
CREDENTIALS_KEPT = timedelta(days=7)
#: A daemon that was not seen for this time is forgotten, once nothing refers to it.
WORKERS_KEPT = timedelta(days=7)
_LONGEST_PATH = 150


@frozen(kw_only=True)
class RetentionPolicy:
    """How long things are kept; None stands for ever.

    Attributes:
        jobs: after their end, with all that belongs to them; at least `KEYS_KEPT`.
        logs: of attempts, after the end of their job; at the latest they are removed with it.
        receipts: after the end of the job. One that is kept for longer than its job is stored before that is purged.
        events: after they were written.
        audit: records of actions.
        summaries: of purged jobs, after they were purged.
    """

    jobs: timedelta | None = None
    logs: timedelta | None = None
    receipts: timedelta | None = None
    events: timedelta | None = None
    audit: timedelta | None = None
    summaries: timedelta | None = None

    @property
    def keeps_receipts(self) -> bool:
        """Whether receipts outlive their jobs."""
        return self.jobs is not None and (self.receipts is None or self.receipts > self.jobs)


@frozen(kw_only=True)
class PurgedJob:
    """What is left of a purged job.

    Attributes:
        done, failed, cancelled: numbers of its elements.
        receipt_pieces: pieces of its stored receipt; 0 for none.
    """

    id: int
    user_id: int
    type: str
    status: JobStatus
    src_siteid: int
    src_filepath: str
    dst_siteid: int | None
    dst_filepath: str | None
    label: str | None
    timestamp: datetime
    finished_at: datetime
    purged_at: datetime
    done: int
    failed: int
    cancelled: int
    bytes_done: int
    receipt_pieces: int

    def summary(self) -> str:
        """One line: what it was, how it ended, and when it was purged."""
        what = f"{self.type} of site {self.src_siteid}, {_cut(self.src_filepath)}"
        if self.dst_filepath is not None:
            what += f", to site {self.dst_siteid or self.src_siteid}, {_cut(self.dst_filepath)}"
        label = "" if self.label is None else f" ({_cut(self.label)})"
        receipt = "; its receipt is kept" if self.receipt_pieces else ""
        return (
            f"job {self.id}{label} ended {self.status.name} on {self.finished_at:%Y-%m-%d} and was purged on"
            f" {self.purged_at:%Y-%m-%d}: {what}; elements: {self.done} done, {self.failed} failed,"
            f" {self.cancelled} cancelled; {self.bytes_done} bytes{receipt}"
        )


def _cut(text: str) -> str:
    line = " ".join(text[: 2 * _LONGEST_PATH].split())
    return line if len(line) <= _LONGEST_PATH else line[: _LONGEST_PATH - 3] + "..."
