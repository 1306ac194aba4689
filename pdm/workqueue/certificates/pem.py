"""Read certificates, keys and proxy bundles in PEM form; write them as PKCS#12 for browsers.

Errors name the file that is wrong and say what to do about it. A bundle is a proxy, its key and the certificates
behind it in one text, the form that grid tools read and write.
"""

from __future__ import annotations

import base64
import hashlib
import re
from datetime import UTC, datetime
from pathlib import Path

from attrs import field, frozen
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    pkcs12,
)

from pdm.workqueue.certificates.names import PARSE_ERRORS, dn
from pdm.workqueue.certificates.proxies import VomsAttributes, end_entity, is_proxy, lifetime_end, voms_attributes

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey

#: OpenSSL's default security level refuses shorter RSA keys.
_SHORTEST_RSA_BITS = 2048
#: Rounds of PBKDF2: 0.2 s for who knows the passphrase.
_PKCS12_ROUNDS = 200_000
_ENCRYPTED = (b"-----BEGIN ENCRYPTED PRIVATE KEY-----", b"Proc-Type: 4,ENCRYPTED")
_KEY_BLOCK = re.compile(rb"-----BEGIN ([A-Z ]*PRIVATE KEY)-----.*?-----END \1-----[\r\n]*", re.DOTALL)


class CertificateFilesError(Exception):
    """A file with certificates or a key is missing or unfit. The text names it and says what to do."""


class WeakKeyError(CertificateFilesError):
    """A key is shorter than TLS allows today."""


@frozen
class TlsIdentity:
    """Certificate, key and chain of one side of a connection.

    Attributes:
        chain: the certificates behind it, leaf side first.
    """

    certificate: x509.Certificate
    key: PrivateKey = field(repr=False)
    chain: tuple[x509.Certificate, ...]

    @property
    def valid_until(self) -> datetime:
        """When the first of the certificates expires (UTC)."""
        return lifetime_end([self.certificate, *self.chain])

    @property
    def subject(self) -> str:
        return dn(self.certificate.subject)

    @property
    def names(self) -> list[str]:
        """Host names and addresses for which the certificate is valid."""
        try:
            names = self.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except x509.ExtensionNotFound:
            return []
        addresses = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
        return [*names.get_values_for_type(x509.DNSName), *addresses]


def read_identity(certificate_path: Path, key_path: Path | None, passphrase: bytes | None = None) -> TlsIdentity:
    """Read a certificate with its chain and its key.

    Args:
        certificate_path: PEM; the certificate first, then its chain. May hold the key too (a proxy file does).
        key_path: PEM of the key; None if it is in the same file.

    Raises:
        CertificateFilesError: a file is missing, holds something else, the key is encrypted or another one's.
        WeakKeyError: the key is too short.
    """
    certificate, *chain = read_certificates(certificate_path)
    key = _read_key(key_path or certificate_path, passphrase)
    if _public_der(key.public_key()) != _public_der(certificate.public_key()):
        raise CertificateFilesError(
            f"the key in {key_path or certificate_path} does not belong to the first certificate in"
            f" {certificate_path} ({dn(certificate.subject)}): name the pair that was made together"
        )
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size < _SHORTEST_RSA_BITS:
        advice = "make a new proxy" if is_proxy(certificate) else "get a new certificate from your authority"
        raise WeakKeyError(
            f"the key of the certificate in {certificate_path} ({dn(certificate.subject)}) has only {key.key_size}"
            f" bits, and TLS needs {_SHORTEST_RSA_BITS}: {advice}"
        )
    return TlsIdentity(certificate, key, tuple(chain))


def to_pkcs12(identity: TlsIdentity, name: str, passphrase: str) -> bytes:
    """A certificate with its key and chain as browsers import it (PKCS#12, DER).

    Certificates and key are encrypted by PBES2 with AES-256: NSS, which Firefox and Chromium use, reads that, and the
    systems that need the older RC2 and 3DES are out of support.

    Args:
        name: shown by the browser in its list.
    """
    encryption = (
        PrivateFormat.PKCS12.encryption_builder()
        .kdf_rounds(_PKCS12_ROUNDS)
        .key_cert_algorithm(pkcs12.PBES.PBESv2SHA256AndAES256CBC)
        .hmac_hash(hashes.SHA256())
        .build(passphrase.encode())
    )
    friendly_name = name.encode()
    return pkcs12.serialize_key_and_certificates(
        friendly_name, identity.key, identity.certificate, identity.chain or None, encryption
    )


def is_encrypted(path: Path) -> bool:
    """Whether the key in a PEM file needs a passphrase.

    Raises:
        CertificateFilesError: the file cannot be read.
    """
    content = read_bytes(path)
    return any(mark in content for mark in _ENCRYPTED)


