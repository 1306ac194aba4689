"""A user's stored credentials as files that an agent can use, for as long as agents need them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from attrs import define, field, frozen
from twisted.logger import Logger

from pdm.workqueue.certificates.files import CredentialFiles
from pdm.workqueue.certificates.tokens import token_payload
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
from pdm.workqueue.domain.oidc import LoginState
from pdm.workqueue.domain.token_profiles import TokenClaims
from pdm.workqueue.store import credentials, oidc_logins
from pdm.workqueue.store.credentials import CredentialRecord
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.oidc_logins import login_problem

PROXY = CredentialKind.PROXY
#: Environment variable of a helper: files of SSH keys, tokens or S3 keys; see
#: `pdm.workqueue.movers.mover.Mover.needs_credential`.
CREDENTIALS_VARIABLE = "PDM_CREDENTIALS"
_FILE_KINDS = {
    CredentialKind.PROXY: "x509up",
    CredentialKind.SSH_KEY: "ssh-key",
    CredentialKind.TOKEN: "token",
    CredentialKind.S3_KEY: "s3-key",
}


class CredentialUnusableError(Exception):
    """No stored credential can be used."""

    def __init__(self, code: FailureCode, message: str) -> None:
        super().__init__(message)
        self.failure = AttemptFailure(FailureScope.SERVICE, code, message)


@frozen
class SiteCredential:
    """A credential file for one site.

    Attributes:
        path: file of mode 0600 with the proxy, private key, token or S3 keys.
        account: login name, if the user has given one (SSH).
        claims: of a token that is a JWT.
    """

    kind: CredentialKind
    path: Path
    account: str | None
    claims: TokenClaims | None = None


@frozen
class UsableCredentials:
    """Credential files for a route, kept until `Credentials.release`.

    Attributes:
        fingerprint: identifies the contents: an agent that was started with the same one can be reused.
        sites: site → credential; a proxy is the same at all sites.
    """

    fingerprint: str
    sites: Mapping[int, SiteCredential]

    @property
    def path(self) -> Path:
        """The file, if the whole route uses one."""
        return next(iter(self.sites.values())).path

    @property
    def claims(self) -> dict[int, TokenClaims]:
        """The claims of tokens, by site."""
        return {site: each.claims for site, each in self.sites.items() if each.claims is not None}

    @property
    def proxy(self) -> Path | None:
        """The proxy file, if there is one."""
        return next((each.path for each in self.sites.values() if each.kind is PROXY), None)

    def variable(self, endpoints: Mapping[int, Sequence[str]]) -> str:
        """Value of `CREDENTIALS_VARIABLE`: JSON object, URL → file and account; empty if only proxies are used.

        ``endpoints``: site → URLs of its endpoints.
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
    """Fingerprints of credentials in use that differ from the database.

    Attributes:
        ended: removed, or replaced by another identity's: their batches are ended.
        renewed: replaced by a newer one of the same identity: running batches may finish.
    """

    ended: frozenset[str] = frozenset()
    renewed: frozenset[str] = frozenset()


#: Stored encrypted in the database, to detect a daemon that has another key.
KEY_CHECK, KEY_CHECK_CONTEXT = b"key of the credentials", "check of the key"


