"""Authorities and revocation lists read from files.

They come from one PEM file (which may hold revocation lists too) or from a grid-style directory, as
``/etc/grid-security/certificates``: ``HASH.0`` is an authority, ``HASH.r0`` its revocation list,
``HASH.signing_policy`` and ``HASH.namespaces`` say which subjects it may sign. Beside a PEM file ``NAME.pem`` such
files are ``NAME.signing_policy`` and ``NAME.namespaces``, for all authorities in it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPublicKeyTypes, CertificatePublicKeyTypes

from pdm.workqueue.certificates.names import canonical, dn, plain, subject_hash, subject_hash_old
from pdm.workqueue.certificates.pem_files import CertificateFilesError, read_bytes, read_certificates
from pdm.workqueue.certificates.trust import CrlPolicy, Trust
from pdm.workqueue.domain.signing_policy import (
    LONGEST_FILE,
    NAMESPACES,
    SIGNING_POLICY,
    PolicyFile,
    PolicyMode,
    SigningPolicies,
)

_GRID_FILE = re.compile(r"(?P<stem>[0-9a-f]{8})\.(?P<crl>r?)\d+")
_CRL_BLOCK = re.compile(rb"-----BEGIN X509 CRL-----.*?-----END X509 CRL-----[\r\n]*", re.DOTALL)


def read_trust(path: Path, policy: CrlPolicy = "if-present", signing: PolicyMode = "if-present") -> Trust:
    """Read authorities and lists. File work: to be called in a thread when a reactor runs.

    Args:
        path: PEM file or grid-style directory.
        policy: which revocation lists are checked.
        signing: which signing policies are applied.

    Raises:
        CertificateFilesError: nothing there can be trusted.
    """
    return _read_directory(path, policy, signing) if path.is_dir() else _read_file(path, policy, signing)


def state_of(path: Path) -> tuple[object, ...]:
    """What changes when a file, or a file of a directory, is written or replaced; empty if it is not there."""
    try:
        if path.is_dir():
            return tuple(sorted((each.name, *_stamp(each)) for each in path.iterdir()))
        return tuple(_stamp(each) for each in (path, *_policies_beside(path)))
    except OSError:
        return ()


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except FileNotFoundError:  # replaced while we look, or a link that leads nowhere
        return 0, 0, 0
    return status.st_mtime_ns, status.st_size, status.st_ino


def _policies_beside(path: Path) -> tuple[Path, Path]:
    return path.with_suffix(SIGNING_POLICY), path.with_suffix(NAMESPACES)


def _read_file(path: Path, policy: CrlPolicy, signing: PolicyMode) -> Trust:
    authorities = read_certificates(path)
    crls: list[x509.CertificateRevocationList] = []
    for block in _CRL_BLOCK.findall(read_bytes(path)):
        try:
            crls.append(x509.load_pem_x509_crl(block))
        except ValueError as error:
            raise CertificateFilesError(f"{path} holds a damaged revocation list ({error})") from error
    policies = [_read_policy(each, authorities) for each in _policies_beside(path) if each.exists()]
    return _trust(
        authorities,
        [(crl, str(path)) for crl in crls],
        frozenset(),
        policy,
        [],
        SigningPolicies(tuple(policies), signing),
    )


def _read_directory(path: Path, policy: CrlPolicy, signing: PolicyMode) -> Trust:
    beside: dict[str, list[x509.Certificate]] = {}
    policies: dict[str, str] = {}
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
            if name.endswith((SIGNING_POLICY, NAMESPACES)) and not name.startswith("."):
                policies[name] = name.rpartition(".")[0]
            continue
        try:
            if found["crl"]:
                listed_stems.add(found["stem"])
                crls.append((_read_crl(path / name), str(path / name)))
            else:
                beside.setdefault(found["stem"], []).extend(read_certificates(path / name))
        except CertificateFilesError as error:
            # One bad file of a hundred must not stop the service; who depends on it is refused.
            problems.append(str(error))
    if not beside:
        raise CertificateFilesError(
            f"{path} holds no authority: files must be named HASH.0 (openssl rehash makes the names)"
        )
    read = (_read_policy(path / name, beside.get(stem, ())) for name, stem in sorted(policies.items()))
    # Both hashes of a name lead to the same file, or to copies of it.
    files = {(each.owners, each.statements, each.problem): each for each in read}
    return _trust(
        [authority for group in beside.values() for authority in group],
        crls,
        frozenset(listed_stems),
        policy,
        problems,
        SigningPolicies(tuple(files.values()), signing),
    )


def _read_policy(path: Path, authorities: Sequence[x509.Certificate]) -> PolicyFile:
    owners = {plain(each.subject) for each in authorities}
    try:
        with path.open("rb") as file:
            content = file.read(LONGEST_FILE + 1)
    except OSError as error:
        return PolicyFile(str(path), frozenset(owners), problem=f"it cannot be read ({error.strerror})")
    return PolicyFile.read(str(path), content, owners)


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
    signing: SigningPolicies,
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
        tuple(dict.fromkeys([*problems, *signing.problems()])),
        frozenset(listed),
        signing,
    )


def _signed(crl: x509.CertificateRevocationList, key: CertificatePublicKeyTypes) -> bool:
    try:
        # A key that cannot sign raises the TypeError.
        return crl.is_signature_valid(cast("CertificateIssuerPublicKeyTypes", key))
    except (TypeError, ValueError):
        return False
