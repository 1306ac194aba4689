"""Multistatus documents of WebDAV (the response to PROPFIND), parsed while they arrive.

The server may be hostile. A document type, and with it every entity, is refused. Memory is bounded: the tree holds the
responses of one chunk and an incomplete one.

`xml.etree.ElementTree.XMLPullParser` cannot be used: it fails at undeclared prefixes, which some servers send, and has
no hook for the document type. Here expat, without namespaces, drives the same `TreeBuilder` without calling Python code
for an element.
"""

from __future__ import annotations

import codecs
import email.utils
import functools
import re
import secrets
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple
from urllib.parse import quote_from_bytes, unquote_to_bytes, urlsplit
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.helpers.backends.xrootd_listing import ListedEntries
from pdm.workqueue.helpers.storage import StorageError

#: Characters without a special meaning, which no known server confuses.
_PLAIN_NAME = re.compile(rb"[A-Za-z0-9._~ (),=@!$'\x80-\xff-]+")
_CONTEXT_LENGTH = 4
_MAX_SHAPE_LENGTH = 200
_MAX_SHAPES = 2000
#: Authority and shape of a name → whether the server keeps such names.
_name_kept: dict[tuple[str, bytes], bool] = {}
_name_kept_lock = threading.Lock()


def is_odd(encoded_name: str) -> bool:
    """Whether a server may confuse a percent-encoded name with another."""
    return _PLAIN_NAME.fullmatch(unquote_to_bytes(encoded_name)) is None


def shape_of(encoded_name: str) -> bytes:
    """The special characters of a name: a server keeps all names of one shape, or none.

    Plain characters are omitted, except after ``&`` and ``%``, where they may be part of an entity or an escape.
    """
    name = unquote_to_bytes(encoded_name)
    if b"&" in name or b"%" in name:
        odd = [at for at, byte in enumerate(name) if _PLAIN_NAME.fullmatch(bytes([byte])) is None]
        return b"x" + name[odd[0] : odd[-1] + _CONTEXT_LENGTH][:_MAX_SHAPE_LENGTH]
    return _PLAIN_NAME.sub(b"x", b"x" + name)[:_MAX_SHAPE_LENGTH]


def check_kept(authority: str, shape: bytes, try_name: Callable[[str, str], bool | None]) -> bool:
    """Whether a server keeps names of a shape; tried once.

    Args:
        authority: host and port.
        shape: result of `shape_of`.
        try_name: makes a file with the first percent-encoded name, moves it to the second, and returns whether that
            exists; None if it could not be tried.
    """
    with _name_kept_lock:
        known = _name_kept.get((authority, shape))
    if known is None:
        probe = f".pdm-{secrets.token_hex(8)}.probe"
        known = try_name(probe, probe + quote_from_bytes(shape, safe=""))
        if known is None:
            return True
        with _name_kept_lock:
            if len(_name_kept) > _MAX_SHAPES:
                _name_kept.clear()
            _name_kept[authority, shape] = known
    return known


def folded(name: bytes) -> str:
    """A key that is equal for names that a server may treat as the same: it ignores case or normalises Unicode."""
    return unicodedata.normalize("NFC", name.decode("utf-8", "surrogateescape")).casefold()


#: Bytes that are parsed before complete responses are removed from the tree.
_CHUNK_SIZE = 64 * 1024
#: Maximum bytes of one response: servers list a few dozen properties, locks and their owners.
_MAX_RESPONSE_SIZE = 256 * 1024
_MAX_SIZE_DIGITS = 19
_OK = 200
#: Error of expat for text after the end of the document.
_AFTER_END = expat.errors.codes[expat.errors.XML_ERROR_JUNK_AFTER_DOC_ELEMENT]
#: Bytes that XML does not allow → characters of the private use area, which always stand for such bytes.
_ESCAPES = {
    **{0xDC00 + byte: chr(0xEF00 + byte) for byte in range(0x80, 0x100)},
    **{byte: chr(0xEF00 + byte) for byte in range(0x20) if byte not in b"\n\t"},
}
_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\udc80-\udcff]")
_UNESCAPES = {ord(escaped): chr(byte) for byte, escaped in _ESCAPES.items()}


class DavResource(NamedTuple):
    """One resource of a multistatus.

    Attributes:
        href: unchanged.
        is_directory: whether it is a collection.
        size: ``getcontentlength``; None if missing.
        mtime: ``getlastmodified`` in seconds since 1970 UTC; None if missing.
        status: HTTP status of the resource itself; 200 if missing.
    """

    href: str
    is_directory: bool
    size: int | None
    mtime: int | None
    status: int


