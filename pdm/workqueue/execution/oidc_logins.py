"""Logins of users at token issuers: begun by a device code, renewed before the access token ends.

A refresh token that the issuer has replaced is stored before the answer is used for anything else, and the one before
it is kept beside it until the next renewal: if the issuer has lost the replacement, the earlier one may still be valid.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Coroutine
from datetime import datetime, timedelta
from typing import Any

from attrs import Factory, define, evolve, field, frozen
from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from pdm.workqueue.certificates.vault import VaultError
from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.oidc import OidcSettings
from pdm.workqueue.execution.issuers import (
    IssuedTokens,
    IssuerRefusedError,
    Issuers,
    IssuerUnavailableError,
)
from pdm.workqueue.execution.login_secrets import LoginSecrets, PendingCode
from pdm.workqueue.sites.registry import Site, SiteRegistry
from pdm.workqueue.store import oidc_logins
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.held_elements import Resumed
from pdm.workqueue.store.oidc_logins import LoginRecord, NewDevice, RenewedToken
from pdm.workqueue.telemetry.background import DueTimer, start_background

#: Seconds until a login is noticed that another daemon has stored.
_LOOK_EVERY_S = 20.0
#: Logins that are renewed at once. A lease is longer than all requests of a renewal take.
_AT_ONCE, _LEASE_S = 8, 300.0
#: Seconds until an issuer is asked again that does not answer; doubles with each failure.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 600.0
#: Seconds until a renewal is tried again that the issuer refuses for a reason that is not the user's.
_REFUSED_PAUSE_S = 600.0
#: Seconds between two renewals of a login, at least.
_LEAST_PERIOD_S = 5.0
#: A code with fewer seconds left is not given out again.
_LEAST_CODE_S = 60
_MOST_INTERVAL_S = 300
#: The refresh token is not accepted any more (RFC 6749, 5.2).
_INVALID_GRANT = "invalid_grant"


class LoginRefusedError(Exception):
    """The login cannot begin, or has failed; the text says why and what to do.

    Attributes:
        is_over: whether a code that the user had to approve is not valid any more.
    """

    def __init__(self, text: str, *, is_over: bool = False) -> None:
        super().__init__(text)
        self.is_over = is_over


@frozen
class LoginProgress:
    """A login, and the code that waits for its user; None if none does."""

    login: LoginRecord
    code: PendingCode | None


@define
class _AwayIssuer:
    """An issuer that does not answer."""

    failures: int
    until: datetime
    why: str


@define(eq=False, kw_only=True)
class OidcLogins:
    """Begins logins, and renews their access tokens.

    Attributes:
        margin_s: an access token is renewed so long before its end.
        protocols: of jobs that may wait for a token.
        on_token: called when a token was stored, with what was resumed in the same transaction.
        timer: to be woken when a login was stored.
    """

    reactor: IReactorTime
    database: Database
    clock: Callable[[], datetime]
    secrets: LoginSecrets
    issuers: Issuers
    sites: SiteRegistry
    incarnation: str
    margin_s: float
    protocols: Callable[[], Collection[JobProtocol]]
    on_token: Callable[[int, int, Resumed], Coroutine[Deferred[Any], Any, None]]
    timer: DueTimer = field(
        init=False,
        default=Factory(
            lambda self: DueTimer(self.reactor, "renew logins", _LOOK_EVERY_S, self._renew_due), takes_self=True
        ),
    )
    _away: dict[str, _AwayIssuer] = field(factory=dict)
    _stopping: bool = False
    _log: Logger = field(factory=Logger)

    def start(self) -> None:
        self.issuers.requests.start()
        self.timer.start()

    async def stop(self) -> None:
        """Wait for renewals that run: their answers may hold the only valid refresh token."""
        self._stopping = True
        await self.timer.stop()
        self.issuers.requests.stop()

    # -- logging in

    async def begin(self, user_id: int, site: Site) -> LoginProgress:
        """Begin a login; a code that waits for the user's approval is given out again.

        Raises:
            LoginRefusedError: the issuer refuses it.
            IssuerUnavailableError: it does not answer.
        """
        oidc, now = _settings(site), self.clock()
        known = await self.database.read("find a login", oidc_logins.fetch, user_id, site.id)
        code = None if known is None else self.secrets.pending_code(known, oidc, now)
        if known is not None and code is not None and code.expires_at > now + timedelta(seconds=_LEAST_CODE_S):
            return LoginProgress(known, code)
        try:
            issued = await self.issuers.device_code(oidc)
        except IssuerRefusedError as error:
            raise LoginRefusedError(f"the issuer {oidc.issuer} refuses the login: {error}") from error
        secret = self.secrets.seal_device(user_id, site.id, oidc, issued)
        until = self.clock() + timedelta(seconds=issued.expires_in_s)
        device = NewDevice(
            issuer=oidc.issuer or "",
            client_id=oidc.client_id or "",
            secret=secret,
            until=until,
            interval_s=issued.interval_s,
        )
        login = await self.database.run("begin a login", oidc_logins.begin, user_id, site.id, device, self.clock())
        return LoginProgress(login, self.secrets.pending_code(login, oidc, self.clock()))

    async def proceed(self, user_id: int, site: Site) -> LoginProgress | None:
        """Ask the issuer whether the user has approved the login, unless it was asked within the interval.

        Returns:
            None if the user has no login at the site.

        Raises:
            LoginRefusedError: it was not approved, or no code waits.
            IssuerUnavailableError: the issuer does not answer.
        """
        oidc, now = _settings(site), self.clock()
        login, may_ask = await self.database.run("ask for a login", oidc_logins.claim_question, user_id, site.id, now)
        if login is None:
            return None
        if login.device is None:
            if login.logged_in_at is not None:
                return LoginProgress(login, None)
            raise LoginRefusedError("the login was not approved in time: begin another one", is_over=True)
        code = self.secrets.pending_code(login, oidc, self.clock())
        if code is None:
            await self.database.run("drop a login", oidc_logins.drop_device, login)
            raise LoginRefusedError("the issuer of the site has changed: begin another login", is_over=True)
        if not may_ask:
            return LoginProgress(login, code)
        try:
            issued = await self.issuers.redeem(oidc, self.secrets.device_code(login))
        except IssuerRefusedError as error:
            return await self._not_approved(login, oidc, error)
        except IssuerUnavailableError:
            # RFC 8628, 3.5: ask less often after a timeout.
            interval_s = min(2 * code.interval_s, _MOST_INTERVAL_S)
            await self.database.run("ask less often", oidc_logins.slow_down, login, interval_s, self.clock())
            raise
        return LoginProgress(await self._logged_in(login, oidc, issued), None)

    async def adopt(self, user_id: int, site: Site, refresh_token: str) -> LoginRecord:
        """Log in by a refresh token that the user has from the issuer, for the same client, by another way.

        Raises:
            LoginRefusedError: the issuer refuses it.
            IssuerUnavailableError: it does not answer.
        """
        oidc = _settings(site)
        try:
            issued = await self.issuers.refresh(oidc, refresh_token)
        except IssuerRefusedError as error:
            raise LoginRefusedError(f"the issuer {oidc.issuer} refuses the refresh token: {error}") from error
        issuer, client_id = oidc.issuer or "", oidc.client_id or ""
        login = await self.database.store("prepare a login", oidc_logins.prepare, user_id, site.id, issuer, client_id)
        # Without another one, the one that was used stays valid.
        issued = evolve(issued, refresh_token=issued.refresh_token or refresh_token)
        return await self._logged_in(login, oidc, issued)

    async def _not_approved(self, login: LoginRecord, oidc: OidcSettings, error: IssuerRefusedError) -> LoginProgress:
        if error.code in ("authorization_pending", "slow_down"):
            if error.code == "slow_down":
                interval_s = min((login.device_interval_s or 5) + 5, _MOST_INTERVAL_S)
                login = await self.database.run(
                    "ask less often", oidc_logins.slow_down, login, interval_s, self.clock()
                )
            return LoginProgress(login, self.secrets.pending_code(login, oidc, self.clock()))
        await self.database.run("drop a login", oidc_logins.drop_device, login)
        if error.code == "access_denied":
            raise LoginRefusedError("the login was refused at the issuer", is_over=True) from error
        if error.code in ("expired_token", _INVALID_GRANT):
            raise LoginRefusedError("the login was not approved in time: begin another one", is_over=True) from error
        raise LoginRefusedError(f"the issuer {oidc.issuer} refuses the login: {error}", is_over=True) from error

    async def _logged_in(self, login: LoginRecord, oidc: OidcSettings, issued: IssuedTokens) -> LoginRecord:
        """Store the tokens of a login; the refresh token comes first, as of a renewal."""
        refresh_token = issued.refresh_token
        exchanged: str | None = None
        if oidc.exchange:
            try:
                issued = await self._exchanged(oidc, issued)
            except (IssuerRefusedError, IssuerUnavailableError) as error:
                exchanged = f"the token exchange failed: {error}"
                if refresh_token is None:
                    raise LoginRefusedError(f"at the issuer {oidc.issuer}, {exchanged}", is_over=True) from error
        secret = None if refresh_token is None else self.secrets.seal_refresh(login, refresh_token, None)
        now = self.clock()
        due_at = None if secret is None else now if exchanged else self._next_renewal(issued, now)
        renewal = RenewedToken(secret=secret, credential=self.secrets.seal_access(login, issued), due_at=due_at)
        device = NewDevice(
            issuer=oidc.issuer or "", client_id=oidc.client_id or "", secret=b"", until=now, interval_s=0
        )
        logged_in, resumed = await self.database.store(
            "store a login", oidc_logins.log_in, login, device, renewal, self.protocols(), now
        )
        self._log.info(
            "user {user} logged in at {issuer} for site {site} as {subject}",
            user=login.user_id,
            issuer=oidc.issuer,
            site=login.site_id,
            subject=issued.subject,
        )
        start_background("use a token", self.on_token(login.user_id, login.site_id, resumed))
        self.timer.wake()
        return logged_in

    async def log_out(self, user_id: int, site_id: int) -> bool:
        """Remove a login and its token, and revoke the refresh token; returns whether there was one."""
        login = await self.database.run("remove a login", oidc_logins.remove, user_id, site_id)
        if login is None:
            return False
        start_background("revoke a refresh token", self._revoke(login))
        return True

    async def _revoke(self, login: LoginRecord) -> None:
        site = self.sites.by_id(login.site_id)
        if login.secret is None or login.ended_at is not None or site is None or not _is_of(login, site.oidc):
            return
        try:
            await self.issuers.revoke(_settings(site), self.secrets.refresh_tokens(login)[0])
        except (IssuerRefusedError, IssuerUnavailableError, VaultError) as error:
            self._log.warn(
                "the refresh token of user {user} is removed, and not revoked at {issuer}: {why}",
                user=login.user_id,
                issuer=login.issuer,
                why=str(error),
            )

    # -- renewing

    async def _renew_due(self) -> float:
        while not self._stopping:
            now = self.clock()
            claimed = await self.database.run(
                "claim logins", oidc_logins.claim_due, self.incarnation, _AT_ONCE, _LEASE_S, now
            )
            if not claimed:
                break
            await DeferredList([Deferred.fromCoroutine(self._attend(login)) for login in claimed])
        due_at = await self.database.read("find the next renewal", oidc_logins.next_due)
        return _LOOK_EVERY_S if due_at is None else max((due_at - self.clock()).total_seconds(), 0.5)

    async def _attend(self, login: LoginRecord) -> None:
        site = self.sites.by_id(login.site_id)
        if site is None or not _is_of(login, site.oidc):
            await self._end(login, "its site is gone, or has another issuer or client now")
            return
        oidc, now = _settings(site), self.clock()
        away = self._away.get(login.issuer)
        if away is not None and away.until > now:
            # One request at a time finds out whether the issuer is back.
            await self._failed(login, away.why, away.until)
            return
        try:
            await self._renew(login, site, oidc)
        except IssuerUnavailableError as error:
            await self._issuer_away(login, str(error))
            return
        except IssuerRefusedError as error:
            await self._refused(login, f"the issuer refuses to renew the token: {error}")
        except VaultError as error:
            await self._end(login, f"the stored refresh token cannot be read ({error})")
        except Exception:
            self._log.failure("a login of user {user} could not be renewed", user=login.user_id)
            again_at = self.clock() + timedelta(seconds=_REFUSED_PAUSE_S)
            await self._failed(login, "a fault of the service: tell an operator", again_at)
        if self._away.pop(login.issuer, None) is not None:
            self._log.info("issuer {issuer} answers again", issuer=login.issuer)

    async def _renew(self, login: LoginRecord, site: Site, oidc: OidcSettings) -> None:
        used = issued = None
        tokens = self.secrets.refresh_tokens(login)
        for used in tokens:
            try:
                issued = await self.issuers.refresh(oidc, used)
                break
            except IssuerRefusedError as error:
                if error.code != _INVALID_GRANT:
                    raise
                refusal = error
        if issued is None:
            words = f"the issuer has ended it ({refusal})"
            if login.leased_by is not None:
                # Its answer may have held the next refresh token.
                words += "; the service was interrupted during the last renewal"
            await self._end(login, words)
            return
        newest = issued.refresh_token or used or tokens[0]
        spare = used if newest != used else None
        secret = self.secrets.seal_refresh(login, newest, spare)
        if oidc.exchange:
            kept = await self.database.store("keep a refresh token", oidc_logins.keep_secret, login, secret)
            if kept is None:
                return
            login = kept
            try:
                issued = await self._exchanged(oidc, issued)
            except IssuerUnavailableError as error:
                await self._issuer_away(login, f"the token exchange failed: {error}")
                return
            except IssuerRefusedError as error:
                await self._refused(login, f"the token exchange failed: {error}")
                return
        now = self.clock()
        renewal = RenewedToken(
            secret=secret, credential=self.secrets.seal_access(login, issued), due_at=self._next_renewal(issued, now)
        )
        resumed = await self.database.store(
            "store a renewal", oidc_logins.renewed, login, renewal, self.protocols(), now
        )
        if resumed is not None:
            start_background("use a token", self.on_token(login.user_id, site.id, resumed))

    async def _exchanged(self, oidc: OidcSettings, issued: IssuedTokens) -> IssuedTokens:
        return evolve(await self.issuers.exchange(oidc, issued.access_token), refresh_token=issued.refresh_token)

    async def _refused(self, login: LoginRecord, why: str) -> None:
        """The issuer refuses what the user cannot mend, for example an unknown client."""
        self._log.warn("issuer {issuer} renews no token: {why}", issuer=login.issuer, why=why)
        await self._failed(login, why, self.clock() + timedelta(seconds=_REFUSED_PAUSE_S))

    async def _issuer_away(self, login: LoginRecord, why: str) -> None:
        away = self._away.get(login.issuer)
        failures = 0 if away is None else away.failures
        pause_s = min(_FIRST_PAUSE_S * 2.0 ** min(failures, 10), _LONGEST_PAUSE_S)
        until = self.clock() + timedelta(seconds=pause_s)
        if away is None:
            self._log.warn(
                "issuer {issuer} does not renew tokens: {why}; it is asked again", issuer=login.issuer, why=why
            )
        self._away[login.issuer] = _AwayIssuer(failures + 1, until, why)
        await self._failed(login, why, until)

    async def _failed(self, login: LoginRecord, error: str, due_at: datetime) -> None:
        await self.database.store("store a failed renewal", oidc_logins.failed, login, error, due_at)

    async def _end(self, login: LoginRecord, why: str) -> None:
        stored = await self.database.store("end a login", oidc_logins.failed, login, why, None, self.clock())
        if stored:
            self._log.warn(
                "the login of user {user} at {issuer} for site {site} is over: {why}",
                user=login.user_id,
                issuer=login.issuer,
                site=login.site_id,
                why=why,
            )
            # What is HELD until the issuer answers is HELD until the user logs in from now on.
            start_background("hold what waits", self.on_token(login.user_id, login.site_id, Resumed(0, (0, -1))))

    def _next_renewal(self, issued: IssuedTokens, now: datetime) -> datetime:
        left_s = (issued.valid_until - now).total_seconds()
        return now + timedelta(seconds=max(left_s - min(self.margin_s, left_s / 2), _LEAST_PERIOD_S))


def _settings(site: Site) -> OidcSettings:
    if site.oidc is None or not site.oidc.has_login:
        raise LoginRefusedError(f"site {site.name} has no client at a token issuer: give a token (pdm token)")
    return site.oidc


def _is_of(login: LoginRecord, oidc: OidcSettings | None) -> bool:
    """Whether the refresh token of a login belongs to the issuer and client of its site."""
    return oidc is not None and (oidc.issuer, oidc.client_id) == (login.issuer, login.client_id)
