"""Credentials and trusted authorities of single endpoints, and the signing policies of authorities.

``PDM_CREDENTIALS`` and ``PDM_TRUST`` of the environment are JSON objects: URL of an endpoint →
``{"file": PATH, "account": NAME or null}``, or the directory with the authorities that are trusted for this endpoint.
``X509_CERT_DIR`` has the authorities for all other servers.

A signing policy, stored beside an authority's certificate, limits the subjects that the authority may sign; it is
checked for connections of `ssl`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import ssl
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.domain.signing_policy import LONGEST_FILE, NAMESPACES, SIGNING_POLICY, PolicyFile, SigningPolicies
from pdm.workqueue.domain.subjects import plain_form

#: Directory of the authorities that are trusted for all servers, when the helper starts.
_TRUST_VARIABLE = "X509_CERT_DIR"
_DEFAULT_TRUST = os.environ.get(_TRUST_VARIABLE)
_switching = threading.RLock()
#: Protocols whose servers are verified against authorities.
_DEFAULT_PORTS = frozenset(
    str(protocol.info.default_port) for protocol in (JobProtocol.GRIDFTP, JobProtocol.HTTPS, JobProtocol.XROOT)
)


class EndpointCredential(NamedTuple):
    """The credential for one endpoint.

    Attributes:
        file: with the private key or the token.
        account: user name at the server; None if the user has not given one.
    """

    file: str
    account: str | None


def credential_at(schemes: tuple[str, ...], authority: str) -> EndpointCredential | None:
    """The credential for a server; None if there is none.

    Args:
        schemes: URL schemes of its endpoint.
        authority: its ``HOST:PORT``.
    """
    given = _parsed_credentials(os.environ.get("PDM_CREDENTIALS", ""))
    return next((given[url] for scheme in schemes if (url := f"{scheme}://{authority}") in given), None)


def credential_below(url: StorageUrl) -> EndpointCredential | None:
    """The credential of the endpoint that a URL is below, or that is below the URL; None if there is none.

    One server may have several endpoints, each with a credential of its own.
    """
    given = _credentials_by_url(os.environ.get("PDM_CREDENTIALS", ""))
    fitting = [known for known in given if _is_below(url, known)] or [known for known in given if _is_below(known, url)]
    return given[max(fitting, key=len)] if fitting else None


def _is_below(url: str, endpoint: str) -> bool:
    return url == endpoint or url.startswith(endpoint + "/")


@functools.lru_cache(maxsize=1)
def _credentials_by_url(text: str) -> Mapping[str, EndpointCredential]:
    told: dict[str, dict[str, Any]] = json.loads(text) if text else {}
    return {url.rstrip("/"): EndpointCredential(each["file"], each.get("account")) for url, each in told.items()}


@functools.lru_cache(maxsize=1)
def _parsed_credentials(text: str) -> Mapping[str, EndpointCredential]:
    told: dict[str, dict[str, Any]] = json.loads(text) if text else {}
    return {StorageUrl(url).server: EndpointCredential(each["file"], each.get("account")) for url, each in told.items()}


def trust_at(authority: str) -> str | None:
    """The directory with the authorities trusted for a server; None if there is no such directory.

    Args:
        authority: its ``HOST:PORT``.
    """
    directory = _parsed_trust(os.environ.get("PDM_TRUST", "")).get(_canonical_authority(authority))
    # An empty directory, if there is none: no server can be verified.
    return _DEFAULT_TRUST if directory is None else directory or os.devnull


@contextlib.contextmanager
def trusting(authority: str) -> Iterator[None]:
    """Point ``X509_CERT_DIR`` at the trusted authorities of one server, for a library that reads the variable.

    One thread at a time: the others wait. Without ``PDM_TRUST`` the variable is the same for all servers, and no thread
    waits.
    """
    if not os.environ.get("PDM_TRUST"):
        yield
        return
    with _switching:
        before = os.environ.get(_TRUST_VARIABLE)
        _set_trust_variable(trust_at(authority))
        try:
            yield
        finally:
            _set_trust_variable(before)


def _set_trust_variable(directory: str | None) -> None:
    if directory is None:
        os.environ.pop(_TRUST_VARIABLE, None)
    else:
        os.environ[_TRUST_VARIABLE] = directory


@functools.lru_cache(maxsize=1)
def _parsed_trust(text: str) -> Mapping[str, str]:
    told: dict[str, str] = json.loads(text) if text else {}
    directories: dict[str, str] = {}
    for url, directory in told.items():
        authority = _canonical_authority(StorageUrl(url).authority)
        # Two names of one server with different trusted authorities: trust none.
        directories[authority] = directory if directories.get(authority, directory) == directory else ""
    return directories


def _canonical_authority(authority: str) -> str:
    """Canonical ``HOST:PORT`` of a server: libraries share connections between spellings of an address."""
    address = authority.rpartition("@")[2].lower()
    host, _, port = address.rpartition(":")
    return host if port in _DEFAULT_PORTS else address


_AUTHORITY_FILE = re.compile(r"([0-9a-f]{8})\.\d+")
#: Attribute names of `ssl` → short names.
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


def check_server(sock: ssl.SSLSocket, directory: str) -> None:
    """Raise `ssl.SSLCertVerificationError` if an authority of the server's chain has violated its signing policy.

    Args:
        sock: after its handshake.
        directory: of the trusted authorities.
    """
    policies = _policies(directory, _directory_state(directory))
    if not policies.files:
        return
    # Public from Python 3.13 on only.
    chain: list[Any] = sock._sslobj.get_verified_chain()  # type: ignore[attr-defined]
    refusal = policies.evaluate([_canonical_subject(each.get_info()["subject"]) for each in chain]).refusal
    if refusal is not None:
        raise ssl.SSLCertVerificationError(f"certificate verify failed: {refusal}")


def _directory_state(directory: str) -> tuple[tuple[str, int], ...]:
    """A value that changes when the policies of a directory change."""
    found = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.endswith((SIGNING_POLICY, NAMESPACES)):
                try:
                    found.append((entry.name, entry.stat().st_mtime_ns))
                except OSError:  # a link that leads nowhere
                    found.append((entry.name, 0))
    return tuple(sorted(found))


@functools.lru_cache(maxsize=16)
def _policies(directory: str, _state: tuple[tuple[str, int], ...]) -> SigningPolicies:
    """The policies in a directory; cached until they change."""
    owners: dict[str, set[str]] = {}
    files: list[Path] = []
    for path in sorted(Path(directory).iterdir()):
        if found := _AUTHORITY_FILE.fullmatch(path.name):
            owners.setdefault(found[1], set()).update(_subjects(path))
        elif path.suffix in (SIGNING_POLICY, NAMESPACES):
            files.append(path)
    return SigningPolicies(tuple(_read_policy_file(path, owners.get(path.stem, set())) for path in files))


def _subjects(path: Path) -> list[str]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(path)
    except (OSError, ValueError):
        return []  # unreadable: it is no trusted authority
    return [_canonical_subject(each["subject"]) for each in context.get_ca_certs()]


def _read_policy_file(path: Path, owners: set[str]) -> PolicyFile:
    try:
        with path.open("rb") as file:
            return PolicyFile.read(str(path), file.read(LONGEST_FILE + 1), owners)
    except OSError as error:
        return PolicyFile(str(path), frozenset(owners), problem=f"it cannot be read ({error.strerror})")


def _canonical_subject(subject: Any) -> str:
    return plain_form([[(_SHORT_NAMES.get(kind, kind), value) for kind, value in part] for part in subject])
