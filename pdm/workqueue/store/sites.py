"""Sites that users have created, and the restrictions (drained sites, banned users) of operators.

Callers check permissions; this module checks what only the database can. Changes are serialized, and each increments
the version of the catalogue, by which other daemons notice that they must reload it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobProtocol, JobStatus, MoverKind
from pdm.workqueue.domain.node_reports import SignalKind
from pdm.workqueue.domain.oidc import OidcSettings
from pdm.workqueue.domain.sites import (
    LAST_FILE_SITE,
    Actor,
    NewSite,
    Restriction,
    RestrictionKind,
    SiteRecord,
    SiteSnapshot,
)
from pdm.workqueue.store import signals, users
from pdm.workqueue.store.records import (
    catalogue,
    credentials,
    jobs,
    matched,
    oidc_logins,
    predecessors,
    restrictions,
    sites,
)
from pdm.workqueue.WorkqueueDB import HAS_HELD, HAS_HOLD, HAS_LISTING, HAS_RUNNING, HAS_WORK

_CATALOGUE_ROW = 1


def begin_change(session: Session) -> None:
    """Serialize a change: other changes wait for its commit. The first statement of the transaction."""
    signals.note(session, SignalKind.SITES)
    bump = sa.update(catalogue).where(catalogue.c.id == _CATALOGUE_ROW).values(version=catalogue.c.version + 1)
    if not matched(session, bump):
        # Two transactions may insert at once: the second one fails and is retried.
        session.execute(sa.insert(catalogue).values(id=_CATALOGUE_ROW, version=1, last_site=LAST_FILE_SITE))


def next_site_number(session: Session) -> int:
    """A number that no site ever had: jobs refer to it permanently."""
    session.execute(
        sa.update(catalogue).where(catalogue.c.id == _CATALOGUE_ROW).values(last_site=catalogue.c.last_site + 1)
    )
    return int(session.scalars(sa.select(catalogue.c.last_site).where(catalogue.c.id == _CATALOGUE_ROW)).one())


_RESTRICTION_COLUMNS = tuple(restrictions.c[name] for name in ("kind", "number", "message", "subject", "since"))
#: kind → actions in the audit log: to restrict, to lift the restriction.
_ACTIONS = {RestrictionKind.SITE: ("site.drain", "site.resume"), RestrictionKind.USER: ("user.ban", "user.unban")}


def all_restrictions(session: Session) -> Iterator[Restriction]:
    for row in session.execute(sa.select(*_RESTRICTION_COLUMNS)):
        yield Restriction(RestrictionKind(row.kind), row.number, row.message, by=row.subject, since=row.since)


def restrict(
    session: Session, kind: RestrictionKind, number: int, message: str, by: Actor, now: datetime
) -> Restriction:
    """Restrict a site or a user; replaces the message of an existing restriction."""
    begin_change(session)
    session.execute(sa.delete(restrictions).where(*_is_restriction_of(kind, number)))
    session.execute(
        sa.insert(restrictions).values(kind=kind.value, number=number, message=message, subject=by.subject, since=now)
    )
    users.record_action(session, by, _ACTIONS[kind][0], f"{kind.value} {number}", message, now)
    return Restriction(kind, number, message, by.subject, now)


def lift_restriction(session: Session, kind: RestrictionKind, number: int, by: Actor, now: datetime) -> bool:
    """End a restriction; returns whether there was one."""
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
        *("endpoints", "limit_in", "limit_out", "authorities", "myproxy", "mover", "tape", "fts"),
        *("unlisted", "oidc", "oidc_secret"),
    )
)
#: Sites of one user; bounds the memory, where all sites are kept.
MOST_OF_OWNER = 200
#: Of these, sites that the service has made of URLs of one user.
MOST_UNLISTED = 500
_COUNT_OF_OWNER = (
    sa.select(sa.func.count())
    .select_from(sites)
    .where(sites.c.owner_id == sa.bindparam("owner"), sites.c.unlisted == sa.bindparam("of_urls"))
)
#: Unfinished jobs, read from partial indexes that contain no ended jobs. A UNION, because neither database combines
#: several partial indexes for an OR.
_UNFINISHED = sa.union(
    *(
        sa.select(jobs.c.id).where(
            sa.text(condition),
            sa.or_(jobs.c.src_siteid == sa.bindparam("site"), jobs.c.dst_siteid == sa.bindparam("site")),
        )
        for condition in (HAS_WORK, HAS_LISTING, HAS_RUNNING, HAS_HELD, HAS_HOLD)
    ),
    sa.select(jobs.c.id).where(
        # Jobs that wait for others are in none of these indexes.
        jobs.c.id.in_(sa.select(predecessors.c.job_id)),
        jobs.c.status == JobStatus.SUBMITTED,
        sa.or_(jobs.c.src_siteid == sa.bindparam("site"), jobs.c.dst_siteid == sa.bindparam("site")),
    ),
).subquery()
_COUNT_UNFINISHED = sa.select(sa.func.count()).select_from(_UNFINISHED)


class NameTakenError(Exception):
    """Another site that the owner, or everybody, can see has the name."""


class SiteInUseError(Exception):
    """Unfinished jobs need the site."""

    def __init__(self, count: int) -> None:
        super().__init__(f"{count} jobs that have not ended need the site")
        self.jobs = count


class TooManySitesError(Exception):
    """The owner has `MOST_OF_OWNER` sites, or `MOST_UNLISTED` that were made of URLs."""


def all_sites(session: Session) -> Iterator[SiteRecord]:
    """All sites of the database, by ascending id."""
    for row in session.execute(sa.select(*_COLUMNS).order_by(sites.c.id)):
        yield _record(row)


def create(session: Session, new: NewSite, by: Actor, now: datetime) -> SiteRecord:
    """Create a site. Returns the existing one if it is identical, because a client may repeat a request.

    Raises:
        NameTakenError: another site has the name.
        TooManySitesError: the owner has as many as one may have.
    """
    begin_change(session)
    for known in _same_name(session, new):
        if known.content == new:
            return known
        raise NameTakenError
    most = MOST_UNLISTED if new.unlisted else MOST_OF_OWNER
    if (session.scalar(_COUNT_OF_OWNER, {"owner": new.owner_id, "of_urls": new.unlisted}) or 0) >= most:
        of_urls = " that were made of URLs" if new.unlisted else ""
        raise TooManySitesError(f"you have {most} sites{of_urls}: remove some you do not use any more")
    number = next_site_number(session)
    session.execute(sa.insert(sites).values(id=number, created_at=now, **_values(new)))
    users.record_action(session, by, "site.create", f"site {number}", _audit_details(new), now)
    return SiteRecord(number, new)


def change(
    session: Session, number: int, changed: Callable[[NewSite], NewSite], by: Actor, now: datetime
) -> SiteRecord | None:
    """Change the description of a site; None if it does not exist any more.

    ``changed``: computes the new description from the current one, which another daemon may just have changed.

    Raises:
        NameTakenError: another site has the new name.
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
    """Remove a site that no unfinished job needs; returns whether it existed.

    Raises:
        SiteInUseError: an unfinished job needs it.
    """
    begin_change(session)
    # FOR UPDATE conflicts with the lock of a job that is being registered (`missing`).
    locked = session.execute(sa.select(sites.c.name).where(sites.c.id == number).with_for_update()).one_or_none()
    if locked is None:
        return False
    used = session.scalar(_COUNT_UNFINISHED, {"site": number})
    if used:
        raise SiteInUseError(used)
    session.execute(sa.delete(sites).where(sites.c.id == number))
    session.execute(sa.delete(credentials).where(credentials.c.site_id == number))
    session.execute(sa.delete(oidc_logins).where(oidc_logins.c.site_id == number))
    session.execute(sa.delete(restrictions).where(restrictions.c.kind == "site", restrictions.c.number == number))
    users.record_action(session, by, "site.remove", f"site {number}", locked.name, now)
    return True


