"""Jobs that wait for others, deadlines of jobs, and why the service has cancelled a job."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012_chains"
down_revision = "0011_planned"
branch_labels = None
depends_on = None


def _number() -> sa.types.TypeEngine[int]:
    return sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("after", sa.JSON(), nullable=True))
    op.add_column("jobs", sa.Column("is_awaited", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.add_column("jobs", sa.Column("deadline", sa.DateTime(timezone=True), nullable=True))
    op.add_column("jobs", sa.Column("cancel_reason", sa.JSON(), nullable=True))
    has_open_deadline = sa.text("deadline IS NOT NULL AND finished_at IS NULL")
    op.create_index(
        "ix_jobs_deadline",
        "jobs",
        ["deadline"],
        sqlite_where=has_open_deadline,
        postgresql_where=has_open_deadline,
    )
    op.create_table(
        "predecessors",
        sa.Column("job_id", _number(), nullable=False),
        sa.Column("predecessor_id", _number(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_predecessors_jobs")),
        sa.ForeignKeyConstraint(["predecessor_id"], ["jobs.id"], name=op.f("fk_predecessors_awaited_jobs")),
        sa.PrimaryKeyConstraint("job_id", "predecessor_id", name=op.f("pk_predecessors")),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_predecessors_predecessor", "predecessors", ["predecessor_id", "job_id"])
