"""Counts of what a source holds and is left out, and of what a destination had before."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004_left_out"
down_revision = "0003_sites"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("already_there", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("bytes_already_there", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("job_elements", sa.Column("already_there", sa.Boolean(), nullable=False, server_default=sa.false()))
    # Null: notes of an earlier version, which are counted when they are asked for.
    op.add_column("listing_notes", sa.Column("counts", sa.Text(), nullable=True))