def require_valid(certificates_path: Path, chain: tuple[x509.Certificate, ...], now: datetime) -> None:
    """Check that no certificate of a chain has expired or is still to become valid.

    Raises:
        CertificateFilesError: one is not valid now.
    """
    for certificate in chain:
        end, begin = certificate.not_valid_after_utc, certificate.not_valid_before_utc
        which = f"the certificate in {certificates_path} ({dn(certificate.subject)})"
        if end <= now:
            advice = "make a new proxy" if is_proxy(certificate) else "get a new certificate from your authority"
            raise CertificateFilesError(f"{which} expired at {_timestamp(end)}: {advice}")
        if begin > now:
            raise CertificateFilesError(f"{which} is valid only from {_timestamp(begin)}: check this machine's clock")


def read_certificates(path: Path) -> list[x509.Certificate]:
    """Read all certificates of a PEM file; at least one.

    Raises:
        CertificateFilesError: the file cannot be read, or a certificate in it.
    """
    content = read_bytes(path)
    if b"-----BEGIN CERTIFICATE-----" not in content:
        raise CertificateFilesError(f"{path} holds no certificate in PEM form (-----BEGIN CERTIFICATE-----)")
    try:
        return x509.load_pem_x509_certificates(content)
    except PARSE_ERRORS as error:
        raise CertificateFilesError(f"{path} holds a damaged certificate ({error})") from error


