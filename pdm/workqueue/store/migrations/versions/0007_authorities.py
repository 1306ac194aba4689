"""The authority to which a user is bound, and subjects without the mark before each slash in a value."""

from __future__ import annotations

import re

import sqlalchemy as sa
from alembic import op

revision = "0007_authorities"
down_revision = "0006_begun"
branch_labels = None
depends_on = None

#: A slash is marked only where it could be taken for the beginning of a part; all other escapes are kept.
_MARKED = re.compile(r"(\\/)(?![A-Za-z0-9.]+=)|\\.", re.DOTALL)


def upgrade() -> None:
    op.add_column("users", sa.Column("authority", sa.Text(), nullable=True))
    users = sa.table("users", sa.column("id", sa.BigInteger()), sa.column("subject", sa.Text()))
    connection = op.get_bind()
    rows = connection.execute(sa.select(users.c.id, users.c.subject).where(users.c.subject.contains("\\/"))).all()
    for number, subject in rows:
        now = _MARKED.sub(lambda found: "/" if found[1] else found[0], subject)
        if now != subject:
            connection.execute(sa.update(users).where(users.c.id == number).values(subject=now))
