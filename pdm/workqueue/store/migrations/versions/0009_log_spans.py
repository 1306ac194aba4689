"""Where the log of an attempt stands in the log file of its job."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009_log_spans"
down_revision = "0008_mover"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("attempts", sa.Column("log_offset", sa.BigInteger(), nullable=True))
    op.add_column("attempts", sa.Column("log_length", sa.BigInteger(), nullable=True))
