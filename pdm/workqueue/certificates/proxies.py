"""Proxy certificates (RFC 3820 and older) and the VOMS attributes in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from attrs import frozen
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes, CertificatePublicKeyTypes
from cryptography.x509.oid import NameOID

from pdm.workqueue.certificates.names import PARSE_ERRORS

_AC_SEQUENCE = x509.ObjectIdentifier("1.3.6.1.4.1.8005.100.100.5")
#: Object identifier 1.3.6.1.4.1.8005.100.100.4 in DER: the attribute that holds the names of groups and roles.
_FQAN_ATTRIBUTE = bytes.fromhex("060a2b06010401be45646404")
_OCTETS, _URI = 0x04, 0x86
_LONG_FORM, _CONSTRUCTED = 0x80, 0x20
#: More than this no server sends; a hostile extension gets no further.
_MOST_FQANS, _DEEPEST, _LONGEST_NAME = 100, 16, 255


@frozen
class VomsAttributes:
    """What one attribute certificate says.

    Attributes:
        fqans: groups and roles in it, the primary one first: ``/vo/group/Role=NULL/Capability=NULL``.
    """

    vo: str
    fqans: tuple[str, ...]


def voms_attributes(chain: Sequence[x509.Certificate]) -> tuple[VomsAttributes, ...]:
    """The VOMS attributes of a chain of proxies; those of the newest proxy that has any.

    Args:
        chain: leaf first.
    """
    for certificate in chain:
        try:
            extension = certificate.extensions.get_extension_for_oid(_AC_SEQUENCE).value
        except (x509.ExtensionNotFound, *PARSE_ERRORS):
            continue
        if isinstance(extension, x509.UnrecognizedExtension) and (found := _read(extension.value)):
            return found
    return ()


def _read(der: bytes) -> tuple[VomsAttributes, ...]:
    try:
        return tuple(_attributes(value) for value in _attribute_values(der, _DEEPEST))
    except (ValueError, IndexError):
        return ()


def _attribute_values(der: bytes, depth: int) -> Iterator[bytes]:
    """The contents of all attributes with FQANs, at any depth."""
    for tag, content in der_elements(der):
        if tag == _SEQUENCE and content.startswith(_FQAN_ATTRIBUTE):
            yield content[len(_FQAN_ATTRIBUTE) :]
        elif tag & _CONSTRUCTED and depth:
            yield from _attribute_values(content, depth - 1)


def _attributes(der: bytes) -> VomsAttributes:
    authority = ""
    names: list[str] = []
    for tag, content in _leaves(der, _DEEPEST):
        if tag == _URI:
            authority = _text(content)
        elif tag == _OCTETS and len(names) < _MOST_FQANS:
            names.append(_text(content))
    vo = authority.partition("://")[0]
    if not vo and names:
        vo = names[0].strip("/").partition("/")[0]
    return VomsAttributes(vo, tuple(names))


def _leaves(der: bytes, depth: int) -> Iterator[tuple[int, bytes]]:
    for tag, content in der_elements(der):
        if tag & _CONSTRUCTED:
            if depth:
                yield from _leaves(content, depth - 1)
        else:
            yield tag, content


def der_elements(der: bytes) -> Iterator[tuple[int, bytes]]:
    """Tag and content of each element, one after the other.

    Raises:
        ValueError, IndexError: it is not DER.
    """
    at = 0
    while at < len(der):
        tag, length = der[at], der[at + 1]
        at += 2
        if length & _LONG_FORM:
            digits = length & ~_LONG_FORM
            length = int.from_bytes(der[at : at + digits], "big")
            at += digits
        if at + length > len(der):
            raise ValueError("an element is longer than the one that contains it")
        yield tag, der[at : at + length]
        at += length


def _text(content: bytes) -> str:
    """Text out of a certificate, for people: what does not print is shown as a question mark."""
    text = content[:_LONGEST_NAME].decode("utf-8", "replace")
    return "".join(character if character.isprintable() else "?" for character in text)


#: The extension ProxyCertInfo, and that of the draft before RFC 3820 (GT3).
PROXY_CERT_INFO = x509.ObjectIdentifier("1.3.6.1.5.5.7.1.14")
_DRAFT_CERT_INFO = x509.ObjectIdentifier("1.3.6.1.4.1.3536.1.222")
# Object identifiers of policies, their content in DER: "inherit all" (1.3.6.1.5.5.7.21.1), "independent" (21.2), and
# Globus' "limited" (1.3.6.1.4.1.3536.1.1.1.9): good for moving files, not for starting work.
_INHERIT_ALL = bytes.fromhex("2b06010505071501")
_INDEPENDENT = bytes.fromhex("2b06010505071502")
_LIMITED = bytes.fromhex("2b060104019b5001010109")
_SEQUENCE, _INTEGER, _OBJECT_IDENTIFIER = 0x30, 0x02, 0x06
#: The last common name of a legacy proxy.
_LEGACY_NAMES = ("proxy", "limited proxy")


def is_proxy(certificate: x509.Certificate) -> bool:
    """Whether the certificate says that it is an RFC 3820 proxy."""
    return _proxy_cert_info(certificate) is not None


def is_limited(certificate: x509.Certificate) -> bool:
    """Whether the certificate is a limited proxy."""
    info = _proxy_cert_info(certificate)
    try:
        return info is not None and _policy_of(info.value) == _LIMITED
    except (ValueError, IndexError):
        return False


def proxy_problem(certificate: x509.Certificate) -> str | None:
    """Why a proxy does not act for its issuer; None if it does, or is no proxy.

    RFC 3820 (3.8.2) leaves this to the relying party: only the policies "inherit all" and "limited" are accepted.
    """
    info = _proxy_cert_info(certificate)
    if info is None:
        return "a legacy proxy (GT2 or GT3): make an RFC 3820 proxy instead" if is_legacy_proxy(certificate) else None
    try:
        critical = certificate.extensions.get_extension_for_oid(PROXY_CERT_INFO).critical
        policy = _policy_of(info.value)
    except (ValueError, IndexError):
        return "a proxy whose ProxyCertInfo is malformed"
    if not critical:
        return "a proxy whose ProxyCertInfo is not critical"
    if policy == _INDEPENDENT:
        return "an independent proxy, which has no rights of its user"
    return None if policy in (_INHERIT_ALL, _LIMITED) else "a proxy of an unknown policy"


def is_legacy_proxy(certificate: x509.Certificate) -> bool:
    """Whether it is a proxy of a kind before RFC 3820: of GT2 (``CN=proxy``, no extension), or of GT3's draft."""
    if _proxy_cert_info(certificate) is not None:
        return False
    if any(each.oid == _DRAFT_CERT_INFO for each in certificate.extensions):
        return True
    if not certificate.subject.rdns:
        return False
    *parts, last = certificate.subject.rdns
    return parts == certificate.issuer.rdns and [(each.oid, each.value) for each in last] in [
        [(NameOID.COMMON_NAME, name)] for name in _LEGACY_NAMES
    ]


