"""WebDAV servers as a storage: third-party copies where both ends can, through the service where they cannot.

What servers differ in is not believed: a MKCOL of XRootD makes what is above and says 201 for what is there, its MOVE
overwrites whatever is asked, a DELETE of other servers removes whole trees. So each is preceded by a look.
"""

from __future__ import annotations

import contextlib
import email.utils
import errno
import json
import re
import threading
import time
import unicodedata
from collections.abc import Iterator
from urllib.parse import unquote_to_bytes
from xml.sax.saxutils import unescape

from pdm.workqueue.agents.helpers.dav_client import Answer, DavClient, errno_of
from pdm.workqueue.agents.helpers.side import Pieces, Side
from pdm.workqueue.agents.helpers.storage import (
    Arrived,
    Entries,
    Patience,
    StorageError,
    Thing,
    bare_url,
    link_to_directory,
    parent_url,
    scoped,
    shortened,
)

_PIECE = 256 * 1024
_LONGEST_ENTRY = 256 * 1024
#: Seconds without a marker after which a server that copies is taken for dead; most send one every five.
_MARKERS_S = 12.0
#: Seconds between two looks at a copy between servers, and for a server to answer that may be dead.
_LOOK_S, _SOON_S = 0.5, 3.0
_BLANK = 0x20
_LONGEST_LINE = 64 * 1024
_TOKEN_REQUEST = json.dumps({"caveats": ["activity:DOWNLOAD,LIST"], "validity": "PT60M"}).encode()
_RESPONSE_END = re.compile(rb"</(?:[A-Za-z0-9_.-]{1,32}:)?response\s{0,8}>")
_HREF = re.compile(rb"<(?:[A-Za-z0-9_.-]{1,32}:)?href\s{0,8}>(.*?)</(?:[A-Za-z0-9_.-]{1,32}:)?href\s{0,8}>", re.DOTALL)
_LENGTH = re.compile(rb"<(?:[A-Za-z0-9_.-]{1,32}:)?getcontentlength[^>]{0,200}>\s{0,8}([0-9]{1,19})\s{0,8}<")
_MODIFIED = re.compile(rb"<(?:[A-Za-z0-9_.-]{1,32}:)?getlastmodified[^>]{0,200}>([^<]{1,100})<")
#: Not ``iscollection``: XRootD (5.5) says that of every file that may be executed.
_COLLECTION = re.compile(rb"<(?:[A-Za-z0-9_.-]{1,32}:)?collection[^>]{0,200}>")
_ENTITIES = {"&quot;": '"', "&apos;": "'", "&#39;": "'", "&#34;": '"'}
_DIGEST = re.compile(r"adler32=([0-9A-Fa-f]{1,8})\b", re.IGNORECASE | re.ASCII)
_MARKER = re.compile(rb"Stripe Bytes Transferred:\s{0,8}([0-9]{1,19})", re.IGNORECASE)


