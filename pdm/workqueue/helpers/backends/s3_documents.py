"""Documents of S3 servers: errors, pages of listings, results of copies and uploads.

The server may be hostile. A document type, and with it every entity, is refused; size, number and depth of elements are
bounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import NamedTuple
from urllib.parse import unquote_to_bytes
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat
from xml.sax.saxutils import escape

from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.helpers.storage import FileStat, StorageError

#: Bytes of a document: a page of 1,000 keys of 1,024 bytes, each percent-encoded, with what is said of each.
MAX_DOCUMENT = 8 * 1024 * 1024
#: Of the documents that are sent.
NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
_MAX_ELEMENTS, _MAX_DEPTH = 50_000, 16


class ListingPage(NamedTuple):
    """A page of ListObjectsV2.

    Attributes:
        objects: key, state and entity tag of each object.
        prefixes: the common prefixes, with the delimiter at their end.
        next_token: continuation token; empty at the end of the listing.
    """

    objects: list[tuple[bytes, FileStat, str]]
    prefixes: list[bytes]
    next_token: str


class UploadedPart(NamedTuple):
    """A part of a multipart upload, as its server has it."""

    number: int
    size: int
    tag: str


class _BoundedTree:
    def __init__(self) -> None:
        self._builder = TreeBuilder()
        self._elements = self._depth = 0
        self.parser = expat.ParserCreate()
        self.parser.buffer_text = True
        self.parser.StartDoctypeDeclHandler = self._refuse
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._builder.data

    def _refuse(self, *_: object) -> None:
        raise ValueError("it declares a document type")

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        self._elements += 1
        self._depth += 1
        if self._elements > _MAX_ELEMENTS or self._depth > _MAX_DEPTH:
            raise ValueError("it has too many elements")
        self._builder.start(tag.rpartition(":")[2], attributes)

    def _end(self, tag: str) -> None:
        self._depth -= 1
        self._builder.end(tag.rpartition(":")[2])

    def root(self) -> Element:
        return self._builder.close()


def parsed(document: bytes) -> Element:
    """The root of a document; names are without prefixes.

    Raises:
        ValueError: it is no XML, or not what a server of S3 sends.
    """
    if len(document) > MAX_DOCUMENT:
        raise ValueError("it is too long")
    tree = _BoundedTree()
    try:
        # Servers send blanks while they put a large object together, some of them before all else.
        tree.parser.Parse(document.lstrip(), True)
        return tree.root()
    except (expat.ExpatError, AssertionError, UnicodeError) as error:
        raise ValueError(str(error) or "it is no XML") from None


def expected(where: str, document: bytes, *roots: str) -> Element:
    """The root of a document, which has one of some names; raises `StorageError` (BAD_LISTING) for another document."""
    try:
        root = parsed(document)
        if root.tag not in roots:
            raise ValueError(f"it begins with <{root.tag[:50]}>")
    except ValueError as error:
        text = f"{where}: the server's answer is not valid: {error}"
        raise StorageError(text, code=FailureCode.BAD_LISTING) from None
    return root


def error_fields(document: bytes) -> dict[str, str]:
    """The elements of an ``Error`` document by name; empty for another document."""
    try:
        root = parsed(document)
    except ValueError:
        return {}
    return {each.tag: (each.text or "").strip() for each in root} if root.tag == "Error" else {}


def text_of(root: Element, name: str) -> str:
    """The text of an element below the root; empty if there is none."""
    found = root.find(name)
    return "" if found is None else (found.text or "").strip()


def listing_page(where: str, document: bytes) -> ListingPage:
    """A page of ListObjectsV2; ``where`` is for errors."""
    root = expected(where, document, "ListBucketResult")
    is_encoded = text_of(root, "EncodingType").lower() == "url"
    try:
        objects = []
        for each in root.iterfind("Contents"):
            size = int(text_of(each, "Size") or -1)
            if not 0 <= size < 1 << 63:
                raise ValueError(f"a size of {size} bytes")
            stat = FileStat("file", size, None, seconds_of(text_of(each, "LastModified")))
            objects.append((_key(each, "Key", is_encoded=is_encoded), stat, text_of(each, "ETag").strip('"')))
        prefixes = [_key(each, "Prefix", is_encoded=is_encoded) for each in root.iterfind("CommonPrefixes")]
        next_token = text_of(root, "NextContinuationToken")
        if text_of(root, "IsTruncated") == "true" and not next_token:
            raise ValueError("it is cut off, and does not say where it continues")
    except (ValueError, UnicodeError) as error:
        raise StorageError(
            f"{where}: the server's listing is not valid: {error}", code=FailureCode.BAD_LISTING
        ) from None
    return ListingPage(objects, prefixes, next_token if text_of(root, "IsTruncated") == "true" else "")


def _key(element: Element, name: str, *, is_encoded: bool) -> bytes:
    found = element.find(name)
    if found is None or not found.text:
        raise ValueError(f"an entry without <{name}>")
    raw = found.text
    # A blank is "+" in this encoding, as in forms.
    return unquote_to_bytes(raw.replace("+", " ")) if is_encoded else raw.encode()


def delete_document(keys: Iterable[bytes]) -> bytes:
    """The body of DeleteObjects, whose answer names each key."""
    objects = "".join(f"<Object><Key>{escape(key.decode())}</Key></Object>" for key in keys)
    return f'<Delete xmlns="{NAMESPACE}">{objects}<Quiet>false</Quiet></Delete>'.encode()


def deleted_keys(where: str, document: bytes) -> set[bytes]:
    """The keys that an answer to DeleteObjects names as removed; ``where`` is for errors."""
    root = expected(where, document, "DeleteResult")
    return {(each.findtext("Key") or "").encode() for each in root.iterfind("Deleted")}


def seconds_of(text: str) -> int | None:
    """Seconds since 1970 UTC of a time in the form of ISO 8601; None for another text."""
    with suppress(ValueError, OverflowError):
        time = datetime.fromisoformat(text)
        return int((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp())
    return None


def uploaded_parts(where: str, document: bytes) -> tuple[list[UploadedPart], str]:
    """The parts of a page of ListParts, and the marker of the next page; empty at the end."""
    root = expected(where, document, "ListPartsResult")
    try:
        parts = [
            UploadedPart(int(text_of(each, "PartNumber")), int(text_of(each, "Size")), text_of(each, "ETag").strip('"'))
            for each in root.iterfind("Part")
        ]
    except ValueError as error:
        raise StorageError(
            f"{where}: the server's list of parts is not valid: {error}", code=FailureCode.BAD_LISTING
        ) from None
    return parts, text_of(root, "NextPartNumberMarker") if text_of(root, "IsTruncated") == "true" else ""


def uploads_of_key(where: str, document: bytes, key: bytes) -> Iterator[tuple[str, int | None]]:
    """Id and begin (seconds since 1970 UTC) of each multipart upload of a key in a page of ListMultipartUploads."""
    root = expected(where, document, "ListMultipartUploadsResult")
    is_encoded = text_of(root, "EncodingType").lower() == "url"
    for each in root.iterfind("Upload"):
        with suppress(ValueError, UnicodeError):
            if _key(each, "Key", is_encoded=is_encoded) == key and (upload := text_of(each, "UploadId")):
                yield upload, seconds_of(text_of(each, "Initiated"))
