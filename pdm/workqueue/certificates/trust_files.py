"""Authorities and revocation lists read from files.

They come from one PEM file (which may hold revocation lists too) or from a grid-style directory, as
``/etc/grid-security/certificates``: ``HASH.0`` is an authority, ``HASH.r0`` its revocation list. ``signing_policy``
files, which limit what an authority may sign, are not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPublicKeyTypes, CertificatePublicKeyTypes

from pdm.workqueue.certificates.names import canonical, dn, subject_hash, subject_hash_old
from pdm.workqueue.certificates.pem_files import CertificateFilesError, read_bytes, read_certificates
from pdm.workqueue.certificates.trust import CrlPolicy, Trust

_GRID_FILE = re.compile(r"(?P<stem>[0-9a-f]{8})\.(?P<crl>r?)\d+")
_CRL_BLOCK = re.compile(rb"-----BEGIN X509 CRL-----.*?-----END X509 CRL-----[\r\n]*", re.DOTALL)


def read_trust(path: Path, policy: CrlPolicy = "if-present") -> Trust:
    """Read authorities and lists. File work: to be called in a thread when a reactor runs.

    Args:
        path: PEM file or grid-style directory.
        policy: which revocation lists are checked.

    Raises:
        CertificateFilesError: nothing there can be trusted.
    """
    return _read_directory(path, policy) if path.is_dir() else _read_file(path, policy)


def state_of(path: Path) -> tuple[object, ...]:
    """What changes when a file, or a file of a directory, is written or replaced; empty if it is not there."""
    try:
        if path.is_dir():
            return tuple(sorted((each.name, *_stamp(each)) for each in path.iterdir()))
        return _stamp(path)
    except OSError:
        return ()


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except FileNotFoundError:  # replaced while we look, or a link that leads nowhere
        return 0, 0, 0
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read_file(path: Path, policy: CrlPolicy) -> Trust:
    authorities = read_certificates(path)
    crls: list[x509.CertificateRevocationList] = []
    for block in _CRL_BLOCK.findall(read_bytes(path)):
        try:
            crls.append(x509.load_pem_x509_crl(block))
        except ValueError as error:
            raise CertificateFilesError(f"{path} holds a damaged revocation list ({error})") from error
    return _trust(authorities, [(crl, str(path)) for crl in crls], frozenset(), policy, [])


def _read_directory(path: Path, policy: CrlPolicy) -> Trust:
    authorities: list[x509.Certificate] = []
    crls: list[tuple[x509.CertificateRevocationList, str]] = []
    listed_stems: set[str] = set()
    problems: list[str] = []
    try:
        names = sorted(each.name for each in path.iterdir())
    except OSError as error:
        raise CertificateFilesError(f"{path} cannot be read ({error.strerror})") from error
    for name in names:
        found = _GRID_FILE.fullmatch(name)
        if found is None:
            continue
        try:
            if found["crl"]:
                listed_stems.add(found["stem"])
                crls.append((_read_crl(path / name), str(path / name)))
            else:
                authorities.extend(read_certificates(path / name))
        except CertificateFilesError as error:
            # One bad file of a hundred must not stop the service; who depends on it is refused.
            problems.append(str(error))
    if not authorities:
        raise CertificateFilesError(
            f"{path} holds no authority: files must be named HASH.0 (openssl rehash makes the names)"
        )
    return _trust(authorities, crls, frozenset(listed_stems), policy, problems)


def _read_crl(path: Path) -> x509.CertificateRevocationList:
    content = read_bytes(path)
    try:
        load = x509.load_pem_x509_crl if b"-----BEGIN" in content else x509.load_der_x509_crl
        return load(content)
    except ValueError as error:
        raise CertificateFilesError(
            f"{path} holds no revocation list that can be read ({error}): clients of its authority are refused"
        ) from error


def _trust(
    authorities: Sequence[x509.Certificate],
    crls: Sequence[tuple[x509.CertificateRevocationList, str]],
    listed_stems: frozenset[str],
    policy: CrlPolicy,
    problems: list[str],
) -> Trust:
    """Join what was read: each authority and list once (both hashes lead to the same), lists with good signatures."""
    keys: dict[bytes, list[x509.Certificate]] = {}
    for authority in dict.fromkeys(authorities):
        keys.setdefault(canonical(authority.subject), []).append(authority)
    listed = {canonical(crl.issuer) for crl, _ in crls}
    usable: dict[bytes, x509.CertificateRevocationList] = {}
    for crl, origin in crls:
        signers = keys.get(canonical(crl.issuer), [])
        if any(_signed(crl, signer.public_key()) for signer in signers):
            usable[crl.fingerprint(hashes.SHA256())] = crl
        elif signers:
            problems.append(f"{origin} is not signed by {dn(crl.issuer)}: clients of that authority are refused")
    for subject, certificates in keys.items():
        name = certificates[0].subject
        if listed_stems & {subject_hash(name), subject_hash_old(name)}:
            listed.add(subject)
    return Trust(
        tuple(dict.fromkeys(authorities)),
        tuple(usable.values()),
        policy,
        tuple(dict.fromkeys(problems)),
        frozenset(listed),
    )


def _signed(crl: x509.CertificateRevocationList, key: CertificatePublicKeyTypes) -> bool:
    try:
        # A key that cannot sign raises the TypeError.
        return crl.is_signature_valid(cast("CertificateIssuerPublicKeyTypes", key))
    except (TypeError, ValueError):
        return False
