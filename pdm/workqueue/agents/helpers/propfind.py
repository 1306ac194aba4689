"""Multistatus documents of WebDAV: a PROPFIND's answer, parsed as it arrives.

An answer comes from a server that may be hostile: no entity is ever expanded, names and texts have bounds, and only one
response is in memory at a time.
"""

from __future__ import annotations

import codecs
import email.utils
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple
from urllib.parse import unquote_to_bytes, urlsplit
from xml.parsers import expat

from pdm.workqueue.agents.helpers.storage import StorageError

_LONGEST_TEXT = 64 * 1024
_DEEPEST = 64
#: Elements of one response: servers name a few dozen properties, locks and their owners.
_MOST_ELEMENTS = 5000
#: What is between the brackets of one element, attributes included; expat keeps that in memory.
_LONGEST_UNPARSED = 1024 * 1024
_DIGITS = 19
_TEXTS = frozenset({"href", "status", "getcontentlength", "getlastmodified", "getetag"})
_GOOD = "200"
#: What XML cannot carry, and characters of the private use area in their place; those themselves are taken for bytes.
_HIDDEN = {
    **{0xDC00 + byte: chr(0xEF00 + byte) for byte in range(0x80, 0x100)},
    **{byte: chr(0xEF00 + byte) for byte in range(0x20) if byte not in b"\n\t"},
}
_SHOWN = {ord(shown): chr(hidden) for hidden, shown in _HIDDEN.items()}


class Resource(NamedTuple):
    """One resource of a multistatus.

    Attributes:
        href: as the server has written it.
        is_directory: whether it is a collection.
        size: ``getcontentlength``; None if the server gives none.
        mtime: ``getlastmodified`` in seconds since 1970 UTC; None if the server gives none.
        etag: ``getetag``; None if the server gives none.
        status: HTTP status of the resource itself; 200 unless the server says otherwise.
    """

    href: str
    is_directory: bool
    size: int | None
    mtime: int | None
    etag: str | None
    status: int


