"""What the listing of a destination has, by path, in a temporary file."""

from __future__ import annotations

import os
import re
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pdm.workqueue.domain.jobs import ListedEntry
from pdm.workqueue.domain.planning import checked_entries

#: Paths of one look-up; a text for each number of them would have to be prepared.
_PATHS_AT_ONCE = 100
#: Entries that are read at once.
_ROWS_AT_ONCE = 1000
#: KiB of the file that are kept in memory.
_CACHE_KIB = 8 * 1024
#: Names under which files of this service arrive (`pdm.workqueue.movers.mover.temporary_name`).
_TEMPORARY = re.compile(r"(?:.*/)?\.pdm-[^/]*\.part\Z", re.DOTALL)

_SCHEMA = """
    CREATE TABLE entries (
        path BLOB PRIMARY KEY, type TEXT NOT NULL, size INTEGER NOT NULL, mode INTEGER, mtime INTEGER,
        target_is_file INTEGER NOT NULL, target_is_directory INTEGER NOT NULL, is_seen INTEGER NOT NULL
    ) WITHOUT ROWID
"""
_PUT = "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, 0)"
_COLUMNS = "path, type, size, mode, mtime, target_is_file, target_is_directory"
_MARKS = ", ".join("?" * _PATHS_AT_ONCE)
_SEE = f"UPDATE entries SET is_seen = 1 WHERE path IN ({_MARKS}) RETURNING {_COLUMNS}"  # noqa: S608 - constants
_EXTRA = f"SELECT {_COLUMNS} FROM entries WHERE NOT is_seen ORDER BY path"  # noqa: S608 - constants


class DestinationIndex:
    """Entries of a destination. All methods block, and may be called from any thread, one at a time.

    The file has no name once it is open, so that nothing of it is left after a crash.

    Args:
        directory: where the file is.
    """

    def __init__(self, directory: Path) -> None:
        handle, name = tempfile.mkstemp(prefix="destination-", dir=directory)
        os.close(handle)
        try:
            self._connection = sqlite3.connect(name, check_same_thread=False, isolation_level=None)
            for pragma in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{_CACHE_KIB}"):
                self._connection.execute(f"PRAGMA {pragma}")
            self._connection.execute(_SCHEMA)
        finally:
            Path(name).unlink()

    def put(self, entries: Iterable[ListedEntry]) -> None:
        """Add entries, without those under which copies arrive.

        Raises:
            BadListingError: an entry that no honest server gives.
        """
        rows = [
            (_key(one.path), one.type, one.size, one.mode, one.mtime, one.target_is_file, one.target_is_directory)
            for one in checked_entries(entries)
            if _TEMPORARY.match(one.path) is None
        ]
        # One transaction for all of them.
        self._connection.execute("BEGIN")
        self._connection.executemany(_PUT, rows)
        self._connection.execute("COMMIT")

    def at(self, paths: Sequence[str]) -> dict[str, ListedEntry]:
        """The entries at some paths, by path; from now on they are not extra."""
        found: dict[str, ListedEntry] = {}
        keys = iter([_key(path) for path in paths])
        while some := list(islice(keys, _PATHS_AT_ONCE)):
            some += [b"\0"] * (_PATHS_AT_ONCE - len(some))
            found.update((entry.path, entry) for entry in map(_entry, self._connection.execute(_SEE, some)))
        return found

    def extra(self) -> Iterable[ListedEntry]:
        """The entries that `at` has never given, by path; may be gone through again."""
        return _Extra(self._connection)

    def close(self) -> None:
        """Free the space of the file."""
        self._connection.close()


class _Extra:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __iter__(self) -> Iterator[ListedEntry]:
        cursor = self._connection.execute(_EXTRA)
        try:
            while rows := cursor.fetchmany(_ROWS_AT_ONCE):
                yield from map(_entry, rows)
        finally:
            cursor.close()


def _key(path: str) -> bytes:
    return path.encode("utf-8", "surrogatepass")


def _entry(row: Sequence[Any]) -> ListedEntry:
    path, type_, size, mode, mtime, target_is_file, target_is_directory = row
    return ListedEntry(
        path.decode("utf-8", "surrogatepass"),
        type_,
        size,
        mode,
        mtime,
        None,
        bool(target_is_file),
        bool(target_is_directory),
    )
