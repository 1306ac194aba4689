"""The GridFTP helper: third-party transfers, checksums and listings over kept sessions of the Globus client library.

Its environment tells the credential (``X509_USER_PROXY``) and the trusted authorities (``X509_CERT_DIR``).
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Started by its path: the folder of the helpers must not be on the path, the project must.
    sys.path[0] = str(Path(__file__).resolve().parents[4])

from pdm.workqueue.agents.helpers import requests
from pdm.workqueue.agents.helpers.channel import Batch, serve
from pdm.workqueue.agents.helpers.globus import Globus
from pdm.workqueue.agents.helpers.globus_library import PACKAGE, GlobusError
from pdm.workqueue.agents.helpers.gridftp_storage import GridFtpStorage
from pdm.workqueue.agents.helpers.lanes import Lanes
from pdm.workqueue.agents.helpers.storage import StorageError

_MOST_LANES = 4
#: From so many items on, one more lane: a login costs as much as a hundred small files.
_ITEMS_A_LANE = 100


class _Agent:
    """Carries out batches."""

    def __init__(self, globus: Globus) -> None:
        self._globus = globus
        self._storages: list[GridFtpStorage] = []
        self._lanes = Lanes(self._opened, _MOST_LANES)

    def _opened(self) -> GridFtpStorage:
        storage = GridFtpStorage(self._globus)
        self._storages.append(storage)
        return storage

    def carry_out(self, batch: Batch) -> None:
        self._globus.destroy_buried()
        try:
            requests.carry_out(batch, self._lanes, _MOST_LANES, _ITEMS_A_LANE)
        finally:
            if self._globus.abandoned:
                self._cut()

    def _cut(self) -> None:
        """Cut the connections of handles that were left to themselves; the others make new ones."""
        self._globus.abandoned = False
        self._globus.cut()
        for storage in self._storages:
            storage.drop()


def main() -> None:
    """Serve until the requests end."""
    try:
        agent = _Agent(Globus())
    except (OSError, GlobusError) as error:
        why = f"the Globus client library cannot be used ({error}): install the package {PACKAGE}"

        def refuse(batch: Batch) -> None:
            for key in batch.open_keys():
                batch.failed(key, StorageError(why, code="INTERNAL", scope="service"))

        serve(why, refuse)
    else:
        serve("libglobus_ftp_client.so.2", agent.carry_out)


if __name__ == "__main__":
    main()
