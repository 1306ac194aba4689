"""Trusted authorities, revocation lists and signing policies, and the verification of chains against them.

The CRL policy says which lists are checked: ``require`` refuses every certificate of an authority without a list,
``if-present`` checks each list that exists, ``off`` none. A list that exists but cannot be used (damaged, signed by
somebody else, expired) always refuses: it may be the one that names the caller.

They are read from one PEM file (which may hold revocation lists too) or from a grid-style directory, as
``/etc/grid-security/certificates``: ``HASH.0`` is an authority, ``HASH.r0`` its revocation list,
``HASH.signing_policy`` and ``HASH.namespaces`` say which subjects it may sign. Beside a PEM file ``NAME.pem`` such
files are ``NAME.signing_policy`` and ``NAME.namespaces``, for all authorities in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal, cast

from attrs import field, frozen
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPublicKeyTypes, CertificatePublicKeyTypes
from OpenSSL.crypto import X509, X509Store, X509StoreContext, X509StoreContextError, X509StoreFlags
from OpenSSL.SSL import X509VerificationCodes as Code

from pdm.workqueue.certificates.names import canonical, dn, policy_form, subject_hash, subject_hash_old
from pdm.workqueue.certificates.pem import CertificateFilesError, read_bytes, read_certificates
from pdm.workqueue.certificates.proxies import is_legacy_proxy, is_proxy, proxy_problem
from pdm.workqueue.domain.signing_policy import (
    LONGEST_FILE,
    NAMESPACES,
    SIGNING_POLICY,
    PolicyDecision,
    PolicyFile,
    PolicyMode,
    SigningPolicies,
)

# pyOpenSSL has no names for these: X509_V_ERR_EE_KEY_TOO_SMALL and its neighbours.
_EE_KEY_TOO_SMALL, _CA_KEY_TOO_SMALL, _WEAK_DIGEST, _PROXY_SUBJECT = 66, 67, 68, 72

_UNKNOWN_AUTHORITY = "its authority is not trusted here, or part of the chain is missing"
_REASONS = {
    Code.ERR_CERT_HAS_EXPIRED: "certificate expired",
    Code.ERR_CERT_NOT_YET_VALID: "certificate not yet valid",
    Code.ERR_CERT_REVOKED: "certificate revoked",
    Code.ERR_CERT_SIGNATURE_FAILURE: "certificate has a bad signature",
    Code.ERR_DEPTH_ZERO_SELF_SIGNED_CERT: "certificate is self-signed and not trusted here",
    Code.ERR_SELF_SIGNED_CERT_IN_CHAIN: _UNKNOWN_AUTHORITY,
    Code.ERR_UNABLE_TO_GET_ISSUER_CERT: _UNKNOWN_AUTHORITY,
    Code.ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY: _UNKNOWN_AUTHORITY,
    Code.ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE: _UNKNOWN_AUTHORITY,
    Code.ERR_INVALID_CA: "signed by a certificate that is no authority",
    Code.ERR_INVALID_NON_CA: "a proxy of an authority's certificate",
    Code.ERR_INVALID_PURPOSE: "certificate is not meant for clients",
    Code.ERR_PATH_LENGTH_EXCEEDED: "chain is longer than an authority allows",
    Code.ERR_PROXY_PATH_LENGTH_EXCEEDED: "chain of proxies is longer than one of them allows",
    Code.ERR_PROXY_CERTIFICATES_NOT_ALLOWED: "proxy not allowed",
    Code.ERR_KEYUSAGE_NO_DIGITAL_SIGNATURE: "a proxy of a certificate that may not sign",
    Code.ERR_UNABLE_TO_GET_CRL: "no usable revocation list of its authority",
    Code.ERR_CRL_HAS_EXPIRED: "the revocation list of its authority has expired",
    Code.ERR_CRL_NOT_YET_VALID: "the revocation list of its authority is not yet valid",
    Code.ERR_CRL_SIGNATURE_FAILURE: "the revocation list of its authority has a bad signature",
    Code.ERR_UNABLE_TO_GET_CRL_ISSUER: "the revocation list of its authority is signed by somebody else",
    Code.ERR_UNHANDLED_CRITICAL_EXTENSION: "it has a critical extension that is not known here (a draft proxy of GT3?)",
    Code.ERR_PERMITTED_VIOLATION: "an authority of its chain may not sign such a subject (name constraints)",
    Code.ERR_EXCLUDED_VIOLATION: "an authority of its chain may not sign such a subject (name constraints)",
    _EE_KEY_TOO_SMALL: "key too short (2048 bits are needed)",
    _CA_KEY_TOO_SMALL: "the key of its authority is too short",
    _WEAK_DIGEST: "signed with an algorithm that is too weak",
    _PROXY_SUBJECT: "the subject of a proxy is not that of its issuer plus one CN",
}


def reason_of(error: int) -> str:
    """The reason for one of OpenSSL's verification errors."""
    return _REASONS.get(error, f"OpenSSL verification error {error}")