@define(eq=False, kw_only=True)
class Credentials:
    """Writes credential files for agents, and removes them when no agent uses them."""

    database: Database
    vault: Vault
    files: CredentialFiles
    _written: dict[str, Mapping[int, SiteCredential]] = field(factory=dict)
    #: Fingerprint → credentials in the files.
    _sources: dict[str, tuple[CredentialRecord, ...]] = field(factory=dict)
    _holds: Counter[str] = field(factory=Counter)
    #: What was read since the last change; not of a shared database, which other daemons change.
    _read: dict[tuple[int, CredentialKind], Sequence[CredentialRecord]] = field(factory=dict)
    _log: Logger = field(factory=Logger)

    async def check_key(self, incarnation: str) -> None:
        """Check that the key decrypts what is in the database; a new key is accepted while no credential is stored.

        Args:
            incarnation: of this daemon, which has the lease.

        Raises:
            VaultError: it does not.
        """
        sealed = self.vault.seal(KEY_CHECK, KEY_CHECK_CONTEXT)
        present, may_change = await self.database.run("check the key", credentials.key_check, sealed, incarnation)
        try:
            self.vault.unseal(present, KEY_CHECK_CONTEXT)
        except VaultError as error:
            if not may_change:
                raise VaultError(
                    f"the key file {self.vault.path} does not decrypt the credentials in this database, which another "
                    "key has encrypted: restore that key file, or copy it from the daemon that shares the database"
                ) from error
            self._log.warn("the key of the credentials was changed while none was stored")
            await self.database.run("change the key", credentials.change_key_check, sealed)

    async def usable(
        self, user_id: int, kind: CredentialKind, sites: Collection[int], now: datetime
    ) -> UsableCredentials:
        """The user's credential of one kind for each site of a route.

        Raises:
            CredentialUnusableError: none is stored for a site, it has expired, or it cannot be decrypted.
        """
        return await self.usable_each(user_id, dict.fromkeys(sites, CredentialNeed((kind,))), now)

    async def usable_each(self, user_id: int, needs: Mapping[int, CredentialNeed], now: datetime) -> UsableCredentials:
        """The user's credentials for a route whose sites may need different kinds.

        Returns:
            Credentials by site, without the sites that use the service's own.

        Raises:
            CredentialUnusableError: none is stored for a site, it has expired, or it cannot be decrypted.
        """
        found: list[CredentialRecord] = []
        for kind in needed_kinds(needs):
            found += await self._of_kind(user_id, kind)
        try:
            chosen = choose_credentials_by_need(found, needs, now)
        except NoCredentialError as error:
            raise await self._unusable(user_id, needs, error, now) from error
        if not chosen:
            return UsableCredentials("", {})
        fingerprint = _fingerprint(chosen)
        written = self._written.get(fingerprint)
        if written is None:
            written = self._written[fingerprint] = self._write(chosen)
            self._sources[fingerprint] = tuple({record.id: record for record in chosen.values()}.values())
        self._holds[fingerprint] += 1
        if _is_one_proxy(chosen):
            # The file may have been written for another route.
            written = dict.fromkeys(chosen, next(iter(written.values())))
        return UsableCredentials(fingerprint, written)

    async def _unusable(
        self, user_id: int, needs: Mapping[int, CredentialNeed], error: NoCredentialError, now: datetime
    ) -> CredentialUnusableError:
        """The error for a missing or expired credential; of a login it says what became of it."""
        # The error may be that of a proxy, which is used where there is no valid token.
        wanted = [site for site, need in needs.items() if CredentialKind.TOKEN in need.kinds]
        found = await self.database.read("find logins", oidc_logins.of_user, user_id) if wanted else []
        login = login_problem(found, wanted, now)
        if login is not None:
            is_over = login.state(now) is LoginState.ENDED
            code = FailureCode.CREDENTIAL_EXPIRED if is_over else FailureCode.ISSUER_UNAVAILABLE
            return CredentialUnusableError(code, login.problem(now))
        return CredentialUnusableError(error.code, str(error))

    async def _of_kind(self, user_id: int, kind: CredentialKind) -> Sequence[CredentialRecord]:
        read = self._read
        found = read.get((user_id, kind))
        if found is None:
            found = await self.database.read("find credentials", credentials.of_kind, user_id, kind)
            if not self.database.is_shared:
                # If credentials changed meanwhile, `self._read` is another dictionary, and this one is dropped.
                read[user_id, kind] = found
        return found

    async def outdated(self) -> OutdatedCredentials:
        """Find the credentials in use that were removed or replaced since, through any daemon.

        Called after each change through this daemon, and every few seconds.
        """
        self._read = {}
        sources = dict(self._sources)
        numbers = {record.id for records in sources.values() for record in records}
        if not numbers:
            return OutdatedCredentials()
        now_there = await self.database.read("check credentials in use", credentials.fetch_many, numbers)
        ended, renewed = set(), set()
        for fingerprint, records in sources.items():
            for used in records:
                there = now_there.get(used.id)
                if there is None or _account_of(there) != _account_of(used):
                    ended.add(fingerprint)
                elif there.secret != used.secret:
                    renewed.add(fingerprint)
                    if there.is_renewed:
                        self._renew_file(fingerprint, there)
        return OutdatedCredentials(frozenset(ended), frozenset(renewed - ended))

    def _renew_file(self, fingerprint: str, record: CredentialRecord) -> None:
        """Let running batches use a renewed token: helpers read the file before each request."""
        credential = self._written.get(fingerprint, {}).get(record.site_id)
        if credential is not None:
            self.files.replace(credential.path, self._unsealed(record))
            sources = self._sources[fingerprint]
            self._sources[fingerprint] = tuple(record if each.id == record.id else each for each in sources)

    def claims(self, fingerprint: str) -> Mapping[int, TokenClaims]:
        """The claims of tokens in use, by site."""
        return UsableCredentials(fingerprint, self._written.get(fingerprint, {})).claims

    def release(self, fingerprint: str) -> bool:
        """A batch that uses the files has ended; agents may keep using them.

        Returns:
            Whether no other batch uses them.
        """
        self._holds[fingerprint] -= 1
        if self._holds[fingerprint]:
            return False
        del self._holds[fingerprint]
        return True

    def remove_unused(self, fingerprint: str) -> None:
        """Remove the files when no agent uses them, unless a batch is about to start one."""
        if not self._holds[fingerprint]:
            self._sources.pop(fingerprint, None)
            for credential in self._written.pop(fingerprint, {}).values():
                self.files.remove(credential.path)

    def _write(self, chosen: Mapping[int, CredentialRecord]) -> Mapping[int, SiteCredential]:
        """Write one file per credential; all of them or none."""
        made: dict[int, SiteCredential] = {}
        try:
            for record in {each.id: each for each in chosen.values()}.values():
                secret = self._unsealed(record)
                path = self.files.write(secret, _FILE_KINDS[record.kind])
                claims = _claims(secret) if record.kind is CredentialKind.TOKEN else None
                made[record.id] = SiteCredential(record.kind, path, record.details.get("account"), claims)
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
    """Associated data of an encrypted credential, so that it cannot be used for another user or site."""
    return f"{kind.value} of user {user_id}" + ("" if site_id == ALL_SITES else f" for site {site_id}")


def pending_context(user_id: int) -> str:
    """Associated data of the encrypted key of a delegation that waits for its proxy."""
    return f"pending delegation of user {user_id}"


def _account_of(record: CredentialRecord) -> tuple[str, object]:
    """The identity that a credential gives to its user."""
    return record.subject, record.details.get("account")


def _claims(token: bytes) -> TokenClaims | None:
    payload = token_payload(token.decode("ascii", "replace"))
    return None if payload is None else TokenClaims.of(payload)


def _fingerprint(chosen: Mapping[int, CredentialRecord]) -> str:
    digest = hashlib.sha256()
    one_proxy = _is_one_proxy(chosen)
    for site, record in sorted(chosen.items()):
        account = str(record.details.get("account"))
        # Agents with one proxy for the whole route serve every route.
        place = "" if one_proxy else f"{site} {account} "
        digest.update(f"{place}{hashlib.sha256(record.secret).hexdigest()}\n".encode())
        if one_proxy:
            break
    return digest.hexdigest()


def _is_one_proxy(chosen: Mapping[int, CredentialRecord]) -> bool:
    """Whether the whole route uses the user's proxy."""
    return all(record.kind is PROXY for record in chosen.values())
