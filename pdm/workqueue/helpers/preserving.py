"""What a copy keeps of its source besides the bytes: modification time and permission bits.

It is set on the temporary file, after the bytes were proven: a crash leaves nothing half done under the final name.
What cannot be set is logged and reported; the copy is done nevertheless.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.storage import FileStat, Storage, StorageError, at_destination, at_source
from pdm.workqueue.wire.agent_requests import PreservedAttribute

#: Attributes in the order in which they are set: without permission to read, a file could not be opened again.
_ORDER: tuple[PreservedAttribute, ...] = ("mtime", "mode")
#: Bits that are set from a source: never setuid, setgid and sticky.
PERMISSIONS = 0o777
UNKNOWN = "the source does not report it"


def values_of(attributes: FileStat, wanted: Collection[PreservedAttribute]) -> Mapping[PreservedAttribute, int | None]:
    """The values to set, in the order in which they are set; None for what the source does not report."""
    mode = None if attributes.mode is None else attributes.mode & PERMISSIONS
    values: Mapping[PreservedAttribute, int | None] = {"mtime": attributes.mtime, "mode": mode}
    return {name: values[name] for name in _ORDER if name in wanted}


class AttributeCopier:
    """Copies attributes of files.

    Args:
        wanted: which.
    """

    def __init__(self, wanted: Collection[PreservedAttribute]) -> None:
        self.wanted = wanted

    def read(self, storage: Storage, source: StorageUrl) -> FileStat:
        """The attributes of a source; to be read before the last check that it is unchanged."""
        return at_source(storage.attributes, source) if self.wanted else FileStat("file")

    def apply(
        self, storage: Storage, url: StorageUrl, attributes: FileStat, log: Callable[[str], None]
    ) -> tuple[PreservedAttribute, ...]:
        """Set the attributes of a file at the destination.

        Args:
            storage: of both ends.
            url: of the file.
            attributes: result of `read`.
            log: called with a line about each attribute that could not be set.

        Returns:
            Names of attributes that could not be set.

        Raises:
            StorageError: the connection was lost, or the server does not answer.
        """
        values = values_of(attributes, self.wanted)
        lacking: dict[PreservedAttribute, str] = {}
        for name, value in values.items():
            if value is None:
                lacking[name] = UNKNOWN
                continue
            try:
                at_destination(storage.set_mtime if name == "mtime" else storage.set_mode, url, value)
            except StorageError as error:
                if error.is_of_server:
                    raise
                lacking[name] = error.message
        if len(lacking) < len(values):
            lacking |= self._ignored(storage, url, {name: values[name] for name in values if name not in lacking})
        for name, why in lacking.items():
            log(f"{name} is not preserved: {why}")
        return tuple(name for name in _ORDER if name in lacking)

    @staticmethod
    def _ignored(
        storage: Storage, url: StorageUrl, values: Mapping[PreservedAttribute, int | None]
    ) -> Mapping[PreservedAttribute, str]:
        """Attributes that the server still shows with another value, with the reason."""
        there = at_destination(storage.attributes, url)
        shown: Mapping[PreservedAttribute, int | None] = {"mtime": there.mtime, "mode": there.mode}
        return {
            name: f"the server accepts {value} and shows {shown[name]}"
            for name, value in values.items()
            if shown[name] not in (None, value)
        }
