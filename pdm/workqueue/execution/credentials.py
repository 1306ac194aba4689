"""A user's stored credential as a file that an agent can use, for as long as agents need it."""

from __future__ import annotations

import hashlib
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path

from attrs import define, field

from pdm.workqueue.certificates.credential_files import CredentialFiles
from pdm.workqueue.certificates.vault import Vault, VaultError
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, Scope
from pdm.workqueue.store import credentials
from pdm.workqueue.store.credentials import CredentialRecord
from pdm.workqueue.store.database import Database

#: The one kind of credential there is so far: a delegated RFC 3820 proxy.
PROXY = "proxy"


class CredentialUnusableError(Exception):
    """There is none that works."""

    def __init__(self, code: FailureCode, message: str) -> None:
        super().__init__(message)
        self.failure = AttemptFailure(Scope.SERVICE, code, message)


@define(eq=False)
class Credentials:
    """Hands out credential files."""

    database: Database
    vault: Vault
    files: CredentialFiles
    _paths: dict[str, Path] = field(factory=dict)
    _holds: Counter[str] = field(factory=Counter)

    async def usable(self, user_id: int, now: datetime) -> tuple[str, Path]:
        """The fingerprint and the 0600 file of the user's credential; the file stays until `let_go`.

        Raises:
            CredentialUnusableError: none is stored, it has expired, or it cannot be unsealed.
        """
        record = await self.database.read("find a credential", credentials.find, user_id, PROXY)
        if record is None:
            raise CredentialUnusableError(FailureCode.CREDENTIAL_MISSING, "no credential has been delegated")
        if record.valid_until <= now + timedelta(seconds=1):
            raise CredentialUnusableError(
                FailureCode.CREDENTIAL_EXPIRED,
                f"the credential of {record.subject} expired at {record.valid_until:%Y-%m-%dT%H:%M:%SZ}",
            )
        fingerprint = hashlib.sha256(record.secret).hexdigest()
        path = self._paths.get(fingerprint)
        if path is None:
            path = self.files.write(self._bundle(record))
            self._paths[fingerprint] = path
        self._holds[fingerprint] += 1
        return fingerprint, path

    def let_go(self, fingerprint: str) -> None:
        """A batch that asked for the file has ended; agents may go on using it."""
        self._holds[fingerprint] -= 1
        if not self._holds[fingerprint]:
            del self._holds[fingerprint]

    def _bundle(self, record: CredentialRecord) -> bytes:
        try:
            return self.vault.unseal(record.secret, context_of(record.user_id))
        except VaultError as error:
            raise CredentialUnusableError(
                FailureCode.CREDENTIAL_MISSING, f"the stored credential cannot be read ({error})"
            ) from error

    def released(self, fingerprint: str) -> None:
        """No agent works with it any more: the file goes, unless a batch is about to start one that will."""
        if not self._holds[fingerprint]:
            path = self._paths.pop(fingerprint, None)
            if path is not None:
                self.files.remove(path)


def context_of(user_id: int) -> str:
    """What a sealed proxy is bound to, so that one user's cannot be passed off as another's."""
    return f"proxy of user {user_id}"
