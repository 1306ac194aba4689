"""Copies of a whole database: a consistent one of a database in use, and a new database of a copy.

SQLite copies itself in one read transaction of its write-ahead log, which delays no writer. PostgreSQL is copied by
pg_dump, with the snapshot of the transaction that counts its jobs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import sqlalchemy as sa
from attrs import frozen
from sqlalchemy.engine import URL, make_url

from pdm.workqueue.store.engines import create_sqlite_file, make_engines
from pdm.workqueue.store.errors import DatabaseUnusableError
from pdm.workqueue.store.records import catalogue, jobs, mail_subscriptions, webhooks, workers
from pdm.workqueue.store.schema_revisions import known_revisions, migrate, revision
from pdm.workqueue.WorkqueueDB import Base

#: Rows that are written at once.
_ROWS = 1000
#: Ids of a table that a restored database leaves out: those that were given since the backup are never given again.
_GAP = 1000
_GAPS: Mapping[str, int] = {"events": 1_000_000}
#: Numbers of sites that it leaves out.
_SITE_GAP = 100
_DUMP_NAME = "pdm-backup"


class BackupError(Exception):
    """A database cannot be copied or restored; the text is one line that says why and what to do."""


@frozen
class DatabaseSummary:
    """What a copy has.

    Attributes:
        kind: ``sqlite`` or ``postgresql``.
        schema: its revision.
        jobs: how many it has.
        ended: how many of these have ended.
    """

    kind: str
    schema: str
    jobs: int
    ended: int


def database_kind(url: str) -> str:
    """``sqlite`` or ``postgresql``."""
    return make_url(url).get_backend_name()


def sqlite_path(url: str) -> Path:
    """The file of an SQLite database."""
    return Path(str(make_url(url).database))


def copy_database(url: str, target: Path) -> DatabaseSummary:
    """Copy a database that may be in use to a file: an SQLite database, or a dump of PostgreSQL.

    Raises:
        BackupError: it is empty, cannot be read or copied, or the copy is damaged.
        DatabaseUnusableError: it is of a newer version, or of another program.
    """
    if database_kind(url) == "sqlite":
        return _copy_sqlite(sqlite_path(url), target)
    return _dump(make_url(url), target)


def _copy_sqlite(source: Path, target: Path) -> DatabaseSummary:
    if not source.exists():
        raise BackupError(f"there is no database {source}: the daemon makes it at its first start")
    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    try:
        with (
            contextlib.closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=rw", uri=True)) as original,
            contextlib.closing(sqlite3.connect(target)) as copy,
        ):
            # All pages at once: with several steps, each commit of the daemon would begin the copy anew.
            original.backup(copy)
            # A file of its own, without a write-ahead log beside it.
            copy.execute("PRAGMA journal_mode=delete")
            (state,) = copy.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as error:
        raise BackupError(f"the database {source} cannot be copied: {error}") from error
    if state != "ok":
        raise BackupError(f"the database {source} is damaged: {' '.join(state.split())}")
    engine = sa.create_engine(URL.create("sqlite", database=str(target)), poolclass=sa.NullPool)
    with engine.connect() as connection:
        return _summary(connection)


def _summary(connection: sa.Connection) -> DatabaseSummary:
    schema = revision(connection)
    if schema is None:
        raise BackupError("the database has no tables: the daemon makes them at its first start")
    total, ended = connection.execute(sa.select(sa.func.count(), sa.func.count(jobs.c.finished_at))).one()
    return DatabaseSummary(connection.dialect.name, schema, total, ended)


def _dump(url: URL, target: Path) -> DatabaseSummary:
    engines = make_engines(url.render_as_string(hide_password=False), 1)
    try:
        with engines.reader.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
            # pg_dump may take longer than any of the service's timeouts.
            connection.exec_driver_sql(
                f"SET application_name = '{_DUMP_NAME}'; SET statement_timeout = 0;"
                " SET idle_in_transaction_session_timeout = 0"
            )
            summary = _summary(connection)
            snapshot = connection.scalar(sa.select(sa.func.pg_export_snapshot()))
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            _run_client(url, "pg_dump", ["--format=custom", f"--snapshot={snapshot}", f"--file={target}"])
            return summary
    except sa.exc.DBAPIError as error:
        raise BackupError(f"the database cannot be read: {_line(error.orig)}") from error
    finally:
        engines.dispose()


def _run_client(url: URL, program: str, arguments: Sequence[str]) -> None:
    """Run a program of PostgreSQL; the password is in its environment, not on its command line."""
    path = shutil.which(program)
    if path is None:
        raise BackupError(
            f"there is no {program} on the PATH: install PostgreSQL's client programs (postgresql-client)"
        )
    database = url.set(drivername="postgresql", password=None).render_as_string(hide_password=False)
    environment = {**os.environ, "PGAPPNAME": _DUMP_NAME, **({"PGPASSWORD": str(url.password)} if url.password else {})}
    done = subprocess.run(
        [path, "--no-password", *arguments, f"--dbname={database}"],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BackupError(f"{program} failed: {_line(done.stderr)[:500] or f'exit status {done.returncode}'}")


def restore_database(copy: Path, kind: str, url: str, scratch: Path) -> None:
    """Make a new database of a copy, bring it to the schema of this version, and prepare it for a daemon.

    Args:
        kind: of the copy; an SQLite copy can be restored into PostgreSQL, not the reverse.
        url: of a database that has no tables, or of a file that does not exist.
        scratch: directory for temporary files, as large as the copy.

    Raises:
        BackupError: the target has content, or the copy cannot be restored into it.
        DatabaseUnusableError: the target cannot be opened, or the copy is of a newer version.
    """
    target = make_url(url)
    if target.get_backend_name() == "sqlite":
        if kind != "sqlite":
            raise BackupError("a dump of PostgreSQL can only be restored into PostgreSQL: name a database")
        path = Path(str(target.database))
        if path.exists():
            raise BackupError(f"{path} exists already: nothing is overwritten")
        _copy_file(copy, path)
        _prepare(url)
        return
    _require_empty(url)
    if kind == "postgresql":
        _run_client(
            target, "pg_restore", ["--no-owner", "--no-acl", "--exit-on-error", "--single-transaction", str(copy)]
        )
    else:
        _transfer(copy, url, scratch)
    _prepare(url)


def worker_names(copy: Path) -> list[str]:
    """Names of the daemons that have worked on an SQLite database, of a copy of it."""
    with contextlib.closing(sqlite3.connect(f"{copy.absolute().as_uri()}?mode=ro", uri=True)) as database:
        return [name for (name,) in database.execute("SELECT name FROM workers ORDER BY id")]


def _copy_file(source: Path, target: Path) -> None:
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (
        source.open("rb") as read,
        os.fdopen(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file,
    ):
        shutil.copyfileobj(read, file, 1024**2)
        file.flush()
        os.fsync(file.fileno())


def _require_empty(url: str) -> None:
    engines = make_engines(url, 1)
    try:
        with engines.reader.connect() as connection:
            tables = sa.inspect(connection).get_table_names()
    except sa.exc.DBAPIError as error:
        raise BackupError(f"the database cannot be opened: {_line(error.orig)}") from error
    finally:
        engines.dispose()
    if tables:
        raise BackupError(
            f"the database has tables already ({tables[0]}, …): name an empty one, nothing is overwritten"
        )


def _prepare(url: str) -> None:
    """What a restored database needs before a daemon works with it.

    Ids that were given after the backup are left out: a client that knows such a job must not find another one under
    its number, and receivers of webhooks must not take new events for repeated ones.
    """
    engines = make_engines(url, 1)
    try:
        with engines.writer.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
            if revision(connection) not in known_revisions():
                raise BackupError("the backup has no tables of the service")
            migrate(connection)
            for table in Base.metadata.sorted_tables:
                if table.dialect_options["sqlite"]["autoincrement"]:
                    _leave_gap(connection, table, _GAPS.get(table.name, _GAP))
            connection.execute(
                sa.update(catalogue).values(
                    version=catalogue.c.version + 1, last_site=catalogue.c.last_site + _SITE_GAP
                )
            )
            # No daemon works with this copy.
            connection.execute(sa.update(workers).values(lease_until=None))
            for leased in (webhooks, mail_subscriptions):
                connection.execute(sa.update(leased).values(leased_by=None, leased_until=None))
    except sa.exc.DBAPIError as error:
        raise BackupError(f"the restored database cannot be prepared: {_line(error.orig)}") from error
    finally:
        engines.dispose()


def _leave_gap(connection: sa.Connection, table: sa.Table, gap: int) -> None:
    last = connection.scalar(sa.select(sa.func.max(table.c.id))) or 0
    if connection.dialect.name == "postgresql":
        connection.execute(_SET_SEQUENCE, {"name": table.name, "last": last, "gap": gap})
        return
    sequence = sa.table("sqlite_sequence", sa.column("name"), sa.column("seq"))
    given = connection.scalar(sa.select(sequence.c.seq).where(sequence.c.name == table.name))
    if given is None:
        connection.execute(sa.insert(sequence).values(name=table.name, seq=last + gap))
    else:
        connection.execute(sa.update(sequence).where(sequence.c.name == table.name).values(seq=max(given, last) + gap))


_SET_SEQUENCE = sa.text("""
    SELECT setval(
        pg_get_serial_sequence(:name, 'id'),
        GREATEST(:last, COALESCE(pg_sequence_last_value(pg_get_serial_sequence(:name, 'id')::regclass), 0)) + :gap
    )
