"""The attempt that succeeds is told by columns of its element, and has no row of its own."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010_attempts_in_elements"
down_revision = "0009_log_spans"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("job_elements", sa.Column("started_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("job_elements", sa.Column("log_offset", sa.BigInteger(), nullable=True))
    op.add_column("job_elements", sa.Column("log_length", sa.BigInteger(), nullable=True))
