"""Incarnations of workers, and a check of the key of the credentials."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005_incarnations"
down_revision = "0003_sites"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name, length in (("incarnation", 64), ("instance", 256), ("host", 256)):
        op.add_column("workers", sa.Column(name, sa.String(length=length), nullable=True))
    op.create_table(
        "key_checks",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False),
        sa.Column("secret", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_key_checks")),
    )