""")


def _transfer(copy: Path, url: str, scratch: Path) -> None:
    """Copy the rows of an SQLite database to PostgreSQL, in one transaction."""
    work = scratch / "transfer.sqlite"
    _copy_file(copy, work)
    source = make_engines(URL.create("sqlite", database=str(work)).render_as_string(), 1)
    target = make_engines(url, 1)
    try:
        with source.writer.begin() as read:
            migrate(read)
        with target.writer.begin() as write:
            migrate(write)
        with source.reader.connect() as read, target.writer.begin() as write:
            write.exec_driver_sql("SET LOCAL statement_timeout = 0")
            _transfer_rows(read, write)
    except sa.exc.SQLAlchemyError as error:
        reason = error.orig if isinstance(error, sa.exc.DBAPIError) else error
        raise BackupError(f"the rows cannot be transferred: {_line(reason)[:500]}") from error
    finally:
        source.dispose()
        target.dispose()
        for file in scratch.glob(f"{work.name}*"):
            file.unlink()


def _transfer_rows(read: sa.Connection, write: sa.Connection) -> None:
    tables = Base.metadata.sorted_tables
    for table in reversed(tables):
        # Migrations have inserted some rows.
        write.execute(sa.delete(table))
    for table in tables:
        rows = read.execution_options(yield_per=_ROWS).execute(sa.select(table))
        for part in rows.mappings().partitions(_ROWS):
            write.execute(sa.insert(table), [dict(row) for row in part])
        if table.autoincrement_column is not None:
            last = write.scalar(sa.select(sa.func.max(table.c.id))) or 0
            write.execute(_SET_SEQUENCE, {"name": table.name, "last": last, "gap": 1})


def _line(reason: object) -> str:
    return " ".join(str(reason).split())


def upgrade_database(url: str) -> tuple[str | None, str]:
    """Bring a database to the schema of this version; returns its revision before and after.

    Raises:
        DatabaseUnusableError: it cannot be opened, or is of a newer version.
    """
    engines = make_engines(url, 1)
    try:
        create_sqlite_file(engines.writer)
        with engines.writer.begin() as connection:
            before = revision(connection)
            migrate(connection)
            return before, revision(connection) or ""
    except sa.exc.DBAPIError as error:
        raise DatabaseUnusableError(f"the database cannot be upgraded: {_line(error.orig)}") from error
    finally:
        engines.dispose()


def schema_of(url: str) -> tuple[str | None, str]:
    """The revision of a database, None if it has no tables or no file, and that of this version.

    Raises:
        DatabaseUnusableError: it cannot be opened, or is of a newer version.
    """
    newest = max(known_revisions())
    if database_kind(url) == "sqlite" and not sqlite_path(url).exists():
        return None, newest
    engines = make_engines(url, 1)
    try:
        with engines.reader.connect() as connection:
            return revision(connection), newest
    except sa.exc.DBAPIError as error:
        raise DatabaseUnusableError(f"the database cannot be opened: {_line(error.orig)}") from error
    finally:
        engines.dispose()
