"""What a COPY element was to preserve of its source, and could not."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014_not_preserved"
down_revision = "0013_schedules"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("job_elements", sa.Column("not_preserved", sa.String(12), nullable=True))
