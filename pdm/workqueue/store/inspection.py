"""What an operator wants to know of a database before a daemon uses it; read without changing anything."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy as sa
from attrs import frozen

from pdm.workqueue.store.engines import make_engines
from pdm.workqueue.store.errors import DatabaseMissingError
from pdm.workqueue.store.records import events, key_checks
from pdm.workqueue.store.schema_revisions import known_revisions, revision


@frozen(kw_only=True)
class DatabaseState:
    """A database that can be opened.

    Attributes:
        server: kind and version.
        schema: its revision; None if it has no tables.
        newest: the revision of this version.
        size: bytes.
        clock_ahead_s: by how much the clock of the database is ahead of this machine's, in seconds. SQLite has none:
            there it is the time of the newest event, if that is in the future; None if the clocks cannot be compared.
        connections: how many the server accepts; None for SQLite.
        key_check: the text that the key of the credentials must open; None if there is none yet.
    """

    server: str
    schema: str | None
    newest: str
    size: int
    clock_ahead_s: float | None
    connections: int | None
    key_check: bytes | None


def inspect_database(url: str) -> DatabaseState | None:
    """The state of a database; None for an SQLite file that does not exist.

    Raises:
        DatabaseUnusableError: it cannot be opened, or is of a newer version or another program.
    """
    engines = make_engines(url, 1)
    is_sqlite = engines.reader.dialect.name == "sqlite"
    if is_sqlite and not Path(str(engines.reader.url.database)).exists():
        return None
    try:
        with engines.reader.connect() as connection:
            schema = revision(connection)
            tables = set(sa.inspect(connection).get_table_names())
            check = None
            if key_checks.name in tables:
                check = connection.scalar(sa.select(key_checks.c.secret))
            return DatabaseState(
                server=f"{'SQLite' if is_sqlite else 'PostgreSQL'} {_version(connection)}",
                schema=schema,
                newest=max(known_revisions()),
                size=_size(connection),
                clock_ahead_s=_clock_of_events(connection, tables) if is_sqlite else _clock(connection),
                connections=None if is_sqlite else int(connection.scalar(sa.text("SHOW max_connections")) or 0),
                key_check=check,
            )
    except sa.exc.DBAPIError as error:
        where = engines.reader.url.render_as_string(hide_password=True)
        raise DatabaseMissingError(f"the database {where} cannot be opened: {error.orig}") from error
    finally:
        engines.dispose()


def _version(connection: sa.Connection) -> str:
    if connection.dialect.name == "sqlite":
        return str(connection.scalar(sa.text("SELECT sqlite_version()")))
    return str(connection.scalar(sa.text("SHOW server_version"))).split(maxsplit=1)[0]


def _size(connection: sa.Connection) -> int:
    if connection.dialect.name == "sqlite":
        pages = connection.scalar(sa.text("PRAGMA page_count")) or 0
        return int(pages) * int(connection.scalar(sa.text("PRAGMA page_size")) or 0)
    return int(connection.scalar(sa.text("SELECT pg_database_size(current_database())")) or 0)


def _clock(connection: sa.Connection) -> float | None:
    before = datetime.now(UTC)
    there: datetime | None = connection.scalar(sa.text("SELECT clock_timestamp()"))
    here = before + (datetime.now(UTC) - before) / 2
    return None if there is None else (there - here).total_seconds()


def _clock_of_events(connection: sa.Connection, tables: set[str]) -> float | None:
    if events.name not in tables:
        return None
    newest = connection.scalar(sa.select(events.c.at).order_by(events.c.id.desc()).limit(1))
    ahead = 0.0 if newest is None else (newest - datetime.now(UTC)).total_seconds()
    return ahead if ahead > 0 else None
