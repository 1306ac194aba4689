"""The FTS3 of a site."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0027_fts_worker"
down_revision = "0025_fts"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("sites", sa.Column("fts", sa.Text(), nullable=True))
