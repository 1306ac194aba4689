"""Sites that users have created, and the restrictions (drained sites, banned users) of operators.

Permissions are checked before; here are the checks that only the database can make. Changes are serialized, and each
makes a new version of the catalogue, by which the other daemons see that they have to load it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobProtocol, MoverKind
from pdm.workqueue.domain.sites import (
    LAST_FILE_SITE,
    Actor,
    NewSite,
    Restriction,
    RestrictionKind,
    SiteRecord,
    SiteSnapshot,
)
from pdm.workqueue.store import users
from pdm.workqueue.store.records import catalogue, credentials, jobs, matched, restrictions, sites
from pdm.workqueue.WorkqueueDB import HAS_HELD, HAS_LISTING, HAS_RUNNING, HAS_WORK

#: The only row.
_CATALOGUE_ROW = 1


def begin_change(session: Session) -> None:
    """Begin a change: who comes later waits until it is committed. The first statement of its transaction."""
    bump = sa.update(catalogue).where(catalogue.c.id == _CATALOGUE_ROW).values(version=catalogue.c.version + 1)
    if not matched(session, bump):
        # Two may try this at once: the second one's transaction fails, and is run again.
        session.execute(sa.insert(catalogue).values(id=_CATALOGUE_ROW, version=1, last_site=LAST_FILE_SITE))


def next_site_number(session: Session) -> int:
    """A number that no site has ever had: jobs remember it for good."""
    session.execute(
        sa.update(catalogue).where(catalogue.c.id == _CATALOGUE_ROW).values(last_site=catalogue.c.last_site + 1)
    )
    return int(session.scalars(sa.select(catalogue.c.last_site).where(catalogue.c.id == _CATALOGUE_ROW)).one())


_RESTRICTION_COLUMNS = tuple(restrictions.c[name] for name in ("kind", "number", "message", "subject", "since"))
#: kind → what the audit log calls it to restrict it, and to end that.
_ACTIONS = {RestrictionKind.SITE: ("site.drain", "site.resume"), RestrictionKind.USER: ("user.ban", "user.unban")}


def all_restrictions(session: Session) -> Iterator[Restriction]:
    """All restrictions."""
    for row in session.execute(sa.select(*_RESTRICTION_COLUMNS)):
        yield Restriction(RestrictionKind(row.kind), *row[1:])


def restrict(
    session: Session, kind: RestrictionKind, number: int, message: str, by: Actor, now: datetime
) -> Restriction:
    """Restrict a site or a user; a message that is there is replaced."""
    begin_change(session)
    session.execute(sa.delete(restrictions).where(*_is_restriction_of(kind, number)))
    session.execute(
        sa.insert(restrictions).values(kind=kind.value, number=number, message=message, subject=by.subject, since=now)
    )
    users.record_action(session, by, _ACTIONS[kind][0], f"{kind.value} {number}", message, now)
    return Restriction(kind, number, message, by.subject, now)


def lift_restriction(session: Session, kind: RestrictionKind, number: int, by: Actor, now: datetime) -> bool:
    """End a restriction; says whether there was one."""
    begin_change(session)
    lifted = bool(matched(session, sa.delete(restrictions).where(*_is_restriction_of(kind, number))))
    if lifted:
        users.record_action(session, by, _ACTIONS[kind][1], f"{kind.value} {number}", "", now)
    return lifted


def _is_restriction_of(kind: RestrictionKind, number: int) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
    return restrictions.c.kind == kind.value, restrictions.c.number == number


_COLUMNS = tuple(
    sites.c[name]
    for name in (
        *("id", "owner_id", "public", "name", "description", "default_folder"),
        *("endpoints", "limit_in", "limit_out", "authorities", "myproxy", "mover"),
    )
)
#: Sites of one user: all are kept in memory.
MOST_OF_OWNER = 200
_COUNT_OF_OWNER = sa.select(sa.func.count()).select_from(sites).where(sites.c.owner_id == sa.bindparam("owner"))
#: Jobs that have not ended: each waits for work or its listing, runs or is held; these indexes have no others, however
#: many there ever were. A union, for neither engine reads several partial indexes for one condition.
_UNFINISHED = sa.union(
    *(
        sa.select(jobs.c.id).where(
            sa.text(condition),
            sa.or_(jobs.c.src_siteid == sa.bindparam("site"), jobs.c.dst_siteid == sa.bindparam("site")),
        )
        for condition in (HAS_WORK, HAS_LISTING, HAS_RUNNING, HAS_HELD)
    )
).subquery()
_COUNT_UNFINISHED = sa.select(sa.func.count()).select_from(_UNFINISHED)


class NameTakenError(Exception):
    """Another site that the owner, or everybody, sees has the name."""


class SiteInUseError(Exception):
    """Jobs that have not ended need the site.

    Attributes:
        jobs: how many.
    """

    def __init__(self, count: int) -> None:
        super().__init__(f"{count} jobs that have not ended need the site")
        self.jobs = count


class TooManySitesError(Exception):
    """The owner has as many sites as one may have."""


def all_sites(session: Session) -> Iterator[SiteRecord]:
    """All sites of the database, lowest number first."""
    for row in session.execute(sa.select(*_COLUMNS).order_by(sites.c.id)):
        yield _record(row)


def create(session: Session, new: NewSite, by: Actor, now: datetime) -> SiteRecord:
    """Make a site; the same again by the same owner is the one there is, for a client may repeat a request.

    Raises:
        NameTakenError: the name is another's.
        TooManySitesError: the owner has enough.
    """
    begin_change(session)
    for known in _same_name(session, new):
        if known.content == new:
            return known
        raise NameTakenError
    if (session.scalar(_COUNT_OF_OWNER, {"owner": new.owner_id}) or 0) >= MOST_OF_OWNER:
        raise TooManySitesError(f"you have {MOST_OF_OWNER} sites: remove some you do not use any more")
    number = next_site_number(session)
    session.execute(sa.insert(sites).values(id=number, created_at=now, **_values(new)))
    users.record_action(session, by, "site.create", f"site {number}", _audit_details(new), now)
    return SiteRecord(number, new)


def change(
    session: Session, number: int, changed: Callable[[NewSite], NewSite], by: Actor, now: datetime
) -> SiteRecord | None:
    """Change what is said about a site; None if it is gone.

    Args:
        session: of the database.
        number: of the site.
        changed: makes what it is to be of what it is at this moment, which another daemon may just have changed.
        by: who does it.
        now: the present moment, UTC.

    Raises:
        NameTakenError: the new name is another's.
    """
    begin_change(session)
    row = session.execute(sa.select(*_COLUMNS).where(sites.c.id == number)).one_or_none()
    if row is None:
        return None
    before = _record(row).content
    content = changed(before)
    if content == before:
        return SiteRecord(number, content)
    if any(other.id != number for other in _same_name(session, content)):
        raise NameTakenError
    session.execute(sa.update(sites).where(sites.c.id == number).values(**_values(content)))
    users.record_action(session, by, "site.change", f"site {number}", _audit_details(content), now)
    return SiteRecord(number, content)


def remove(session: Session, number: int, by: Actor, now: datetime) -> bool:
    """Remove a site of which no job has need any more; says whether it was there.

    Raises:
        SiteInUseError: a job has need of it.
    """
    begin_change(session)
    # Under a lock: a job that is being registered holds it (`missing`).
    locked = session.execute(sa.select(sites.c.name).where(sites.c.id == number).with_for_update()).one_or_none()
    if locked is None:
        return False
    used = session.scalar(_COUNT_UNFINISHED, {"site": number})
    if used:
        raise SiteInUseError(used)
    session.execute(sa.delete(sites).where(sites.c.id == number))
    session.execute(sa.delete(credentials).where(credentials.c.site_id == number))
    session.execute(sa.delete(restrictions).where(restrictions.c.kind == "site", restrictions.c.number == number))
    users.record_action(session, by, "site.remove", f"site {number}", locked.name, now)
    return True


def missing(session: Session, numbers: Collection[int]) -> set[int]:
    """Which of some sites are not there; the others cannot be removed before this transaction has ended."""
    found = session.scalars(
        sa.select(sites.c.id).where(sites.c.id.in_(numbers)).order_by(sites.c.id).with_for_update(read=True)
    )
    return set(numbers) - set(found)


def _same_name(session: Session, content: NewSite) -> list[SiteRecord]:
    """Sites of the name that the owner sees; for a public site, all that would be beside it in somebody's eyes."""
    seen = sa.or_(sites.c.public.is_(True), sites.c.owner_id == content.owner_id)
    rows = session.execute(sa.select(*_COLUMNS).where(sa.func.lower(sites.c.name) == content.name.lower(), seen))
    return [_record(row) for row in rows]


