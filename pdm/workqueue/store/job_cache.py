"""Cache of job records, so that repeated requests for a job do not read the database.

It is exact where this process is the only one that writes the database. Before a commit, the jobs that it changes leave
the cache, so requests in the meantime read the database; after the commit they are cached as they were written, before
any caller learns that the commit is through. A job that was read is cached only if no commit has touched it since the
read began.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from attrs import define, field
from sqlalchemy.orm import Session

from pdm.workqueue.domain.jobs import JobRecord

#: How many jobs are kept, the least recently asked for leave first.
MOST_JOBS = 2048
#: Jobs with longer paths and labels are not kept, so that all together stay below some tens of MiB.
LONGEST_TEXT = 2000

_KEY = "written jobs"


def note_written(session: Session, record: JobRecord) -> None:
    """Say that this transaction has written a job, as it will be once it is committed."""
    session.info.setdefault(_KEY, {})[record.id] = record


def written_jobs(session: Session) -> Mapping[int, JobRecord]:
    """The jobs that a transaction has written, as the last write left them."""
    noted: Mapping[int, JobRecord] = session.info.get(_KEY, {})
    return noted


@define(eq=False)
class JobRead:
    """A read of one job; what it found may be kept if nothing was written meanwhile."""

    record: JobRecord | None = None


@define(eq=False)
class JobCache:
    """Caches jobs. Threads that write call `begin_write` and `end_write`, the reactor's thread the other methods.

    Attributes:
        most: how many; 0 where others write the database too.
    """

    most: int = MOST_JOBS
    _kept: OrderedDict[int, JobRecord] = field(factory=OrderedDict)
    #: Of jobs that are being written: the number of the newest commit that does.
    _being_written: dict[int, int] = field(factory=dict)
    #: Reads under way of which nothing was written yet.
    _loading: dict[int, JobRead] = field(factory=dict)
    _commits: int = 0
    _lock: threading.Lock = field(factory=threading.Lock)

    def get(self, job_id: int) -> JobRecord | None:
        """A job as the database has it, None if that is not known."""
        with self._lock:
            record = self._kept.get(job_id)
            if record is not None:
                self._kept.move_to_end(job_id)
            return record

    @contextmanager
    def loading(self, job_id: int) -> Iterator[JobRead]:
        """Read a job inside, and set what was found; it is kept if it is still true."""
        loading = JobRead()
        with self._lock:
            if self.most and job_id not in self._being_written:
                self._loading[job_id] = loading
        try:
            yield loading
        finally:
            with self._lock:
                if self._loading.get(job_id) is loading:
                    del self._loading[job_id]
                    if loading.record is not None:
                        self._keep(loading.record)

    def begin_write(self, records: Mapping[int, JobRecord]) -> int:
        """Forget jobs, for a commit begins that changes them; returns the commit's number."""
        with self._lock:
            self._commits += 1
            if self.most:
                for job_id in records:
                    self._kept.pop(job_id, None)
                    self._loading.pop(job_id, None)
                    self._being_written[job_id] = self._commits
            return self._commits

    def end_write(self, commit: int, records: Mapping[int, JobRecord], *, committed: bool) -> None:
        """Cache the jobs of a commit again, unless a later commit has begun to change the same job.

        Args:
            commit: its number.
            records: the same as for `begin_write`.
            committed: whether they stand in the database now; else it is asked again.
        """
        with self._lock:
            for job_id, record in records.items():
                if self._being_written.get(job_id) == commit:
                    del self._being_written[job_id]
                    if committed:
                        self._keep(record)

    def _keep(self, record: JobRecord) -> None:
        if len(record.src_filepath) + len(record.dst_filepath or "") + len(record.label or "") > LONGEST_TEXT:
            return
        self._kept[record.id] = record
        self._kept.move_to_end(record.id)
        if len(self._kept) > self.most:
            self._kept.popitem(last=False)
