"""Logins at token issuers, and what sites say about tokens."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0024_oidc"
down_revision = "0021_s3"
branch_labels = None
depends_on = None


def _time(name: str) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=True)


def upgrade() -> None:
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.add_column("sites", sa.Column("oidc", sa.JSON(), nullable=True))
    op.add_column("sites", sa.Column("oidc_secret", sa.LargeBinary(), nullable=True))
    op.create_table(
        "oidc_logins",
        sa.Column("id", number, nullable=False),
        sa.Column("user_id", number, nullable=False),
        sa.Column("site_id", sa.BigInteger(), nullable=False),
        sa.Column("issuer", sa.Text(), nullable=False),
        sa.Column("client_id", sa.Text(), nullable=False),
        sa.Column("secret", sa.LargeBinary(), nullable=True),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        _time("logged_in_at"),
        _time("refreshed_at"),
        _time("valid_until"),
        _time("due_at"),
        sa.Column("failures", sa.BigInteger(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        _time("ended_at"),
        sa.Column("device", sa.LargeBinary(), nullable=True),
        _time("device_until"),
        _time("device_due_at"),
        sa.Column("device_interval_s", sa.BigInteger(), nullable=True),
        sa.Column("leased_by", sa.String(length=64), nullable=True),
        _time("leased_until"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_oidc_logins_users")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_oidc_logins")),
        sa.UniqueConstraint("user_id", "site_id", name=op.f("uq_oidc_logins_user_id")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_oidc_logins_due", "oidc_logins", ["due_at"])
