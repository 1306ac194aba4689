"""Whether the credentials of a user last for a job; functions run in the transaction that registers it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from attrs import frozen
from sqlalchemy.orm import Session

from pdm.workqueue.domain.credentials import (
    CredentialKind,
    CredentialNeed,
    NoCredentialError,
    choose_credentials_by_need,
    needed_kinds,
)
from pdm.workqueue.domain.jobs import NewJob
from pdm.workqueue.domain.oidc import LoginState
from pdm.workqueue.http.context import CredentialExpiry, CredentialLifetimes, first_expiry
from pdm.workqueue.http.problems import DelegationNeededError
from pdm.workqueue.store import credentials, oidc_logins
from pdm.workqueue.store.oidc_logins import login_problem
from pdm.workqueue.wire.responses import timestamp_text


@frozen
class CredentialNeeds:
    """Credentials that a job needs, by site, and their required remaining lifetimes."""

    sites: Mapping[int, CredentialNeed]
    lifetimes: CredentialLifetimes


def check_credential(session: Session, new: NewJob, needed: CredentialNeeds, now: datetime) -> list[str]:
    """Check that the user's credentials are valid for long enough; returns warnings."""
    lifetimes = needed.lifetimes
    found = [each for kind in needed_kinds(needed.sites) for each in credentials.of_kind(session, new.user_id, kind)]
    try:
        chosen = choose_credentials_by_need(found, needed.sites, now)
    except NoCredentialError as error:
        kind = error.kind
        if warning := _login_warning(session, new.user_id, needed.sites, now):
            return [warning]
        if not any(each.kind is kind for each in found):
            what = "the service holds no credential of yours"
            what += "" if kind is CredentialKind.PROXY else f" ({kind.words})"
        else:
            what = str(error)
        raise DelegationNeededError(f"{what}: {kind.remedy}, then submit again") from error
    first = first_expiry({site: each for site, each in chosen.items() if not each.is_renewed})
    if first is None or first.at >= now + max(lifetimes.least, lifetimes.expected):
        return []
    end, kind = first.at, first.kind
    if end < now + lifetimes.least:
        raise DelegationNeededError(
            f"your {kind.words} expires at {timestamp_text(end)}, and a job needs at least "
            f"{lifetimes.least.total_seconds():.0f} s: {kind.remedy}, then submit again"
        )
    return [
        f"your {kind.words} expires at {timestamp_text(end)}, possibly before this job ends: the remaining elements"
        f" will then be held, and resume automatically when you renew it ({kind.remedy})"
    ]


def _login_warning(session: Session, user_id: int, needs: Mapping[int, CredentialNeed], now: datetime) -> str | None:
    """A warning, if the issuer has not renewed the token of a login; None if there is no such login.

    Raises:
        DelegationNeededError: the login has ended.
    """
    # The error may be that of a proxy, which is used where there is no valid token.
    wanted = [site for site, need in needs.items() if CredentialKind.TOKEN in need.kinds]
    login = login_problem(oidc_logins.of_user(session, user_id), wanted, now)
    if login is None:
        return None
    if login.state(now) is LoginState.ENDED:
        raise DelegationNeededError(f"{login.problem(now)}, then submit again")
    return f"{login.problem(now)}; the job waits for it"


def first_credential_expiry(
    session: Session, user_id: int, needs: Mapping[int, CredentialNeed], now: datetime
) -> CredentialExpiry | None:
    """Earliest expiry of the credentials that a job uses; None if none expires, or one is missing."""
    found = [each for kind in needed_kinds(needs) for each in credentials.of_kind(session, user_id, kind)]
    try:
        chosen = choose_credentials_by_need(found, needs, now)
        return first_expiry({site: each for site, each in chosen.items() if not each.is_renewed})
    except NoCredentialError:
        # The next attempt reports it.
        return None
