r"""Subjects of certificates as text: how values are escaped, and how what people write is read.

``/DC=org/DC=example/CN=Alice Jones`` is the slash form of a name; `pdm.workqueue.certificates.names` makes it of a
certificate, and says how it is escaped. Configuration, lists of users and policy files come with other spellings of the
same names: ``/Email=`` for ``/emailAddress=``, ``\xC3\x85`` for ``Å``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

#: The types of attributes that have a short name; others are written by their number.
KNOWN_TYPES = frozenset(
    {"CN", "C", "DC", "L", "O", "OU", "ST", "STREET", "UID", "emailAddress", "serialNumber", "GN", "SN", "title"}
    | {"pseudonym", "dnQualifier"}
)
#: Spellings of types, in lower case → ours.
SPELLINGS = {
    **{each.lower(): each for each in KNOWN_TYPES},
    "e": "emailAddress",
    "email": "emailAddress",
    "userid": "UID",
    "s": "ST",
    "sp": "ST",
}
#: Where a part begins, but for the slash.
BEGINNING = r"[A-Za-z0-9.]+="
#: A part as people write it, with backslashes that are not doubled.
_PART = re.compile(rf"/([A-Za-z0-9.]+)=((?:[^/\\]|/(?!{BEGINNING})|\\[/\\+#]|\\(?![/\\+#]))*)")
_PIECE = re.compile(r"((?:\\x[0-9A-Fa-f]{2})+)|\\([/\\])|(\\[+#])|([^\\]+|\\)")
_AMBIGUOUS = re.compile(rf"/(?={BEGINNING})")


def escaped_value(value: str) -> str:
    """A value in the slash form: what does not print, a backslash, and a slash that seems to begin a part, escaped."""
    ends = {found.start() for found in _AMBIGUOUS.finditer(value)}
    return "".join(r"\/" if at in ends else _escaped(character) for at, character in enumerate(value))


def decoded_bytes(text: str) -> str:
    r"""The characters that ``\xC3\x85`` stands for.

    Raises:
        ValueError: the bytes are no UTF-8.
    """
    return bytes.fromhex(text.replace("\\x", "")).decode("utf-8", "surrogatepass")


def normal_subject(text: str) -> str:
    """A subject that somebody has written, in the form that certificates' subjects are compared in.

    Raises:
        ValueError: it is not the slash form of a name, or has a type that no name has; the text says what is wrong.
    """
    parts: list[str] = []
    end = 0
    while end < len(text) or not parts:
        found = _PART.match(text, end)
        if found is None:
            raise ValueError(f"{text[:60]!r} is no subject: /C=XX/O=Organisation/CN=Name is expected")
        kind = SPELLINGS.get(found[1].lower(), found[1])
        if kind not in KNOWN_TYPES and not kind[0].isdigit():
            raise ValueError(
                f"{text[:60]!r} is no subject: {kind[:20]} is no known part of one (if it belongs to a value, write the"
                " / before it as \\/)"
            )
        parts.append(f"/{kind}={_normal_value(found[2])}")
        end = found.end()
    return "".join(parts)


def plain_form(parts: Iterable[Iterable[tuple[str, str]]]) -> str:
    """A name in the form that signing policies are compared with; nothing in it is escaped.

    Args:
        parts: the relative distinguished names; each the short names and values of its attributes.
    """
    return "".join("/" + "+".join(f"{kind}={value}" for kind, value in part) for part in parts)


def _normal_value(text: str) -> str:
    done, value = "", ""
    for found in _PIECE.finditer(text):
        if found[3]:
            # Between the values of one part, or before the hex digits of one that is no text.
            done, value = done + escaped_value(value) + found[3], ""
        elif found[1]:
            value += decoded_bytes(found[1])
        else:
            value += found[2] or found[4]
    return done + escaped_value(value)


def _escaped(character: str) -> str:
    if character == "\\":
        return r"\\"
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogatepass"))
