"""Paths at sites: text for people and JSON, bytes for servers, percent-encoded in URLs; joined without surprises.

A file name is bytes; the REST API speaks Unicode. Bytes that are not UTF-8 become characters U+EF80 to U+EFFF of the
private use area, one each (the OPTU encoding of MirBSD), so that every name has one text, which every database and
JSON library can hold, and every text one name.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from urllib.parse import quote_from_bytes, unquote_to_bytes

_RAW_BASE = 0xEF00
_RAW_CHARACTERS = re.compile("[\uef80-\uefff]")
_ESCAPED = re.compile("[\udc80-\udcff]|[\uef80-\uefff]")
#: A path that is the same in a URL.
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_.~/-]*", re.ASCII)
#: A name that is the same in a URL; ``.`` and ``..`` are not among them.
_PLAIN_NAME = re.compile(r"(?!\.\.?\Z)[A-Za-z0-9_.~-]{1,255}", re.ASCII)
#: What makes a relative path unsafe: an empty name, ``.``, ``..``, NUL.
_UNSAFE_PART = re.compile(r"(?:\A|/)\.{0,2}(?:/|\Z)|\0")

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
    if text.isascii():
        return text.encode()
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
    if _PLAIN_PATH.fullmatch(path) is not None:
        return path
    return quote_from_bytes(bytes_from_text(path), safe="/~")


def decoded(encoded_path: str) -> str:
    """The text of a percent-encoded path."""
    if "%" not in encoded_path and encoded_path.isascii():
        return encoded_path
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
    if len(path) <= LONGEST_NAME and path.isascii():
        return path
    raw = bytes_from_text(path)
    if len(raw) > LONGEST_PATH:
        raise InvalidPathError(f"a path must not be longer than {LONGEST_PATH} bytes")
    if max(map(len, raw.split(b"/"))) > LONGEST_NAME:
        raise InvalidPathError(f"a file name must not be longer than {LONGEST_NAME} bytes")
    return path


def is_plain_name(name: str) -> bool:
    """Whether a file may have this name, and a URL has it as it is: without percent-encoding."""
    return _PLAIN_NAME.fullmatch(name) is not None


class StorageUrl(str):
    """The URL of a path at a storage server: percent-encoded text, as on the wire, and its parts.

    ``root://host:port//path`` has the path ``//path``: what a server takes it for is the business of its protocol.
    """

    __slots__ = ()

    @classmethod
    def at(cls, server: str, encoded_path: str) -> StorageUrl:
        """The URL of a path, which begins with a slash, at ``SCHEME://HOST:PORT``."""
        return cls(server.removesuffix("/") + encoded_path)

    @property
    def scheme(self) -> str:
        return self.partition("://")[0]

    @property
    def authority(self) -> str:
        """``HOST:PORT`` as it is written; a user name may stand before it."""
        return self.partition("://")[2].partition("/")[0]

    @property
    def address(self) -> str:
        """``HOST:PORT``, without a user name or password."""
        return self.authority.rpartition("@")[2]

    @property
    def server(self) -> str:
        """``SCHEME://HOST:PORT``, without a user name or password."""
        return f"{self.scheme}://{self.address}"

    @property
    def host(self) -> str:
        """The host of `address`; an IPv6 address without its brackets."""
        return host_and_port(self.address)[0]

    @property
    def port(self) -> str:
        """The port of `address`; empty if it names none."""
        return host_and_port(self.address)[1]

    @property
    def encoded_path(self) -> str:
        """The path, percent-encoded, with the slash that it begins with."""
        return "/" + self.partition("://")[2].partition("/")[2]

    @property
    def path(self) -> bytes:
        """The path, with the slash that it begins with."""
        return unquote_to_bytes(self.encoded_path)

    @property
    def name(self) -> bytes:
        """The last name of the path."""
        return unquote_to_bytes(self.rstrip("/").rpartition("/")[2])

    @property
    def display(self) -> str:
        """The URL for people: names as they are, no user name, no password, no query."""
        return self.server + self.text_path

    @property
    def text_path(self) -> str:
        """The path as text, without a query."""
        return decoded(self.encoded_path.partition("?")[0])

    @property
    def without_slash(self) -> StorageUrl:
        """The URL without trailing slashes, but for the one that is all of its path."""
        root = self._root()
        return StorageUrl(self[:root] + self[root:].rstrip("/"))

    @property
    def parent(self) -> StorageUrl:
        """The directory that holds what is at the URL; of the root, that is the root."""
        root = self._root()
        return StorageUrl(self[:root] + self[root:].rstrip("/").rpartition("/")[0])

    def _root(self) -> int:
        return self.find("/", self.find("//") + 2) + 1

    def child(self, name: bytes) -> StorageUrl:
        """The entry of a name in the directory at the URL."""
        return self.below(quote_from_bytes(name, safe=""))

    def below(self, encoded_path: str) -> StorageUrl:
        """What is at a percent-encoded relative path below the directory at the URL; the directory for an empty one."""
        return StorageUrl(f"{self.rstrip('/')}/{encoded_path}") if encoded_path else self

    def parents(self) -> Iterator[StorageUrl]:
        """The URL and those of the directories above it, without the root."""
        url = self
        while (above := url.parent) != url:
            yield url
            url = above.without_slash


def host_and_port(authority: str) -> tuple[str, str]:
    """Host and port of ``HOST:PORT``: an IPv6 address without its brackets, an empty port if it names none."""
    if authority.startswith("["):
        host, _, port = authority[1:].partition("]")
        return host, port.removeprefix(":")
    host, _, port = authority.partition(":")
    return host, port


def is_safe_path(path: str) -> bool:
    """Whether a listing may give this as the path of one entry: it stays below the listed directory."""
    return _UNSAFE_PART.search(path) is None


def resolved(path: str, default_folder: str) -> str:
    """The path as the site knows it: absolute, or beginning with ``~``.

    Args:
        path: as the user gave it.
        default_folder: where relative paths of the site begin; absolute, or ``~``.
    """
    if path == "~" or path.startswith(("/", "~/")):
        return path
    return posixpath.join(default_folder or "/", path)


def joined(directory: str, relative: str) -> str:
    """The path of an entry of a directory; ``relative`` comes from a listing whose names are safe."""
    return directory.rstrip("/") + "/" + relative if relative else directory


def normalised(path: str) -> str:
    """The path without ``.``, ``..``, doubled and trailing slashes; used to compare, not to send."""
    plain = posixpath.normpath(path)
    return "/" + plain.lstrip("/") if plain.startswith("/") else plain


def is_inside(path: str, directory: str) -> bool:
    """Whether a path is the directory or below it, by their text alone."""
    inner, outer = normalised(path), normalised(directory)
    return inner == outer or inner.startswith(outer.rstrip("/") + "/")
