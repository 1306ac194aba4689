"""Database engines. All differences between SQLite and PostgreSQL connections are in this module.

SQLite runs with a write-ahead log and ``synchronous=FULL``. With NORMAL a power failure may undo the last commits:
registered jobs would be lost, stored results would be repeated. FULL costs one disk flush per commit;
`pdm.workqueue.store.transaction_threads` puts all queued calls into one commit, so they share the cost.

PostgreSQL is reached over a network, where any session may hang, ours or another daemon's. Each wait has a timeout:
`DatabaseTimeouts`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from attrs import evolve, frozen
from sqlalchemy import event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.orm import Session

from pdm.workqueue.store.errors import (
    DatabaseFileGoneError,
    DatabaseMissingError,
    DatabaseUrlError,
)

if TYPE_CHECKING:
    pass

_BUSY_TIMEOUT_S = 5
_BUSY_PAUSE_S = 0.01
#: TCP keepalive: seconds between probes, and how many may remain unanswered.
_PROBE_EVERY_S, _MOST_PROBES = 5, 2
#: The least that libpq accepts as connect_timeout, in seconds.
_LEAST_CONNECT_S = 2
#: Name of our sessions on PostgreSQL, in pg_stat_activity.
APPLICATION_NAME = "pdm-workqueue"
#: Option of a statement that PostgreSQL plans for the values of each execution: the driver does not prepare it.
PLANNED_EACH_TIME = "planned_each_time"


@frozen
class DatabaseTimeouts:
    """Timeouts of PostgreSQL, in seconds; SQLite needs none of these.

    Attributes:
        connect_s: until a connection is made.
        lock_s: to wait for a row or table that another session has locked.
        statement_s: for one statement.
        idle_in_transaction_s: after which the server ends a session that is idle within a transaction.
        network_s: for sent data that the peer does not acknowledge; then the connection is dead.
        renewal_s: for each of these, where a lease is renewed: of several tries one must succeed before the lease ends.
    """

    connect_s: float = 5.0
    lock_s: float = 10.0
    statement_s: float = 60.0
    idle_in_transaction_s: float = 10.0
    network_s: float = 10.0
    renewal_s: float = 5.0

    @property
    def transaction_s(self) -> float:
        """After this time a transaction hangs, and its connection is cut by the client."""
        return self.statement_s + self.lock_s

    @property
    def of_renewal(self) -> DatabaseTimeouts:
        """Those of the connection that renews leases."""
        longest = self.renewal_s
        return evolve(
            self,
            connect_s=min(self.connect_s, longest),
            lock_s=min(self.lock_s, longest),
            statement_s=min(self.statement_s, longest),
            idle_in_transaction_s=min(self.idle_in_transaction_s, longest),
            network_s=min(self.network_s, longest),
        )


DEFAULT_TIMEOUTS = DatabaseTimeouts()


@frozen(kw_only=True)
class Engines:
    """The engines of a database, and how many threads may use them.

    Attributes:
        reader: for transactions that only read; the same engine as ``writer`` on PostgreSQL.
        lease: for the renewal of leases, which waits for nothing else; the same engine as ``writer`` on SQLite.
        signals: for the connection on which daemons announce changes to each other; None on SQLite.
        together: how many calls may share one commit.
        shared: whether other daemons may use the database at the same time.
    """

    writer: sa.Engine
    reader: sa.Engine
    lease: sa.Engine
    signals: sa.Engine | None
    writers: int
    readers: int
    together: int
    shared: bool
    timeouts: DatabaseTimeouts = DEFAULT_TIMEOUTS

    def dispose(self) -> None:
        """Close all connections."""
        for engine in (self.writer, self.reader, self.lease, self.signals):
            if engine is not None:
                engine.dispose()


def make_engines(url: str, threads: int, timeouts: DatabaseTimeouts = DEFAULT_TIMEOUTS) -> Engines:
    """Engines for a URL; nothing is connected yet.

    ``url``: ``sqlite:////directory/file`` or ``postgresql://user:password@host/database``. ``threads``: maximum number
    of threads, and so of connections. ``timeouts``: of PostgreSQL.

    Raises:
        DatabaseUrlError: it names another database, or an SQLite database without a file.
    """
    try:
        parsed = make_url(url)
    except sa.exc.ArgumentError as error:
        raise DatabaseUrlError("[database] url is not a database URL: write sqlite:////directory/file") from error
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        return _sqlite(parsed, threads)
    if backend == "postgresql":
        return _postgresql(parsed, threads, timeouts)
    raise DatabaseUrlError(f"[database] url: {backend} is not supported: use sqlite or postgresql")


def _sqlite(url: URL, threads: int) -> Engines:
    if url.database in (None, "", ":memory:"):
        raise DatabaseUrlError("[database] url: SQLite needs a file: write sqlite:////directory/file")
    # SQLite has one writer at a time: one thread writes and never waits for another, the rest read in parallel.
    readers = max(threads - 1, 1)
    writer = _sqlite_engine(url, 1, "BEGIN IMMEDIATE", read_only=False)
    return Engines(
        writer=writer,
        reader=_sqlite_engine(url, readers, "BEGIN", read_only=True),
        lease=writer,
        signals=None,
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
        # A pooled connection may be opened in one thread and used in another.
        connect_args={"timeout": _BUSY_TIMEOUT_S, "check_same_thread": False},
    )

    # Readers scan pages once; the writer touches the same rows and indexes again: it gets the larger cache.
    cache_kib = 16384 if read_only else 65536
    may_create = not read_only
    path = str(url.database)
    log_path = f"{path}-wal"

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, record: Any) -> None:
        # The driver must not begin transactions implicitly.
        connection.isolation_level = None
        cursor = connection.cursor()
        if not read_only:
            # Of a new file only, and before anything else: free pages can be returned in small steps.
            cursor.execute("PRAGMA auto_vacuum=incremental")
        _write_ahead(cursor)
        for pragma in ("synchronous=full", "foreign_keys=on", f"cache_size=-{cache_kib}"):
            cursor.execute(f"PRAGMA {pragma}")
        if read_only:
            cursor.execute("PRAGMA query_only=on")
        cursor.close()

    @event.listens_for(engine, "do_connect")
    def make_file(*_: Any) -> None:
        nonlocal may_create
        if may_create:
            create_sqlite_file(engine)
            may_create = False
        else:
            # SQLite itself would create an empty one.
            _require_file(path)

    @event.listens_for(engine, "begin")
    def begin_transaction(connection: sa.Connection) -> None:
        connection.exec_driver_sql(begin)
        if not read_only:
            _check_files(connection, path, log_path)

    return engine


def _require_file(path: str) -> None:
    try:
        os.stat(path)  # noqa: PTH116 - like `_check_files`
    except OSError as error:
        raise DatabaseFileGoneError(f"its file {path} cannot be opened: {error.strerror}") from error


def _check_files(connection: sa.Connection, path: str, log_path: str) -> None:
    """Check that the open files of a database are still those of their names.

    Raises:
        DatabaseFileGoneError: one was removed or replaced.
    """
    found = _identity(path), _identity(log_path)
    # At the first transaction both files are open.
    known = connection.info.setdefault("files", found)
    if found != known:
        changed = path if found[0] != known[0] else log_path
        raise DatabaseFileGoneError(
            f"its file {changed} was removed or replaced while it was open: put that file back, or stop the service and"
            " restore a backup"
        )


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)  # noqa: PTH116 - at a third of the price, for every transaction
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _write_ahead(cursor: Any) -> None:
    """Switch the file to a write-ahead log.

    SQLite ignores its busy timeout here: if several connections open a new file at once, all but one get "database is
    locked" immediately, so the statement is retried.
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


