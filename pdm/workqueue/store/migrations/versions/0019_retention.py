"""Retention: purged jobs, their receipts, and indexes that find what is old and what refers to a job."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0019_retention"
down_revision = "0017_nodes"
branch_labels = None
depends_on = None

#: PostgreSQL vacuums and analyzes a table by default when a fifth of it has changed: of millions of rows, too seldom.
_OFTEN = ", ".join(
    (
        "autovacuum_vacuum_scale_factor = 0.02",
        "autovacuum_vacuum_insert_scale_factor = 0.05",
        "autovacuum_analyze_scale_factor = 0.02",
    )
)
_LARGE = ("jobs", "job_elements", "attempts", "events")


def _number() -> sa.types.TypeEngine[int]:
    return sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _time(name: str, *, nullable: bool = False) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def _partial(name: str, table: str, columns: list[str], condition: str) -> None:
    where = sa.text(condition)
    op.create_index(name, table, columns, sqlite_where=where, postgresql_where=where)


def upgrade() -> None:
    op.add_column("jobs", _time("purged_at", nullable=True))
    _partial("ix_jobs_ended", "jobs", ["finished_at", "id"], "finished_at IS NOT NULL AND purged_at IS NULL")
    _partial("ix_jobs_purged", "jobs", ["id"], "purged_at IS NOT NULL")
    _partial("ix_schedule_runs_job", "schedule_runs", ["job_id"], "job_id IS NOT NULL")
    _partial("ix_webhooks_job", "webhooks", ["job_id"], "job_id IS NOT NULL")
    # Operators list the unfinished or failed jobs of all users: a few of a long history.
    _partial("ix_jobs_status", "jobs", ["status", "id"], "status <> 'DONE'")
    op.create_index("ix_attempts_worker", "attempts", ["worker_id"])
    op.create_index("ix_idempotent_requests_job", "idempotent_requests", ["job_id"])
    op.create_index("ix_deliveries_job", "deliveries", ["job_id"])
    op.create_table(
        "purged_jobs",
        sa.Column("id", _number(), autoincrement=False, nullable=False),
        sa.Column("user_id", _number(), nullable=False),
        sa.Column("type", sa.String(length=16), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("src_siteid", sa.BigInteger(), nullable=False),
        sa.Column("src_filepath", sa.Text(), nullable=False),
        sa.Column("dst_siteid", sa.BigInteger(), nullable=True),
        sa.Column("dst_filepath", sa.Text(), nullable=True),
        sa.Column("label", sa.Text(), nullable=True),
        sa.Column("log_uid", sa.String(length=64), nullable=False),
        _time("timestamp"),
        _time("finished_at"),
        _time("purged_at"),
        sa.Column("num_elements", sa.BigInteger(), nullable=False),
        sa.Column("num_done", sa.BigInteger(), nullable=False),
        sa.Column("num_failed", sa.BigInteger(), nullable=False),
        sa.Column("num_cancelled", sa.BigInteger(), nullable=False),
        sa.Column("bytes_done", sa.BigInteger(), nullable=False),
        sa.Column("receipt_pieces", sa.Integer(), nullable=True),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_purged_jobs_users")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_purged_jobs")),
    )
    op.create_index("ix_purged_jobs_purged", "purged_jobs", ["purged_at", "id"])
    _partial("ix_purged_jobs_receipt", "purged_jobs", ["finished_at", "id"], "receipt_pieces IS NOT NULL")
    op.create_table(
        "kept_receipts",
        sa.Column("job_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "number", name=op.f("pk_kept_receipts")),
    )
    op.create_table(
        "retention",
        sa.Column("id", _number(), autoincrement=False, nullable=False),
        sa.Column("leased_by", sa.String(length=64), nullable=True),
        _time("leased_until", nullable=True),
        sa.Column("receipt_of", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_retention")),
    )
    op.execute("INSERT INTO retention (id) VALUES (1)")
    if op.get_bind().dialect.name == "postgresql":
        for table in _LARGE:
            op.execute(f"ALTER TABLE {table} SET ({_OFTEN})")
