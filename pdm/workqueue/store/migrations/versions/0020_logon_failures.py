"""Failed MyProxy logons, which all daemons on one database count together."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0020_logon_failures"
down_revision = "0019_retention"
branch_labels = None
depends_on = None


def upgrade() -> None:
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "logon_failures",
        sa.Column("id", number, nullable=False),
        sa.Column("user_id", number, nullable=False),
        sa.Column("failed_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_logon_failures_users")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_logon_failures")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_logon_failures_user", "logon_failures", ["user_id", "failed_at"])