def _postgresql(url: URL, threads: int, timeouts: DatabaseTimeouts) -> Engines:
    engine, signals = (_postgresql_engine(url, connections, timeouts) for connections in (threads, 1))
    lease = _postgresql_engine(url, 1, timeouts.of_renewal)
    return Engines(
        writer=engine,
        reader=engine,
        lease=lease,
        signals=signals,
        writers=threads,
        readers=threads,
        together=1,
        shared=True,
        timeouts=timeouts,
    )


def _postgresql_engine(url: URL, connections: int, timeouts: DatabaseTimeouts) -> sa.Engine:
    try:
        engine = sa.create_engine(
            url.set(drivername="postgresql+psycopg"),
            pool_size=connections,
            max_overflow=0,
            pool_timeout=timeouts.lock_s,
            connect_args={
                "connect_timeout": max(round(timeouts.connect_s), _LEAST_CONNECT_S),
                "keepalives": 1,
                "keepalives_idle": _PROBE_EVERY_S,
                "keepalives_interval": _PROBE_EVERY_S,
                "keepalives_count": _MOST_PROBES,
                "tcp_user_timeout": _milliseconds(timeouts.network_s),
            },
        )
    except ModuleNotFoundError as error:
        raise DatabaseUrlError(
            "[database] url: PostgreSQL needs its driver: install pdm-workqueue[postgresql]"
        ) from error
    # By statement, not as connection options: a connection pooler would refuse those.
    session_settings = "; ".join(
        f"SET {name} = {value}"
        for name, value in {
            # `leases.end_suspended_sessions` tells our sessions from those of a backup by this name.
            "application_name": f"'{APPLICATION_NAME}'",
            "lock_timeout": _milliseconds(timeouts.lock_s),
            "statement_timeout": _milliseconds(timeouts.statement_s),
            "idle_in_transaction_session_timeout": _milliseconds(timeouts.idle_in_transaction_s),
            # Server side: the session of a daemon whose machine died must not keep its locks for two hours.
            "tcp_keepalives_idle": _PROBE_EVERY_S,
            "tcp_keepalives_interval": _PROBE_EVERY_S,
            "tcp_keepalives_count": _MOST_PROBES,
            "tcp_user_timeout": _milliseconds(timeouts.network_s),
            # Queries of large tables have an index. The statistics of a table that has just grown are outdated: without
            # this, the results of a young job are stored by reading all elements.
            "enable_seqscan": "off",
            # None of our queries takes as long as compiling it.
            "jit": "off",
        }.items()
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, record: Any) -> None:
        connection.autocommit = True
        connection.execute(session_settings)
        connection.execute(_NOTICE_DEAD_CLIENTS)
        connection.autocommit = False

    @event.listens_for(engine, "do_execute")
    def plan_each_time(cursor: Any, statement: Any, parameters: Any, context: Any) -> bool | None:
        if PLANNED_EACH_TIME not in context.execution_options:
            return None
        cursor.execute(statement, parameters, prepare=False)
        return True

    @event.listens_for(engine, "handle_error")
    def leave_standby(context: sa.engine.ExceptionContext) -> None:
        # The server has become a standby, or this is one: a new connection may find the primary.
        if getattr(context.original_exception, "sqlstate", None) == "25006":
            context.is_disconnect = True

    return engine


