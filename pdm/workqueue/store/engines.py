"""Engines for the two databases: what differs between SQLite and PostgreSQL is here and nowhere else.

SQLite runs with a write-ahead log and ``synchronous=FULL``. With NORMAL a power cut may take back the last commits:
jobs whose registration was answered would be gone, results that were reported would not be. FULL costs one flush of the
disk a commit; `pdm.workqueue.store.lane` puts all work that waits into one commit, so the price is shared.
"""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from attrs import frozen
from sqlalchemy import event
from sqlalchemy.engine import URL, make_url

from pdm.workqueue.store.errors import DatabaseUrlError

_BUSY_TIMEOUT_S = 10
_BUSY_PAUSE_S = 0.01


@frozen
class Engines:
    """Where to write and where to read.

    Attributes:
        writer: for transactions that change something.
        reader: for those that do not; the same engine on PostgreSQL.
        writers: threads that may write at once.
        readers: threads that may read at once.
        together: how many transactions may share one commit.
        shared: whether other daemons may use the database at the same time.
    """

    writer: sa.Engine
    reader: sa.Engine
    writers: int
    readers: int
    together: int
    shared: bool

    def dispose(self) -> None:
        """Close all connections."""
        self.writer.dispose()
        self.reader.dispose()


def make_engines(url: str, threads: int) -> Engines:
    """Engines for a URL; nothing is connected yet.

    Args:
        url: ``sqlite:////folder/file`` or ``postgresql://user:password@host/database``.
        threads: how many threads, and so connections, there may be.

    Raises:
        DatabaseUrlError: it names another database, or an SQLite database without a file.
    """
    try:
        parsed = make_url(url)
    except sa.exc.ArgumentError as error:
        raise DatabaseUrlError("[database] url is not a database URL: write sqlite:////folder/file") from error
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        return _sqlite(parsed, threads)
    if backend == "postgresql":
        return _postgresql(parsed, threads)
    raise DatabaseUrlError(f"[database] url: {backend} is not supported: use sqlite or postgresql")


def _sqlite(url: URL, threads: int) -> Engines:
    if url.database in (None, "", ":memory:"):
        raise DatabaseUrlError("[database] url: SQLite needs a file: write sqlite:////folder/file")
    # SQLite has one writer at a time. One thread that writes waits for nobody; the others read beside it.
    readers = max(threads - 1, 1)
    return Engines(
        _sqlite_engine(url, 1, "BEGIN IMMEDIATE", read_only=False),
        _sqlite_engine(url, readers, "BEGIN", read_only=True),
        writers=1,
        readers=readers,
        together=64,
        shared=False,
    )


def _sqlite_engine(url: URL, connections: int, begin: str, *, read_only: bool) -> sa.Engine:
    engine = sa.create_engine(
        url,
        poolclass=sa.QueuePool,
        pool_size=connections,
        max_overflow=0,
        # A connection may be opened in one thread of the pool and used, later and alone, in another.
        connect_args={"timeout": _BUSY_TIMEOUT_S, "check_same_thread": False},
    )

    # What is read is read once, page by page; what is written is met again: rows and indexes of the jobs at work.
    cache_kib = 16384 if read_only else 65536

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, record: Any) -> None:
        # The driver must not begin transactions behind our back.
        connection.isolation_level = None
        cursor = connection.cursor()
        _write_ahead(cursor)
        for pragma in ("synchronous=full", "foreign_keys=on", f"cache_size=-{cache_kib}"):
            cursor.execute(f"PRAGMA {pragma}")
        if read_only:
            cursor.execute("PRAGMA query_only=on")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin_transaction(connection: sa.Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def _write_ahead(cursor: Any) -> None:
    """Have the file use a write-ahead log; of several connections that are opened on a new file, one switches it over.

    SQLite does not wait for its busy timeout here: who comes second is told at once that the database is locked.
    """
    until = time.monotonic() + _BUSY_TIMEOUT_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=wal")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(_BUSY_PAUSE_S)
        else:
            return


def _postgresql(url: URL, threads: int) -> Engines:
    try:
        engine = sa.create_engine(
            url.set(drivername="postgresql+psycopg"), pool_size=threads, max_overflow=0, pool_pre_ping=True
        )
    except ModuleNotFoundError as error:
        raise DatabaseUrlError(
            "[database] url: PostgreSQL needs its driver: install pdm-workqueue[postgresql]"
        ) from error
    return Engines(engine, engine, writers=threads, readers=threads, together=1, shared=True)


def create_sqlite_file(bind: sa.Engine | sa.Connection) -> None:
    """Make the database file, readable by its owner alone, if it is not there.

    Raises:
        OSError: the folder cannot be written.
    """
    if bind.dialect.name == "sqlite":
        path = Path(str(bind.engine.url.database))
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
