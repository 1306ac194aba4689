"""Files of credentials: one for each, shared while they are the same, removed when no agent uses them."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from attrs import define, evolve, field

from pdm.workqueue.certificates.files import CredentialFiles
from pdm.workqueue.certificates.vault import Vault
from pdm.workqueue.domain.credentials import CredentialKind, CredentialNeed
from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.execution.credentials import Credentials, CredentialUnusableError, OutdatedCredentials, vault_context
from pdm.workqueue.store import credentials, oidc_logins
from pdm.workqueue.store.credentials import CredentialRecord

NOW = datetime(2026, 3, 2, tzinfo=UTC)
PROXY, KEY, TOKEN = CredentialKind.PROXY, CredentialKind.SSH_KEY, CredentialKind.TOKEN


@define
class Stored:
    """Stands for the database: answers with the records of a kind."""

    records: list[CredentialRecord] = field(factory=list)
    is_shared: bool = False
    reads: int = 0

    async def read(self, _name: str, function: object, *arguments: Any) -> Any:
        self.reads += 1
        if function is credentials.fetch_many:
            return {record.id: record for record in self.records if record.id in arguments[0]}
        if function is oidc_logins.of_user:
            return []
        return [record for record in self.records if record.kind is arguments[1]]


@pytest.fixture
def stored() -> Stored:
    return Stored()


@pytest.fixture
def handed_out(stored: Stored, tmp_path: Path) -> Credentials:
    vault = Vault.open(tmp_path / "key")
    return Credentials(database=stored, vault=vault, files=CredentialFiles(tmp_path / "run"))  # type: ignore[arg-type]


def give(handed_out: Credentials, stored: Stored, kind: CredentialKind, site: int, text: str, **details: Any) -> None:
    sealed = handed_out.vault.seal(text.encode(), vault_context(7, kind, site))
    until = NOW + timedelta(hours=1)
    number = len(stored.records) + 1
    stored.records.append(CredentialRecord(number, 7, kind, site, None, "/CN=a", until, details, NOW, sealed))


def test_each_site_has_its_key(
    handed_out: Credentials, stored: Stored, tmp_path: Path, result_of: Callable[..., Any]
) -> None:
    give(handed_out, stored, KEY, 1, "key one", account="alice")
    give(handed_out, stored, KEY, 2, "key two")
    usable = result_of(handed_out.usable(7, KEY, {1, 2}, NOW))
    assert [(usable.sites[site].path.read_text(), usable.sites[site].account) for site in (1, 2)] == [
        ("key one", "alice"),
        ("key two", None),
    ]
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "run").iterdir()} == {0o600}
    of_one = {"file": str(usable.sites[1].path), "account": "alice"}
    assert json.loads(usable.variable({1: ("sftp://one:22", "sftp://uno:22")})) == {
        "sftp://one:22": of_one,
        "sftp://uno:22": of_one,
    }
    again = result_of(handed_out.usable(7, KEY, {1, 2}, NOW))
    assert again == usable
    handed_out.release(usable.fingerprint)
    handed_out.remove_unused(usable.fingerprint)
    assert len(list((tmp_path / "run").iterdir())) == 2, "another batch has them"
    handed_out.release(again.fingerprint)
    handed_out.remove_unused(again.fingerprint)
    assert not list((tmp_path / "run").iterdir())


def test_a_proxy_is_one_file_on_every_route(
    handed_out: Credentials, stored: Stored, tmp_path: Path, result_of: Callable[..., Any]
) -> None:
    give(handed_out, stored, PROXY, 0, "a proxy")
    first = result_of(handed_out.usable(7, PROXY, {1}, NOW))
    second = result_of(handed_out.usable(7, PROXY, {2, 3}, NOW))
    assert first.fingerprint == second.fingerprint
    assert first.path == second.path == second.sites[3].path
    assert len(list((tmp_path / "run").iterdir())) == 1


def test_what_was_removed_or_replaced_is_found(
    handed_out: Credentials, stored: Stored, result_of: Callable[..., Any]
) -> None:
    assert result_of(handed_out.outdated()) == OutdatedCredentials()
    give(handed_out, stored, PROXY, 0, "a proxy")
    give(handed_out, stored, KEY, 1, "a key", account="alice")
    give(handed_out, stored, TOKEN, 2, "a token")
    used = [result_of(handed_out.usable(7, kind, {site}, NOW)) for kind, site in ((PROXY, 1), (KEY, 1), (TOKEN, 2))]
    proxy, key, token = (each.fingerprint for each in used)
    assert result_of(handed_out.outdated()) == OutdatedCredentials()
    # A newer one of the same subject does not disturb what runs; another account is another identity.
    stored.records[0] = evolve(stored.records[0], secret=b"renewed")
    stored.records[1] = evolve(stored.records[1], secret=b"other", details={"account": "bob"})
    del stored.records[2]
    assert result_of(handed_out.outdated()) == OutdatedCredentials(frozenset({key, token}), frozenset({proxy}))
    for each in used:
        assert handed_out.release(each.fingerprint)
        handed_out.remove_unused(each.fingerprint)
    assert result_of(handed_out.outdated()) == OutdatedCredentials()


def test_what_was_sealed_for_another_place_does_not_open(
    handed_out: Credentials, stored: Stored, tmp_path: Path, result_of: Callable[..., Any]
) -> None:
    give(handed_out, stored, TOKEN, 1, "a token")
    give(handed_out, stored, TOKEN, 2, "another")
    moved = stored.records[0].secret
    stored.records[1] = CredentialRecord(2, 7, TOKEN, 2, None, "/CN=a", None, {}, NOW, moved)

    async def refused() -> FailureCode:
        with pytest.raises(CredentialUnusableError) as caught:
            await handed_out.usable(7, TOKEN, {1, 2}, NOW)
        return caught.value.failure.code

    assert result_of(refused()) is FailureCode.CREDENTIAL_MISSING
    assert not list((tmp_path / "run").iterdir()), "all of them or none"


def test_a_key_for_one_end_and_a_proxy_for_the_other(
    handed_out: Credentials, stored: Stored, tmp_path: Path, result_of: Callable[..., Any]
) -> None:
    give(handed_out, stored, KEY, 1, "a key")
    give(handed_out, stored, PROXY, 0, "a proxy")
    usable = result_of(handed_out.usable_each(7, {1: CredentialNeed((KEY,)), 2: CredentialNeed((TOKEN, PROXY))}, NOW))
    assert usable.proxy is not None and usable.proxy.read_text() == "a proxy"
    told = json.loads(usable.variable({1: ("sftp://one:22",), 2: ("https://two",)}))
    assert {url: Path(each["file"]).read_text() for url, each in told.items()} == {"sftp://one:22": "a key"}
    alone = result_of(handed_out.usable(7, PROXY, {2}, NOW))
    assert alone.fingerprint != usable.fingerprint and alone.variable({2: ("https://two",)}) == ""
    for each in (usable, alone):
        handed_out.release(each.fingerprint)
        handed_out.remove_unused(each.fingerprint)
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("shared", [False, True])
def test_credentials_are_read_again_after_a_change(
    handed_out: Credentials, stored: Stored, result_of: Callable[..., Any], shared: bool
) -> None:
    stored.is_shared = shared
    give(handed_out, stored, PROXY, 0, "a proxy")
    for _ in range(3):
        result_of(handed_out.usable(7, PROXY, {1}, NOW))
    # Other daemons change a shared database at any time.
    assert stored.reads == (3 if shared else 1)
    stored.records.clear()
    result_of(handed_out.outdated())

    async def refused() -> FailureCode:
        with pytest.raises(CredentialUnusableError) as caught:
            await handed_out.usable(7, PROXY, {1}, NOW)
        return caught.value.failure.code

    assert result_of(refused()) is FailureCode.CREDENTIAL_MISSING