class DavSide(Side):
    """One lane's connections."""

    def __init__(self) -> None:
        super().__init__()
        self._client = DavClient()
        #: Pairs of servers between which a third-party copy could not be begun.
        self._no_third_party: set[tuple[str, str]] = set()

    @property
    def patience(self) -> Patience:  # a property here, so that the client has it too
        return self._client.patience

    @patience.setter
    def patience(self, patience: Patience) -> None:
        self._client.patience = patience

    # -- names

    def look(self, url: str) -> Thing | None:
        try:
            found = list(self._found(bare_url(url), "0"))
        except StorageError as trouble:
            if trouble.errno == errno.ENOENT:
                return None
            raise
        if not found:
            raise StorageError(f"{url}: the server's answer names nothing", code="BAD_LISTING")
        return found[0][1]

    def entries(self, url: str) -> Entries:
        folder = bare_url(url)
        own = _path(folder).rstrip(b"/")
        for path, thing in self._found(folder, "1"):
            if path == own:
                if thing.kind != "directory":
                    raise StorageError(f"{url} is not a directory", errno=errno.ENOTDIR)
                continue
            if not path.startswith(own + b"/"):
                raise StorageError(f"{path[:200]!r} is not in {url}", code="BAD_LISTING")
            yield path[len(own) + 1 :], thing

    def _found(self, url: str, depth: str) -> Iterator[tuple[bytes, Thing]]:
        """Paths, without a slash at the end, and things of a PROPFIND, as they arrive."""
        answer = self._client.open("PROPFIND", url, headers={"Depth": depth}, good=(207,))
        # XRootD writes names as they are, not percent-encoded.
        raw = self._client.is_xrootd(url)
        waiting = b""
        whole = False
        try:
            while piece := answer.read(_PIECE):
                self.check()
                waiting += piece
                while end := _RESPONSE_END.search(waiting):
                    yield _response(waiting[: end.start()], raw=raw)
                    waiting = waiting[end.end() :]
                if len(waiting) > _LONGEST_ENTRY:
                    raise StorageError(f"{url}: the server's listing is not valid", code="BAD_LISTING")
            whole = True
        finally:
            if not whole:
                answer.drop()
        if not re.search(rb"</(?:[A-Za-z0-9_.-]{1,32}:)?multistatus\s{0,8}>", waiting):
            raise StorageError(f"{url}: the server's listing is cut short", code="CONNECTION", lost=True)

    def link_at(self, url: str, *, listed: bool) -> str | None:
        """XRootD removes no link to a directory and no folder that is not empty: the reasons differ.

        Others (Apache) show no links in listings, but do when asked for one by its name.
        """
        if self._client.is_xrootd(url):
            try:
                self._client.call("DELETE", bare_url(url), good=(200, 204))
            except StorageError as trouble:
                if trouble.errno == errno.ENOTDIR:
                    return link_to_directory(url)
                if trouble.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                    raise
            return None
        name = _path(bare_url(url)).rpartition(b"/")[2]
        if listed or not name:
            return None
        try:
            with contextlib.closing(self.entries(parent_url(url))) as found:
                if any(_alike(one) == _alike(name) for one, _ in found):
                    return None
        except StorageError:
            return None
        return f"{url} is not shown in the folder above: it may be a symbolic link, so nothing in it was removed"

    def make_directory(self, url: str) -> None:
        if self.look(url) is not None:
            raise StorageError(f"{url} is there", errno=errno.EEXIST)
        above = self.look(parent_url(url))
        if above is None:
            raise StorageError(f"{parent_url(url)} is not there", errno=errno.ENOENT)
        if above.kind != "directory":
            raise StorageError(f"{parent_url(url)} is not a directory", errno=errno.ENOTDIR)
        self._client.call("MKCOL", bare_url(url), good=(200, 201))

    def remove(self, url: str, *, directory: bool) -> None:
        there = self.look(url)
        if there is None:
            raise StorageError(f"{url} is not there", errno=errno.ENOENT)
        if there.kind == "directory" and not directory:
            raise StorageError(f"{url} is a directory", errno=errno.EISDIR)
        if there.kind != "directory" and directory:
            raise StorageError(f"{url} is not a directory", errno=errno.ENOTDIR)
        if directory:
            with contextlib.closing(self.entries(url)) as entries:
                if next(entries, None) is not None:
                    if self._client.is_xrootd(url) and (link := self.link_at(url, listed=True)):
                        raise StorageError(link, code="UNSUPPORTED")
                    raise StorageError(f"{url} is not empty", errno=errno.ENOTEMPTY)
        self._client.call("DELETE", bare_url(url), good=(200, 204))

    def rename(self, source: str, destination: str, *, replace: bool) -> None:
        there = self.look(destination)
        if there is not None and not replace:
            raise StorageError(f"{destination} is there", errno=errno.EEXIST)
        headers: dict[str, str | bytes] = {"Overwrite": "T" if replace else "F"}
        headers["Destination"] = self._destination(bare_url(destination))
        self._client.call("MOVE", bare_url(source), headers=headers, good=(200, 201, 204))

    def _destination(self, url: str) -> str | bytes:
        """The header of a MOVE; XRootD does not decode it: encoded, the file would be called ``%20`` and the like."""
        url = _https(url)
        if not self._client.is_xrootd(url):
            return url
        self._client.check_name(url)
        raw = unquote_to_bytes(url)
        if any(byte < _BLANK for byte in raw):
            raise StorageError(f"{url}: this server cannot be told such a name", errno=errno.EILSEQ)
        # It cuts blanks off the end, and letters beyond ASCII with them; but not in front of a query.
        return raw + b"?pdm=1"

    def size(self, url: str) -> int:
        length = self._client.call("HEAD", url).header("Content-Length")
        if length is None or not length.isdecimal():
            raise StorageError(f"{url}: the server tells no size", code="UNSUPPORTED")
        return int(length)

    def checksum(self, url: str) -> str:
        """As the server gives it; by reading the file where it gives none."""
        answer = self._client.call("HEAD", url, headers={"Want-Digest": "adler32"})
        digest = _DIGEST.search(answer.header("Digest") or "")
        return digest.group(1).lower().rjust(8, "0") if digest else super().checksum(url)

    # -- bytes

    def read(self, url: str) -> Pieces:
        there = self.look(url)
        if there is not None and there.kind == "directory":
            # Servers give a page for people.
            raise StorageError(f"{url} is a directory", errno=errno.EISDIR)
        answer = self._client.open("GET", url)
        length = int(answer.header("Content-Length") or -1)
        read = 0
        whole = False
        try:
            while piece := answer.read(_PIECE):
                read += len(piece)
                yield piece
            whole = True
        finally:
            if not whole:
                answer.drop()
        if length not in (-1, read):
            raise StorageError(f"{url}: {read} of {length} bytes came", code="CONNECTION", lost=True)

    def write(self, url: str, pieces: Iterator[bytes], size: int) -> None:
        headers = {"Content-Length": str(size)}
        body = _exactly(pieces, size)
        try:
            self._client.call("PUT", url, headers, body if size else b"".join(body), good=(200, 201, 204))
        except StorageError as trouble:
            if not trouble.lost:
                raise
            # A server that refuses ends the connection while we still write: its reason is lost with it.
            raise self._refused(url, trouble) from trouble

    def _refused(self, url: str, trouble: StorageError) -> StorageError:
        """Why a PUT was cut off, as a PUT of nothing beside it tells."""
        probe = url + ".probe"
        try:
            self._client.call("PUT", probe, headers={"Content-Length": "1"}, body=b"x", good=(200, 201, 204))
        except StorageError as told:
            return told
        with contextlib.suppress(StorageError):
            self.remove(probe, directory=False)
        return trouble

    def transfer(self, source: str, temporary: str, size: int, checksum: bool, arrived: Arrived) -> str | None:
        pair = (_server(source), _server(temporary))
        if pair not in self._no_third_party:
            try:
                self._third_party(source, temporary, arrived)
            except StorageError as trouble:
                if trouble.errno != errno.EOPNOTSUPP:
                    raise
                self._no_third_party.add(pair)
            else:
                return None
        return super().transfer(source, temporary, size, checksum, arrived)

    def _third_party(self, source: str, temporary: str, arrived: Arrived) -> None:
        """Have the destination pull; EOPNOTSUPP if one of the two does not know how."""
        headers = {
            "Source": _https(source),
            "Overwrite": "F",
            "Credential": "none",
            "RequireChecksumVerification": "false",
        }
        headers["TransferHeaderAuthorization"] = self._token(source)
        self._client.check_name(source)
        verdict = scoped("destination", self._asked_to_copy, source, temporary, headers, arrived)
        if not verdict.lower().startswith("success"):
            raise self._blamed(source, verdict)

    def _asked_to_copy(self, source: str, temporary: str, headers: dict[str, str], arrived: Arrived) -> str:
        answer = self._client.open("COPY", temporary, headers=headers, good=(200, 201, 202))
        watch = _Watch(source, self.patience.stall_s, answer)
        verdict = ""
        try:
            with watch:
                verdict = self._followed(temporary, answer, watch, arrived)
        except StorageError:
            if not watch.gave_up:
                raise
        finally:
            if not verdict:
                answer.drop()
        if watch.gave_up and not verdict:
            raise StorageError(
                f"{source}: no byte comes, and the server does not answer", code="STALLED", scope="source"
            )
        return verdict

    def _token(self, source: str) -> str:
        """What lets another server read the source for us."""
        own = self._client.credentials(_server(source)).get("Authorization")
        if own is not None:
            return own
        headers = {"Content-Type": "application/macaroon-request"}
        try:
            answer = self._client.open("POST", source, headers=headers, body=_TOKEN_REQUEST)
        except StorageError as trouble:
            if trouble.errno is None and trouble.code is None:
                # It does not know what a macaroon is.
                raise StorageError(trouble.message, errno=errno.EOPNOTSUPP) from trouble
            raise trouble.at("source") from trouble.__cause__
        said = b""
        while piece := answer.read(_PIECE):
            said += piece
            if len(said) > _LONGEST_LINE:
                answer.drop()
                break
        try:
            token = json.loads(said)["macaroon"]
        except (ValueError, KeyError, TypeError):
            token = None
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise StorageError(f"{source}: the server gives no macaroon", errno=errno.EOPNOTSUPP)
        return f"Bearer {token}"

    def _followed(self, url: str, answer: Answer, watch: _Watch, arrived: Arrived) -> str:
        """The last line of a COPY's answer; what comes before are markers of its progress."""
        waiting, last = b"", b""
        moved = 0
        while piece := answer.read(_PIECE, _MARKERS_S):
            self.check()
            *lines, waiting = (waiting + piece).split(b"\n")
            for line in lines:
                marker = _MARKER.search(line)
                if marker is not None and int(marker.group(1)) > moved:
                    moved = int(marker.group(1))
                    watch.moved_at = time.monotonic()
                    arrived(moved)
                last = line.strip() or last
            if time.monotonic() - watch.moved_at > max(self.patience.stall_s, _MARKERS_S):
                raise StorageError(f"{url}: no byte has come for too long", code="STALLED")
            if len(waiting) > _LONGEST_LINE:
                raise StorageError(f"{url}: the server's answer is not valid", code="BAD_LISTING")
        last = waiting.strip() or last
        return last.decode("utf-8", "backslashreplace")

    def _blamed(self, source: str, verdict: str) -> StorageError:
        """Whose fault the failure of a third-party copy is: a source that cannot be read now is at fault."""
        text = shortened(verdict or "the server did not say how the copy ended", 1000)
        try:
            with contextlib.closing(self.read(source)) as pieces:
                next(pieces, None)
        except StorageError as trouble:
            return trouble.at("source")
        return StorageError(text, errno=errno_of(text), code=None if verdict else "CONNECTION", scope="destination")

    def interrupt(self) -> None:
        super().interrupt()
        self._client.interrupt()

    def resume(self) -> None:
        super().resume()
        self._client.interrupted = False


