"""WebDAV responses: multistatus documents parsed as they arrive, error responses, and names that servers confuse.

A server that stores ``a;b`` as ``a`` overwrites another file, and no check afterwards restores it. So a name with
characters that have a meaning in URLs or XML is tried first, on a probe file.
"""

from __future__ import annotations

import codecs
import email.utils
import errno
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from http import HTTPStatus
from typing import NamedTuple
from urllib.parse import quote_from_bytes, unquote_to_bytes, urlsplit
from xml.parsers import expat

from pdm.workqueue.helpers.storage import StorageError, truncated

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


def path_of_href(href: str, base: bytes, *, raw: bool) -> bytes:
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


_LONGEST_WAIT_S = 7 * 86400.0
_BY_STATUS: Mapping[int, int] = {
    403: errno.EACCES,
    404: errno.ENOENT,
    405: errno.EOPNOTSUPP,
    409: errno.ENOENT,
    410: errno.ENOENT,
    412: errno.EEXIST,
    414: errno.ENAMETOOLONG,
    415: errno.EOPNOTSUPP,
    501: errno.EOPNOTSUPP,
    507: errno.ENOSPC,
}
#: These mean what they say, whatever the page that comes with them speaks of.
_CODES: Mapping[int, str] = {
    408: "TIMEOUT",
    413: "TOO_LARGE",
    417: "UNSUPPORTED",
    423: "LOCKED",
    425: "BUSY",
    429: "BUSY",
    503: "BUSY",
    504: "SERVER_ERROR",
}
#: What servers write into the body of any status; XRootD says so in the words of the system.
_BY_TEXT = (
    ("no space left", errno.ENOSPC),
    ("quota exceeded", errno.EDQUOT),
    ("permission denied", errno.EACCES),
    ("operation not permitted", errno.EACCES),
    ("no such file", errno.ENOENT),
    ("not empty", errno.ENOTEMPTY),
    ("not a directory", errno.ENOTDIR),
    ("is a directory", errno.EISDIR),
    ("file exists", errno.EEXIST),
    ("name too long", errno.ENAMETOOLONG),
    ("too many levels of symbolic links", errno.ELOOP),
    ("read-only", errno.EROFS),
    ("cross-device link", errno.EXDEV),
)


class HttpStatusError(StorageError):
    """A server answered with a status that is no success.

    Attributes:
        status: of HTTP.
    """

    status = 0


def errno_from_text(text: str) -> int | None:
    """The error that a sentence of a server tells of.

    What comes before the last semicolon names the file, which may be called ``permission denied``.
    """
    lowered = text.rpartition(";")[2].lower()
    return next((number for words, number in _BY_TEXT if words in lowered), None)


def error_from_response(
    method: str, url: str, status: int, reason: str, said: str, retry_after: str | None, sent: str | None
) -> HttpStatusError:
    """The error for an answer.

    Args:
        method: of the request.
        url: of the request, without a query.
        status: of the answer.
        reason: the words beside it.
        said: the beginning of its body.
        retry_after: its ``Retry-After``.
        sent: ``Content-Length`` of the request.
    """
    text = f"{method} {url}: {status} {reason}: {truncated(said, 500)}"
    if status == HTTPStatus.MULTI_STATUS:
        status = _inner_status(url, said) or status
    code, number = _CODES.get(status), None
    if code is None:
        number = errno_from_text(said) or _BY_STATUS.get(status)
    if status == HTTPStatus.UNAUTHORIZED and errno_from_text(said) is None:
        code = "CREDENTIAL_REFUSED"
    elif number is None and code is None and status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        code = "SERVER_ERROR"
    if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        text = (
            f"the server, or a proxy before it, takes no request of {sent or 'that many'} bytes"
            f" (as set by client_max_body_size of nginx, LimitRequestBody of Apache and the like): {text}"
        )
    error = HttpStatusError(text, errno=number, code=code, retry_after_s=retry_after_seconds(retry_after))
    error.status = status
    return error


def _inner_status(url: str, said: str) -> int | None:
    """The first status in a multistatus that is no success: the resource that was in the way."""
    try:
        found = MultistatusParser(url).feed(said.encode("utf-8", "replace"))
    except StorageError:
        return None
    return next((resource.status for resource in found if resource.status >= HTTPStatus.BAD_REQUEST), None)


def retry_after_seconds(retry_after: str | None) -> float | None:
    """``Retry-After`` in seconds from now, given as a number or as a date; None if there is none, or no such thing."""
    text = (retry_after or "").strip()
    if text.isascii() and text.isdecimal():
        return min(float(text[:10]), _LONGEST_WAIT_S)
    try:
        moment = email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(moment - time.time(), 0.0), _LONGEST_WAIT_S)


#: What is plain in a URL, and what no server has been seen to mistake.
_PLAIN_NAME = re.compile(rb"[A-Za-z0-9._~ (),=@!$'\x80-\xff-]+")
_CONTEXT_LENGTH = 4
_MAX_SHAPE_LENGTH = 200
_MAX_SHAPES = 2000
_name_kept: dict[tuple[str, bytes], bool] = {}
_name_kept_lock = threading.Lock()


def is_odd(encoded_name: str) -> bool:
    """Whether a server may take a percent-encoded name for another."""
    return _PLAIN_NAME.fullmatch(unquote_to_bytes(encoded_name)) is None


def shape_of(encoded_name: str) -> bytes:
    """What is odd of a name; names of one shape are kept, or not, alike.

    Plain characters are left out, but for those behind ``&`` and ``%``: with them they may be an entity, or an escape.
    """
    name = unquote_to_bytes(encoded_name)
    if b"&" in name or b"%" in name:
        odd = [at for at, byte in enumerate(name) if _PLAIN_NAME.fullmatch(bytes([byte])) is None]
        return b"x" + name[odd[0] : odd[-1] + _CONTEXT_LENGTH][:_MAX_SHAPE_LENGTH]
    return _PLAIN_NAME.sub(b"x", b"x" + name)[:_MAX_SHAPE_LENGTH]


def check_kept(server: str, shape: bytes, moved: Callable[[str, str], bool | None]) -> bool:
    """Whether a server keeps names of a shape; found out once.

    Args:
        server: host and port.
        shape: of `shape_of`.
        moved: makes a file of the first percent-encoded name, moves it to the second, and tells whether it is there;
            None where that could not be tried.
    """
    with _name_kept_lock:
        known = _name_kept.get((server, shape))
    if known is None:
        probe = f".pdm-{secrets.token_hex(8)}.probe"
        known = moved(probe, probe + quote_from_bytes(shape, safe=""))
        if known is None:
            return True
        with _name_kept_lock:
            if len(_name_kept) > _MAX_SHAPES:
                _name_kept.clear()
            _name_kept[server, shape] = known
    return known
