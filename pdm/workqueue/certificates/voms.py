"""VOMS attributes of a proxy: which organisation it is for, and in which groups and roles. Shown, never verified.

A VOMS server signs an attribute certificate (RFC 5755), and the proxy carries it in an extension. Only storage servers
decide by it, and they verify it themselves; here it is read so that people see what they have delegated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attrs import frozen
from cryptography import x509

from pdm.workqueue.certificates.names import PARSE_ERRORS

_AC_SEQUENCE = x509.ObjectIdentifier("1.3.6.1.4.1.8005.100.100.5")
#: Object identifier 1.3.6.1.4.1.8005.100.100.4 in DER: the attribute that holds the names of groups and roles.
_FQAN_ATTRIBUTE = bytes.fromhex("060a2b06010401be45646404")
_TAG_SEQUENCE, _OCTETS, _URI = 0x30, 0x04, 0x86
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
        if tag == _TAG_SEQUENCE and content.startswith(_FQAN_ATTRIBUTE):
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
