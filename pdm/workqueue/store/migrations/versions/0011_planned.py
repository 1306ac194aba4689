"""What a COPY element was planned to do, and the modification time of its source."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011_planned"
down_revision = "0010_attempts_in_elements"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("job_elements", sa.Column("planned", sa.String(12), nullable=True))
    op.add_column("job_elements", sa.Column("mtime", sa.BigInteger(), nullable=True))
