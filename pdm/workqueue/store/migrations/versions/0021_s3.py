"""The protocol S3."""

from __future__ import annotations

from alembic import op

revision = "0021_s3"
down_revision = "0020_logon_failures"
branch_labels = None
depends_on = None

_BEFORE = "protocol IN ('GRIDFTP', 'SSH', 'DUMMY', 'FILE', 'HTTPS', 'XROOT')"
_AFTER = "protocol IN ('GRIDFTP', 'SSH', 'DUMMY', 'FILE', 'HTTPS', 'XROOT', 'S3')"


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.drop_constraint(op.f("ck_jobs_protocol"), "jobs", type_="check")
        op.create_check_constraint(op.f("ck_jobs_protocol"), "jobs", _AFTER)
        return
    # SQLite cannot change a constraint, and making a table of many jobs anew takes long. Its documentation has this way
    # for changes that concern no row (ALTER TABLE, "Making Other Kinds Of Table Schema Changes").
    connection = op.get_bind()
    version = connection.exec_driver_sql("PRAGMA schema_version").scalar_one()
    connection.exec_driver_sql("PRAGMA writable_schema=on")
    changed = connection.exec_driver_sql(
        "UPDATE sqlite_master SET sql = replace(sql, ?, ?) WHERE type = 'table' AND name = 'jobs' AND instr(sql, ?)",
        (_BEFORE, _AFTER, _BEFORE),
    )
    if changed.rowcount != 1:
        raise RuntimeError("the table of jobs has not the constraint that it should have")
    connection.exec_driver_sql(f"PRAGMA schema_version={int(version) + 1}")
    # Also read anew by this connection.
    connection.exec_driver_sql("PRAGMA writable_schema=reset")
