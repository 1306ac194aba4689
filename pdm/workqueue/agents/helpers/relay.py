"""The helper of all protocols whose bytes may pass through the service, and of copies between unlike ones.

Each URL goes to the side that its scheme names. A copy within one side is left to that side, which may know of a
shorter way than through here; any other is streamed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

if not __package__:
    # Started by its path: the folder of the helpers must not be on the path, the project must.
    sys.path[0] = str(Path(__file__).resolve().parents[4])

from pdm.workqueue.agents.helpers import listing, requests
from pdm.workqueue.agents.helpers.channel import Batch, serve
from pdm.workqueue.agents.helpers.confined import Roots
from pdm.workqueue.agents.helpers.dav_side import DavSide
from pdm.workqueue.agents.helpers.file_side import FileSide
from pdm.workqueue.agents.helpers.lanes import Lanes
from pdm.workqueue.agents.helpers.sftp_side import SftpSide
from pdm.workqueue.agents.helpers.side import Side, stream
from pdm.workqueue.agents.helpers.storage import Arrived, Entries, Patience, Storage, StorageError, Thing
from pdm.workqueue.agents.helpers.xroot_side import XrootSide

_MOST_LANES = 4
_ITEMS_A_LANE = 16


def _file_side() -> Side:
    return FileSide(Roots(json.loads(os.environ.get("PDM_FILE_ROOTS", "[]"))))


#: Scheme → what makes a side for it.
SIDES: Mapping[str, Callable[[], Side]] = {
    "file": _file_side,
    "sftp": SftpSide,
    "https": DavSide,
    "davs": DavSide,
    "root": XrootSide,
    "roots": XrootSide,
}


class Relay(Storage):
    """One lane: a side for each scheme, made when it is first asked for."""

    def __init__(self, makers: Mapping[str, Callable[[], Side]] = SIDES) -> None:
        self._makers = makers
        self._sides: dict[str, Side] = {}
        self._stopped = False

    def _side(self, url: str) -> Side:
        scheme = url.partition("://")[0]
        side = self._sides.get(scheme)
        if side is None:
            maker = self._makers.get(scheme)
            if maker is None:
                raise StorageError(f"this helper cannot reach {scheme}://", code="UNSUPPORTED", scope="service")
            side = self._sides[scheme] = maker()
            if self._stopped:
                side.interrupt()
        side.patience = self.patience
        return side

    @property
    def patience(self) -> Patience:  # a property here, so that the sides have it too
        return self._patience

    @patience.setter
    def patience(self, patience: Patience) -> None:
        self._patience = patience
        for side in self._sides.values():
            side.patience = patience

    def look(self, url: str) -> Thing | None:
        return self._side(url).look(url)

    def real_path(self, url: str, there: Thing) -> bytes | None:
        return self._side(url).real_path(url, there)

    def entries(self, url: str) -> Entries:
        return self._side(url).entries(url)

    def link_at(self, url: str, *, listed: bool) -> str | None:
        return self._side(url).link_at(url, listed=listed)

    def make_directory(self, url: str) -> None:
        self._side(url).make_directory(url)

    def remove(self, url: str, *, directory: bool) -> None:
        self._side(url).remove(url, directory=directory)

    def rename(self, source: str, destination: str, *, replace: bool) -> None:
        self._side(source).rename(source, destination, replace=replace)

    def transfer(self, source: str, temporary: str, size: int, checksum: bool, arrived: Arrived) -> str | None:
        source_side, side = self._side(source), self._side(temporary)
        if source_side is side:
            return side.transfer(source, temporary, size, checksum, arrived)
        return stream(source_side, source, side, temporary, size, checksum, arrived)

    def size(self, url: str) -> int:
        return self._side(url).size(url)

    def checksum(self, url: str) -> str:
        return self._side(url).checksum(url)

    def interrupt(self) -> None:
        self._stopped = True
        for side in list(self._sides.values()):
            side.interrupt()

    def resume(self) -> None:
        self._stopped = False
        for side in self._sides.values():
            side.resume()

    def settle(self, directory_url: str) -> None:
        self._side(directory_url).settle(directory_url)


def main() -> None:
    """Serve until the requests end."""
    lanes = Lanes(Relay, _MOST_LANES)

    def carry_out(batch: Batch) -> None:
        if batch.request["op"] == "list":
            # Threads that list a local disk only wait for each other.
            most = 1 if batch.request["url"].startswith("file:") else _MOST_LANES
            listing.carry_out(batch, lambda: listing.list_tree(batch, lanes, most))
        else:
            requests.carry_out_items(batch, batch.request["items"], lanes, _ITEMS_A_LANE)

    serve(f"a relay of {', '.join(SIDES)}", carry_out)


if __name__ == "__main__":
    main()