def resources(url: str, chunks: Iterable[bytes], *, raw: bool = False) -> Iterator[DavResource]:
    """The resources of a multistatus document.

    Args:
        url: of the request, for errors.
        chunks: of the document.
        raw: whether the server does not encode names, like XRootD: bytes that XML forbids are accepted.

    Raises:
        StorageError: BAD_LISTING, the document is no multistatus; SERVER_ERROR, it is incomplete.
    """
    tree = _ResponseTree(url, raw=raw)
    plain = ListedEntries() if raw else None
    for chunk in chunks:
        for at in range(0, len(chunk), _CHUNK_SIZE):
            piece = chunk[at : at + _CHUNK_SIZE]
            if plain is not None:
                for each in plain.taken(piece):
                    yield DavResource(each.href, each.is_directory, each.size, http_date(each.modified), _OK)
                if plain.is_plain:
                    continue
                piece, plain = plain.rest, None
            tree.feed(piece)
            yield from map(tree.resource, tree.take(leave=1))
    if plain is not None and plain.is_complete():
        return
    tree.feed(b"" if plain is None else plain.all_of_rest(), final=True)
    yield from map(tree.resource, tree.take(leave=0))


#: Body of a PROPFIND for the quota properties (RFC 4331), which servers do not send unasked.
QUOTA_REQUEST = (
    b'<?xml version="1.0" encoding="utf-8"?><propfind xmlns="DAV:"><prop><quota-available-bytes/></prop></propfind>'
)


def available_bytes(url: str, chunks: Iterable[bytes], *, raw: bool = False) -> int | None:
    """``quota-available-bytes`` of the first resource in a response to `QUOTA_REQUEST`; None if it has none.

    Arguments and errors are those of `resources`. Some servers send negative numbers for "unknown" and "unlimited".
    """
    tree = _ResponseTree(url, raw=raw)
    for chunk in chunks:
        tree.feed(chunk)
    tree.feed(b"", final=True)
    for response in tree.take(leave=0)[:1]:
        _, _, properties = tree.parts(response)
        return byte_count(_text(properties.get("quota-available-bytes")))
    return None


class _ResponseTree:
    """The parsed ``response`` elements that were not taken yet."""

    def __init__(self, url: str, *, raw: bool) -> None:
        self._url = url
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape") if raw else None
        self._builder = TreeBuilder()
        self._parser = expat.ParserCreate()
        self._parser.buffer_text = True
        self._parser.StartDoctypeDeclHandler = self._refuse_doctype
        self._parser.StartElementHandler = self._start_root
        self._parser.EndElementHandler = self._builder.end
        self._parser.CharacterDataHandler = self._builder.data
        self._root: Element | None = None
        #: Bytes since the last complete response.
        self._pending = 0

    def _refuse_doctype(self, *_: object) -> None:
        raise self._invalid("it declares a document type")

    def _start_root(self, tag: str, attributes: dict[str, str]) -> None:
        if _local_name(tag) != "multistatus":
            raise self._invalid(f"it begins with <{tag[:50]}>")
        self._root = self._builder.start(tag, attributes)
        self._parser.StartElementHandler = self._builder.start

    def feed(self, data: bytes, *, final: bool = False) -> None:
        if self._decoder is not None:
            text = self._decoder.decode(data, final)
            if _FORBIDDEN.search(text):
                text = text.translate(_ESCAPES)
            data = text.encode()
        self._pending += len(data)
        try:
            self._parser.Parse(data, final)
        except expat.ExpatError as error:
            if error.code == _AFTER_END:
                # rclone and other servers in Go append an error message, for example when a file vanishes during the
                # listing.
                text = f"{self._url}: the server broke off its listing: {error}"
                raise StorageError(text, code=FailureCode.SERVER_ERROR) from None
            if final:
                text = f"{self._url}: the server's listing is cut short"
                raise StorageError(text, code=FailureCode.SERVER_ERROR, lost=True) from None
            raise self._invalid(str(error)) from None

    def take(self, *, leave: int) -> list[Element]:
        """Remove the elements from the tree and return them, except the last ``leave``, which may be incomplete."""
        found: list[Element] = []
        if self._root is not None and len(self._root) > leave:
            found = self._root[: len(self._root) - leave]
            del self._root[: len(found)]
            self._pending = 0
        elif self._pending > _MAX_RESPONSE_SIZE:
            raise self._invalid("an entry is too long")
        return [element for element in found if _local_name(element.tag) == "response"]

    def parts(self, response: Element) -> tuple[list[str], list[int], dict[str, Element]]:
        """The hrefs of a response, its statuses, and its properties by name."""
        hrefs: list[str] = []
        statuses = [_OK]
        properties: dict[str, Element] = {}
        for part in response:
            name = _local_name(part.tag)
            if name == "href":
                hrefs.append(part.text or "")
            elif name == "status":
                statuses.append(_status_code(part) or _OK)
            elif name == "propstat":
                if _propstat_is_ok(part):
                    for inner in part:
                        for each in inner:
                            properties[_local_name(each.tag)] = each
            else:
                # Some servers omit ``propstat``, or ``prop`` as well.
                properties |= _by_name(part) | {name: part}
        if not hrefs:
            raise self._invalid("an entry without a name")
        return hrefs, statuses, properties

    def resource(self, response: Element) -> DavResource:
        hrefs, statuses, properties = self.parts(response)
        # Not ``iscollection``: XRootD (5.5) sends it for every executable file.
        kinds = properties.get("resourcetype")
        return DavResource(
            # The first of several; no response to PROPFIND has more than one.
            hrefs[0],
            kinds is not None and any(_local_name(kind.tag) == "collection" for kind in kinds),
            byte_count(_text(properties.get("getcontentlength"))),
            http_date(_text(properties.get("getlastmodified"))),
            statuses[-1],
        )

    def _invalid(self, reason: str) -> StorageError:
        return StorageError(f"{self._url}: the server's listing is not valid: {reason}", code=FailureCode.BAD_LISTING)