class MultistatusParser:
    """Takes the bytes of a document piece by piece and gives the resources that are complete.

    Args:
        url: that was asked; named in errors.
        raw: whether the server writes names as they are, as XRootD: bytes that XML does not allow are let through.
    """

    def __init__(self, url: str, *, raw: bool = False) -> None:
        self._url = url
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape") if raw else None
        # Without namespaces: some servers use prefixes that they never declare, and local names tell all here.
        self._parser = expat.ParserCreate()
        self._parser.buffer_text = True
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._characters
        # Entities come in a document type, which no multistatus has.
        self._parser.StartDoctypeDeclHandler = self._refuse
        self._parser.EntityDeclHandler = self._refuse
        self._path: list[str] = []
        self._text: list[str] | None = None
        self._length = 0
        self._elements = 0
        self._fed = 0
        self._found: list[Resource] = []
        self._ended = False
        self._reset()

    def _reset(self) -> None:
        self._href: str | None = None
        self._status = 200
        self._properties: dict[str, str] = {}
        self._pending: dict[str, str] = {}
        self._propstat = _GOOD
        self._elements = 0

    def feed(self, piece: bytes) -> list[Resource]:
        """The resources that a piece completes.

        Raises:
            StorageError: BAD_LISTING, the document is no multistatus.
        """
        if self._decoder is not None:
            piece = self._decoder.decode(piece).translate(_HIDDEN).encode()
        self._fed += len(piece)
        try:
            self._parser.Parse(piece, False)
        except expat.ExpatError as error:
            if self._ended:
                # rclone and others of Go's library append an error so, as when a file goes while they list.
                raise StorageError(
                    f"{self._url}: the server broke off its listing: {error}", code="SERVER_ERROR"
                ) from None
            raise self._invalid(str(error)) from None
        if self._fed - max(self._parser.CurrentByteIndex, 0) > _LONGEST_UNPARSED:
            raise self._invalid("an element is too long")
        found, self._found = self._found, []
        return found

    @property
    def ended(self) -> bool:
        """Whether the document is complete."""
        return self._ended

    def _invalid(self, why: str) -> StorageError:
        return StorageError(f"{self._url}: the server's listing is not valid: {why}", code="BAD_LISTING")

    def _refuse(self, *_: object) -> None:
        raise self._invalid("it declares a document type")

    def _start(self, tag: str, _attributes: object) -> None:
        name = tag.rpartition(":")[2].lower()
        self._elements += 1
        if len(self._path) >= _DEEPEST or self._elements > _MOST_ELEMENTS:
            raise self._invalid("too many elements")
        if not self._path and name != "multistatus":
            raise self._invalid(f"it begins with <{name[:50]}>")
        self._path.append(name)
        match self._path[1:]:
            case ["response"]:
                self._reset()
            case ["response", "propstat"]:
                self._pending, self._propstat = {}, _GOOD
            case ["response", *_, "resourcetype", "collection"]:
                self._properties_here()["collection"] = "1"
        is_ours = len(self._path) <= 5 and name in _TEXTS
        self._text, self._length = ([], 0) if is_ours else (None, 0)

    def _characters(self, text: str) -> None:
        if self._text is not None:
            self._length += len(text)
            if self._length > _LONGEST_TEXT:
                raise self._invalid("a text is too long")
            self._text.append(text)

    def _end(self, _tag: str) -> None:
        text = "".join(self._text) if self._text is not None else ""
        self._text = None
        match self._path[1:]:
            case ["response", "href"]:
                # With a status for several resources, the first; no PROPFIND has such.
                self._href = text if self._href is None else self._href
            case ["response", "status"]:
                self._status = _status(text) or self._status
            case ["response", "propstat", "status"]:
                self._propstat = str(_status(text) or _GOOD)
            case ["response", *_, name] if name in _TEXTS and name != "href":
                self._properties_here()[name] = text.strip()
            case ["response", "propstat"] if self._propstat == _GOOD:
                self._properties |= self._pending
            case ["response"]:
                self._found.append(self._resource())
            case []:
                self._ended = True
        self._path.pop()

    def _properties_here(self) -> dict[str, str]:
        """Where the property belongs that is read: those of a propstat count if its status, which follows, is good."""
        return self._pending if "propstat" in self._path else self._properties

    def _resource(self) -> Resource:
        if self._href is None:
            raise self._invalid("an entry without a name")
        told = self._properties
        # Not ``iscollection``: XRootD (5.5) says that of every file that may be executed.
        is_directory = "collection" in told
        length, size = told.get("getcontentlength", ""), None
        if length.isascii() and length.isdecimal() and len(length) <= _DIGITS:
            size = int(length)
        mtime = None
        with suppress(ValueError, TypeError, OverflowError, IndexError):
            mtime = (
                int(email.utils.parsedate_to_datetime(told["getlastmodified"]).timestamp())
                if told.get("getlastmodified")
                else None
            )
        return Resource(self._href, is_directory, size, mtime, told.get("getetag") or None, self._status)


def _status(text: str) -> int | None:
    """The number in ``HTTP/1.1 404 Not Found``."""
    words = text.split()
    return (
        int(words[1]) if len(words) > 1 and words[1].isascii() and words[1].isdecimal() and len(words[1]) == 3 else None
    )


def path_of(href: str, base: bytes, *, raw: bool) -> bytes:
    """The decoded path that an href names, without a slash at its end; the root is empty.

    Args:
        href: absolute URL, absolute path, or relative to ``base``.
        base: decoded path of the folder that was asked, without a slash at its end.
        raw: whether the server does not encode names, as XRootD.
    """
    if raw:
        return href.translate(_SHOWN).encode("utf-8", "surrogateescape").rstrip(b"/")
    href = href.strip()
    encoded = href.encode()
    if "://" in href or href.startswith("//"):
        # A proxy may have another name and scheme than the server behind it, so only the path counts.
        with suppress(ValueError):
            encoded = urlsplit(href).path.encode()
    else:
        encoded = encoded.partition(b"?")[0].partition(b"#")[0]
    path = unquote_to_bytes(encoded)
    if not path.startswith(b"/"):
        path = base + b"/" + path
    return plain_path(path)


def plain_path(path: bytes) -> bytes:
    """A path without empty names and ``.``; ``..`` stays, for entries must not leave their folder by it."""
    return b"".join(b"/" + name for name in path.split(b"/") if name not in (b"", b"."))


def resources(url: str, pieces: Iterator[bytes], *, raw: bool = False) -> Iterator[Resource]:
    """The resources of a document; ``raw`` as in `MultistatusParser`.

    Raises:
        StorageError: BAD_LISTING, or SERVER_ERROR if the document ends too early.
    """
    parser = MultistatusParser(url, raw=raw)
    for piece in pieces:
        yield from parser.feed(piece)
    if not parser.ended:
        raise StorageError(f"{url}: the server's listing is cut short", code="SERVER_ERROR", lost=True)
