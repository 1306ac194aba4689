"""Schedules, their runs, and of which schedule a job is a run."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013_schedules"
down_revision = "0012_chains"
branch_labels = None
depends_on = None


def _number() -> sa.types.TypeEngine[int]:
    return sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("schedule_id", sa.BigInteger(), nullable=True))
    op.create_table(
        "schedules",
        sa.Column("id", _number(), nullable=False),
        sa.Column("user_id", _number(), nullable=False),
        sa.Column("recurrence", sa.Text(), nullable=False),
        sa.Column("timezone", sa.Text(), nullable=False),
        sa.Column("submission", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("next_due", sa.DateTime(timezone=True), nullable=True),
        sa.Column("request_key", sa.Text(), nullable=True),
        sa.Column("fingerprint", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_schedules_users")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_schedules")),
        sa.UniqueConstraint("user_id", "request_key", name=op.f("uq_schedules_user_id")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_schedules_user", "schedules", ["user_id", "id"])
    is_due = sa.text("next_due IS NOT NULL")
    op.create_index("ix_schedules_due", "schedules", ["next_due"], sqlite_where=is_due, postgresql_where=is_due)
    op.create_table(
        "schedule_runs",
        sa.Column("schedule_id", _number(), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("made_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("outcome", sa.String(length=16), nullable=False),
        sa.Column("job_id", _number(), nullable=True),
        sa.Column("message", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_schedule_runs_jobs")),
        sa.ForeignKeyConstraint(["schedule_id"], ["schedules.id"], name=op.f("fk_schedule_runs_schedules")),
        sa.PrimaryKeyConstraint("schedule_id", "due_at", name=op.f("pk_schedule_runs")),
        sqlite_with_rowid=False,
    )