def _values(content: NewSite) -> dict[str, Any]:
    return {
        "owner_id": content.owner_id,
        "public": content.public,
        "name": content.name,
        "description": content.description,
        "default_folder": content.default_folder,
        "endpoints": {protocol.name: list(urls) for protocol, urls in content.endpoints.items()},
        "limit_in": content.limit_in,
        "limit_out": content.limit_out,
        "authorities": content.authorities,
        "myproxy": content.myproxy,
        "mover": content.mover.value,
    }


def _audit_details(content: NewSite) -> str:
    urls = " ".join(url for urls in content.endpoints.values() for url in urls)
    own = " with authorities of its own" if content.authorities else ""
    logon = f", logon at {content.myproxy}" if content.myproxy else ""
    mover = f", moved by {content.mover}" if content.mover is not MoverKind.NATIVE else ""
    return f"{content.name}, {'public' if content.public else 'private'}{own}{logon}{mover}: {urls}"


def _record(row: sa.Row[Any]) -> SiteRecord:
    known = {JobProtocol[word]: tuple(urls) for word, urls in row.endpoints.items() if word in JobProtocol.__members__}
    return SiteRecord(
        row.id,
        NewSite(
            owner_id=row.owner_id,
            public=row.public,
            name=row.name,
            description=row.description,
            default_folder=row.default_folder,
            endpoints=known,
            limit_in=row.limit_in,
            limit_out=row.limit_out,
            authorities=row.authorities,
            myproxy=row.myproxy,
            mover=MoverKind(row.mover),
        ),
    )


_CATALOGUE_VERSION = sa.select(catalogue.c.version).where(catalogue.c.id == _CATALOGUE_ROW)


def load_snapshot(session: Session, known: int | None) -> SiteSnapshot | None:
    """All sites and restrictions; None if the version is the known one."""
    version = session.scalar(_CATALOGUE_VERSION) or 0
    if version == known:
        return None
    return SiteSnapshot(version, tuple(all_sites(session)), tuple(all_restrictions(session)))
