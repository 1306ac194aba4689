"""Copies whose bytes an FTS3 transfers: checked before, handed over in bulk, polled in bulk, proven afterwards.

The FTS3 gets temporary names as destinations. Its word FINISHED only begins our own proof, after which our own client
renames the file: whatever the FTS3 does, nothing is at the final name that is not proven.

A job of the FTS3 has an id that follows from its ``sid``, and the daemon stores both before the job is submitted. So
each file is in one job, whatever crashes when: the next attempt asks for the stored job, and continues with the file if
that job has it. If there is no such job, the rest is submitted with the same ``sid``: of that request and of one that
arrives late, the FTS3 accepts one.
"""

from __future__ import annotations

import errno
import hashlib
import threading
import time
from collections.abc import Collection, Iterable, Sequence

from msgspec.structs import replace

from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.channel import ActiveBatch
from pdm.workqueue.helpers.copying import FileCopier, FileCopy, PendingCopy
from pdm.workqueue.helpers.fts.file_groups import FileGroups, groups
from pdm.workqueue.helpers.fts.file_states import FileStates, error_of
from pdm.workqueue.helpers.fts.patience import PatientClient
from pdm.workqueue.helpers.fts.rest import (
    FINISHED,
    FtsClient,
    HandedFile,
    HandedJob,
    JobExistsError,
    NewFile,
    RefusedError,
    cancel_files,
    job_id,
)
from pdm.workqueue.helpers.storage import StoppedError, Storage, StorageError
from pdm.workqueue.helpers.threads import WorkerThreads, may_begin
from pdm.workqueue.wire.agent_requests import CopyItem, CopyRequest, TransferService

MAX_WORKERS = 4
#: A login at a GridFTP server costs as much as a hundred small files.
_ITEMS_PER_WORKER = 50
#: Files of one job.
_MOST_FILES = 1000
#: A summary is written at least so often: an agent that is silent is killed.
_SUMMARY_S = 60.0
#: First pause between two polls, longer by so much for each file; grows by half each time that nothing has changed.
_FIRST_POLL_S, _POLL_S_EACH, _GROWTH = 0.2, 0.002, 1.5


