"""Logins of users at the token issuers of sites; secrets are encrypted before they are stored here.

One daemon at a time renews a login, under a lease as of webhooks. A renewal is stored if the login is still the one
that was renewed (`LoginRecord.generation`), whatever became of the lease: the answer may hold the only refresh token
that is still valid.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import datetime, timedelta

import attrs
import sqlalchemy as sa
from attrs import field, frozen
from sqlalchemy.orm import Session

from pdm.workqueue.domain.credentials import MIN_VALIDITY, CredentialKind
from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.oidc import LoginState
from pdm.workqueue.store import credentials, held_elements
from pdm.workqueue.store.credentials import EncryptedCredential
from pdm.workqueue.store.held_elements import Resumed
from pdm.workqueue.store.leases import is_free, lease_clock
from pdm.workqueue.store.records import matched, oidc_logins


@frozen
class LoginRecord:
    """A login; see `pdm.workqueue.WorkqueueDB.OidcLoginRow`."""

    id: int
    user_id: int
    site_id: int
    issuer: str
    client_id: str
    secret: bytes | None = field(repr=False)
    generation: int
    subject: str
    logged_in_at: datetime | None
    refreshed_at: datetime | None
    valid_until: datetime | None
    due_at: datetime | None
    failures: int
    error: str | None
    ended_at: datetime | None
    device: bytes | None = field(repr=False)
    device_until: datetime | None
    device_due_at: datetime | None
    device_interval_s: int | None
    leased_by: str | None

    def state(self, now: datetime) -> LoginState:
        if self.device_until is not None and self.device_until > now:
            return LoginState.WAITING
        if self.logged_in_at is None or self.ended_at is not None:
            return LoginState.ENDED
        if self.due_at is None and (self.valid_until is None or self.valid_until <= now):
            return LoginState.ENDED
        return LoginState.RETRYING if self.failures else LoginState.ACTIVE

    def problem(self, now: datetime) -> str:
        """Why the token has ended, in words, and what to do about it."""
        if self.state(now) is LoginState.ENDED:
            why = f": {self.error}" if self.error else ""
            return f"the login at {self.issuer} has ended{why}; run 'pdm login {self.site_id} --oidc'"
        why = f" ({self.error})" if self.error else ""
        return f"the token for site {self.site_id} has ended, and its issuer {self.issuer} has not renewed it yet{why}"


@frozen(kw_only=True)
class NewDevice:
    """A code that a user has to approve.

    Attributes:
        secret: the encrypted code.
    """

    issuer: str
    client_id: str
    secret: bytes = field(repr=False)
    until: datetime
    interval_s: int


@frozen(kw_only=True)
class RenewedToken:
    """What an issuer has given.

    Attributes:
        secret: the encrypted refresh tokens; None if there is none.
        credential: the access token.
        due_at: the next renewal; None for never.
    """

    secret: bytes | None = field(repr=False)
    credential: EncryptedCredential
    due_at: datetime | None


_COLUMNS = tuple(oidc_logins.c[each.name] for each in attrs.fields(LoginRecord))
_NO_DEVICE: dict[str, None] = dict.fromkeys(("device", "device_until", "device_due_at", "device_interval_s"))


def fetch(session: Session, user_id: int, site_id: int) -> LoginRecord | None:
    """The user's login at a site, ended or not."""
    row = session.execute(sa.select(*_COLUMNS).where(*_at(user_id, site_id))).one_or_none()
    return None if row is None else LoginRecord(**row._mapping)


def of_user(session: Session, user_id: int) -> list[LoginRecord]:
    """All logins of a user, by site."""
    statement = sa.select(*_COLUMNS).where(oidc_logins.c.user_id == user_id).order_by(oidc_logins.c.site_id)
    return [LoginRecord(**row._mapping) for row in session.execute(statement)]


def begin(session: Session, user_id: int, site_id: int, new: NewDevice, now: datetime) -> LoginRecord:
    """Store a code that the user has to approve; the login that there is stays until then."""
    values = {
        "device": new.secret,
        "device_until": new.until,
        "device_due_at": now + timedelta(seconds=new.interval_s),
        "device_interval_s": new.interval_s,
    }
    login = prepare(session, user_id, site_id, new.issuer, new.client_id)
    _change(session, login, **values)
    return _fetched(session, user_id, site_id)


