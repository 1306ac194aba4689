"""The FILE helper: the folders that the service itself can see, and only those (``PDM_FILE_ROOTS``)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

if not __package__:
    # Started by its path: the folder of the helpers must not be on the path, the project must.
    sys.path[0] = str(Path(__file__).resolve().parents[4])

from pdm.workqueue.agents.helpers import listing, requests
from pdm.workqueue.agents.helpers.channel import Batch, serve
from pdm.workqueue.agents.helpers.confined import Roots
from pdm.workqueue.agents.helpers.file_storage import FileStorage
from pdm.workqueue.agents.helpers.lanes import Lanes

_MOST_LANES = 4
_ITEMS_A_LANE = 16


def main() -> None:
    """Serve until the requests end."""
    roots = Roots(json.loads(os.environ.get("PDM_FILE_ROOTS", "[]")))
    lanes = Lanes(lambda: FileStorage(roots), _MOST_LANES)

    def carry_out(batch: Batch) -> None:
        if batch.request["op"] == "list":
            listing.carry_out(batch, lambda: listing.list_tree(batch, lanes, 1))
        else:
            requests.carry_out_items(batch, batch.request["items"], lanes, _ITEMS_A_LANE)

    serve("the file system of this machine", carry_out)


if __name__ == "__main__":
    main()