def end_entity(chain: Sequence[x509.Certificate]) -> x509.Certificate:
    """The certificate of the person or host behind the proxies: the first that is none.

    Raises:
        ValueError: all are proxies.
    """
    for certificate in chain:
        if not is_proxy(certificate):
            return certificate
    raise ValueError("the chain holds only proxies: the user's own certificate is missing")


def lifetime_end(chain: Sequence[x509.Certificate]) -> datetime:
    """When the first certificate of the chain expires, and with it the chain (UTC)."""
    return min(certificate.not_valid_after_utc for certificate in chain)


def lifetime_start(chain: Sequence[x509.Certificate]) -> datetime:
    """When the last certificate of the chain becomes valid, and with it the chain (UTC)."""
    return max(certificate.not_valid_before_utc for certificate in chain)


def sign_proxy(
    issuer: x509.Certificate,
    issuer_key: CertificateIssuerPrivateKeyTypes,
    public_key: CertificatePublicKeyTypes,
    start: datetime,
    end: datetime,
    *,
    limited: bool = False,
) -> x509.Certificate:
    """Sign a proxy: subject of the issuer plus one ``CN`` of digits.

    Args:
        issuer: certificate of the user, or a proxy of hers.
        limited: make a limited proxy; of a limited one only limited ones can be made.
    """
    serial = x509.random_serial_number()
    name = x509.Name([*issuer.subject.rdns, x509.RelativeDistinguishedName([_common_name(serial)])])
    policy = _LIMITED if limited or is_limited(issuer) else _INHERIT_ALL
    language = bytes([_OBJECT_IDENTIFIER, len(policy)]) + policy
    # Two sequences, one in the other; without a path length.
    info = bytes([_SEQUENCE, len(language) + 2, _SEQUENCE, len(language)]) + language
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer.subject)
        .public_key(public_key)
        .serial_number(serial)
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(key_usage(digital_signature=True, key_encipherment=True), critical=True)
        .add_extension(x509.UnrecognizedExtension(PROXY_CERT_INFO, info), critical=True)
        .sign(issuer_key, hashes.SHA256())
    )


def key_usage(
    *,
    digital_signature: bool = False,
    key_encipherment: bool = False,
    signs_certificates: bool = False,
) -> x509.KeyUsage:
    """The extension with only what is named switched on."""
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_encipherment=key_encipherment,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _common_name(serial: int) -> x509.NameAttribute[str]:
    # 64 characters is the longest common name that X.520 allows; Globus writes some ten digits.
    return x509.NameAttribute(NameOID.COMMON_NAME, str(serial % 10**18))


def _policy_of(info: bytes) -> bytes:
    """The object identifier of the policy in a ProxyCertInfo.

    Raises:
        ValueError, IndexError: it is malformed.
    """
    ((tag, content),) = der_elements(info)
    elements = [each for each in der_elements(content) if each[0] != _INTEGER]
    if tag != _SEQUENCE or len(elements) != 1:
        raise ValueError("no proxy policy")
    (kind, language), *_ = der_elements(elements[0][1])
    if kind != _OBJECT_IDENTIFIER:
        raise ValueError("no object identifier")
    return language


def _proxy_cert_info(certificate: x509.Certificate) -> x509.UnrecognizedExtension | None:
    try:
        extension = certificate.extensions.get_extension_for_oid(PROXY_CERT_INFO)
    except x509.ExtensionNotFound:
        return None
    value = extension.value
    assert isinstance(value, x509.UnrecognizedExtension)
    return value
