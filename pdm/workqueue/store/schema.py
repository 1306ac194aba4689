"""Brings a database to the schema of this version, with the migrations that are part of the package."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from pdm.workqueue.store.errors import ForeignSchemaError, SchemaTooNewError
from pdm.workqueue.WorkqueueDB import Base

#: Key of the lock under which one of several daemons migrates a PostgreSQL database; any number, always the same.
_MIGRATION_LOCK = 7_236_914_250_118_402


def migrate(connection: sa.Connection) -> None:
    """Create the tables, or bring them up to date, in the connection's transaction.

    Raises:
        SchemaTooNewError: this version does not know the schema.
        ForeignSchemaError: there are tables, but no record of which version made them.
    """
    if connection.dialect.name == "postgresql":
        # A large table takes its time, and so may another daemon that migrates.
        connection.exec_driver_sql("SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0")
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
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
    if present != scripts.get_current_head():
        command.upgrade(config(connection), "head")


def config(connection: sa.Connection | None = None) -> Config:
    """Alembic's configuration for the migrations in the package."""
    made = Config()
    made.set_main_option("script_location", "pdm.workqueue.store:migrations")
    made.attributes["connection"] = connection
    return made
