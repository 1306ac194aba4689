"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "users",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("role", sa.String(length=16), nullable=False),
        sa.Column("registered_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_users")),
        sa.UniqueConstraint("subject", name=op.f("uq_users_subject")),
    )
    op.create_table(
        "workers",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workers")),
        sa.UniqueConstraint("name", name=op.f("uq_workers_name")),
    )
    op.create_table(
        "credentials",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("user_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("valid_until", sa.DateTime(timezone=True), nullable=False),
        sa.Column("stored_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("secret", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_credentials_users")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_credentials")),
        sa.UniqueConstraint("user_id", "kind", name=op.f("uq_credentials_user_id")),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("user_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column(
            "type",
            sa.Enum(
                "LIST",
                "COPY",
                "REMOVE",
                "RENAME",
                "MKDIR",
                name="type",
                native_enum=False,
                create_constraint=True,
                length=14,
            ),
            nullable=False,
        ),
        sa.Column(
            "status",
            sa.Enum(
                "NEW",
                "DONE",
                "FAILED",
                "SUBMITTED",
                "RUNNING",
                "CANCELLED",
                "HELD",
                name="status",
                native_enum=False,
                create_constraint=True,
                length=17,
            ),
            nullable=False,
        ),
        sa.Column(
            "protocol",
            sa.Enum(
                "GRIDFTP",
                "SSH",
                "DUMMY",
                "FILE",
                "HTTPS",
                "XROOT",
                name="protocol",
                native_enum=False,
                create_constraint=True,
                length=15,
            ),
            nullable=False,
        ),
        sa.Column("src_siteid", sa.BigInteger(), nullable=False),
        sa.Column("src_filepath", sa.Text(), nullable=False),
        sa.Column("dst_siteid", sa.BigInteger(), nullable=True),
        sa.Column("dst_filepath", sa.Text(), nullable=True),
        sa.Column("extra_opts", sa.JSON(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("max_tries", sa.Integer(), nullable=False),
        sa.Column("label", sa.Text(), nullable=True),
        sa.Column("log_uid", sa.String(length=64), nullable=False),
        sa.Column("timestamp", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("num_elements", sa.BigInteger(), nullable=False),
        sa.Column("num_submitted", sa.BigInteger(), nullable=False),
        sa.Column("num_running", sa.BigInteger(), nullable=False),
        sa.Column("num_done", sa.BigInteger(), nullable=False),
        sa.Column("num_failed", sa.BigInteger(), nullable=False),
        sa.Column("num_cancelled", sa.BigInteger(), nullable=False),
        sa.Column("num_held", sa.BigInteger(), nullable=False),
        sa.Column("bytes_total", sa.BigInteger(), nullable=False),
        sa.Column("bytes_done", sa.BigInteger(), nullable=False),
        sa.Column("skipped", sa.BigInteger(), nullable=False),
        sa.Column("list_due_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("work_due_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "num_elements = num_submitted + num_running + num_done + num_failed + num_cancelled + num_held",
            name=op.f("ck_jobs_counters_sum"),
        ),
        sa.CheckConstraint(
            "num_submitted >= 0 AND num_running >= 0 AND num_done >= 0"
            " AND num_failed >= 0 AND num_cancelled >= 0 AND num_held >= 0",
            name=op.f("ck_jobs_counters_positive"),
        ),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_jobs_users")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
        sqlite_autoincrement=True,
    )
    op.create_index(
        "ix_jobs_held",
        "jobs",
        ["user_id", "id"],
        unique=False,
        sqlite_where=sa.text("num_held > 0"),
        postgresql_where=sa.text("num_held > 0"),
    )
    op.create_index(
        "ix_jobs_listing",
        "jobs",
        ["user_id", "priority", "id", "list_due_at"],
        unique=False,
        sqlite_where=sa.text("list_due_at IS NOT NULL"),
        postgresql_where=sa.text("list_due_at IS NOT NULL"),
    )
    op.create_index(
        "ix_jobs_listing_due",
        "jobs",
        ["list_due_at"],
        unique=False,
        sqlite_where=sa.text("list_due_at IS NOT NULL"),
        postgresql_where=sa.text("list_due_at IS NOT NULL"),
    )
    op.create_index(
        "ix_jobs_running",
        "jobs",
        ["user_id", "id"],
        unique=False,
        sqlite_where=sa.text("num_running > 0"),
        postgresql_where=sa.text("num_running > 0"),
    )
    op.create_index("ix_jobs_user", "jobs", ["user_id", "id"], unique=False)
    op.create_index("ix_jobs_user_status", "jobs", ["user_id", "status", "id"], unique=False)
    op.create_index(
        "ix_jobs_work",
        "jobs",
        ["user_id", "priority", "id", "work_due_at"],
        unique=False,
        sqlite_where=sa.text("work_due_at IS NOT NULL"),
        postgresql_where=sa.text("work_due_at IS NOT NULL"),
    )
    op.create_index(
        "ix_jobs_work_due",
        "jobs",
        ["work_due_at"],
        unique=False,
        sqlite_where=sa.text("work_due_at IS NOT NULL"),
        postgresql_where=sa.text("work_due_at IS NOT NULL"),
    )
    op.create_table(
        "pending_delegations",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("user_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("key", sa.LargeBinary(), nullable=False),
        sa.Column("csr_pem", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_pending_delegations_users")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_pending_delegations")),
        sa.UniqueConstraint("user_id", name=op.f("uq_pending_delegations_user_id")),
    )
    op.create_table(
        "idempotent_requests",
        sa.Column("user_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("job_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_idempotent_requests_jobs")),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_idempotent_requests_users")),
        sa.PrimaryKeyConstraint("user_id", "key", name=op.f("pk_idempotent_requests")),
    )
    op.create_table(
        "job_elements",
        sa.Column("job_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("id", sa.BigInteger(), nullable=False),
        sa.Column(
            "type",
            sa.Enum(
                "LIST",
                "COPY",
                "REMOVE",
                "RENAME",
                "MKDIR",
                name="type",
                native_enum=False,
                create_constraint=True,
                length=14,
            ),
            nullable=False,
        ),
        sa.Column(
            "status",
            sa.Enum(
                "NEW",
                "DONE",
                "FAILED",
                "SUBMITTED",
                "RUNNING",
                "CANCELLED",
                "HELD",
                name="status",
                native_enum=False,
                create_constraint=True,
                length=17,
            ),
            nullable=False,
        ),
        sa.Column("src_filepath", sa.Text(), nullable=False),
        sa.Column("dst_filepath", sa.Text(), nullable=True),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("is_directory", sa.Boolean(), nullable=False),
        sa.Column("phase", sa.Integer(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("lost", sa.Integer(), nullable=False),
        sa.Column("max_tries", sa.Integer(), nullable=False),
        sa.Column("timestamp", sa.DateTime(timezone=True), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("worker_id", sa.BigInteger(), nullable=True),
        sa.Column("claimed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("transferred", sa.BigInteger(), nullable=True),
        sa.Column("elapsed_s", sa.Double(), nullable=True),
        sa.Column("checksum", sa.Text(), nullable=True),
        sa.Column("residue", sa.Boolean(), nullable=False),
        sa.Column("failure_scope", sa.String(length=16), nullable=True),
        sa.Column("failure_code", sa.String(length=32), nullable=True),
        sa.Column("failure_message", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_elements_jobs")),
        sa.PrimaryKeyConstraint("job_id", "id", name=op.f("pk_job_elements")),
        sqlite_with_rowid=False,
    )
    op.create_index(
        "ix_elements_residue",
        "job_elements",
        ["job_id", "id"],
        unique=False,
        sqlite_where=sa.text("residue IS TRUE"),
        postgresql_where=sa.text("residue IS TRUE"),
    )
    op.create_index(
        "ix_elements_running",
        "job_elements",
        ["job_id", "phase", "id", "worker_id"],
        unique=False,
        sqlite_where=sa.text("status = 'RUNNING'"),
        postgresql_where=sa.text("status = 'RUNNING'"),
    )
    op.create_index(
        "ix_elements_set_aside",
        "job_elements",
        ["job_id", "status", "id"],
        unique=False,
        sqlite_where=sa.text("status IN ('FAILED', 'CANCELLED', 'HELD')"),
        postgresql_where=sa.text("status IN ('FAILED', 'CANCELLED', 'HELD')"),
    )
    op.create_index(
        "ix_elements_waiting",
        "job_elements",
        ["job_id", "phase", "due_at", "id"],
        unique=False,
        sqlite_where=sa.text("status = 'SUBMITTED' AND type <> 'LIST'"),
        postgresql_where=sa.text("status = 'SUBMITTED' AND type <> 'LIST'"),
    )
    op.create_table(
        "attempts",
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("element_id", sa.BigInteger(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column(
            "status",
            sa.Enum(
                "NEW",
                "DONE",
                "FAILED",
                "SUBMITTED",
                "RUNNING",
                "CANCELLED",
                "HELD",
                name="status",
                native_enum=False,
                create_constraint=True,
                length=17,
            ),
            nullable=False,
        ),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("worker_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("transferred", sa.BigInteger(), nullable=False),
        sa.Column("failure_scope", sa.String(length=16), nullable=True),
        sa.Column("failure_code", sa.String(length=32), nullable=True),
        sa.Column("failure_message", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["job_id", "element_id"], ["job_elements.job_id", "job_elements.id"], name=op.f("fk_attempts_job_elements")
        ),
        sa.ForeignKeyConstraint(["worker_id"], ["workers.id"], name=op.f("fk_attempts_workers")),
        sa.PrimaryKeyConstraint("job_id", "element_id", "attempt", name=op.f("pk_attempts")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "listing_chunks",
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("element_id", sa.BigInteger(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("entries", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id", "element_id"],
            ["job_elements.job_id", "job_elements.id"],
            name=op.f("fk_listing_chunks_job_elements"),
        ),
        sa.PrimaryKeyConstraint("job_id", "element_id", "sequence", name=op.f("pk_listing_chunks")),
    )
    op.create_table(
        "listing_notes",
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("element_id", sa.BigInteger(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id", "element_id"],
            ["job_elements.job_id", "job_elements.id"],
            name=op.f("fk_listing_notes_job_elements"),
        ),
        sa.PrimaryKeyConstraint("job_id", "element_id", "sequence", name=op.f("pk_listing_notes")),
    )
