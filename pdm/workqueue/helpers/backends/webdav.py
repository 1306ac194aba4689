"""WebDAV servers as a storage backend: third-party copies where both servers can, else streamed through the service.

Servers differ in what a request overwrites or removes: a MOVE of some overwrites whatever is asked, a DELETE of others
removes whole trees. So each such request is preceded by a PROPFIND or HEAD.
"""

from __future__ import annotations

import contextlib
import email.utils
import errno
import re
import unicodedata
from collections.abc import Generator, Iterator
from http import HTTPStatus
from urllib.parse import quote_from_bytes, unquote_to_bytes

from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.backends.base import Pieces, StorageBackend
from pdm.workqueue.helpers.backends.webdav_client import WebdavClient, WebdavResponse, server_of
from pdm.workqueue.helpers.backends.webdav_responses import (
    HttpStatusError,
    Resource,
    check_kept,
    is_odd,
    path_of_href,
    plain_path,
    resources,
    shape_of,
)
from pdm.workqueue.helpers.backends.webdav_third_party import NotBegunError, ThirdPartyCopies
from pdm.workqueue.helpers.storage import (
    EntryIterator,
    FileStat,
    FileVersion,
    ProgressCallback,
    StorageError,
    Timeouts,
    joined_url,
    link_to_directory,
    parent_url,
    without_trailing_slash,
)

_PIECE = 256 * 1024
_BLANK = 0x20
_DIGEST = re.compile(r"adler32=([0-9A-Fa-f]{1,8})\b", re.IGNORECASE | re.ASCII)
#: The ways to write ``Destination``. The second is for servers behind a proxy, which know neither the scheme nor the
#: port that we see; WebDAV allows it since RFC 4918.
_DESTINATION_FORMS = ("https://{authority}{path}", "{path}", "http://{authority}{path}")
_WRONG_FORM = (HTTPStatus.BAD_REQUEST, HTTPStatus.BAD_GATEWAY)
#: The form that a server has taken.
_form_of: dict[str, int] = {}
#: What a server says to a name that it cannot hold, or has mistaken for another.
_NAME_REFUSED = frozenset({400, 404, 409, 412, 414, 422})
_MOST_PROBES = 4
#: Of one that was asked for.
_MOST_RESOURCES = 1000
_LONGEST_NUMBER = 20


