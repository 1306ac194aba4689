"""Which credential fits a route."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from attrs import frozen

from pdm.workqueue.domain.credentials import (
    CredentialKind,
    CredentialNeed,
    NoCredentialError,
    choose_credentials,
    choose_credentials_by_need,
    earliest_expiry,
)
from pdm.workqueue.domain.failures import FailureCode

NOW = datetime(2026, 3, 2, tzinfo=UTC)
PROXY, KEY, TOKEN, _S3_KEY = CredentialKind


@frozen
class Given:
    """A credential; `hours` left, None for ever."""

    site_id: int
    subject: str = "/CN=a"
    hours: float | None = 1.0
    kind: CredentialKind = PROXY

    @property
    def valid_until(self) -> datetime | None:
        return None if self.hours is None else NOW + timedelta(hours=self.hours)


def test_a_sites_own_comes_before_the_one_for_all() -> None:
    everywhere, own = Given(0, "/CN=all"), Given(1, "/CN=own")
    assert choose_credentials([everywhere, own], PROXY, [1], NOW) == {1: own}
    assert choose_credentials([everywhere, own], PROXY, [2], NOW) == {2: everywhere}
    assert choose_credentials([everywhere, Given(1, hours=-1)], PROXY, [1], NOW) == {1: everywhere}


def test_keys_are_each_sites_own() -> None:
    one, two = Given(1, "SHA256:1", None), Given(2, "SHA256:2", None)
    chosen = choose_credentials([one, two], KEY, [1, 2], NOW)
    assert chosen == {1: one, 2: two}
    assert earliest_expiry(chosen) is None
    assert earliest_expiry(choose_credentials([one, Given(2, hours=3)], TOKEN, [1, 2], NOW)) == NOW + timedelta(hours=3)


def test_a_proxy_is_one_for_the_whole_route() -> None:
    short, long = Given(1, hours=1), Given(2, hours=5)
    assert choose_credentials([short, long], PROXY, [1, 2], NOW) == {1: long, 2: long}
    everywhere, other = Given(0, "/CN=a"), Given(2, "/CN=b")
    assert choose_credentials([everywhere, other], PROXY, [1, 2], NOW) == {1: everywhere, 2: everywhere}
    with pytest.raises(NoCredentialError, match="different subjects") as caught:
        choose_credentials([Given(1, "/CN=a"), Given(2, "/CN=b")], PROXY, [1, 2], NOW)
    assert caught.value.code is FailureCode.CREDENTIAL_MISSING


@pytest.mark.parametrize("kind", list(CredentialKind))
def test_none_and_expired_ones_are_distinguished(kind: CredentialKind) -> None:
    for found, code, words in (
        ([], FailureCode.CREDENTIAL_MISSING, "for site 1"),
        ([Given(2)], FailureCode.CREDENTIAL_MISSING, "for site 1"),
        ([Given(1, hours=0)], FailureCode.CREDENTIAL_EXPIRED, "expired at 2026-03-02T00:00:00Z"),
        ([Given(0, hours=-2), Given(1, hours=-1)], FailureCode.CREDENTIAL_EXPIRED, "2026-03-01T23:00:00Z"),
    ):
        with pytest.raises(NoCredentialError, match=words) as caught:
            choose_credentials(found, kind, [1], NOW)
        assert caught.value.code is code


def test_the_ends_of_a_route_may_need_unlike_kinds() -> None:
    key, proxy = Given(1, "SHA256:1", None, KEY), Given(0)
    needs = {1: CredentialNeed((KEY,)), 2: CredentialNeed((TOKEN, PROXY))}
    assert choose_credentials_by_need([key, proxy], needs, NOW) == {1: key, 2: proxy}
    token = Given(2, "me", 1.0, TOKEN)
    assert choose_credentials_by_need([key, proxy, token], needs, NOW) == {1: key, 2: token}
    assert choose_credentials_by_need([key, proxy, Given(2, "me", -1.0, TOKEN)], needs, NOW) == {1: key, 2: proxy}
    with pytest.raises(NoCredentialError, match="no credential has been delegated for site 2") as caught:
        choose_credentials_by_need([key], needs, NOW)
    assert caught.value.kind is PROXY


def test_the_service_uses_its_own_key_for_users_without_one() -> None:
    lent = CredentialNeed((KEY,), optional=True)
    assert choose_credentials_by_need([], {1: lent}, NOW) == {}
    own = Given(1, "SHA256:1", None, KEY)
    assert choose_credentials_by_need([own], {1: lent}, NOW) == {1: own}
    with pytest.raises(NoCredentialError) as caught:
        choose_credentials_by_need([Given(1, "SHA256:1", -1.0, KEY)], {1: lent}, NOW)
    assert caught.value.code is FailureCode.CREDENTIAL_EXPIRED
    with pytest.raises(NoCredentialError):
        choose_credentials_by_need([], {1: lent.at(7)}, NOW)
    assert lent.at(None) == lent
