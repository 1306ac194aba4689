"""Jobs of FTS3's clients: their ids, their files, and sites that are made of URLs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0025_fts"
down_revision = "0024_oidc"
branch_labels = None
depends_on = None


def upgrade() -> None:
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.add_column("sites", sa.Column("unlisted", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.create_table(
        "fts_jobs",
        sa.Column("id", number, nullable=False),
        sa.Column("fts_id", sa.String(length=36), nullable=False),
        sa.Column("user_id", number, nullable=False),
        sa.Column("vo_name", sa.Text(), nullable=False),
        sa.Column("submitted_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_fts_jobs_users")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_fts_jobs")),
        sqlite_autoincrement=True,
    )
    op.create_index("ux_fts_jobs_fts_id", "fts_jobs", ["fts_id", "user_id"], unique=True)
    op.create_index("ix_fts_jobs_user", "fts_jobs", ["user_id", "id"])
    op.create_table(
        "fts_parts",
        sa.Column("job_id", number, autoincrement=False, nullable=False),
        sa.Column("fts_job", sa.BigInteger(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_fts_parts_jobs")),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_fts_parts")),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_fts_parts_fts_job", "fts_parts", ["fts_job", "position"])
    op.create_table(
        "fts_files",
        sa.Column("job_id", number, autoincrement=False, nullable=False),
        sa.Column("element_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("file_index", sa.BigInteger(), nullable=False),
        sa.Column("source_surl", sa.Text(), nullable=False),
        sa.Column("dest_surl", sa.Text(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_fts_files_jobs")),
        sa.PrimaryKeyConstraint("job_id", "element_id", name=op.f("pk_fts_files")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "fts_bans",
        sa.Column("storage", sa.Text(), nullable=False),
        sa.Column("status", sa.String(length=8), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("user_id", number, nullable=False),
        sa.Column("since", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_fts_bans_users")),
        sa.PrimaryKeyConstraint("storage", name=op.f("pk_fts_bans")),
    )
