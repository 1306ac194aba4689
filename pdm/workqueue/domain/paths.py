"""Paths at sites: text for people and JSON, bytes for servers, percent-encoded in URLs; joined without surprises.

A file name is bytes; the REST API speaks Unicode. Bytes that are not UTF-8 become characters U+EF80 to U+EFFF of the
private use area, one each (the OPTU encoding of MirBSD), so that every name has one text, which every database and
JSON library can hold, and every text one name.
"""

from __future__ import annotations

import posixpath
import re
from urllib.parse import quote_from_bytes, unquote_to_bytes

_RAW_BASE = 0xEF00
_RAW_CHARACTERS = re.compile("[\uef80-\uefff]")
_ESCAPED = re.compile("[\udc80-\udcff]|[\uef80-\uefff]")

#: The longest name of one file, in bytes (NAME_MAX of common file systems).
LONGEST_NAME = 255
#: The longest path, in bytes (PATH_MAX).
LONGEST_PATH = 4096


class InvalidPathError(ValueError):
    """A path that no site can hold; the text says why."""


def text_from_bytes(raw: bytes) -> str:
    """The text of a server's path."""

    def escape(match: re.Match[str]) -> str:
        character = match.group()
        if "\udc80" <= character <= "\udcff":
            return chr(_RAW_BASE + (ord(character) - 0xDC00))
        return "".join(chr(_RAW_BASE + byte) for byte in character.encode())

    return _ESCAPED.sub(escape, raw.decode("utf-8", "surrogateescape"))


def bytes_from_text(text: str) -> bytes:
    """The bytes of a path's text.

    Raises:
        InvalidPathError: the text holds half of a surrogate pair.
    """
    parts = []
    end = 0
    try:
        for match in _RAW_CHARACTERS.finditer(text):
            parts.append(text[end : match.start()].encode())
            parts.append(bytes([ord(match.group()) - _RAW_BASE]))
            end = match.end()
        parts.append(text[end:].encode())
    except UnicodeEncodeError as error:
        raise InvalidPathError("a path must be valid Unicode text") from error
    return b"".join(parts)


def encoded(path: str) -> str:
    """The path percent-encoded for a URL; slashes stay."""
    return quote_from_bytes(bytes_from_text(path), safe="/~")


def decoded(encoded_path: str) -> str:
    """The text of a percent-encoded path."""
    return text_from_bytes(unquote_to_bytes(encoded_path))


def checked(path: str) -> str:
    """The path, if a site could hold it.

    Raises:
        InvalidPathError: it is empty, too long, or has a NUL or half a surrogate pair.
    """
    if not path:
        raise InvalidPathError("a path must not be empty")
    if "\0" in path:
        raise InvalidPathError("a path must not contain NUL")
    raw = bytes_from_text(path)
    if len(raw) > LONGEST_PATH:
        raise InvalidPathError(f"a path must not be longer than {LONGEST_PATH} bytes")
    if any(len(name) > LONGEST_NAME for name in raw.split(b"/")):
        raise InvalidPathError(f"a file name must not be longer than {LONGEST_NAME} bytes")
    return path


def is_safe_name(name: str) -> bool:
    """Whether a listing may give this as the name of one entry."""
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


def resolved(path: str, default_folder: str) -> str:
    """The path as the site knows it: absolute, or beginning with ``~``.

    Args:
        path: as the user gave it.
        default_folder: where relative paths of the site begin; absolute, or ``~``.
    """
    if path == "~" or path.startswith(("/", "~/")):
        return path
    return posixpath.join(default_folder or "/", path)


def joined(folder: str, relative: str) -> str:
    """The path of an entry of a folder; ``relative`` comes from a listing whose names are safe."""
    return folder.rstrip("/") + "/" + relative if relative else folder


def normalised(path: str) -> str:
    """The path without ``.``, ``..``, doubled and trailing slashes; used to compare, not to send."""
    plain = posixpath.normpath(path)
    return "/" + plain.lstrip("/") if plain.startswith("/") else plain


def is_inside(path: str, folder: str) -> bool:
    """Whether a path is the folder or below it, by their text alone."""
    inner, outer = normalised(path), normalised(folder)
    return inner == outer or inner.startswith(outer.rstrip("/") + "/")
