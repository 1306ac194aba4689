"""Events of jobs and sites, and the counts of failures by which those are bounded."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015_events"
down_revision = "0014_not_preserved"
branch_labels = None
depends_on = None


def _number() -> sa.types.TypeEngine[int]:
    return sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "events",
        sa.Column("id", _number(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("job_id", sa.BigInteger(), nullable=True),
        sa.Column("owner_id", sa.BigInteger(), nullable=True),
        sa.Column("data", sa.Text(), nullable=False),
        sa.Column("xact", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_events")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_events_order", "events", ["xact", "id"], sqlite_where=sa.text("xact > 0"))
    op.create_index("ix_events_job", "events", ["job_id", "xact", "id"])
    op.create_index("ix_events_owner", "events", ["owner_id", "xact", "id"])
    op.create_table(
        "failure_counts",
        sa.Column("job_id", _number(), nullable=False),
        sa.Column("code", sa.String(length=32), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_failure_counts_jobs")),
        sa.PrimaryKeyConstraint("job_id", "code", name=op.f("pk_failure_counts")),
        sqlite_with_rowid=False,
    )
