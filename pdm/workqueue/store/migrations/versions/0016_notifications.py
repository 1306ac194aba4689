"""Webhooks, their deliveries, and mail to users."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0016_notifications"
down_revision = "0015_events"
branch_labels = None
depends_on = None


def _number() -> sa.types.TypeEngine[int]:
    return sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _time(name: str, *, nullable: bool = False) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def upgrade() -> None:
    op.create_table(
        "webhooks",
        sa.Column("id", _number(), nullable=False),
        sa.Column("user_id", _number(), nullable=False),
        sa.Column("uid", sa.String(length=32), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("kinds", sa.JSON(), nullable=False),
        sa.Column("job_id", sa.BigInteger(), nullable=True),
        sa.Column("secret", sa.LargeBinary(), nullable=False),
        _time("created_at"),
        sa.Column("after_event", sa.BigInteger(), nullable=False),
        sa.Column("request_key", sa.Text(), nullable=True),
        sa.Column("fingerprint", sa.Text(), nullable=True),
        _time("failing_since", nullable=True),
        sa.Column("failures", sa.Integer(), nullable=False),
        _time("rests_until", nullable=True),
        _time("disabled_at", nullable=True),
        sa.Column("disabled_why", sa.Text(), nullable=True),
        sa.Column("leased_by", sa.String(length=64), nullable=True),
        _time("leased_until", nullable=True),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_webhooks_users")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhooks")),
        sa.UniqueConstraint("user_id", "request_key", name=op.f("uq_webhooks_user_id")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_webhooks_user", "webhooks", ["user_id", "id"])
    op.create_table(
        "deliveries",
        sa.Column("id", _number(), nullable=False),
        sa.Column("webhook_id", _number(), nullable=False),
        sa.Column("event_id", sa.BigInteger(), nullable=False),
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        _time("created_at"),
        sa.Column("attempts", sa.Integer(), nullable=False),
        _time("first_tried_at", nullable=True),
        _time("due_at", nullable=True),
        _time("ended_at", nullable=True),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["webhook_id"], ["webhooks.id"], name=op.f("fk_deliveries_webhooks")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_deliveries")),
        sqlite_autoincrement=True,
    )
    due = sa.text("due_at IS NOT NULL")
    op.create_index(
        "ix_deliveries_due",
        "deliveries",
        ["webhook_id", "job_id", "id", "due_at"],
        sqlite_where=due,
        postgresql_where=due,
    )
    op.create_index("ix_deliveries_webhook", "deliveries", ["webhook_id", "id"])
    op.create_table(
        "mail_subscriptions",
        sa.Column("user_id", _number(), autoincrement=False, nullable=False),
        sa.Column("address", sa.Text(), nullable=False),
        sa.Column("notify", sa.JSON(), nullable=False),
        sa.Column("per", sa.String(length=8), nullable=False),
        sa.Column("after_event", sa.BigInteger(), nullable=False),
        _time("confirmed_at", nullable=True),
        sa.Column("code_digest", sa.String(length=64), nullable=True),
        _time("code_sent_at", nullable=True),
        sa.Column("wrong_codes", sa.Integer(), nullable=False),
        sa.Column("confirmations", sa.Integer(), nullable=False),
        _time("confirmations_since", nullable=True),
        _time("due_at", nullable=True),
        _time("sent_at", nullable=True),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("leased_by", sa.String(length=64), nullable=True),
        _time("leased_until", nullable=True),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_mail_subscriptions_users")),
        sa.PrimaryKeyConstraint("user_id", name=op.f("pk_mail_subscriptions")),
    )
    op.create_index(
        "ix_mail_subscriptions_due", "mail_subscriptions", ["due_at"], sqlite_where=due, postgresql_where=due
    )
    op.create_table(
        "mail_notices",
        sa.Column("id", _number(), nullable=False),
        sa.Column("user_id", _number(), nullable=False),
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("what", sa.String(length=8), nullable=False),
        _time("at"),
        sa.Column("details", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["user_id"], ["mail_subscriptions.user_id"], name=op.f("fk_mail_notices_mail_subscriptions")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_mail_notices")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_mail_notices_user", "mail_notices", ["user_id", "id"])
    op.create_table(
        "notified",
        sa.Column("id", _number(), autoincrement=False, nullable=False),
        sa.Column("event_id", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_notified")),
    )
    op.execute("INSERT INTO notified (id, event_id) SELECT 1, COALESCE(MAX(id), 0) FROM events")
