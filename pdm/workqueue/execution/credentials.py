"""A user's stored credentials as files that an agent can use, for as long as agents need them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from attrs import define, field, frozen

from pdm.workqueue.certificates.files import CredentialFiles
from pdm.workqueue.certificates.vault import Vault, VaultError
from pdm.workqueue.domain.credentials import (
    ALL_SITES,
    CredentialKind,
    CredentialNeed,
    NoCredentialError,
    choose_credentials_by_need,
    needed_kinds,
)
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.store import credentials
from pdm.workqueue.store.credentials import CredentialRecord
from pdm.workqueue.store.database import Database

PROXY = CredentialKind.PROXY
#: Where a helper finds the files of SSH keys or tokens; see `pdm.workqueue.movers.mover.Mover.needs_credential`.
CREDENTIALS_VARIABLE = "PDM_CREDENTIALS"
_FILE_KINDS = {CredentialKind.PROXY: "x509up", CredentialKind.SSH_KEY: "ssh-key", CredentialKind.TOKEN: "token"}


class CredentialUnusableError(Exception):
    """There is none that works."""

    def __init__(self, code: FailureCode, message: str) -> None:
        super().__init__(message)
        self.failure = AttemptFailure(FailureScope.SERVICE, code, message)


@frozen
class SiteCredential:
    """What an agent uses at one site.

    Attributes:
        kind: of what is in the file.
        path: 0600 file with the proxy, the private key or the token.
        account: who to be at the site, where the user has said so (SSH).
    """

    kind: CredentialKind
    path: Path
    account: str | None


@frozen
class UsableCredentials:
    """What an agent uses on a route; the files stay until `Credentials.release`.

    Attributes:
        fingerprint: names what is in the files: an agent that was started with the same may go on with it.
        sites: site → what is used there; of a proxy, the same everywhere.
    """

    fingerprint: str
    sites: Mapping[int, SiteCredential]

    @property
    def path(self) -> Path:
        """The file, for those who use one for the whole route."""
        return next(iter(self.sites.values())).path

    @property
    def proxy(self) -> Path | None:
        """The file with the proxy, where one is used."""
        return next((each.path for each in self.sites.values() if each.kind is PROXY), None)

    def variable(self, endpoints: Mapping[int, Sequence[str]]) -> str:
        """What a helper is told in `CREDENTIALS_VARIABLE`: endpoint → file and account, as a JSON object.

        Proxies are not in it; it is empty where nothing else is used.

        Args:
            endpoints: site → URLs of its endpoints; a site that has none is left out.
        """
        files = {
            url: {"file": str(credential.path), "account": credential.account}
            for site, credential in self.sites.items()
            if credential.kind is not PROXY
            for url in endpoints.get(site, ())
        }
        return json.dumps(files, sort_keys=True) if files else ""


@frozen
class OutdatedCredentials:
    """Fingerprints of credentials in use that are not what the database has any more.

    Attributes:
        ended: their user has removed one, or put somebody else's in its place: nothing may go on with them.
        renewed: there is a newer one of the same subject: what runs may come to its end.
    """

    ended: frozenset[str] = frozenset()
    renewed: frozenset[str] = frozenset()


@define(eq=False)
class Credentials:
    """Hands out credential files."""

    database: Database
    vault: Vault
    files: CredentialFiles
    _written: dict[str, Mapping[int, SiteCredential]] = field(factory=dict)
    #: What is in the files: the credentials of each fingerprint.
    _sources: dict[str, tuple[CredentialRecord, ...]] = field(factory=dict)
    _holds: Counter[str] = field(factory=Counter)

    async def usable(
        self, user_id: int, kind: CredentialKind, sites: Collection[int], now: datetime
    ) -> UsableCredentials:
        """The user's credential for each site of a route.

        Args:
            user_id: whose.
            kind: what the mover needs.
            sites: of the route.
            now: the present moment, UTC.

        Raises:
            CredentialUnusableError: none is stored for a site, it has expired, or it cannot be unsealed.
        """
        return await self.usable_each(user_id, dict.fromkeys(sites, CredentialNeed((kind,))), now)

    async def usable_each(self, user_id: int, needs: Mapping[int, CredentialNeed], now: datetime) -> UsableCredentials:
        """The user's credential for each site of a route whose sites may need credentials of several kinds.

        Args:
            user_id: whose.
            needs: site → what is needed there.
            now: the present moment, UTC.

        Returns:
            What is used; without the sites for which the service has to take its own.

        Raises:
            CredentialUnusableError: none is stored for a site, it has expired, or it cannot be unsealed.
        """
        found: list[CredentialRecord] = []
        for kind in needed_kinds(needs):
            found += await self.database.read("find credentials", credentials.of_kind, user_id, kind)
        try:
            chosen = choose_credentials_by_need(found, needs, now)
        except NoCredentialError as error:
            raise CredentialUnusableError(error.code, str(error)) from error
        if not chosen:
            return UsableCredentials("", {})
        fingerprint = _fingerprint(chosen)
        written = self._written.get(fingerprint)
        if written is None:
            written = self._written[fingerprint] = self._write(chosen)
            self._sources[fingerprint] = tuple({record.id: record for record in chosen.values()}.values())
        self._holds[fingerprint] += 1
        if _is_one_proxy(chosen):
            # It may have been written for another route.
            written = dict.fromkeys(chosen, next(iter(written.values())))
        return UsableCredentials(fingerprint, written)

    async def outdated(self) -> OutdatedCredentials:
        """Look which of the credentials in use were removed or replaced, by this daemon's users or another's."""
        sources = dict(self._sources)
        numbers = {record.id for records in sources.values() for record in records}
        if not numbers:
            return OutdatedCredentials()
        now_there = await self.database.read("are credentials in use still there", credentials.fetch_many, numbers)
        ended, renewed = set(), set()
        for fingerprint, records in sources.items():
            for used in records:
                there = now_there.get(used.id)
                if there is None or _account_of(there) != _account_of(used):
                    ended.add(fingerprint)
                elif there.secret != used.secret:
                    renewed.add(fingerprint)
        return OutdatedCredentials(frozenset(ended), frozenset(renewed - ended))

    def release(self, fingerprint: str) -> bool:
        """A batch that asked for the files has ended; agents may go on using them.

        Returns:
            Whether no other batch has need of them.
        """
        self._holds[fingerprint] -= 1
        if self._holds[fingerprint]:
            return False
        del self._holds[fingerprint]
        return True

    def remove_unused(self, fingerprint: str) -> None:
        """No agent works with them any more: the files go, unless a batch is about to start one that will."""
        if not self._holds[fingerprint]:
            self._sources.pop(fingerprint, None)
            for credential in self._written.pop(fingerprint, {}).values():
                self.files.remove(credential.path)

    def _write(self, chosen: Mapping[int, CredentialRecord]) -> Mapping[int, SiteCredential]:
        """Files for what was chosen, one for each credential; all of them or none."""
        made: dict[int, SiteCredential] = {}
        try:
            for record in {each.id: each for each in chosen.values()}.values():
                path = self.files.write(self._unsealed(record), _FILE_KINDS[record.kind])
                made[record.id] = SiteCredential(record.kind, path, record.details.get("account"))
        except BaseException:
            for credential in made.values():
                self.files.remove(credential.path)
            raise
        return {site: made[record.id] for site, record in chosen.items()}

    def _unsealed(self, record: CredentialRecord) -> bytes:
        try:
            return self.vault.unseal(record.secret, vault_context(record.user_id, record.kind, record.site_id))
        except VaultError as error:
            raise CredentialUnusableError(
                FailureCode.CREDENTIAL_MISSING, f"the stored credential cannot be read ({error})"
            ) from error


def vault_context(user_id: int, kind: CredentialKind = PROXY, site_id: int = ALL_SITES) -> str:
    """What a sealed credential is bound to, so that one user's or site's cannot be passed off as another's."""
    return f"{kind.value} of user {user_id}" + ("" if site_id == ALL_SITES else f" for site {site_id}")


def _account_of(record: CredentialRecord) -> tuple[str, object]:
    """Whom a credential makes of its user."""
    return record.subject, record.details.get("account")


def _fingerprint(chosen: Mapping[int, CredentialRecord]) -> str:
    digest = hashlib.sha256()
    one_proxy = _is_one_proxy(chosen)
    for site, record in sorted(chosen.items()):
        account = str(record.details.get("account"))
        # Agents that use one for the whole route serve every route.
        place = "" if one_proxy else f"{site} {account} "
        digest.update(f"{place}{hashlib.sha256(record.secret).hexdigest()}\n".encode())
        if one_proxy:
            break
    return digest.hexdigest()


def _is_one_proxy(chosen: Mapping[int, CredentialRecord]) -> bool:
    """Whether all of a route is reached by its proxy, of which there is one."""
    return all(record.kind is PROXY for record in chosen.values())
