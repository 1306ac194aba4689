"""Migrates a database to the schema of this version, with the migrations in the package."""

from __future__ import annotations

import os
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from pdm.workqueue.store.engines import make_engines
from pdm.workqueue.store.errors import DatabaseMissingError, ForeignSchemaError, SchemaTooNewError
from pdm.workqueue.WorkqueueDB import Base

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
    if _revision(connection) != ScriptDirectory.from_config(config()).get_current_head():
        command.upgrade(config(connection), "head")


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
            _revision(connection)
    except sa.exc.DBAPIError as error:
        raise DatabaseMissingError(f"the database {where} cannot be opened: {error.orig}") from error
    finally:
        engines.dispose()


def _revision(connection: sa.Connection) -> str | None:
    """The schema revision of a database, None for an empty one.

    Raises:
        SchemaTooNewError: this version does not know the schema.
        ForeignSchemaError: there are tables, but no record of their version.
    """
    scripts = ScriptDirectory.from_config(config())
    known = {script.revision for script in scripts.walk_revisions()}
    present = MigrationContext.configure(connection).get_current_revision()
    if present is None:
        strangers = sorted(set(sa.inspect(connection).get_table_names()) & set(Base.metadata.tables))
        if strangers:
            raise ForeignSchemaError(
                f"the database has tables of another origin ({', '.join(strangers)}): "
                "point [database] url at an empty database"
            )
    elif present not in known:
        raise SchemaTooNewError(
            f"the database has schema {present}, which this version does not know: "
            "install the version of the service that last used it, or a newer one"
        )
    return present


def config(connection: sa.Connection | None = None) -> Config:
    """Alembic's configuration for the migrations in the package."""
    made = Config()
    made.set_main_option("script_location", "pdm.workqueue.store:migrations")
    made.attributes["connection"] = connection
    return made
