"""Changes of sites and restrictions come one after the other, and each makes a new version."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pdm.workqueue.domain.catalogue import LAST_FILE_SITE
from pdm.workqueue.store.tables import catalogue, matched

#: The only row.
ROW = 1


def begin_change(session: Session) -> None:
    """Begin a change: who comes later waits until it is committed. The first statement of its transaction."""
    bump = sa.update(catalogue).where(catalogue.c.id == ROW).values(version=catalogue.c.version + 1)
    if not matched(session, bump):
        # Two may try this at once: the second one's transaction fails, and is run again.
        session.execute(sa.insert(catalogue).values(id=ROW, version=1, last_site=LAST_FILE_SITE))


def next_site_number(session: Session) -> int:
    """A number that no site has ever had: jobs remember it for good."""
    session.execute(sa.update(catalogue).where(catalogue.c.id == ROW).values(last_site=catalogue.c.last_site + 1))
    return int(session.scalars(sa.select(catalogue.c.last_site).where(catalogue.c.id == ROW)).one())
