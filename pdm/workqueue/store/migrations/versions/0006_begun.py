"""What renames and new directories found before they were begun."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006_begun"
down_revision = "0005_incarnations"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("job_elements", sa.Column("begun", sa.JSON(none_as_null=True), nullable=True))