def missing(session: Session, numbers: Collection[int]) -> set[int]:
    """Those of some sites that do not exist; the others cannot be removed before this transaction ends."""
    found = session.scalars(
        sa.select(sites.c.id).where(sites.c.id.in_(numbers)).order_by(sites.c.id).with_for_update(read=True)
    )
    return set(numbers) - set(found)


def _same_name(session: Session, content: NewSite) -> list[SiteRecord]:
    """Sites of that name that the owner can see; for a public site, also those of every user who would see both."""
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
        "tape": content.tape,
        "fts": content.fts,
        "unlisted": content.unlisted,
        "oidc": None if content.oidc is None else _oidc_values(content.oidc),
        "oidc_secret": None if content.oidc is None else content.oidc.sealed_secret,
    }


def _oidc_values(oidc: OidcSettings) -> dict[str, Any]:
    return {
        "issuer": oidc.issuer,
        "client_id": oidc.client_id,
        "scope": oidc.scope,
        "audiences": list(oidc.audiences),
        "base_path": oidc.base_path,
        "exchange": oidc.exchange,
    }


def _oidc_of(row: sa.Row[Any]) -> OidcSettings | None:
    if row.oidc is None:
        return None
    return OidcSettings(**{**row.oidc, "audiences": tuple(row.oidc["audiences"])}, sealed_secret=row.oidc_secret)


def _audit_details(content: NewSite) -> str:
    urls = " ".join(url for urls in content.endpoints.values() for url in urls)
    own = " with authorities of its own" if content.authorities else ""
    logon = f", logon at {content.myproxy}" if content.myproxy else ""
    mover = f", moved by {content.mover}" if content.mover is not MoverKind.NATIVE else ""
    tape = f", tape API {content.tape}" if content.tape else ""
    fts = f", copies by {content.fts}" if content.fts else ""
    issuer = f", tokens of {content.oidc.issuer}" if content.oidc is not None and content.oidc.issuer else ""
    return f"{content.name}, {'public' if content.public else 'private'}{own}{logon}{mover}{tape}{fts}{issuer}: {urls}"


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
            tape=row.tape,
            fts=row.fts,
            unlisted=row.unlisted,
            oidc=_oidc_of(row),
        ),
    )


_CATALOGUE_VERSION = sa.select(catalogue.c.version).where(catalogue.c.id == _CATALOGUE_ROW)


def load_snapshot(session: Session, known: int | None) -> SiteSnapshot | None:
    """All sites and restrictions; None if the version is ``known``."""
    version = session.scalar(_CATALOGUE_VERSION) or 0
    if version == known:
        return None
    return SiteSnapshot(version, tuple(all_sites(session)), tuple(all_restrictions(session)))