@functools.lru_cache(maxsize=256)
def _local_name(tag: str) -> str:
    return tag.rpartition(":")[2].lower()


def _by_name(elements: Iterable[Element]) -> dict[str, Element]:
    return {_local_name(element.tag): element for element in elements}


def _text(element: Element | None) -> str:
    return "" if element is None else (element.text or "").strip()


def byte_count(text: str | None) -> int | None:
    """A byte count in a header or property; None if it is missing or invalid."""
    is_valid = text is not None and text.isascii() and text.isdecimal() and len(text) <= _MAX_SIZE_DIGITS
    return int(text) if text is not None and is_valid else None


def _propstat_is_ok(propstat: Element) -> bool:
    return all(_status_code(part) in (_OK, None) for part in propstat if _local_name(part.tag) == "status")


def _status_code(element: Element) -> int | None:
    """The number in ``HTTP/1.1 404 Not Found``."""
    return _parsed_status(element.text or "")


@functools.lru_cache(maxsize=64)
def _parsed_status(text: str) -> int | None:
    words = text.split()
    return (
        int(words[1]) if len(words) > 1 and len(words[1]) == 3 and words[1].isascii() and words[1].isdecimal() else None
    )


@functools.lru_cache(maxsize=256)
def http_date(date: str) -> int | None:
    """Seconds since 1970 UTC of a date as headers and properties give it; None if it is none."""
    with suppress(ValueError, TypeError, OverflowError, IndexError):
        return int(email.utils.parsedate_to_datetime(date).timestamp())
    return None


def path_of_href(href: str, base: bytes, *, raw: bool) -> bytes:
    """The decoded path of an href, without a slash at its end; the root is empty.

    Args:
        href: absolute URL, absolute path, or relative to ``base``.
        base: decoded path of the requested directory, without a slash at its end.
        raw: whether the server does not encode names, like XRootD.
    """
    if raw:
        text = href if href.isascii() else href.translate(_UNESCAPES)
        return text.encode("utf-8", "surrogateescape").rstrip(b"/")
    href = href.strip()
    encoded = href.encode()
    if "://" in href or href.startswith("//"):
        # Behind a proxy the server may have another name and scheme: only the path counts.
        with suppress(ValueError):
            encoded = urlsplit(href).path.encode()
    else:
        encoded = encoded.partition(b"?")[0].partition(b"#")[0]
    path = unquote_to_bytes(encoded)
    if not path.startswith(b"/"):
        path = base + b"/" + path
    return plain_path(path)


def plain_path(path: bytes) -> bytes:
    """A path without empty components and ``.``; ``..`` is kept, so that an entry outside its directory is detected."""
    return b"".join(b"/" + name for name in path.split(b"/") if name not in (b"", b"."))