def prepare(session: Session, user_id: int, site_id: int, issuer: str, client_id: str) -> LoginRecord:
    """The user's login at a site; if there is none, one that has not begun."""
    known = fetch(session, user_id, site_id)
    if known is not None:
        return known
    first = {"issuer": issuer, "client_id": client_id, "generation": 0, "subject": "", "failures": 0}
    # A second request at the same time fails by the constraint, and is retried.
    session.execute(sa.insert(oidc_logins).values(user_id=user_id, site_id=site_id, **first))
    return _fetched(session, user_id, site_id)


def claim_question(session: Session, user_id: int, site_id: int, now: datetime) -> tuple[LoginRecord | None, bool]:
    """The login, and whether the issuer may be asked now: at most once in each interval, through any daemon."""
    statement = sa.select(*_COLUMNS).where(*_at(user_id, site_id)).with_for_update()
    row = session.execute(statement).one_or_none()
    if row is None:
        return None, False
    login = LoginRecord(**row._mapping)
    if login.device_due_at is None or login.device_interval_s is None or login.device_until is None:
        return login, False
    if login.device_until <= now:
        _change(session, login, **_NO_DEVICE)
        return _fetched(session, user_id, site_id), False
    # A time far in the future is that of a clock that was set back since.
    interval = timedelta(seconds=login.device_interval_s)
    if now < login.device_due_at <= now + interval:
        return login, False
    _change(session, login, device_due_at=now + interval)
    return login, True


def slow_down(session: Session, login: LoginRecord, interval_s: int, now: datetime) -> LoginRecord:
    """Ask the issuer less often."""
    if _is_same_device(session, login):
        due_at = now + timedelta(seconds=interval_s)
        _change(session, login, device_interval_s=interval_s, device_due_at=due_at)
    return _fetched(session, login.user_id, login.site_id)


def drop_device(session: Session, login: LoginRecord) -> None:
    """Forget a code that the user has refused."""
    if _is_same_device(session, login):
        _change(session, login, **_NO_DEVICE)


def _is_same_device(session: Session, login: LoginRecord) -> bool:
    until = session.scalar(sa.select(oidc_logins.c.device_until).where(oidc_logins.c.id == login.id).with_for_update())
    return until is not None and until == login.device_until


def log_in(
    session: Session,
    login: LoginRecord,
    device: NewDevice,
    renewal: RenewedToken,
    protocols: Collection[JobProtocol],
    now: datetime,
) -> tuple[LoginRecord, Resumed]:
    """Store the tokens of an approved code, in place of those of an earlier login; ``device``: whose they are.

    Returns:
        The login, and what of the elements that were HELD for a token went back to the queue.
    """
    credential, due_at = renewal.credential, renewal.due_at
    values = {
        "issuer": device.issuer,
        "client_id": device.client_id,
        "secret": renewal.secret,
        "generation": oidc_logins.c.generation + 1,
        "subject": credential.subject,
        "logged_in_at": now,
        "leased_by": None,
    }
    if not _change(session, login, **values, **_renewed(renewal, now), **_NO_DEVICE, due_at=due_at):
        # Logged off meanwhile.
        return login, Resumed(0, None)
    resumed = _put(session, login, credential, protocols, now)
    return _fetched(session, login.user_id, login.site_id), resumed


def claim_due(session: Session, incarnation: str, most: int, lease_s: float, now: datetime) -> list[LoginRecord]:
    """Lease logins whose access tokens are to be renewed; `LoginRecord.leased_by` is of the daemon before."""
    timestamp = lease_clock(session, now)
    unleased = is_free(oidc_logins, timestamp)
    statement = sa.select(*_COLUMNS).where(oidc_logins.c.due_at <= now, unleased)
    due = session.execute(statement.order_by(oidc_logins.c.due_at).limit(most)).all()
    lease = {"leased_by": incarnation, "leased_until": timestamp + timedelta(seconds=lease_s)}
    taken = []
    for row in due:
        claim = sa.update(oidc_logins).where(
            oidc_logins.c.id == row.id, oidc_logins.c.generation == row.generation, unleased
        )
        if matched(session, claim.values(lease)):
            taken.append(LoginRecord(**row._mapping))
    return taken


