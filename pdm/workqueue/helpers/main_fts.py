"""FTS3 helper: has an FTS3 transfer files to temporary names, and proves and renames them with our own clients.

The environment names the credential (``X509_USER_PROXY``), which is delegated to the FTS3, and the trusted authorities
(``X509_CERT_DIR``).
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # When started as a script, sys.path has the directory of the helpers instead of the project's.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from msgspec.structs import replace

from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers import operations
from pdm.workqueue.helpers.channel import ActiveBatch
from pdm.workqueue.helpers.fts.handed_copy import MAX_WORKERS, HandedCopy
from pdm.workqueue.helpers.fts.rest import LONGEST_REQUEST_S, FtsClient, HandedJob, end_transfers
from pdm.workqueue.helpers.main_relay import RelayStorage
from pdm.workqueue.helpers.request_loop import serve
from pdm.workqueue.helpers.storage import StoppedError, StorageError, internal_error
from pdm.workqueue.helpers.threads import WorkerThreads
from pdm.workqueue.wire.agent_requests import CopyRequest, DiscardRequest, ListRequest, PathItem

_ITEMS_PER_WORKER = 16


class _FtsHelper:
    """Works on batches."""

    def __init__(self) -> None:
        self._workers = WorkerThreads(RelayStorage, MAX_WORKERS)
        self._clients: dict[str, FtsClient] = {}

    def carry_out(self, batch: ActiveBatch) -> None:
        request = batch.request
        if isinstance(request, CopyRequest) and request.service is not None:
            HandedCopy(batch, request, self._workers, self._client(request.service.url, request)).carry_out()
        elif isinstance(request, DiscardRequest):
            left = replace(request, items=self._ended(batch, request))
            if left.items:
                operations.carry_out_items(batch, left, self._workers, _ITEMS_PER_WORKER)
        elif not isinstance(request, ListRequest):
            operations.carry_out_items(batch, request, self._workers, _ITEMS_PER_WORKER)
        else:
            batch.failed(request.key, internal_error("this helper lists nothing"))

    def _client(self, url: str, request: CopyRequest | DiscardRequest) -> FtsClient:
        client = self._clients.setdefault(url, FtsClient(url))
        client.timeout_s = min(LONGEST_REQUEST_S, request.limits.stall_s)
        client.resume()
        return client

    def _ended(self, batch: ActiveBatch, request: DiscardRequest) -> list[PathItem]:
        """The files whose transfers have ended at the FTS3, which are removed now; the others fail."""
        handed: dict[HandedJob, list[PathItem]] = {}
        left = []
        for item in request.items:
            job = HandedJob.parse(item.handed)
            if job is None:
                left.append(item)
            else:
                handed.setdefault(job, []).append(item)
        for job, items in handed.items():
            client = self._client(job.url, request)
            batch.on_stop(client.interrupt)
            try:
                if not end_transfers(client, job, {StorageUrl(item.url) for item in items}):
                    raise StorageError(
                        f"job {job.id} of the FTS3 at {job.url} does not end",
                        code=FailureCode.BUSY,
                        scope=FailureScope.SERVICE,
                    )
                left += items
            except StoppedError:
                for item in items:
                    batch.cancelled(item.key)
            except StorageError as error:
                for item in items:
                    batch.failed(item.key, error)
        return left


def main() -> None:
    """Serve until the requests end."""
    helper = _FtsHelper()
    serve("FTS3 by its REST API", helper.carry_out)


if __name__ == "__main__":
    main()
