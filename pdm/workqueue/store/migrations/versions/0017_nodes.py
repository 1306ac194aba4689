"""What each daemon of a cluster says of itself: its name, address, version and state."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0017_nodes"
down_revision = "0016_notifications"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # All may be null: a daemon of the earlier version, which runs beside this one, writes none of them.
    for column in (
        sa.Column("node", sa.String(length=256), nullable=True),
        sa.Column("address", sa.Text(), nullable=True),
        sa.Column("version", sa.String(length=64), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("drain", sa.Text(), nullable=True),
        sa.Column("drain_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("sick", sa.Text(), nullable=True),
        sa.Column("report", sa.JSON(), nullable=True),
    ):
        op.add_column("workers", column)
