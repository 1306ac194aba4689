"""Who carries out the elements of a site's jobs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008_mover"
down_revision = "0007_authorities"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("sites", sa.Column("mover", sa.String(length=8), server_default="native", nullable=False))
