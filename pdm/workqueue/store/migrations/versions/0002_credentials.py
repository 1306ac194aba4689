"""Credentials of several kinds, for every site or for one."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002_credentials"
down_revision = "0001"
branch_labels = None
depends_on = None

_KEPT = "id, user_id, kind, subject, valid_until, stored_at, secret"


def upgrade() -> None:
    # SQLite cannot change a constraint. The table is small and nothing refers to it: it is made anew, in both engines.
    op.execute("CREATE TEMPORARY TABLE credentials_before AS SELECT * FROM credentials")
    op.drop_table("credentials")
    op.create_table(
        "credentials",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("user_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("site_id", sa.BigInteger(), nullable=False),
        sa.Column("label", sa.Text(), nullable=True),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("valid_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.Column("stored_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("secret", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_credentials_users")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_credentials")),
        sa.UniqueConstraint("user_id", "kind", "site_id", name=op.f("uq_credentials_user_id")),
    )
    op.execute(
        f"INSERT INTO credentials ({_KEPT}, site_id, details) SELECT {_KEPT}, 0, '{{}}' FROM credentials_before"  # noqa: S608
    )
    op.execute("DROP TABLE credentials_before")
    if op.get_bind().dialect.name == "postgresql":
        # Numbers were given here, not by the sequence.
        op.execute(
            "SELECT setval(pg_get_serial_sequence('credentials', 'id'), coalesce(max(id), 1), max(id) IS NOT NULL)"
            " FROM credentials"
        )
