"""Proxies as one text: the proxy, its key, and the certificates behind it, as grid tools read them."""

from __future__ import annotations

from datetime import datetime

from attrs import field, frozen
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from pdm.workqueue.certificates.names import dn
from pdm.workqueue.certificates.proxies import end_entity, lifetime_end
from pdm.workqueue.certificates.unreadable import UNREADABLE
from pdm.workqueue.certificates.voms import VomsAttributes, voms_attributes

_LONGEST_CHAIN = 16


class ProxyBundleError(Exception):
    """It is no proxy with its key; the text says why."""


@frozen
class FetchedProxy:
    """A proxy that came with its key.

    Attributes:
        subject: whose it is: subject of the end entity, slash form.
        valid_until: when the first certificate of its chain expires (UTC).
        voms: attributes that it carries.
        bundle_pem: secret.
    """

    subject: str
    valid_until: datetime
    voms: tuple[VomsAttributes, ...]
    bundle_pem: bytes = field(repr=False)


def read_bundle(pem: bytes) -> FetchedProxy:
    """Look into a proxy file. Whether its chain can be trusted is for those to say to whom it is shown.

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
    except (TypeError, *UNREADABLE) as error:
        # What cryptography says of a damaged key holds nothing of it.
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
