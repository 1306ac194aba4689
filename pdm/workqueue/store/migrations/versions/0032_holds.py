"""Jobs that a person holds, and how many elements of a job may run at once."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0032_holds"
down_revision = "0030_job_counts"
branch_labels = None
depends_on = None

_HAS_HOLD = "held_until IS NOT NULL"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("hold", sa.JSON(), nullable=True))
    op.add_column("jobs", sa.Column("held_until", sa.DateTime(timezone=True), nullable=True))
    op.add_column("jobs", sa.Column("max_active", sa.Integer(), nullable=True))
    op.create_index(
        "ix_jobs_hold",
        "jobs",
        ["held_until", "id"],
        sqlite_where=sa.text(_HAS_HOLD),
        postgresql_where=sa.text(_HAS_HOLD),
    )
