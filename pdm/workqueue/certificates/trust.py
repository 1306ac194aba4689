"""Which authorities are trusted, and what they have revoked.

What is checked follows the CRL policy: ``require`` refuses everybody below an authority without a list, ``if-present``
checks each list there is, ``off`` none. A list that is there but cannot be used (damaged, signed by somebody else,
expired) always refuses: it may be the one that names the caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Literal

from attrs import field, frozen
from cryptography import x509
from OpenSSL.crypto import X509, X509Store, X509StoreContext, X509StoreContextError, X509StoreFlags

from pdm.workqueue.certificates.names import canonical, dn, plain
from pdm.workqueue.certificates.proxies import is_legacy_proxy, is_proxy, proxy_problem
from pdm.workqueue.certificates.refusals import misuse, reason_of
from pdm.workqueue.domain.signing_policy import SigningPolicies, Verdict

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
        verified = _verified(plain, leaf, others)
        # OpenSSL can only demand lists of all authorities or of none. So each certificate is checked by itself, as the
        # leaf of the rest of its chain, if its authority's list is to be looked at. A user has no list: no proxies.
        for depth, certificate in enumerate(verified):
            issuer = next(iter(verified[depth + 1 :]), None)
            reason = misuse(certificate, issuer, is_leaf=depth == 0)
            if reason is not None:
                raise ChainRefusedError(reason, dn(certificate.subject))
            if not is_proxy(certificate) and self.must_be_listed(certificate.issuer):
                first, *rest = (X509.from_cryptography(each) for each in verified[depth:])
                _verified(checking, first, rest)
        refusal = self.judge_signatures(verified).refusal
        if refusal is not None:
            raise ChainRefusedError(refusal, dn(_behind_proxies(verified)[0].subject))
        return verified

    def judge_signatures(self, chain: Sequence[x509.Certificate]) -> Verdict:
        """Whether the authorities of a chain may sign what they have signed; compares texts, no cryptography.

        Args:
            chain: as verified: leaf first, root last.
        """
        return self.signing.judge([plain(each.subject) for each in _behind_proxies(chain)])

    def unbound(self) -> list[str]:
        """Subjects of the authorities that may sign any subject, for want of a policy."""
        if self.signing.mode != "if-present":
            return []
        subjects = {plain(each.subject): dn(each.subject) for each in self.authorities}
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


def _verified(store: X509Store, leaf: X509, others: Sequence[X509]) -> tuple[x509.Certificate, ...]:
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