def read_bytes(path: Path) -> bytes:
    """Read a file.

    Raises:
        CertificateFilesError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise CertificateFilesError(f"{path} cannot be read ({error.strerror})") from error


def to_pem(*certificates: x509.Certificate) -> bytes:
    """The certificates one after the other in PEM form."""
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def _read_key(path: Path, passphrase: bytes | None) -> PrivateKey:
    found = _KEY_BLOCK.search(read_bytes(path))
    if found is None:
        raise CertificateFilesError(f"{path} holds no private key in PEM form (-----BEGIN ... PRIVATE KEY-----)")
    try:
        # The test of the numbers of an RSA key takes 0.1 s, which each command of a user would pay. It is meant for
        # keys from strangers; this one is our own, and compared with its certificate.
        password = passphrase if any(mark in found[0] for mark in _ENCRYPTED) else None
        key = load_pem_private_key(found[0], password=password, unsafe_skip_rsa_key_validation=True)
    except TypeError as error:
        raise CertificateFilesError(
            f"the key in {path} is encrypted with a passphrase, which pdm asks for on a terminal: make a proxy from it"
            " (grid-proxy-init) and use that, or decrypt it (openssl pkey -in KEY -out NEW)"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        if passphrase is not None:
            raise CertificateFilesError(f"that is not the passphrase of the key in {path}") from error
        raise CertificateFilesError(f"{path} holds a damaged private key ({error})") from error
    if not isinstance(key, PrivateKey):
        raise CertificateFilesError(f"the key in {path} is of a kind that TLS does not use")
    return key


def _public_der(key: object) -> bytes:
    encoded: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined]
    return encoded


def _timestamp(time: datetime) -> str:
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


_LONGEST_CHAIN = 16


class ProxyBundleError(Exception):
    """Not a proxy with its key; the text says why."""


@frozen
class FetchedProxy:
    """A proxy that came with its key.

    Attributes:
        subject: whose it is: subject of the end entity, slash form.
        valid_until: when the first certificate of its chain expires (UTC).
    """

    subject: str
    valid_until: datetime
    voms: tuple[VomsAttributes, ...]
    bundle_pem: bytes = field(repr=False)


def read_bundle(pem: bytes) -> FetchedProxy:
    """Parse a proxy file. Its chain is not verified: the storage servers do that.

    Raises:
        ProxyBundleError: a certificate or the key is missing, damaged or does not belong to the other.
    """
    try:
        chain = x509.load_pem_x509_certificates(pem)
        # Only compared with its certificate: no need to test its numbers, which takes 0.1 s.
        key = load_pem_private_key(_key_block(pem), password=None, unsafe_skip_rsa_key_validation=True)
        if len(chain) > _LONGEST_CHAIN:
            raise ProxyBundleError(f"it has {len(chain)} certificates")
        spki = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        if key.public_key().public_bytes(*spki) != chain[0].public_key().public_bytes(*spki):
            raise ProxyBundleError("the key does not belong to the first certificate")
        return FetchedProxy(_subject(chain), lifetime_end(chain), voms_attributes(chain), pem)
    except PARSE_ERRORS as error:
        # Only the type: the text could contain parts of the key.
        raise ProxyBundleError(f"it cannot be read ({type(error).__name__})") from None


def attributes_of(pem: bytes) -> tuple[VomsAttributes, ...]:
    """The VOMS attributes of a bundle that was checked before."""
    return voms_attributes(x509.load_pem_x509_certificates(pem))


def _subject(chain: list[x509.Certificate]) -> str:
    try:
        return dn(end_entity(chain).subject)
    except ValueError:
        return dn(chain[-1].issuer)


def _key_block(pem: bytes) -> bytes:
    begin, end = pem.find(b"-----BEGIN"), -1
    while begin >= 0:
        line_end = pem.find(b"\n", begin)
        if b"PRIVATE KEY-----" in pem[begin:line_end]:
            end = pem.find(b"-----END", line_end)
            last = pem.find(b"\n", end)
            return pem[begin : last + 1 if last >= 0 else len(pem)] if end >= 0 else b""
        begin = pem.find(b"-----BEGIN", line_end) if line_end >= 0 else -1
    raise ProxyBundleError("it has no private key")


_FEWEST_RSA_BITS, _MOST_RSA_BITS = 2048, 8192
_OPENSSH = b"-----BEGIN OPENSSH PRIVATE KEY-----"


class SshKeyError(Exception):
    """The key cannot be used; the text says why and what to do, and never contains the key."""


@frozen
class SshKey:
    """A key for SSH.

    Attributes:
        fingerprint: ``SHA256:...``, as ssh-keygen shows it.
        private: in OpenSSH's format, without a passphrase; secret.
    """

    fingerprint: str
    public_line: str
    private: bytes = field(repr=False)


def make_ssh_key(comment: str) -> SshKey:
    """Make an ed25519 key.

    Args:
        comment: one word after the public key, which shows its purpose to its owner.
    """
    return _ssh_key(ed25519.Ed25519PrivateKey.generate(), comment)


def read_ssh_key(text: bytes, comment: str) -> SshKey:
    """Check a private key that was uploaded. Takes some computing for RSA: to be called in a thread.

    Raises:
        SshKeyError: it has a passphrase, is of a weak or strange type, or no private key at all.
    """
    key = _load_private_key(_normalised(text))
    if isinstance(key, rsa.RSAPrivateKey):
        if not _FEWEST_RSA_BITS <= key.key_size <= _MOST_RSA_BITS:
            raise SshKeyError(
                f"an RSA key of {key.key_size} bits: use one of {_FEWEST_RSA_BITS} to {_MOST_RSA_BITS}, or ed25519"
            )
    elif not isinstance(key, ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey):
        raise SshKeyError("a key of a type that SSH servers refuse (DSA, or none of SSH): use an ed25519 key")
    try:
        return _ssh_key(key, comment)
    except (ValueError, UnsupportedAlgorithm):
        raise SshKeyError("a key on a curve that SSH does not know: use an ed25519 key") from None


def _normalised(text: bytes) -> bytes:
    """The key as ssh-keygen writes it: editors on Windows put a mark before it and end its lines in two characters."""
    if b"\0" in text or text.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise SshKeyError("this is no plain text, UTF-16 perhaps: send the file as ssh-keygen wrote it, or as UTF-8")
    return text.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").strip() + b"\n"


def _load_private_key(text: bytes) -> object:
    if b"PUBLIC KEY-----" in text or text.startswith((b"ssh-", b"ecdsa-", b"sk-")):
        raise SshKeyError("this is a public key: send the private one, or let the service make a key")
    if b"PuTTY-User-Key-File" in text:
        raise SshKeyError("this is a key in PuTTY's format: export it in OpenSSH's format")
    if b"PRIVATE KEY-----" not in text:
        raise SshKeyError("this is no private key: it must begin with -----BEGIN OPENSSH PRIVATE KEY-----")
    if b"ENCRYPTED" in text:
        raise SshKeyError(_LOCKED)
    try:
        if text.startswith(_OPENSSH):
            return load_ssh_private_key(text, password=None)
        return load_pem_private_key(text, password=None)
    except TypeError:
        raise SshKeyError(_LOCKED) from None
    except (ValueError, UnsupportedAlgorithm) as error:
        if "password" in str(error).lower():
            raise SshKeyError(_LOCKED) from None
        # Not the library's message: it might contain parts of the key.
        raise SshKeyError("the private key is damaged, or of a type that is not supported") from None


_LOCKED = (
    "the key has a passphrase, which the service cannot type: let the service make a key of its own,"
    " or take the passphrase off a copy (ssh-keygen -p)"
)


def _ssh_key(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey, comment: str) -> SshKey:
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    digest = hashlib.sha256(base64.b64decode(public.split()[1])).digest()
    return SshKey(
        "SHA256:" + base64.b64encode(digest).decode().rstrip("="),
        f"{public.decode('ascii')} {comment}",
        key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()),
    )
