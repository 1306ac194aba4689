"""Whether the authorities of a server may sign its subject: the policies beside them, for connections of `ssl`.

GridFTP and MyProxy go through Globus' own libraries, which apply signing policies themselves; OpenSSL knows none.
"""

from __future__ import annotations

import functools
import http.client
import os
import re
import ssl
from pathlib import Path
from typing import Any

from pdm.workqueue.domain.signing_policy import LONGEST_FILE, NAMESPACES, SIGNING_POLICY, PolicyFile, SigningPolicies
from pdm.workqueue.domain.subjects import plain_form

_AUTHORITY_FILE = re.compile(r"([0-9a-f]{8})\.\d+")
#: Names that `ssl` gives to types → short names.
_SHORT_NAMES = {
    "commonName": "CN",
    "countryName": "C",
    "domainComponent": "DC",
    "localityName": "L",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "stateOrProvinceName": "ST",
    "streetAddress": "STREET",
    "userId": "UID",
    "givenName": "GN",
    "surname": "SN",
}


def check_server(connection: http.client.HTTPSConnection, folder: str) -> None:
    """Raise `ssl.SSLCertVerificationError` if an authority of the server's chain may not sign what it has signed.

    Args:
        connection: after its handshake.
        folder: of the trusted authorities.
    """
    policies = _policies(folder, _state(folder))
    if not policies.files:
        return
    # Part of the public interface from Python 3.13 on only.
    sock: Any = connection.sock
    chain: list[Any] = sock._sslobj.get_verified_chain()
    refusal = policies.judge([_plain(each.get_info()["subject"]) for each in chain]).refusal
    if refusal is not None:
        raise ssl.SSLCertVerificationError(f"certificate verify failed: {refusal}")


def _state(folder: str) -> tuple[tuple[str, int], ...]:
    """What changes with the policies of a folder."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith((SIGNING_POLICY, NAMESPACES)):
                try:
                    found.append((entry.name, entry.stat().st_mtime_ns))
                except OSError:  # a link that leads nowhere
                    found.append((entry.name, 0))
    return tuple(sorted(found))


@functools.lru_cache(maxsize=16)
def _policies(folder: str, _state: tuple[tuple[str, int], ...]) -> SigningPolicies:
    """The policies in a folder, read again when they have changed."""
    owners: dict[str, set[str]] = {}
    files: list[Path] = []
    for path in sorted(Path(folder).iterdir()):
        if found := _AUTHORITY_FILE.fullmatch(path.name):
            owners.setdefault(found[1], set()).update(_subjects(path))
        elif path.suffix in (SIGNING_POLICY, NAMESPACES):
            files.append(path)
    return SigningPolicies(tuple(_read(path, owners.get(path.stem, set())) for path in files))


def _subjects(path: Path) -> list[str]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(path)
    except (OSError, ValueError):
        return []  # it vouches for nobody
    return [_plain(each["subject"]) for each in context.get_ca_certs()]


def _read(path: Path, owners: set[str]) -> PolicyFile:
    try:
        with path.open("rb") as file:
            return PolicyFile.read(str(path), file.read(LONGEST_FILE + 1), owners)
    except OSError as error:
        return PolicyFile(str(path), frozenset(owners), problem=f"it cannot be read ({error.strerror})")


def _plain(subject: Any) -> str:
    return plain_form([[(_SHORT_NAMES.get(kind, kind), value) for kind, value in part] for part in subject])
