"""Client side of proxy delegation: the service generates a key and a certificate request, the caller signs a proxy."""

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
    """Reads, creates and removes the delegation of one caller, who signs with a certificate and key (PEM files).

    A `key` of None is in the file of the certificate.
    """

    def __init__(
        self, connection: Connection, *, certificate: Path | None, key: Path | None, passphrase: bytes | None = None
    ) -> None:
        self._connection = connection
        self._certificate = certificate
        self._key = key
        self._passphrase = passphrase

    async def fetch(self) -> DelegationView | None:
        """The delegated proxy; None if there is none."""
        answer = await self._connection.request("GET", await self._path())
        return msgspec.json.decode(answer, type=DelegationView | None)

    async def delegate(self, lifetime: timedelta) -> DelegationView:
        """Sign a proxy for the key that the service has generated.

        Raises:
            CredentialError: the certificate or key is missing or unusable.
        """
        if self._certificate is None:
            raise CredentialError(
                "there is no certificate to delegate with", "Set PDM_CERT and PDM_KEY, or X509_USER_PROXY."
            )
        path = await self._path()
        request = await self._connection.request("GET", f"{path}/request")
        try:
            # Blocks for some milliseconds: two small files and one signature.
            proxy = sign_request(request, self._certificate, self._key, lifetime, passphrase=self._passphrase)
        except ClientCredentialError as error:
            raise CredentialError(str(error).rstrip(".")) from error
        except DelegationError as error:
            raise UnexpectedAnswerError(str(error).rstrip("."), "Report this to an operator of the service.") from error
        answer = await self._connection.request(
            "PUT", f"{path}/credential", body=proxy, content_type="application/x-pem-file"
        )
        return msgspec.json.decode(answer, type=DelegationView)

    async def remove(self) -> None:
        await self._connection.request("DELETE", await self._path())

    async def _path(self) -> str:
        me = msgspec.json.decode(await self._connection.request("GET", "/whoami"), type=WhoamiView)
        return f"/delegation/{me.delegation_id}"
