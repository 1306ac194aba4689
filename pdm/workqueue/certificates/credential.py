"""A certificate with its key, as tests, demonstrations and private instances make them."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from attrs import field, frozen
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from pdm.workqueue.certificates.names import dn
from pdm.workqueue.certificates.proxies import sign_proxy

#: Certificates start a little in the past: clocks of the machines that check them differ.
SKEW = timedelta(minutes=-5)


@frozen
class Credential:
    """A certificate with its private key.

    Attributes:
        certificate: of a host, a user, or a proxy.
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
        """Make an RFC 3820 proxy of this credential; works on a proxy too.

        Args:
            start: when it becomes valid, counted from now.
            lifetime: how long it is valid, counted from `start`.
            limited: Globus' limited proxy.
        """
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
