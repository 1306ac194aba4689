"""Trusted authorities, revocation lists and signing policies: reading them, and checking chains against them.

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
from OpenSSL.crypto import X509, X509Store, X509StoreFlags

from pdm.workqueue.certificates.names import PARSE_ERRORS, canonical, dn, policy_form, subject_hash, subject_hash_old
from pdm.workqueue.certificates.pem import CertificateFilesError, read_bytes, read_certificates
from pdm.workqueue.certificates.proxies import is_proxy
from pdm.workqueue.certificates.verification import UNREADABLE, ChainRefusedError, misuse, verify_chain
from pdm.workqueue.domain.signing_policy import (
    LONGEST_FILE,
    NAMESPACES,
    SIGNING_POLICY,
    PolicyDecision,
    PolicyFile,
    PolicyMode,
    SigningPolicies,
)

CrlPolicy = Literal["require", "if-present", "off"]


@frozen(eq=False)
class Trust:
    """Authorities with their revocation lists; never changes, is replaced as a whole.

    Attributes:
        problems: what could not be read, a sentence each, for the log.
        listed: canonical subjects of the authorities that have a list, usable or not.
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
        """Whether certificates of this authority are refused without a revocation list."""
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
            # Both: CRL_CHECK alone looks at the leaf only, and would accept the proxy of a revoked user.
            store.set_flags(X509StoreFlags.CRL_CHECK | X509StoreFlags.CRL_CHECK_ALL)

    def verify(self, chain: Sequence[x509.Certificate], now: datetime) -> tuple[x509.Certificate, ...]:
        """Verify a chain that did not arrive by TLS, by the same rules.

        Args:
            chain: leaf first; authorities may be missing.

        Returns:
            The whole chain, from the leaf to a trusted root.

        Raises:
            ChainRefusedError: it is not trusted, or a certificate in it is malformed.
        """
        try:
            return self._verify(chain, now)
        except UNREADABLE as error:
            raise ChainRefusedError(f"a certificate cannot be read: {error}", _subject(chain[0])) from error

    def _verify(self, chain: Sequence[x509.Certificate], now: datetime) -> tuple[x509.Certificate, ...]:
        plain, checking = X509Store(), X509Store()
        for store in (plain, checking):
            self._put_into(store)
            store.set_time(now)
            store.set_flags(X509StoreFlags.ALLOW_PROXY_CERTS)
        checking.set_flags(X509StoreFlags.CRL_CHECK)
        leaf, *others = (X509.from_cryptography(certificate) for certificate in chain)
        verified = verify_chain(plain, leaf, others)
        # OpenSSL demands lists of all authorities or of none. So each certificate is verified as the leaf of the rest
        # of its chain, if its authority's list must be checked. Users have no lists: proxies are skipped.
        for depth, certificate in enumerate(verified):
            issuer = next(iter(verified[depth + 1 :]), None)
            reason = misuse(certificate, issuer, is_leaf=depth == 0)
            if reason is not None:
                raise ChainRefusedError(reason, dn(certificate.subject))
            if not is_proxy(certificate) and self.must_be_listed(certificate.issuer):
                first, *rest = (X509.from_cryptography(each) for each in verified[depth:])
                verify_chain(checking, first, rest)
        refusal = self.check_signatures(verified).refusal
        if refusal is not None:
            raise ChainRefusedError(refusal, dn(_behind_proxies(verified)[0].subject))
        return verified

    def check_signatures(self, chain: Sequence[x509.Certificate]) -> PolicyDecision:
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
        """The first certificate of a chain, verified before, that a list names now; by look-up, no cryptography."""
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

    def list_times(self) -> Iterator[tuple[str, datetime, datetime | None]]:
        """The lists: subject of the authority, when it was issued, and when the next one is due."""
        for crl in self.crls:
            yield dn(crl.issuer), crl.last_update_utc, crl.next_update_utc

    def authority_ends(self) -> Iterator[tuple[str, datetime]]:
        """The authorities: subject, and end of the certificate."""
        for authority in self.authorities:
            yield dn(authority.subject), authority.not_valid_after_utc

    def _put_into(self, store: X509Store) -> None:
        for authority in self.authorities:
            store.add_cert(X509.from_cryptography(authority))
        for crl in self.crls:
            store.add_crl(crl)


def _behind_proxies(chain: Sequence[x509.Certificate]) -> Sequence[x509.Certificate]:
    """The chain from the end entity on."""
    return chain[next((at for at, each in enumerate(chain) if not is_proxy(each)), 0) :]


def _subject(certificate: x509.Certificate) -> str:
    try:
        return dn(certificate.subject)
    except PARSE_ERRORS:
        return "(unreadable)"


_GRID_FILE = re.compile(r"(?P<stem>[0-9a-f]{8})\.(?P<crl>r?)\d+")
_CRL_BLOCK = re.compile(rb"-----BEGIN X509 CRL-----.*?-----END X509 CRL-----[\r\n]*", re.DOTALL)


def read_trust(path: Path, policy: CrlPolicy = "if-present", signing: PolicyMode = "if-present") -> Trust:
    """Read authorities and lists. File work: to be called in a thread when a reactor runs.

    Args:
        policy: which revocation lists are checked.

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
    authorities = _read_authorities(path)
    crls: list[x509.CertificateRevocationList] = []
    for block in _CRL_BLOCK.findall(read_bytes(path)):
        try:
            crls.append(_usable_crl(x509.load_pem_x509_crl(block)))
        except UNREADABLE as error:
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
                beside.setdefault(found["stem"], []).extend(_read_authorities(path / name))
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
        return _usable_crl(load(content))
    except UNREADABLE as error:
        raise CertificateFilesError(
            f"{path} holds no revocation list that can be read ({error}): clients of its authority are refused"
        ) from error


def _read_authorities(path: Path) -> list[x509.Certificate]:
    """Certificates that OpenSSL can read, too.

    Raises:
        CertificateFilesError: one is malformed.
    """
    authorities = read_certificates(path)
    try:
        for each in authorities:
            _ = policy_form(each.subject), canonical(each.subject), each.extensions, each.public_key()
            X509.from_cryptography(each)
    except UNREADABLE as error:
        raise CertificateFilesError(f"{path} holds a damaged certificate ({error})") from error
    return authorities


def _usable_crl(crl: x509.CertificateRevocationList) -> x509.CertificateRevocationList:
    """The list, if all that is used of it can be read, by OpenSSL too; else one of `UNREADABLE` is raised."""
    _ = canonical(crl.issuer), crl.next_update_utc
    X509Store().add_crl(crl)
    return crl


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
    except UNREADABLE:
        return False
