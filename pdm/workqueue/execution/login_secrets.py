"""The secrets of logins at token issuers, as the database holds them: encrypted for one user and site."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from attrs import frozen

from pdm.workqueue.certificates.vault import Vault, VaultError
from pdm.workqueue.domain.credentials import CredentialKind
from pdm.workqueue.domain.oidc import OidcSettings
from pdm.workqueue.execution.credentials import vault_context
from pdm.workqueue.execution.issuers import IssuedDeviceCode, IssuedTokens
from pdm.workqueue.store.credentials import EncryptedCredential
from pdm.workqueue.store.oidc_logins import LoginRecord


@frozen(kw_only=True)
class PendingCode:
    """What the user has to do to approve a login."""

    user_code: str
    verification_uri: str
    verification_uri_complete: str | None
    expires_at: datetime
    interval_s: int


def refresh_context(user_id: int, site_id: int) -> str:
    """Associated data of encrypted refresh tokens."""
    return f"login of user {user_id} for site {site_id}"


def device_context(user_id: int, site_id: int) -> str:
    """Associated data of an encrypted device code."""
    return f"device code of user {user_id} for site {site_id}"


@frozen
class LoginSecrets:
    """Encrypts and decrypts refresh tokens and device codes."""

    vault: Vault

    def pending_code(self, login: LoginRecord, oidc: OidcSettings | None, now: datetime) -> PendingCode | None:
        """The code that waits for the user's approval; None if none does, or it is of another issuer or client."""
        if oidc is None or login.device is None or login.device_until is None or login.device_until <= now:
            return None
        try:
            device = self._device_of(login)
        except VaultError:
            return None
        if (device["issuer"], device["client_id"]) != (oidc.issuer, oidc.client_id):
            return None
        return PendingCode(
            user_code=device["user_code"],
            verification_uri=device["verification_uri"],
            verification_uri_complete=device["verification_uri_complete"],
            expires_at=login.device_until,
            interval_s=login.device_interval_s or 5,
        )

    def device_code(self, login: LoginRecord) -> str:
        """The device code of a login with a `pending_code`."""
        return str(self._device_of(login)["device_code"])

    def _device_of(self, login: LoginRecord) -> dict[str, Any]:
        assert login.device is not None
        opened = self.vault.unseal(login.device, device_context(login.user_id, login.site_id))
        found: dict[str, Any] = json.loads(opened)
        return found

    def seal_device(self, user_id: int, site_id: int, oidc: OidcSettings, issued: IssuedDeviceCode) -> bytes:
        """Encrypt a device code, with what is shown of it."""
        content = {
            # The code is sent to no other issuer if the site is changed meanwhile.
            "issuer": oidc.issuer,
            "client_id": oidc.client_id,
            "device_code": issued.device_code,
            "user_code": issued.user_code,
            "verification_uri": issued.verification_uri,
            "verification_uri_complete": issued.verification_uri_complete,
        }
        return self.vault.seal(json.dumps(content).encode(), device_context(user_id, site_id))

    def refresh_tokens(self, login: LoginRecord) -> list[str]:
        """The refresh token, and the one before it if there is one."""
        assert login.secret is not None
        opened = self.vault.unseal(login.secret, refresh_context(login.user_id, login.site_id))
        found: list[str] = json.loads(opened)
        return found

    def seal_refresh(self, login: LoginRecord, newest: str, spare: str | None) -> bytes:
        """Encrypt a refresh token, and the one before it."""
        tokens = [token for token in (newest, spare) if token is not None]
        return self.vault.seal(json.dumps(tokens).encode(), refresh_context(login.user_id, login.site_id))

    def seal_access(self, login: LoginRecord, issued: IssuedTokens) -> EncryptedCredential:
        """The access token as a credential for the site."""
        context = vault_context(login.user_id, CredentialKind.TOKEN, login.site_id)
        return EncryptedCredential(
            kind=CredentialKind.TOKEN,
            subject=issued.subject,
            valid_until=issued.valid_until,
            secret=self.vault.seal(issued.access_token.encode("ascii"), context),
            site_id=login.site_id,
            details={"login": True},
        )
