"""Certificates that parse, and whose parts do not: cryptography has errors of several classes for them."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from pdm.workqueue.certificates.names import parse_dn

#: Names in a form that cryptography does not know, in an extension at which OpenSSL does not look.
ODD_NAMES = {
    "an X.400 address": bytes.fromhex("3010300e06082b06010505073001a3020500"),
    "an EDI party": bytes.fromhex("3010300e06082b06010505073001a5020500"),
}
INFORMATION_ACCESS = x509.ObjectIdentifier("1.3.6.1.5.5.7.1.1")
_ONE, _OTHER = x509.ObjectIdentifier("1.2.3.4.5.6"), x509.ObjectIdentifier("1.2.3.4.5.7")
#: Kind → bytes of the certificate that are changed after it was signed.
_CHANGED = {
    "an extension twice": (bytes.fromhex("06052a03040507"), bytes.fromhex("06052a03040506")),
    "version 10": (bytes.fromhex("a003020102"), bytes.fromhex("a003020109")),
    "the year 0": (b"20600101000000Z", b"00000101000000Z"),
}
KINDS = sorted([*ODD_NAMES, *_CHANGED])


def odd_certificate(kind: str) -> tuple[str, str]:
    """The certificate of an authority that signs itself, and its key; PEM each."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = parse_dn("/DC=org/DC=test/CN=Odd")
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(5)
        .not_valid_before(datetime(2020, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(2060, 1, 1, tzinfo=UTC))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    )
    if kind in ODD_NAMES:
        builder = builder.add_extension(x509.UnrecognizedExtension(INFORMATION_ACCESS, ODD_NAMES[kind]), critical=False)
    for number in (_ONE, _OTHER):
        builder = builder.add_extension(x509.UnrecognizedExtension(number, b"\x05\x00"), critical=False)
    der = builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)
    before, after = _CHANGED.get(kind, (b"", b""))
    assert before in der
    if before:
        der = der.replace(before, after)
    return (
        ssl.DER_cert_to_PEM_cert(der),
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
    )
