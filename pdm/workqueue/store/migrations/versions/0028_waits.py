"""Elements that are HELD while a tape system is polled, and the tape API of a site."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0028_waits"
down_revision = "0027_fts_worker"
branch_labels = None
depends_on = None


def upgrade() -> None:
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.add_column("sites", sa.Column("tape", sa.Text(), nullable=True))
    op.create_table(
        "waits",
        sa.Column("id", number, nullable=False),
        sa.Column("job_id", number, nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("phase", sa.String(length=16), nullable=False),
        sa.Column("site_id", sa.BigInteger(), nullable=False),
        sa.Column("request", sa.Text(), nullable=True),
        sa.Column("began_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deadline", sa.DateTime(timezone=True), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("leased_by", sa.String(length=64), nullable=True),
        sa.Column("leased_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("turn", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("polls", sa.Integer(), server_default="0", nullable=False),
        sa.Column("errors", sa.Integer(), server_default="0", nullable=False),
        sa.Column("message", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_waits_jobs")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_waits")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_waits_due", "waits", ["due_at"])
    op.create_index("ix_waits_job", "waits", ["job_id", "kind", "phase"])
    op.create_table(
        "wait_elements",
        sa.Column("wait_id", number, nullable=False),
        sa.Column("element_id", sa.BigInteger(), nullable=False),
        sa.Column("ready", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.ForeignKeyConstraint(["wait_id"], ["waits.id"], name=op.f("fk_wait_elements_waits")),
        sa.PrimaryKeyConstraint("wait_id", "element_id", name=op.f("pk_wait_elements")),
        sqlite_with_rowid=False,
    )