class _Watch:
    """Ends a copy between servers whose source has died: the destination says nothing of it, for a long time.

    Args:
        source: URL of the file.
        stall_s: seconds without a byte after which the source is asked whether it lives.
        answer: of the destination, which is cut off if it does not.
    """

    def __init__(self, source: str, stall_s: float, answer: Answer) -> None:
        #: When the last byte came, as far as is known.
        self.moved_at = time.monotonic()
        self.gave_up = False
        self._source = source
        self._stall_s = stall_s
        self._answer = answer
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch")

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_S):
            if time.monotonic() - self.moved_at < self._stall_s:
                continue
            if self._answers():
                # The others, then: their markers tell.
                return
            self.gave_up = True
            self._answer.cut_off()
            return

    def _answers(self) -> bool:
        """Whether the source's server says anything, soon."""
        client = DavClient()
        client.patience = Patience(_SOON_S, 0, time.monotonic() + _SOON_S)
        try:
            client.call("HEAD", self._source)
        except StorageError as trouble:
            return trouble.code not in ("STALLED", "TIMEOUT", "CONNECTION")
        finally:
            client.hang_up(self._source)
        return True


def _response(block: bytes, *, raw: bool) -> tuple[bytes, Thing]:
    href = _HREF.search(block)
    if href is None:
        raise StorageError("the server's listing is not valid: an entry without a name", code="BAD_LISTING")
    name = unescape(href.group(1).decode("utf-8", "surrogateescape"), _ENTITIES)
    path = name.encode("utf-8", "surrogateescape")
    if not raw:
        path = unquote_to_bytes(path.strip())
        if b"://" in path:
            path = b"/" + path.partition(b"://")[2].partition(b"/")[2]
    rest = block[href.end() :]
    is_directory = _COLLECTION.search(rest) is not None
    length, modified = _LENGTH.search(rest), _MODIFIED.search(rest)
    mtime = None
    if modified is not None:
        with contextlib.suppress(ValueError, TypeError):
            mtime = int(email.utils.parsedate_to_datetime(modified.group(1).decode("ascii", "replace")).timestamp())
    size = int(length.group(1)) if length is not None and not is_directory else 0
    return path.rstrip(b"/"), Thing("directory" if is_directory else "file", size, None, mtime)


def _exactly(pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
    """The pieces, which must have the size that was announced."""
    left = size
    for piece in pieces:
        left -= len(piece)
        if left < 0:
            break
        yield piece
    if left:
        raise StorageError(
            "the source is not as long as it was when it was listed", code="SIZE_CHANGED", scope="source"
        )


def _path(url: str) -> bytes:
    return unquote_to_bytes("/" + url.partition("://")[2].partition("/")[2])


def _alike(name: bytes) -> str:
    """The same for names that a server which ignores case, or composes letters in its own way, takes for one."""
    return unicodedata.normalize("NFC", name.decode("utf-8", "surrogateescape")).casefold()


def _https(url: str) -> str:
    """The URL as servers know it: ``davs`` is a word of clients."""
    return "https://" + url.partition("://")[2]


def _server(url: str) -> str:
    return url.partition("://")[2].partition("/")[0]
