"""The version of sites and restrictions: how one daemon sees what another one has changed."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pdm.workqueue.domain.catalogue import Directory
from pdm.workqueue.store import restrictions, sites
from pdm.workqueue.store.changes import ROW
from pdm.workqueue.store.tables import catalogue

_VERSION = sa.select(catalogue.c.version).where(catalogue.c.id == ROW)


def load(session: Session, known: int | None) -> Directory | None:
    """All sites and restrictions; None if the version is the known one."""
    version = session.scalar(_VERSION) or 0
    if version == known:
        return None
    return Directory(version, tuple(sites.everything(session)), tuple(restrictions.everything(session)))
