"""Revisions of the schema: migrate a database, and tell whether this version can use it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pdm.workqueue.store.engines import make_engines
from pdm.workqueue.store.errors import (
    DatabaseMissingError,
    DatabaseUnusableError,
    ForeignSchemaError,
    SchemaTooNewError,
)
from pdm.workqueue.WorkqueueDB import Base

if TYPE_CHECKING:
    from alembic.config import Config


#: Where alembic records the revision of the schema.
_VERSIONS = sa.table("alembic_version", sa.column("version_num"))
_MIGRATIONS = Path(__file__).parent / "migrations" / "versions"
#: Advisory lock: only one of several daemons migrates a PostgreSQL database. Any constant number.
_MIGRATION_LOCK = 7_236_914_250_118_402


def migrate(connection: sa.Connection) -> None:
    """Create or migrate the tables, in the connection's transaction.

    Raises:
        SchemaTooNewError: this version does not know the schema.
        ForeignSchemaError: there are tables, but no record of their version.
    """
    if connection.dialect.name == "postgresql":
        # Migrating a large table may take long, and so may waiting for another daemon that migrates.
        connection.exec_driver_sql("SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0")
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
    if revision(connection) != max(known_revisions()):
        # Alembic with its migrations takes as long to import as SQLAlchemy, and most starts migrate nothing.
        from alembic import command

        command.upgrade(config(connection), "head")


def outdated_schema(connection: sa.Connection) -> str | None:
    """The revision of a schema that is older than this version needs; None if it is current or newer.

    A newer one is that of another daemon, which was upgraded before this one: changes of the schema only add to it.
    """
    present: str | None = connection.scalar(sa.select(_VERSIONS))
    known = known_revisions()
    return present if present is None or (present in known and present != max(known)) else None


def check_schema(session: Session) -> None:
    """Check that this version can work with the schema.

    Raises:
        DatabaseUnusableError: it is older than this version needs, or there is none.
    """
    outdated = outdated_schema(session.connection())
    if outdated is not None:
        raise DatabaseUnusableError(f"the schema of the database is {outdated}, which is older than this version")


def check(url: str) -> None:
    """Check that a daemon can use a database; changes nothing.

    Raises:
        DatabaseUnusableError: the URL is wrong, its driver is missing, the server cannot be reached, or the tables are
            those of a newer version or of another program.
    """
    engines = make_engines(url, 1)
    where = engines.reader.url.render_as_string(hide_password=True)
    path = Path(engines.reader.url.database or "") if engines.reader.dialect.name == "sqlite" else None
    try:
        if path is not None and not path.exists():
            # The daemon creates it at its first start.
            nearest = next(parent for parent in path.parents if parent.exists())
            if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
                raise DatabaseMissingError(f"the database {where} cannot be made: {nearest} cannot be written")
            return
        with engines.reader.connect() as connection:
            revision(connection)
    except sa.exc.DBAPIError as error:
        raise DatabaseMissingError(f"the database {where} cannot be opened: {error.orig}") from error
    finally:
        engines.dispose()


def revision(connection: sa.Connection) -> str | None:
    """The schema revision of a database, None for an empty one.

    Raises:
        SchemaTooNewError: this version does not know the schema.
        ForeignSchemaError: there are tables, but no record of their version.
    """
    tables = set(sa.inspect(connection).get_table_names())
    present = connection.scalar(sa.select(_VERSIONS)) if _VERSIONS.name in tables else None
    if present is None:
        strangers = sorted(tables & set(Base.metadata.tables))
        if strangers:
            raise ForeignSchemaError(
                f"the database has tables of another origin ({', '.join(strangers)}): "
                "point [database] url at an empty database"
            )
    elif present not in known_revisions():
        raise SchemaTooNewError(
            f"the database has schema {present}, which this version does not know: "
            "install the version of the service that last used it, or a newer one"
        )
    return present


def known_revisions() -> set[str]:
    """The revisions that this version knows: each migration has the name of its file, and the newest sorts last."""
    return {path.stem for path in _MIGRATIONS.glob("[0-9]*.py")}


def config(connection: sa.Connection | None = None) -> Config:
    """Alembic's configuration for the migrations in the package."""
    from alembic.config import Config

    made = Config()
    made.set_main_option("script_location", "pdm.workqueue.store:migrations")
    made.attributes["connection"] = connection
    return made
