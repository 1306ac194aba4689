"""Its helper: the channel to the daemon comes with the service."""

from __future__ import annotations

import os

from pdm.workqueue.helpers import listing
from pdm.workqueue.helpers.channel import ActiveBatch, serve
from pdm.workqueue.helpers.storage import FileStat


def main() -> None:
    """Serve until the requests end."""

    def carry_out(batch: ActiveBatch) -> None:
        def work() -> None:
            teller = listing.EntryReporter(batch)
            found = listing.DirectoryEntries(batch, teller, "", deeper=False)
            found.add(os.environb[b"ECHO_NAME"], FileStat("file", 5))
            found.end(0)
            teller.flush()

        listing.report_listing(batch, work)

    serve("an echo", carry_out)


if __name__ == "__main__":
    main()