#: A session that works or waits for a lock notices that its client is gone, and ends: from PostgreSQL 14 on.
_NOTICE_DEAD_CLIENTS = """
    SELECT set_config(name, '2000', false) FROM pg_settings WHERE name = 'client_connection_check_interval'
"""


def is_reachable(engine: sa.Engine) -> bool:
    """Whether a PostgreSQL server answers a new connection within two seconds; blocks."""
    arguments, options = engine.dialect.create_connect_args(engine.url)
    try:
        engine.dialect.connect(*arguments, **{**options, "connect_timeout": _LEAST_CONNECT_S}).close()
    except Exception as error:
        # Too many connections, a start or a stop: its transactions end by themselves.
        return "FATAL" in str(error)
    return True


def _milliseconds(seconds: float) -> int:
    return max(round(seconds * 1000), 1)


def cut_connection(connection: Any) -> None:
    """Abort the statement of a driver connection from another thread. A closed connection, or None, is left alone."""
    if isinstance(connection, sqlite3.Connection):
        with contextlib.suppress(sqlite3.ProgrammingError):
            connection.interrupt()
        return
    # Shut down, not closed: its thread waits on this descriptor, which must not be reused for another file.
    with contextlib.suppress(Exception), socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
        duplicate.shutdown(socket.SHUT_RDWR)


def create_sqlite_file(bind: sa.Engine | sa.Connection) -> None:
    """Create the database file, readable by its owner alone, if it does not exist.

    Raises:
        OSError: the directory cannot be written.
    """
    if bind.dialect.name == "sqlite":
        path = Path(str(bind.engine.url.database))
        path.parent.mkdir(parents=True, exist_ok=True)
        # An existing file is not opened: closing it would drop all POSIX locks of this process on it.
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))


@contextlib.contextmanager
def transaction(url: str, *, read_only: bool = False) -> Iterator[Session]:
    """A transaction of a command, which blocks; committed at the end.

    Raises:
        DatabaseUnusableError: the URL is wrong, or the database cannot be opened.
    """
    engines = make_engines(url, 1)
    try:
        with Session(engines.reader if read_only else engines.writer) as session, session.begin():
            yield session
    except sa.exc.DBAPIError as error:
        where = engines.writer.url.render_as_string(hide_password=True)
        raise DatabaseMissingError(f"the database {where} cannot be used: {error.orig}") from error
    finally:
        engines.dispose()
