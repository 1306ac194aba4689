"""A certificate authority, and the certificates with keys that it issues.

Used by tests, demonstrations and private instances; the service itself issues no certificates.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from attrs import field, frozen
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pdm.workqueue.certificates.names import dn, parse_dn, subject_hash, subject_hash_old
from pdm.workqueue.certificates.proxies import key_usage, sign_proxy

#: Certificates start a little in the past, because clocks differ.
SKEW = timedelta(minutes=-5)


@frozen
class Credential:
    """A certificate with its private key.

    Attributes:
        key: its private key; RSA, because Globus needs that.
        chain: the certificates that signed it, without the authority's root: for a proxy the proxies before it and the
            user's own.
    """

    certificate: x509.Certificate
    key: rsa.RSAPrivateKey = field(repr=False)
    chain: tuple[x509.Certificate, ...] = ()

    @property
    def dn(self) -> str:
        """The subject in slash form."""
        return dn(self.certificate.subject)

    @property
    def serial(self) -> int:
        """The serial number, as `Authority.crl` takes it."""
        return self.certificate.serial_number

    def proxy(
        self, start: timedelta = SKEW, lifetime: timedelta = timedelta(hours=12), limited: bool = False
    ) -> Credential:
        """Make an RFC 3820 proxy of this credential; works on a proxy too."""
        key = new_key()
        begin = now() + start
        certificate = sign_proxy(self.certificate, self.key, key.public_key(), begin, begin + lifetime, limited=limited)
        return Credential(certificate, key, (self.certificate, *self.chain))

    def certificate_pem(self) -> bytes:
        """The certificate and its chain, leaf first."""
        return b"".join(each.public_bytes(Encoding.PEM) for each in (self.certificate, *self.chain))

    def key_pem(self) -> bytes:
        """The private key, not encrypted."""
        return key_pem(self.key)

    def bundle_pem(self) -> bytes:
        """Certificate, key, chain: the order that grid tools want in the file of ``X509_USER_PROXY``."""
        return b"".join(
            (
                self.certificate.public_bytes(Encoding.PEM),
                self.key_pem(),
                *(each.public_bytes(Encoding.PEM) for each in self.chain),
            )
        )

    def write_certificate(self, path: Path) -> None:
        """Write the certificate and its chain as PEM."""
        path.write_bytes(self.certificate_pem())

    def write_key(self, path: Path) -> None:
        """Write the private key as PEM, readable by the owner only."""
        write_private(path, self.key_pem())

    def write_bundle(self, path: Path) -> None:
        """Write certificate, key and chain into one file, readable by the owner only."""
        write_private(path, self.bundle_pem())


def new_key() -> rsa.RSAPrivateKey:
    """A new RSA key of 2048 bits."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def key_pem(key: rsa.RSAPrivateKey) -> bytes:
    """The key in the PEM form that Globus reads, not encrypted."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())


def now() -> datetime:
    """The present in whole seconds, as certificates count."""
    return datetime.now(UTC).replace(microsecond=0)


def write_private(path: Path, content: bytes) -> None:
    """Write a file that was never readable by others, not even while it is written."""
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    part.replace(path)


_YEAR = timedelta(days=365)


@frozen
class Authority:
    """Signs certificates and revocation lists.

    Attributes:
        chain: the authorities above a subordinate one, without the root.
    """

    certificate: x509.Certificate
    key: rsa.RSAPrivateKey = field(repr=False)
    chain: tuple[x509.Certificate, ...] = ()

    @classmethod
    def create(cls, subject: str, lifetime: timedelta = 10 * _YEAR) -> Authority:
        """Make a new self-signed authority.

        Args:
            subject: slash form, such as ``/DC=org/DC=example/CN=My CA``; users and hosts are named beside it.

        Raises:
            ValueError: `subject` is no subject.
        """
        key = new_key()
        name = parse_dn(subject)
        builder = _authority_certificate(name, name, key.public_key(), key.public_key(), lifetime)
        return cls(builder.sign(key, hashes.SHA256()), key)

    @classmethod
    def load(cls, directory: Path) -> Authority:
        """Read what `write` wrote.

        Raises:
            OSError: a file cannot be read.
            ValueError: a file is not what it should be.
        """
        certificate, *chain = x509.load_pem_x509_certificates((directory / "ca.crt").read_bytes())
        key = load_pem_private_key((directory / "ca.key").read_bytes(), password=None)
        if not isinstance(key, rsa.RSAPrivateKey):
            raise ValueError(f"{directory / 'ca.key'} is no RSA key")  # noqa: TRY004 - the file is wrong, not the call
        return cls(certificate, key, tuple(chain))

    @property
    def dn(self) -> str:
        """The subject in slash form."""
        return dn(self.certificate.subject)

    def write(self, directory: Path) -> None:
        """Write ``ca.crt`` and ``ca.key`` (readable by the owner only), for `load`."""
        directory.mkdir(parents=True, exist_ok=True)
        chain = (self.certificate, *self.chain)
        (directory / "ca.crt").write_bytes(b"".join(each.public_bytes(Encoding.PEM) for each in chain))
        write_private(directory / "ca.key", key_pem(self.key))

    def subordinate(self, common_name: str, lifetime: timedelta = 5 * _YEAR) -> Authority:
        """Make an authority below this one. Both must be in a directory for what it signs to be trusted."""
        key = new_key()
        builder = _authority_certificate(
            self._beside(common_name), self.certificate.subject, key.public_key(), self.key.public_key(), lifetime
        )
        above = () if self.certificate.issuer == self.certificate.subject else (self.certificate, *self.chain)
        return Authority(builder.sign(self.key, hashes.SHA256()), key, above)

    def host(
        self,
        names: Sequence[str],
        ips: Sequence[str] = (),
        *,
        start: timedelta = SKEW,
        lifetime: timedelta = _YEAR,
    ) -> Credential:
        """Sign a host certificate; servers and clients may use it.

        Args:
            names: DNS names, the first (or else the first address) is its common name too.
        """
        alternatives = x509.SubjectAlternativeName(
            [*(x509.DNSName(name) for name in names), *(x509.IPAddress(ipaddress.ip_address(ip)) for ip in ips)]
        )
        return self._sign(
            (*names, *ips)[0],
            start,
            lifetime,
            (alternatives, False),
            (key_usage(digital_signature=True, key_encipherment=True), True),
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), False),
        )

    def user(self, common_name: str, *, start: timedelta = SKEW, lifetime: timedelta = _YEAR) -> Credential:
        """Sign a user certificate; only clients may use it.

        Args:
            common_name: last part of the subject; the parts before it are those of the authority.
        """
        return self._sign(
            common_name,
            start,
            lifetime,
            (key_usage(digital_signature=True), True),
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False),
        )

    def crl(
        self,
        revoked: Iterable[int] = (),
        lifetime: timedelta = timedelta(days=30),
        start: timedelta = SKEW,
    ) -> x509.CertificateRevocationList:
        """Sign a revocation list.

        Args:
            revoked: serial numbers of the revoked certificates.
            lifetime: until the next list is due, counted from `start`.
        """
        begin = now() + start
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(begin)
            .next_update(begin + lifetime)
            .add_extension(_authority_identifier(self.key.public_key()), critical=False)
            .add_extension(x509.CRLNumber(int(begin.timestamp())), critical=False)
        )
        for serial in revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(begin).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(self.key, hashes.SHA256())

    def write_trust(self, directory: Path) -> None:
        """Write the authority (and those above it) into a grid-style directory: ``HASH.0``, ``HASH.signing_policy``.

        Both hashes are written, that of OpenSSL 1.0 and later and the one before it.
        """
        directory.mkdir(parents=True, exist_ok=True)
        policy = (
            f"access_id_CA   X509   '{self.dn}'\n"
            "pos_rights     globus CA:sign\n"
            f"cond_subjects  globus '\"{dn(self._beside('*'))}\"'\n"
        )
        for stem in self._stems():
            (directory / f"{stem}.0").write_bytes(self.certificate.public_bytes(Encoding.PEM))
            (directory / f"{stem}.signing_policy").write_text(policy, encoding="utf-8")

    def write_crl(self, directory: Path, crl: x509.CertificateRevocationList) -> None:
        """Put a revocation list of this authority into a grid-style directory: ``HASH.r0``, replaced at once."""
        for stem in self._stems():
            part = directory / f"{stem}.r0.part"
            part.write_bytes(crl.public_bytes(Encoding.PEM))
            part.replace(directory / f"{stem}.r0")

    def _stems(self) -> tuple[str, str]:
        name = self.certificate.subject
        return subject_hash(name), subject_hash_old(name)

    def _beside(self, common_name: str) -> x509.Name:
        own = x509.RelativeDistinguishedName([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        return x509.Name([*self.certificate.subject.rdns[:-1], own])

    def _sign(
        self, common_name: str, start: timedelta, lifetime: timedelta, *extensions: tuple[x509.ExtensionType, bool]
    ) -> Credential:
        key = new_key()
        begin = now() + start
        builder = (
            x509.CertificateBuilder()
            .subject_name(self._beside(common_name))
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin + lifetime)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(_authority_identifier(self.key.public_key()), critical=False)
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical=critical)
        root = self.certificate.issuer == self.certificate.subject
        return Credential(builder.sign(self.key, hashes.SHA256()), key, () if root else (self.certificate, *self.chain))


def _authority_certificate(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: rsa.RSAPublicKey,
    issuer_key: rsa.RSAPublicKey,
    lifetime: timedelta,
) -> x509.CertificateBuilder:
    begin = now() + SKEW
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + lifetime)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(_authority_identifier(issuer_key), critical=False)
    )


def _authority_identifier(public_key: rsa.RSAPublicKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(public_key)