def misuse(certificate: x509.Certificate, issuer: x509.Certificate | None, *, is_leaf: bool) -> str | None:
    """What OpenSSL lets pass in a chain it trusts, and we do not: an authority as a client, a proxy without rights.

    Args:
        certificate: one of the chain.
        issuer: the one that signed it, None for the root.
        is_leaf: whether it is the client's own.

    Returns:
        The reason to refuse it, None if there is none.
    """
    if is_leaf and _is_authority(certificate):
        return "certificate of an authority, not of a client"
    if is_proxy(certificate) and issuer is not None and _is_authority(issuer):
        return _REASONS[Code.ERR_INVALID_NON_CA]
    if problem := proxy_problem(certificate):
        return problem
    return "certificate has no subject" if not certificate.subject.rdns else None


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


CrlPolicy = Literal["require", "if-present", "off"]


class ChainRefusedError(Exception):
    """A chain of certificates is not trusted.

    Attributes:
        reason: why, in words.
        subject: whose certificate it is, slash form.
    """

    def __init__(self, reason: str, subject: str) -> None:
        super().__init__(f"{reason} ({subject})")
        self.reason = reason
        self.subject = subject


@frozen(eq=False)
class Trust:
    """Authorities with their revocation lists; never changes, is replaced as a whole.

    Attributes:
        authorities: trusted certificates, roots and those below them.
        crls: usable revocation lists.
        policy: which lists are checked.
        problems: what could not be read, a sentence each, for the log.
        listed: canonical subjects of the authorities that have a list, usable or not.
        signing: which subjects the authorities may sign.
    """

    authorities: tuple[x509.Certificate, ...]
    crls: tuple[x509.CertificateRevocationList, ...]
    policy: CrlPolicy
    problems: tuple[str, ...] = ()
    listed: frozenset[bytes] = field(default=frozenset(), repr=False)
    signing: SigningPolicies = field(factory=SigningPolicies, repr=False)
    _by_issuer: dict[bytes, list[x509.CertificateRevocationList]] = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        by_issuer: dict[bytes, list[x509.CertificateRevocationList]] = {}
        for crl in self.crls:
            by_issuer.setdefault(canonical(crl.issuer), []).append(crl)
        object.__setattr__(self, "_by_issuer", by_issuer)

    def must_be_listed(self, issuer: x509.Name) -> bool:
        """Whether certificates of this authority may only pass if a revocation list was looked at."""
        if self.policy == "off":
            return False
        return self.policy == "require" or canonical(issuer) in self.listed

    def fill(self, store: X509Store) -> None:
        """Put authorities, lists and the right flags into an OpenSSL store.

        With ``if-present`` the store alone refuses what has no list: the verify callback of the context must pass
        error `UNABLE_TO_GET_CRL`, and that one only, unless `must_be_listed`.
        """
        self._put_into(store)
        store.set_flags(X509StoreFlags.ALLOW_PROXY_CERTS)
        if self.policy != "off":
            # Both: CRL_CHECK alone looks at the leaf only, and would let in the proxy of a revoked user.
            store.set_flags(X509StoreFlags.CRL_CHECK | X509StoreFlags.CRL_CHECK_ALL)

    def verify(self, chain: Sequence[x509.Certificate], now: datetime) -> tuple[x509.Certificate, ...]:
        """Check a chain that came by another way than TLS, with the same result.

        Args:
            chain: leaf first; authorities may be missing.
            now: the moment to check for (aware).

        Returns:
            The whole chain, from the leaf to a trusted root.

        Raises:
            ChainRefusedError: it is not trusted.
        """
        plain, checking = X509Store(), X509Store()
        for store in (plain, checking):
            self._put_into(store)
            store.set_time(now)
            store.set_flags(X509StoreFlags.ALLOW_PROXY_CERTS)
        checking.set_flags(X509StoreFlags.CRL_CHECK)
        leaf, *others = (X509.from_cryptography(certificate) for certificate in chain)
        verified = _verify_chain(plain, leaf, others)
        # OpenSSL can only demand lists of all authorities or of none. So each certificate is checked by itself, as the
        # leaf of the rest of its chain, if its authority's list is to be looked at. A user has no list: no proxies.
        for depth, certificate in enumerate(verified):
            issuer = next(iter(verified[depth + 1 :]), None)
            reason = misuse(certificate, issuer, is_leaf=depth == 0)
            if reason is not None:
                raise ChainRefusedError(reason, dn(certificate.subject))
            if not is_proxy(certificate) and self.must_be_listed(certificate.issuer):
                first, *rest = (X509.from_cryptography(each) for each in verified[depth:])
                _verify_chain(checking, first, rest)
        refusal = self.judge_signatures(verified).refusal
        if refusal is not None:
            raise ChainRefusedError(refusal, dn(_behind_proxies(verified)[0].subject))
        return verified

    def judge_signatures(self, chain: Sequence[x509.Certificate]) -> PolicyDecision:
        """Whether the authorities of a chain may sign what they have signed; compares texts, no cryptography.

        Args:
            chain: as verified: leaf first, root last.
        """
        return self.signing.evaluate([policy_form(each.subject) for each in _behind_proxies(chain)])

    def unbound(self) -> list[str]:
        """Subjects of the authorities that may sign any subject, for want of a policy."""
        if self.signing.mode != "if-present":
            return []
        subjects = {policy_form(each.subject): dn(each.subject) for each in self.authorities}
        return [shown for subject, shown in subjects.items() if not self.signing.covers(subject)]

    def revoked(self, chain: Iterable[x509.Certificate]) -> x509.Certificate | None:
        """The first certificate of a chain, verified before, that a list names now; a look-up, no cryptography."""
        for certificate in chain:
            for crl in self._by_issuer.get(canonical(certificate.issuer), ()):
                if crl.get_revoked_certificate_by_serial_number(certificate.serial_number) is not None:
                    return certificate
        return None

    def unlisted(self) -> list[str]:
        """Subjects of the authorities that have no usable list."""
        return [dn(each.subject) for each in self.authorities if canonical(each.subject) not in self._by_issuer]

    def ending(self, now: datetime, within: timedelta) -> Iterator[tuple[str, datetime]]:
        """The lists that end soon or have ended: subject of the authority, and when."""
        for crl in self.crls:
            end = crl.next_update_utc
            if end is not None and end <= now + within:
                yield dn(crl.issuer), end

    def _put_into(self, store: X509Store) -> None:
        for authority in self.authorities:
            store.add_cert(X509.from_cryptography(authority))
        for crl in self.crls:
            store.add_crl(crl)


