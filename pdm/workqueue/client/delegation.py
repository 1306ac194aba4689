"""Client side of proxy delegation: the service makes a key and a certificate request, the caller signs a proxy."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import msgspec

from pdm.workqueue.certificates.delegation import DelegationError, sign_request
from pdm.workqueue.certificates.tls_client import ClientCredentialError
from pdm.workqueue.client.connection import Connection
from pdm.workqueue.client.errors import CredentialError, UnexpectedAnswerError
from pdm.workqueue.wire.responses import DelegationView, WhoamiView


class DelegationClient:
    """Reads, gives and withdraws the delegation of one caller.

    Args:
        connection: to the service.
        certificate: PEM file to sign with, None where there is none.
        key: PEM file of its key, None where it is in the same file.
        passphrase: of an encrypted key.
    """

    def __init__(
        self, connection: Connection, certificate: Path | None, key: Path | None, passphrase: bytes | None = None
    ) -> None:
        self._connection = connection
        self._certificate = certificate
        self._key = key
        self._passphrase = passphrase

    async def held(self) -> DelegationView | None:
        """What the service holds; None for nothing."""
        answer = await self._connection.request("GET", await self._place())
        return msgspec.json.decode(answer, type=DelegationView | None)

    async def give(self, lifetime: timedelta) -> DelegationView:
        """Sign a proxy for the key that the service has made.

        Raises:
            CredentialError: there is nothing to sign with, or it cannot be used.
        """
        if self._certificate is None:
            raise CredentialError(
                "there is no certificate to delegate with", "Name yours: PDM_CERT and PDM_KEY, or X509_USER_PROXY."
            )
        place = await self._place()
        request = await self._connection.request("GET", f"{place}/request")
        try:
            # Reads two small files and signs once: some milliseconds, which a client's reactor can spare.
            proxy = sign_request(request, self._certificate, self._key, lifetime, passphrase=self._passphrase)
        except ClientCredentialError as error:
            raise CredentialError(str(error).rstrip(".")) from error
        except DelegationError as error:
            raise UnexpectedAnswerError(str(error).rstrip("."), "Tell an operator of the service.") from error
        answer = await self._connection.request(
            "PUT", f"{place}/credential", body=proxy, content_type="application/x-pem-file"
        )
        return msgspec.json.decode(answer, type=DelegationView)

    async def withdraw(self) -> None:
        """Make the service forget it."""
        await self._connection.request("DELETE", await self._place())

    async def _place(self) -> str:
        me = msgspec.json.decode(await self._connection.request("GET", "/whoami"), type=WhoamiView)
        return f"/delegation/{me.delegation_id}"