def keep_secret(session: Session, login: LoginRecord, secret: bytes) -> LoginRecord | None:
    """Store other refresh tokens before anything else is done with the answer; None if the login is another by now."""
    generation = login.generation + 1
    if not _change_same(session, login, secret=secret, generation=generation):
        return None
    return attrs.evolve(login, secret=secret, generation=generation)


def renewed(
    session: Session, login: LoginRecord, renewal: RenewedToken, protocols: Collection[JobProtocol], now: datetime
) -> Resumed | None:
    """Store a renewal; None if the login is another by now, or the user has logged off."""
    values = {"secret": renewal.secret, "generation": login.generation + 1, "leased_by": None}
    if not _change_same(session, login, **values, **_renewed(renewal, now), due_at=renewal.due_at):
        return None
    return _put(session, login, renewal.credential, protocols, now)


def failed(
    session: Session, login: LoginRecord, error: str, due_at: datetime | None, ended_at: datetime | None = None
) -> bool:
    """Store that a renewal failed; with ``ended_at`` it is not tried again."""
    values = {"failures": login.failures + 1, "error": error, "due_at": due_at, "ended_at": ended_at}
    return _change_same(session, login, **values, leased_by=None)


def next_due(session: Session) -> datetime | None:
    """When the next login is to be renewed; None if there is none."""
    due: datetime | None = session.scalar(sa.select(sa.func.min(oidc_logins.c.due_at)))
    return due


def remove(session: Session, user_id: int, site_id: int) -> LoginRecord | None:
    """Delete a login with its token; returns it."""
    found = fetch(session, user_id, site_id)
    if found is None:
        return None
    session.execute(sa.delete(oidc_logins).where(*_at(user_id, site_id)))
    stored = credentials.find(session, user_id, CredentialKind.TOKEN, site_id)
    if stored is not None and stored.is_renewed:
        credentials.remove(session, user_id, CredentialKind.TOKEN, site_id)
    return found


def remove_credential(session: Session, user_id: int, number: int) -> bool:
    """Delete the user's credential of an id, and the login that renews it; returns whether there was one."""
    found = credentials.fetch_many(session, [number]).get(number)
    if found is not None and found.user_id == user_id and found.is_renewed:
        session.execute(sa.delete(oidc_logins).where(*_at(user_id, found.site_id)))
    return credentials.remove_number(session, user_id, number)


def _put(
    session: Session,
    login: LoginRecord,
    credential: EncryptedCredential,
    protocols: Collection[JobProtocol],
    now: datetime,
) -> Resumed:
    credentials.put(session, login.user_id, credential, now)
    return held_elements.resume_held(session, login.user_id, now, login.site_id, protocols)


def _renewed(renewal: RenewedToken, now: datetime) -> dict[str, object]:
    return {
        "refreshed_at": now,
        "valid_until": renewal.credential.valid_until,
        "failures": 0,
        "error": None,
        "ended_at": None,
    }


def _change(session: Session, login: LoginRecord, **values: object) -> bool:
    return bool(matched(session, sa.update(oidc_logins).where(oidc_logins.c.id == login.id).values(**values)))


def _change_same(session: Session, login: LoginRecord, **values: object) -> bool:
    is_same = (oidc_logins.c.id == login.id, oidc_logins.c.generation == login.generation)
    return bool(matched(session, sa.update(oidc_logins).where(*is_same).values(**values)))


def _at(user_id: int, site_id: int) -> tuple[sa.ColumnElement[bool], ...]:
    return oidc_logins.c.user_id == user_id, oidc_logins.c.site_id == site_id


def _fetched(session: Session, user_id: int, site_id: int) -> LoginRecord:
    found = fetch(session, user_id, site_id)
    assert found is not None, "it was just written"
    return found


def login_problem(found: Iterable[LoginRecord], sites: Collection[int], now: datetime) -> LoginRecord | None:
    """The login for one of some sites whose token is missing or has ended; None if there is none."""
    soon = now + MIN_VALIDITY
    for login in found:
        has_ended = login.valid_until is None or login.valid_until <= soon
        if login.site_id in sites and login.logged_in_at is not None and has_ended:
            return login
    return None
