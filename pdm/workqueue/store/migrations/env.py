"""Run by alembic: migrates over the connection that `pdm.workqueue.store.engines` gives, in its transaction."""

from __future__ import annotations

from alembic import context

from pdm.workqueue.WorkqueueDB import Base

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    # SQLite cannot alter a table: alembic copies it.
    render_as_batch=connection.dialect.name == "sqlite",
)
context.run_migrations()
