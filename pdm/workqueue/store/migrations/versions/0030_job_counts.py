"""Counts of results beside the rows of their jobs, and which workers know of them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0030_job_counts"
down_revision = "0028_waits"
branch_labels = None
depends_on = None


def upgrade() -> None:
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.add_column("workers", sa.Column("counts_apart", sa.Boolean(), nullable=True))
    op.create_table(
        "job_counts",
        sa.Column("id", number, nullable=False),
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("done", sa.BigInteger(), nullable=False),
        sa.Column("bytes_total", sa.BigInteger(), nullable=False),
        sa.Column("bytes_done", sa.BigInteger(), nullable=False),
        sa.Column("already_there", sa.BigInteger(), nullable=False),
        sa.Column("bytes_already_there", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job_counts")),
    )
    op.create_index("ix_job_counts_job", "job_counts", ["job_id"])