class WebdavBackend(StorageBackend):
    """One lane's connections."""

    def __init__(self) -> None:
        super().__init__()
        self._client = WebdavClient()
        self._third_party = ThirdPartyCopies(self, self._client)
        #: What was looked at last, and what was there.
        self._last_seen: tuple[str, FileStat | None] = "", None

    @property
    def timeouts(self) -> Timeouts:  # a property here, so that the client has it too
        return self._client.timeouts

    @timeouts.setter
    def timeouts(self, timeouts: Timeouts) -> None:
        self._client.timeouts = timeouts

    # -- names

    def stat(self, url: str) -> FileStat | None:
        try:
            found = None
            # To its end, for the connection is kept then; but some servers list more than they were asked for.
            with contextlib.closing(self._found(without_trailing_slash(url), "0")) as resources_found:
                for count, each in enumerate(resources_found):
                    found = found or each
                    if count > _MOST_RESOURCES:
                        break
        except StorageError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return None
            raise
        if found is None:
            raise StorageError(f"{url}: the server's answer names nothing", code="BAD_LISTING")
        _, resource = found
        if resource.status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
            return None
        if resource.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            raise StorageError(f"{url}: {resource.status} for this resource", errno=errno.EACCES)
        there = self._file_stat(url, resource)
        self._last_seen = url, there
        return there

    def entries(self, url: str) -> EntryIterator:
        folder = without_trailing_slash(url)
        own = plain_path(_path(folder))
        first = True
        for path, resource in self._found(self._folder_url(folder), "1"):
            if first and resource.is_directory and path != own and not path.startswith(own + b"/"):
                # The folder itself, under the path that it has behind a proxy, or in the server's way of writing it.
                own = path
            first = False
            if path == own:
                if not resource.is_directory:
                    raise StorageError(f"{url} is not a directory", errno=errno.ENOTDIR)
                continue
            if not path.startswith(own + b"/"):
                raise StorageError(f"{path[:200]!r} is not in {url}", code="BAD_LISTING")
            name = path[len(own) + 1 :]
            yield name, self._file_stat(joined_url(folder, quote_from_bytes(name)), resource)

    def _found(self, url: str, depth: str) -> Generator[tuple[bytes, Resource]]:
        """Paths, without a slash at the end, and resources of a PROPFIND, as they arrive."""
        answer = self._client.open("PROPFIND", url, headers={"Depth": depth}, good=(207,))
        # XRootD writes names as they are, not percent-encoded.
        raw = self._client.is_xrootd(url)
        base = plain_path(_path(url))
        whole = False
        try:
            for resource in resources(url, self._pieces(answer), raw=raw):
                yield path_of_href(resource.href, base, raw=raw), resource
            whole = True
        finally:
            if not whole:
                answer.drop()

    def _pieces(self, answer: WebdavResponse) -> Iterator[bytes]:
        while piece := answer.read(_PIECE):
            self.check()
            yield piece

    def _file_stat(self, url: str, resource: Resource) -> FileStat:
        if resource.status >= HTTPStatus.BAD_REQUEST:
            # The server names it, and cannot say what it is: most likely a link that leads nowhere.
            return FileStat("other")
        if resource.is_directory:
            return FileStat("directory", 0, None, resource.mtime)
        size = self._length(url) if resource.size is None else resource.size
        return FileStat("file", size, None, resource.mtime)

    def _length(self, url: str) -> int:
        """Bytes of a file whose server does not list them: as HEAD tells, or by reading it."""
        length = _number(self._client.call("HEAD", url).header("Content-Length"))
        if length is not None:
            return length
        count = 0
        for piece in self._pieces(self._client.open("GET", url)):
            count += len(piece)
        return count

    def _folder_url(self, url: str) -> str:
        """The URL of a folder as WebDAV wants it, with a slash at its end; XRootD goes by the bare one."""
        return (
            without_trailing_slash(url)
            if self._client.is_xrootd(url)
            else without_trailing_slash(url).rstrip("/") + "/"
        )

    def link_at(self, url: str, *, listed: bool) -> str | None:
        """XRootD removes no link to a directory and no folder that is not empty: the reasons differ.

        Others (Apache) show no links in listings, but do when asked for one by its name.
        """
        if self._client.is_xrootd(url):
            try:
                self._client.call("DELETE", without_trailing_slash(url), good=(200, 204))
            except StorageError as error:
                if error.errno == errno.ENOTDIR:
                    return link_to_directory(url)
                if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                    raise
            return None
        name = _path(without_trailing_slash(url)).rpartition(b"/")[2]
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
        if self.stat(url) is not None:
            raise StorageError(f"{url} is there", errno=errno.EEXIST)
        self._check_parent(url)
        try:
            self._client.call("MKCOL", self._folder_url(url), good=(200, 201))
        except StorageError as error:
            # Servers say 405, 301, 409 or 500 of what another client has made since, or of what is above and is gone.
            if error.errno == errno.EACCES or error.retry_after_s is not None:
                raise
            if self.stat(url) is not None:
                raise StorageError(f"{url} is there", errno=errno.EEXIST) from error
            self._check_parent(url)
            if error.errno == errno.ENOENT:
                raise StorageError(error.message, code="SERVER_ERROR") from error
            raise
        if self.stat(url) is None:
            raise _misplaced(url)

    def _check_parent(self, url: str) -> None:
        above = self.stat(parent_url(url))
        if above is None:
            raise StorageError(f"{parent_url(url)} is not there", errno=errno.ENOENT)
        if above.kind != "directory":
            raise StorageError(f"{parent_url(url)} is not a directory", errno=errno.ENOTDIR)

    def remove(self, url: str, *, directory: bool) -> None:
        there = self.stat(url)
        if there is None:
            raise StorageError(f"{url} is not there", errno=errno.ENOENT)
        if there.kind == "directory" and not directory:
            raise StorageError(f"{url} is a directory", errno=errno.EISDIR)
        if there.kind != "directory" and directory:
            raise StorageError(f"{url} is not a directory", errno=errno.ENOTDIR)
        if directory:
            self._check_empty(url, links=True)
        self._client.call(
            "DELETE", self._folder_url(url) if directory else without_trailing_slash(url), good=(200, 202, 204)
        )

    def _check_empty(self, url: str, *, links: bool = False) -> None:
        with contextlib.closing(self.entries(url)) as entries:
            if next(entries, None) is not None:
                if links and self._client.is_xrootd(url) and (link := self.link_at(url, listed=True)):
                    raise StorageError(link, code="UNSUPPORTED")
                raise StorageError(f"{url} is not empty", errno=errno.ENOTEMPTY)

    def rename(self, source: str, destination: str, *, replace: bool) -> None:
        old = self._last_seen[1] if self._last_seen[0] == source else self.stat(source)
        if old is None:
            raise StorageError(f"{source} is not there", errno=errno.ENOENT, scope="source")
        is_directory = old.kind == "directory"
        self._check_name_is_kept(destination)
        there = self.stat(destination)
        if there is not None and not replace:
            raise StorageError(f"{destination} is there", errno=errno.EEXIST)
        if there is not None and there.kind == "directory":
            # A MOVE that overwrites would remove all that is in it.
            if not is_directory:
                raise StorageError(f"{destination} is a directory", errno=errno.EISDIR)
            self._check_empty(destination)
        try:
            self._move(source, destination, is_directory=is_directory, replace=replace)
        except StorageError as error:
            if error.errno == errno.EOPNOTSUPP and not replace and self.stat(destination) is not None:
                raise StorageError(f"{destination} is there", errno=errno.EEXIST) from error
            raise
        now = self.stat(destination)
        if now is None or (not is_directory and now.size != old.size):
            raise _misplaced(destination)

    def _move(self, source: str, destination: str, *, is_directory: bool, replace: bool) -> None:
        """MOVE, with the destination written in the first way that the server takes."""
        if is_directory:
            source, destination = self._folder_url(source), self._folder_url(destination)
        else:
            source, destination = without_trailing_slash(source), without_trailing_slash(destination)
        server = server_of(source)
        forms = _DESTINATION_FORMS[_form_of.get(server, 0) :]
        if self._client.is_xrootd(source):
            forms = _DESTINATION_FORMS[:1]
        for form in forms:
            headers: dict[str, str | bytes] = {"Overwrite": "T" if replace else "F"}
            headers["Destination"] = self._destination(destination, form)
            try:
                self._client.call("MOVE", source, headers=headers, good=(200, 201, 204))
            except HttpStatusError as refused:
                if refused.status not in _WRONG_FORM or form is forms[-1] or self.stat(source) is None:
                    raise
            else:
                _form_of[server] = _DESTINATION_FORMS.index(form)
                return

    def _check_name_is_kept(self, url: str) -> None:
        """Raise `StorageError` if the server would store a name under another one, over a file of that name.

        Some take ``;`` or ``?`` in ``Destination`` for the end of the path, or decode it twice. So an empty file of
        ours is moved to a name of that kind first, in a folder above all such names; whatever becomes of it, it is
        none of the user's.
        """
        start, _, path = url.partition("://")[2].partition("/")
        names = path.rstrip("/").split("/")
        odd = [at for at, name in enumerate(names) if is_odd(name)]
        if not odd or self._client.is_xrootd(url):
            return
        folder = _https("://" + "/".join((start, *names[: odd[0]]))) + "/"

        def moved(probe: str, to: str) -> bool | None:
            source, destination = joined_url(folder, probe), joined_url(folder, to)
            try:
                self._client.call("PUT", source, {"Content-Length": "0"}, b"", good=(200, 201, 204))
            except HttpStatusError as refused:
                if refused.errno not in (errno.EACCES, errno.EOPNOTSUPP):
                    raise
                # Where we may make nothing, nothing of the user's can be overwritten either.
                return None
            try:
                self._move(source, destination, is_directory=False, replace=False)
                return self.stat(destination) is not None
            except HttpStatusError as refused:
                if refused.status not in _NAME_REFUSED:
                    raise
                return False
            finally:
                self._sweep(folder, probe, to)

        for at in odd:
            if not check_kept(start, shape_of(names[at]), moved):
                raise _misplaced(url)

    def _sweep(self, folder: str, probe: str, to: str) -> None:
        """Remove the empty files of a probe, wherever the server has put them."""
        with contextlib.suppress(StorageError):
            self.remove(joined_url(folder, to), directory=False)
            return
        prefix = unquote_to_bytes(probe)
        with contextlib.suppress(StorageError), contextlib.closing(self.entries(folder)) as entries:
            left = [name for name, file_stat in entries if name.startswith(prefix) and file_stat.size == 0]
            for name in left[:_MOST_PROBES]:
                self.remove(joined_url(folder, quote_from_bytes(name)), directory=False)

    def _destination(self, url: str, form: str) -> str | bytes:
        """The header of a MOVE; XRootD does not decode it: encoded, the file would be called ``%20`` and the like."""
        url = _https(url)
        if not self._client.is_xrootd(url):
            authority, path = server_of(url), "/" + url.partition("://")[2].partition("/")[2]
            return form.format(authority=authority, path=path)
        self._client.check_name(url)
        raw = unquote_to_bytes(url)
        if any(byte < _BLANK for byte in raw):
            raise StorageError(f"{url}: this server cannot be told such a name", errno=errno.EILSEQ)
        # It cuts blanks off the end, and letters beyond ASCII with them; but not in front of a query.
        return raw + b"?pdm=1"

    def size(self, url: str) -> int:
        there = self.stat(url)
        if there is None:
            raise StorageError(f"{url} is not there", errno=errno.ENOENT)
        return there.size

    def version(self, url: StorageUrl) -> FileVersion:
        head = self._client.call("HEAD", url)
        tag, modified = (head.header("ETag") or "").removeprefix("W/"), head.header("Last-Modified")
        if not tag and not modified:
            return super().version(url)
        mtime: float | None = None
        with contextlib.suppress(ValueError, TypeError):
            mtime = email.utils.parsedate_to_datetime(modified or "").timestamp()
        return FileVersion(0, mtime, f"{head.header('Content-Length')} {tag}")

    def checksum(self, url: StorageUrl) -> str:
        """As the server gives it; by reading the file where it gives none."""
        answer = self._client.call("HEAD", url, headers={"Want-Digest": "adler32"})
        digest = _DIGEST.search(answer.header("Digest") or "")
        return digest.group(1).lower().rjust(8, "0") if digest else super().checksum(url)

    # -- bytes

    def read(self, url: str) -> Pieces:
        there = self.stat(url)
        if there is not None and there.kind == "directory":
            # Servers give a page for people.
            raise StorageError(f"{url} is a directory", errno=errno.EISDIR)
        answer = self._client.open("GET", url, headers={"Accept-Encoding": "identity"})
        length = _number(answer.header("Content-Length"))
        encoding = (answer.header("Content-Encoding") or "identity").lower()
        if encoding != "identity" and there is not None and length != there.size:
            # One that is stored compressed may be called so, too; then it has the size that was listed.
            answer.drop()
            raise StorageError(f"{url}: the server sends it in {encoding[:40]} unasked", code="UNSUPPORTED")
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
        if length not in (None, read):
            raise StorageError(f"{url}: {read} of {length} bytes came", code="SERVER_ERROR", lost=True)

    def write(self, url: str, pieces: Iterator[bytes], size: int) -> None:
        headers = {"Content-Length": str(size)}
        body = _exactly(pieces, size)
        try:
            self._client.call("PUT", url, headers, body if size else b"".join(body), good=(200, 201, 204))
        except StorageError as error:
            if not error.lost:
                raise
            # A server that refuses ends the connection while we still write: its reason is lost with it.
            raise self._refused(url, error) from error

    def _refused(self, url: str, error: StorageError) -> StorageError:
        """Why a PUT was cut off, as a PUT of nothing beside it tells."""
        probe = url + ".probe"
        try:
            self._client.call("PUT", probe, headers={"Content-Length": "1"}, body=b"x", good=(200, 201, 204))
        except StorageError as told:
            return told
        with contextlib.suppress(StorageError):
            self.remove(probe, directory=False)
        return error

    def transfer(
        self, source: StorageUrl, temporary: StorageUrl, size: int, checksum: bool, arrived: ProgressCallback
    ) -> str | None:
        if not self._third_party.may_work(source, temporary):
            return super().transfer(source, temporary, size, checksum, arrived)
        try:
            self._third_party.copy(source, temporary, arrived)
        except NotBegunError:
            digest = super().transfer(source, temporary, size, checksum, arrived)
            # Only now is it sure that it was the way that was wrong, and not the file.
            self._third_party.remember_failure(source, temporary)
            return digest
        return None

    def interrupt(self) -> None:
        super().interrupt()
        self._client.interrupt()

    def resume(self) -> None:
        super().resume()
        self._client.interrupted = False


def _number(text: str | None) -> int | None:
    """A count of bytes in a header; None if there is none, or no such thing."""
    return (
        int(text) if text is not None and text.isascii() and text.isdecimal() and len(text) < _LONGEST_NUMBER else None
    )


def _misplaced(url: str) -> StorageError:
    return StorageError(
        f"{url}: the server does not keep this name: it would store the file under another one",
        errno=errno.EILSEQ,
        code="INVALID_NAME",
        scope="destination",
    )


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
