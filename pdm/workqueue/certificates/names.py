r"""Distinguished names as the grid writes them: ``/DC=org/DC=example/CN=Alice Jones``.

Access is decided by the subject, so two different names must never give the same text. The plain slash form does not
guarantee that: a single value ``alice/CN=admin`` reads like two parts. Here:

* within a value a ``/`` is written ``\/`` where the beginning of a part (``/CN=``) seems to follow, and unchanged
  elsewhere (``CN=host/www.example.org``); a backslash is written ``\\``;
* what cannot be printed (line ends, control and direction marks, odd blanks) is written as its UTF-8 bytes, ``\x0a``;
* the values of one multi-valued part are joined by ``\+`` (a plain ``+`` is part of a value);
* a value that is not text is written ``\#`` and its bytes in hex.

``=`` is not escaped: the first one ends the type, and no type contains one. Printable names without backslash and
without ``/CN=`` in a value, which is nearly every name in use, look as everywhere else on the grid.

`pdm.workqueue.domain.subjects` reads what people write elsewhere (configuration, lists of users): other spellings of
types (``/Email=``), and bytes as OpenSSL prints them (``\xC3\xA9``).
"""

from __future__ import annotations

import hashlib
import re

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.x509.oid import NameOID

from pdm.workqueue.domain.subjects import BEGINNING, decoded_bytes, escaped_value, plain_form

#: What `cryptography` raises for a malformed certificate of someone else, when it is loaded or an attribute is read.
PARSE_ERRORS = (
    ValueError,
    # A BIT STRING in a name ("oid must be X500_UNIQUE_IDENTIFIER").
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


# OpenSSL's short names, where they differ from those of RFC 4514 or are missing there.
_SHORT_NAMES = {
    NameOID.EMAIL_ADDRESS: "emailAddress",
    NameOID.SERIAL_NUMBER: "serialNumber",
    NameOID.GIVEN_NAME: "GN",
    NameOID.SURNAME: "SN",
    NameOID.TITLE: "title",
    NameOID.PSEUDONYM: "pseudonym",
    NameOID.DN_QUALIFIER: "dnQualifier",
}
_KNOWN_TYPES = {
    **{short: oid for oid, short in _SHORT_NAMES.items()},
    "CN": NameOID.COMMON_NAME,
    "C": NameOID.COUNTRY_NAME,
    "DC": NameOID.DOMAIN_COMPONENT,
    "L": NameOID.LOCALITY_NAME,
    "O": NameOID.ORGANIZATION_NAME,
    "OU": NameOID.ORGANIZATIONAL_UNIT_NAME,
    "ST": NameOID.STATE_OR_PROVINCE_NAME,
    "STREET": NameOID.STREET_ADDRESS,
    "UID": NameOID.USER_ID,
}
_PART = re.compile(rf"/([A-Za-z0-9.]+)=((?:[^/\\]|/(?!{BEGINNING})|\\[/\\]|\\x[0-9A-Fa-f]{{2}})*)")
_ESCAPES = re.compile(r"((?:\\x[0-9A-Fa-f]{2})+)|\\([/\\])")


def dn(name: x509.Name) -> str:
    """The slash form of a name; different names give different texts. Empty for a name without parts."""
    return "".join("/" + r"\+".join(_attribute(attribute) for attribute in part) for part in name.rdns)


def parse_dn(text: str) -> x509.Name:
    """Parse a slash form into a name (values as text only, one value a part).

    Raises:
        ValueError: it is not the slash form of a name; the text says what is wrong.
    """
    parts: list[x509.NameAttribute[str | bytes]] = []
    end = 0
    while end < len(text) or not parts:
        found = _PART.match(text, end)
        if found is None:
            raise ValueError(f"{text!r} is no subject: one looks like /DC=org/DC=example/CN=Alice Jones")
        parts.append(x509.NameAttribute(_type_of(found[1]), _ESCAPES.sub(_unescaped, found[2])))
        end = found.end()
    return x509.Name(parts)


def policy_form(name: x509.Name) -> str:
    """The form in which signing policies are compared; nothing in it is escaped."""
    return plain_form(
        [
            (
                _SHORT_NAMES.get(each.oid, each.rfc4514_attribute_name),
                each.value if isinstance(each.value, str) else f"#{each.value.hex()}",
            )
            for each in part
        ]
        for part in name.rdns
    )


def canonical(name: x509.Name) -> bytes:
    """The form in which OpenSSL compares names: UTF-8, ASCII in lower case, blanks trimmed, runs of them made one."""
    return b"".join(
        _tlv(0x31, b"".join(sorted(_canonical_attribute(attribute) for attribute in part))) for part in name.rdns
    )


def subject_hash(name: x509.Name) -> str:
    """What ``openssl x509 -subject_hash`` prints: the stem of a file in a directory of authorities."""
    return _as_stem(hashlib.sha1(canonical(name), usedforsecurity=False).digest())


def subject_hash_old(name: x509.Name) -> str:
    """What ``openssl x509 -subject_hash_old`` prints; the name that Globus built with OpenSSL 0.9 looks for."""
    return _as_stem(hashlib.md5(name.public_bytes(), usedforsecurity=False).digest())


def _attribute(attribute: x509.NameAttribute[str | bytes]) -> str:
    kind = _SHORT_NAMES.get(attribute.oid, attribute.rfc4514_attribute_name)
    value = attribute.value
    if isinstance(value, bytes):
        return rf"{kind}=\#{value.hex()}"
    return f"{kind}={escaped_value(value)}"


def _type_of(kind: str) -> x509.ObjectIdentifier:
    known = _KNOWN_TYPES.get(kind)
    if known is not None:
        return known
    if kind[0].isdigit():
        return x509.ObjectIdentifier(kind)
    raise ValueError(f"{kind} is no known part of a subject; known are {', '.join(sorted(_KNOWN_TYPES))}")


def _unescaped(found: re.Match[str]) -> str:
    if found[2]:
        return found[2]
    return decoded_bytes(found[1])


def _canonical_attribute(attribute: x509.NameAttribute[str | bytes]) -> bytes:
    value = attribute.value
    if isinstance(value, bytes):
        return _tlv(0x30, _oid(attribute.oid) + _tlv(0x03, b"\0" + value))
    folded = re.sub(r"[ \t\n\v\f\r]+", " ", value.strip(" \t\n\v\f\r")).encode("utf-8", "surrogatepass").lower()
    return _tlv(0x30, _oid(attribute.oid) + _tlv(0x0C, folded))


def _oid(oid: x509.ObjectIdentifier) -> bytes:
    first, second, *rest = (int(number) for number in oid.dotted_string.split("."))
    return _tlv(0x06, b"".join(_base128(number) for number in (first * 40 + second, *rest)))


def _base128(number: int) -> bytes:
    digits = [number & 0x7F]
    while number := number >> 7:
        digits.append(0x80 | number & 0x7F)
    return bytes(reversed(digits))


def _tlv(tag: int, content: bytes) -> bytes:
    """One DER value: tag, length, content."""
    length = len(content)
    if length < 0x80:
        return bytes([tag, length]) + content
    size = (length.bit_length() + 7) // 8
    return bytes([tag, 0x80 | size]) + length.to_bytes(size, "big") + content


def _as_stem(digest: bytes) -> str:
    return f"{int.from_bytes(digest[:4], 'little'):08x}"


def host_names(certificate: x509.Certificate) -> list[str]:
    """The hosts that a certificate is for: its alternative names, else the host in its common name."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        common = [str(each.value) for each in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        return [name.removeprefix("host/") for name in common[-1:]]
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