def _behind_proxies(chain: Sequence[x509.Certificate]) -> Sequence[x509.Certificate]:
    """The chain from the end entity on."""
    return chain[next((at for at, each in enumerate(chain) if not is_proxy(each)), 0) :]


def _verify_chain(store: X509Store, leaf: X509, others: Sequence[X509]) -> tuple[x509.Certificate, ...]:
    try:
        chain = X509StoreContext(store, leaf, others).get_verified_chain()
    except X509StoreContextError as error:
        for certificate in (leaf, *others):
            # OpenSSL would only say that who signed it is no authority.
            if is_legacy_proxy(certificate.to_cryptography()):
                legacy = certificate.to_cryptography()
                raise ChainRefusedError(proxy_problem(legacy) or "a legacy proxy", dn(legacy.subject)) from error
        raise ChainRefusedError(reason_of(error.errors[0]), dn(error.certificate.to_cryptography().subject)) from error
    return tuple(each.to_cryptography() for each in chain)


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


def file_state(path: Path) -> tuple[object, ...]:
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
    return _combine(
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
    return _combine(
        [authority for group in beside.values() for authority in group],
        crls,
        frozenset(listed_stems),
        policy,
        problems,
        SigningPolicies(tuple(files.values()), signing),
    )


def _read_policy(path: Path, authorities: Sequence[x509.Certificate]) -> PolicyFile:
    owners = {policy_form(each.subject) for each in authorities}
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


def _combine(
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
