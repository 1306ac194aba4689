"""Cache of job records, so that repeated requests for a job do not read the database.

It is exact if this process is the only writer. Before a commit, the jobs that it changes leave the cache, so requests
in the meantime read the database; after the commit they are cached as written, before any caller learns of the commit.
A job that was read is cached only if no commit has touched it since the read began.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from attrs import define, field
from sqlalchemy.orm import Session

from pdm.workqueue.domain.jobs import JobRecord

#: Capacity; the least recently used job leaves first.
MOST_JOBS = 2048
#: Jobs with longer paths and labels are not cached, which bounds the memory to some tens of MiB.
LONGEST_TEXT = 2000

_KEY = "written jobs"


def note_written(session: Session, record: JobRecord) -> None:
    """Record that this transaction has written a job; it is cached after the commit."""
    session.info.setdefault(_KEY, {})[record.id] = record


def written_jobs(session: Session) -> Mapping[int, JobRecord]:
    """The jobs that a transaction has written, in their last state."""
    noted: Mapping[int, JobRecord] = session.info.get(_KEY, {})
    return noted


@define(eq=False)
class JobRead:
    """A read of one job; its result is cached if the job was not written meanwhile."""

    record: JobRecord | None = None


@define(eq=False)
class JobCache:
    """Caches jobs. Writer threads call `begin_write` and `end_write`, the reactor thread the other methods.

    Attributes:
        most: capacity; 0 if other processes write the database, too.
    """

    most: int = MOST_JOBS
    _kept: OrderedDict[int, JobRecord] = field(factory=OrderedDict)
    #: Job → number of the latest commit that writes it.
    _being_written: dict[int, int] = field(factory=dict)
    #: Running reads of jobs that no commit has touched since.
    _loading: dict[int, JobRead] = field(factory=dict)
    _commits: int = 0
    _lock: threading.Lock = field(factory=threading.Lock)

    def get(self, job_id: int) -> JobRecord | None:
        """A job as committed, None if it is not cached."""
        with self._lock:
            record = self._kept.get(job_id)
            if record is not None:
                self._kept.move_to_end(job_id)
            return record

    @contextmanager
    def loading(self, job_id: int) -> Iterator[JobRead]:
        """Context of a read; set ``record`` of the result, which is cached if it is still current."""
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
        """Remove the jobs of a commit from the cache; returns the number of the commit."""
        with self._lock:
            self._commits += 1
            if self.most:
                for job_id in records:
                    self._kept.pop(job_id, None)
                    self._loading.pop(job_id, None)
                    self._being_written[job_id] = self._commits
            return self._commits

    def end_write(self, commit: int, records: Mapping[int, JobRecord], *, committed: bool) -> None:
        """Cache the jobs of a commit, unless a later commit has begun to change the same job.

        ``commit``: number from `begin_write`. ``records``: as for `begin_write`. ``committed``: False after a rollback:
        then the next request reads the database.
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
