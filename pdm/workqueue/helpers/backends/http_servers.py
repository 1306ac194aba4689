"""Servers of HTTPS connections: the authorities that are trusted for each, and the credentials that it gets.

``X509_CERT_DIR`` has the trusted authorities, ``PDM_TRUST`` those of single servers, ``X509_USER_PROXY`` the client's
certificate with its key, ``PDM_CREDENTIALS`` the files with bearer tokens, each for one server only. The target of a
redirect gets neither certificate nor token: with the user's proxy it could act in the user's name anywhere.
"""

from __future__ import annotations

import os
import re
import ssl
from pathlib import Path
from typing import NamedTuple

from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.credentials import credential_at, trust_at
from pdm.workqueue.helpers.storage import StorageError

_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{1,16384}", re.ASCII)


class Server(NamedTuple):
    """The server of a connection.

    Attributes:
        authority: host, and port.
        is_known: whether the user has named it; other servers get no credentials.
        trust: directory of the authorities that are trusted for it.
    """

    authority: str
    is_known: bool
    trust: str | None


def known_server(url: StorageUrl) -> Server:
    """The server of a URL, as one that the user has named."""
    authority = url.authority
    return Server(authority, True, trust_at(authority))


def authorization(authority: str) -> dict[str, str]:
    """The header with the user's token for a server, if there is one."""
    credential = credential_at(("https", "davs"), authority)
    if credential is None:
        return {}
    try:
        token = Path(credential.file).read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        text = f"the token cannot be read: {type(error).__name__}"
        raise StorageError(text, code=FailureCode.CREDENTIAL_MISSING, scope=FailureScope.SERVICE) from error
    if not _TOKEN.fullmatch(token):
        raise StorageError("it is not a bearer token", code=FailureCode.CREDENTIAL_MISSING, scope=FailureScope.SERVICE)
    return {"Authorization": f"Bearer {token}"}


class TlsContexts:
    """TLS contexts, each made once."""

    def __init__(self) -> None:
        self._contexts: dict[tuple[str | None, bool], ssl.SSLContext] = {}

    def of(self, server: Server) -> ssl.SSLContext:
        """The TLS context: the server's trusted authorities, and the user's proxy if the user has named the server."""
        key = server.trust, server.is_known
        if key not in self._contexts:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            # Apache requests a certificate after it has read the path (SSLVerifyClient in a Location or Directory).
            context.post_handshake_auth = True
            try:
                context.load_verify_locations(capath=server.trust or None)
                if server.is_known and (proxy := os.environ.get("X509_USER_PROXY")):
                    context.load_cert_chain(proxy)
            except (OSError, TypeError) as error:
                text = f"the credential or the authorities cannot be read: {error}"
                raise StorageError(text, code=FailureCode.CREDENTIAL_MISSING, scope=FailureScope.SERVICE) from error
            self._contexts[key] = context
        return self._contexts[key]