class HandedCopy:
    """Carries out one copy request.

    Args:
        batch: of the request.
        request: the request.
        workers: threads that check and verify files.
        client: of the FTS3.
    """

    def __init__(self, batch: ActiveBatch, request: CopyRequest, workers: WorkerThreads, client: FtsClient) -> None:
        if request.service is None:
            raise ValueError("a copy without an FTS3")
        self._service: TransferService = request.service
        self._batch = batch
        self._limits = request.limits
        self._workers = workers
        self._client = client
        self._patient = PatientClient(client, batch, request.limits.stall_s)
        self._copier = FileCopier(batch, request, request.items)
        self._groups = FileGroups(batch, request, self._copier)
        self._guard = threading.Lock()
        #: Files that were checked, and have no outcome.
        self._pending: dict[int, PendingCopy] = {}
        #: Job → temporary name → key, of pending files.
        self._jobs: dict[HandedJob, dict[str, int]] = {}
        #: By key, each with the temporary name that the FTS3 has.
        self._items = {item.key: item for item in request.items}
        self._states = FileStates(batch, client.url, min(_SUMMARY_S, request.limits.stall_s / 2))
        #: Keys of items that continue what an earlier attempt has handed over.
        self._attached: set[int] = set()
        self._changed_at = time.monotonic()

    def carry_out(self) -> None:
        """Copy all items; each has its outcome afterwards."""
        self._batch.ends_items(lambda keys: self._patient.wake())
        self._batch.on_stop(self._client.interrupt)
        self._batch.on_stop(self._patient.wake)
        try:
            self._patient.log_in()
            fresh, again = self._take_up()
            self._begin()
            for job, keys in again.items():
                fresh += self._submit_again(job, keys)
            self._submit(fresh)
            self._await_all()
        except StoppedError:
            self._end_all()
        except StorageError as error:
            for key in self._batch.open_keys():
                # What was handed over stays at the FTS3, for the next attempt.
                self._batch.failed(key, error, leftover=True)

    def _log_to(self, keys: Iterable[int], text: str) -> None:
        for key in keys:
            self._batch.log(key, text)

    # -- what earlier attempts have handed over

    def _take_up(self) -> tuple[list[int], dict[HandedJob, list[int]]]:
        """Find what became of items that were handed over; sets the temporary names of those that continue.

        Returns:
            Keys of items to submit in a new job; and by job, keys of items whose job does not exist.
        """
        handed: dict[HandedJob, list[CopyItem]] = {}
        fresh: list[int] = []
        for item in self._items.values():
            job = HandedJob.parse(item.handed)
            if job is None or job.url != self._client.url:
                fresh.append(item.key)
            else:
                handed.setdefault(job, []).append(item)
        again: dict[HandedJob, list[int]] = {}
        for job, items in handed.items():
            if not self._batch.stopped:
                files = self._patient.ask(lambda job=job: self._client.files(job.id))  # type: ignore[misc]
            if files is None:
                # Of another VO, the same `sid` would be another job.
                known = job_id(self._patient.identity, job.sid) == job.id
                keys = [item.key for item in items]
                if known:
                    again[job] = keys
                else:
                    fresh += keys
                self._log_to(keys, f"the FTS3 has no job {job.id}: it was not submitted, or is forgotten")
            else:
                fresh += self._attach(job, [item.key for item in items], files)
        return fresh, again

    def _attach(self, job: HandedJob, keys: Iterable[int], files: Sequence[HandedFile]) -> list[int]:
        """Continue with the files of a job; returns keys of items that it does not have, or that it has given up."""
        by_name = {file.dest_surl: file for file in files}
        left = []
        for key in keys:
            item = self._items[key]
            name = next((name for name in (item.temporary, *item.stale) if name in by_name), None)
            file = None if name is None else by_name[name]
            if name is None or file is None or (file.is_final and file.file_state != FINISHED):
                what = "does not have this file" if file is None else f"has given it up: {file.file_state}"
                self._batch.log(key, f"job {job.id} of the FTS3 {what}")
                left.append(key)
                continue
            others = [other for other in (item.temporary, *item.stale) if other != name]
            self._items[key] = replace(item, temporary=name, stale=others)
            self._jobs.setdefault(job, {})[name] = key
            self._attached.add(key)
            self._states.begin(key, file)
            self._batch.log(key, f"continues with job {job.id} of the FTS3, file {file.file_id}: {file.file_state}")
            if key in self._pending:
                self._doubt(key)
        return left

    def _doubt(self, key: int) -> None:
        """The source may have been written to since an earlier attempt looked at it: compare the bytes."""
        item = self._pending[key].item._replace(temporary=StorageUrl(self._items[key].temporary))
        self._pending[key] = self._pending[key]._replace(item=item, doubted=True)

    # -- before the transfer

    def _begin(self) -> None:
        """Check both ends of all items; those that need no transfer have their outcome."""
        items = list(self._items.values())
        count = 1 + len(items) // _ITEMS_PER_WORKER
        self._workers.share_groups(self._batch, list(groups(items)), count, self._begin_group, self._begin_one)
        if self._batch.stopped:
            raise StoppedError
        # The transfer of a file that is at its destination meanwhile is not needed.
        self._drop([key for key in self._attached if key not in self._pending])

    def _begin_group(self, storage: Storage, items: Sequence[CopyItem]) -> Sequence[CopyItem]:
        # What is at the FTS3 already is compared byte by byte.
        begun = self._groups.begin(storage, [item for item in items if item.key not in self._attached])
        with self._guard:
            self._pending |= begun
        opened = set(self._batch.open_keys()).difference(begun)
        return [item for item in items if item.key in opened]

    def _begin_one(self, storage: Storage, item: CopyItem) -> None:
        pending = self._copier.begin(storage, FileCopy.of(item)) if may_begin(self._batch, item.key) else None
        if pending is not None:
            with self._guard:
                self._pending[item.key] = pending
                if item.key in self._attached:
                    self._doubt(item.key)

    # -- handing over

    def _submit(self, keys: Collection[int]) -> None:
        """Submit items as new jobs."""
        left = [key for key in keys if key in self._pending]
        for at in range(0, len(left), _MOST_FILES):
            self._submit_new(left[at : at + _MOST_FILES])

    def _submit_new(self, keys: list[int]) -> None:
        keys = self._not_ended(keys)
        if not keys:
            return
        names = sorted(str(self._pending[key].item.temporary) for key in keys)
        # The names have the uids of the jobs, and the numbers of elements and attempts.
        sid = hashlib.sha256("\n".join(names).encode()).hexdigest()
        job = HandedJob(self._client.url, job_id(self._patient.identity, sid), sid)
        self._batch.hand_over(keys, str(job), self._limits.stall_s)
        keys = self._not_ended(keys)
        try:
            left = self._post(job, keys) if keys else []
        except RefusedError as error:
            if len(keys) > 1:
                # One file may be the reason.
                half = len(keys) // 2
                self._submit_new(keys[:half])
                self._submit_new(keys[half:])
            else:
                refusal = StorageError(
                    f"the FTS3 at {job.url} refuses the file: {error}",
                    code=FailureCode.UNSUPPORTED,
                    scope=FailureScope.SERVICE,
                )
                self._fail(keys, refusal)
            return
        if left:
            text = f"job {job.id} of the FTS3 at {job.url} does not have the files that were submitted"
            self._fail(left, StorageError(text, code=FailureCode.SERVER_ERROR, scope=FailureScope.TRANSFER))

    def _submit_again(self, job: HandedJob, keys: Collection[int]) -> list[int]:
        """Submit items whose job does not exist; returns keys of those that need a new job."""
        left = self._not_ended(key for key in keys if key in self._pending)
        if not left:
            return []
        try:
            return self._post(job, left)
        except RefusedError as error:
            self._log_to(left, f"the FTS3 refuses job {job.id}: {error}")
            return left

    def _post(self, job: HandedJob, keys: Sequence[int]) -> list[int]:
        """Submit a job; if it exists, continue with it. Returns keys of items that it does not have."""
        items = [self._pending[key].item for key in keys]
        files = [NewFile(str(item.source), str(item.temporary), item.size) for item in items]
        try:
            got = self._patient.ask(lambda: self._client.submit(job.sid, files))
        except JobExistsError:
            self._log_to(keys, f"job {job.id} exists at the FTS3 already")
            there = self._patient.ask(lambda: self._client.files(job.id))
            return self._attach(job, keys, there or ())
        if got != job.id:
            self._client.cancel(got)
            text = f"the FTS3 at {job.url} has given a job the id {got} instead of {job.id}"
            raise StorageError(text, code=FailureCode.UNSUPPORTED, scope=FailureScope.SERVICE)
        self._changed_at = time.monotonic()
        names = self._jobs.setdefault(job, {})
        for key, file in zip(keys, files, strict=True):
            names[file.destination] = key
            self._batch.log(key, f"handed over to {job.url}, job {job.id}, as {file.destination}")
        return []

    def _not_ended(self, keys: Iterable[int]) -> list[int]:
        """The items that were not cancelled; reports the others."""
        kept = []
        for key in keys:
            if self._batch.is_ended(key):
                self._pending.pop(key, None)
                self._batch.cancelled(key, leftover=True)
            else:
                kept.append(key)
        return kept

    # -- during the transfer

    def _await_all(self) -> None:
        pause_s = _FIRST_POLL_S
        while self._pending:
            pause_s = min(pause_s, self._service.poll_s)
            self._patient.sleep(pause_s)
            self._end_cancelled()
            pause_s *= _GROWTH
            self._patient.keep_logged_in()
            if self._poll():
                # Each answer has all files of the job, and what has arrived is proven in groups.
                pause_s = _FIRST_POLL_S + _POLL_S_EACH * len(self._pending)
            elif time.monotonic() - self._changed_at > self._service.patience_s:
                self._give_up_all()
            self._states.summarize(list(self._pending))

    def _poll(self) -> bool:
        """Ask for the states of all files, and prove those that have arrived; returns whether any has changed."""
        changed = False
        final: list[CopyItem] = []
        for job, names in list(self._jobs.items()):
            if not names:
                del self._jobs[job]
                continue
            files = self._patient.ask(lambda job=job: self._client.files(job.id))  # type: ignore[misc]
            unseen = dict(names)
            for file in files or ():
                key = unseen.pop(file.dest_surl, None)
                if key is None or key not in self._pending:
                    continue
                changed |= self._states.note(job, key, file, self._pending[key].reporter)
                if file.is_final:
                    final.append(self._items[key])
            self._note_missing(job, unseen.values())
        if final:
            count = 1 + len(final) // _ITEMS_PER_WORKER
            self._workers.share_groups(self._batch, list(groups(final)), count, self._prove_group, self._conclude)
        if changed:
            self._changed_at = time.monotonic()
        return changed

    def _note_missing(self, job: HandedJob, keys: Iterable[int]) -> None:
        for key in [key for key in keys if key in self._pending]:
            if self._states.is_missing(key):
                text = f"the FTS3 at {job.url} does not know this file of job {job.id} any more"
                self._fail([key], StorageError(text, code=FailureCode.SERVER_ERROR, scope=FailureScope.TRANSFER))

    # -- afterwards

    def _prove_group(self, storage: Storage, items: Sequence[CopyItem]) -> Sequence[CopyItem]:
        keys = [item.key for item in items]
        with self._guard:
            files = [
                self._pending[key]
                for key in keys
                if self._states.of(key).file_state == FINISHED and not self._batch.is_ended(key)
            ]
        self._groups.prove(storage, files)
        opened = set(self._batch.open_keys())
        with self._guard:
            for key in keys:
                if key not in opened:
                    self._take(key)
        return [item for item in items if item.key in opened]

    def _conclude(self, storage: Storage, item: CopyItem) -> None:
        """Prove a file that the FTS3 calls FINISHED, and rename it; clean up after one that it has given up."""
        with self._guard:
            pending, file = self._take(item.key), self._states.of(item.key)
        if self._batch.is_ended(item.key):
            self._copier.give_up(storage, pending, StoppedError())
            return
        if file.file_state != FINISHED:
            self._copier.give_up(storage, pending, error_of(file))
            return
        try:
            storage.size(pending.item.temporary)
        except StorageError as error:
            if error.errno == errno.ENOENT:
                error = StorageError(
                    "the FTS3 says FINISHED, but nothing has arrived",
                    code=FailureCode.CHECKSUM_MISMATCH,
                    scope=FailureScope.TRANSFER,
                )
            self._copier.give_up(storage, pending, error.at(FailureScope.DESTINATION))
        else:
            self._copier.complete(storage, pending, None)

    def _take(self, key: int) -> PendingCopy:
        """A pending file that gets its outcome now."""
        pending = self._pending.pop(key)
        for names in self._jobs.values():
            if names.get(str(pending.item.temporary)) == key:
                del names[str(pending.item.temporary)]
        return pending

    def _fail(self, keys: Iterable[int], error: StorageError) -> None:
        for key in list(keys):
            self._take(key)
            self._batch.failed(key, error, leftover=True)

    def _give_up_all(self) -> None:
        keys = list(self._pending)
        self._drop(keys)
        text = f"its state at the FTS3 at {self._client.url} has not changed for {self._service.patience_s:.0f} s"
        self._fail(keys, StorageError(text, code=FailureCode.TIMEOUT, scope=FailureScope.TRANSFER))

    # -- cancellation

    def _end_cancelled(self) -> None:
        """End the items that were cancelled alone."""
        keys = [key for key in self._pending if self._batch.is_ended(key)]
        if keys:
            if not self._batch.keeps_handed:
                self._drop(keys)
            for key in keys:
                self._take(key)
                self._batch.cancelled(key, leftover=True)

    def _end_all(self) -> None:
        """End the batch: cancel what was handed over, unless it is for the next attempts."""
        self._client.resume()
        if not self._batch.keeps_handed:
            self._drop(self._batch.open_keys())
        for key in self._batch.open_keys():
            self._batch.cancelled(key, leftover=True)

    def _drop(self, keys: Collection[int]) -> None:
        """Cancel files at the FTS3; an FTS3 that does not answer gets the request later, when the files are removed."""
        for dropped, what in cancel_files(self._client, self._jobs, keys):
            self._log_to(dropped, what)
