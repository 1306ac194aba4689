"""WebDAV servers as a storage backend: third-party copies if both servers can, else streamed through the service.

Servers differ in what a request overwrites or removes: MKCOL of XRootD makes parents and responds 201 for an existing
directory, its MOVE replaces any destination, and DELETE of other servers removes whole trees. So a PROPFIND precedes
each such request.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Generator, Iterator, Mapping
from http import HTTPStatus
from urllib.parse import unquote_to_bytes

from pdm.workqueue.domain.enums import ChecksumAlgorithm
from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.backends import xrootd_http
from pdm.workqueue.helpers.backends.http_client import HttpClient, HttpResponse
from pdm.workqueue.helpers.backends.http_connection import exactly
from pdm.workqueue.helpers.backends.http_errors import HttpStatusError
from pdm.workqueue.helpers.backends.propfind import (
    QUOTA_REQUEST,
    DavResource,
    available_bytes,
    byte_count,
    check_kept,
    folded,
    http_date,
    is_odd,
    path_of_href,
    plain_path,
    resources,
    shape_of,
)
from pdm.workqueue.helpers.backends.webdav_third_party import NotBegunError, ThirdPartyCopies
from pdm.workqueue.helpers.checksums import HTTP_NAMES, from_http_digest
from pdm.workqueue.helpers.storage import (
    EntryIterator,
    FileStat,
    FileVersion,
    ProgressCallback,
    StorageError,
    Timeouts,
    link_to_directory,
)
from pdm.workqueue.helpers.storage_backend import Pieces, StorageBackend

#: Bytes that are sent without ``Expect``: a round trip would cost more than sending them in vain.
_SMALL = 64 * 1024
#: Forms of ``Destination``. The second is for servers behind a proxy, which do not know the scheme and port that the
#: client uses; WebDAV allows it since RFC 4918.
_DESTINATION_FORMS = ("https://{authority}{path}", "{path}", "http://{authority}{path}")
_WRONG_FORM = (HTTPStatus.BAD_REQUEST, HTTPStatus.BAD_GATEWAY)
#: Authority → the form that the server has accepted.
_accepted_forms: dict[str, int] = {}
#: Statuses for a name that the server cannot store, or has confused with another.
_NAME_REFUSED = frozenset({400, 404, 409, 412, 414, 422})
_MAX_PROBES = 4
#: Maximum resources in the response about one.
_MAX_RESOURCES = 1000


class WebdavBackend(StorageBackend):
    """The connections of one worker thread."""

    def __init__(self) -> None:
        super().__init__()
        self._client = HttpClient()
        self._third_party = ThirdPartyCopies(self, self._client)
        #: The last URL passed to `stat`, and its result.
        self._last_stat: tuple[str, FileStat | None] = "", None

    @property
    def timeouts(self) -> Timeouts:  # a property here, so that the client has them too
        return self._client.timeouts

    @timeouts.setter
    def timeouts(self, timeouts: Timeouts) -> None:
        self._client.timeouts = timeouts

    # -- names

    def stat(self, url: StorageUrl) -> FileStat | None:
        try:
            found = None
            # Read to the end, to keep the connection; but some servers list more than requested.
            with contextlib.closing(self._propfind(url.without_slash, "0")) as resources_found:
                for count, (_, each) in enumerate(resources_found):
                    found = found or each
                    if count > _MAX_RESOURCES:
                        break
        except StorageError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return None
            raise
        if found is None:
            raise StorageError(f"{url}: the server's answer names nothing", code=FailureCode.BAD_LISTING)
        if found.status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
            return None
        if found.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            raise StorageError(f"{url}: {found.status} for this resource", errno=errno.EACCES)
        file_stat = self._file_stat(url, found)
        self._last_stat = url, file_stat
        return file_stat

    def stat_new(self, url: StorageUrl) -> FileStat | None:
        with contextlib.suppress(HttpStatusError):
            if self._client.is_xrootd(url) and xrootd_http.is_free(self._client, url.without_slash):
                return None
        return self.stat(url)

    def entries(self, url: StorageUrl) -> EntryIterator:
        directory = url.without_slash
        own = plain_path(directory.path)
        for count, (path, resource) in enumerate(self._propfind(self._directory_url(directory), "1")):
            if not count and resource.is_directory and path != own and not path.startswith(own + b"/"):
                # The directory itself, with its path behind a proxy, or in the server's spelling.
                own = path
            if path == own:
                if not resource.is_directory:
                    raise StorageError(f"{url} is not a directory", errno=errno.ENOTDIR)
                continue
            if not path.startswith(own + b"/"):
                raise StorageError(f"{path[:200]!r} is not in {url}", code=FailureCode.BAD_LISTING)
            name = path[len(own) + 1 :]
            yield name, self._file_stat(directory.child(name), resource)

    def _propfind(self, url: StorageUrl, depth: str) -> Generator[tuple[bytes, DavResource]]:
        """Paths, without a slash at the end, and resources of a PROPFIND, as they arrive."""
        response = self._client.open("PROPFIND", url, {"Depth": depth}, ok=(207,))
        # XRootD does not percent-encode names.
        raw = self._client.is_xrootd(url)
        base = plain_path(url.path)
        with _dropped_early(response):
            for resource in resources(url, self._body(response), raw=raw):
                yield path_of_href(resource.href, base, raw=raw), resource

    def _body(self, response: HttpResponse) -> Iterator[bytes]:
        while chunk := response.read():
            self.check()
            yield chunk

    def _file_stat(self, url: StorageUrl, resource: DavResource) -> FileStat:
        if resource.status >= HTTPStatus.BAD_REQUEST:
            # A name without properties: most likely a dangling link.
            return FileStat("other")
        if resource.is_directory:
            return FileStat("directory", 0, None, resource.mtime)
        size = self._length(url) if resource.size is None else resource.size
        return FileStat("file", size, None, resource.mtime)

    def _length(self, url: StorageUrl) -> int:
        """Bytes of a file whose server does not list them: from HEAD, or by reading it."""
        length = byte_count(self._client.call("HEAD", url).header("Content-Length"))
        return sum(map(len, self._body(self._client.open("GET", url)))) if length is None else length

    def _directory_url(self, url: StorageUrl) -> StorageUrl:
        """The URL of a directory with a slash at its end, as WebDAV requires; for XRootD without."""
        bare = url.without_slash
        return bare if self._client.is_xrootd(url) else StorageUrl(bare.rstrip("/") + "/")

    def link_at(self, url: StorageUrl, *, listed: bool) -> str | None:
        """XRootD removes neither a link to a directory nor a directory that is not empty: the errors differ.

        Other servers (Apache) omit links from listings, but describe one when it is requested by name.
        """
        bare = url.without_slash
        if self._client.is_xrootd(url):
            try:
                self._client.call("DELETE", bare, ok=(200, 204))
            except StorageError as error:
                if error.errno == errno.ENOTDIR:
                    return link_to_directory(url)
                if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                    raise
            return None
        name = bare.path.rpartition(b"/")[2]
        if listed or not name:
            return None
        try:
            with contextlib.closing(self.entries(url.parent)) as entries:
                if any(folded(each) == folded(name) for each, _ in entries):
                    return None
        except StorageError:
            return None
        return f"{url} is not listed in the directory above: it may be a symbolic link, so nothing in it was removed"

    def make_directory(self, url: StorageUrl) -> None:
        if self.stat_new(url) is not None:
            raise StorageError(f"{url} exists", errno=errno.EEXIST)
        self._check_parent(url)
        try:
            self._client.call("MKCOL", self._directory_url(url), ok=(200, 201))
        except StorageError as error:
            # Servers respond 405, 301, 409 or 500 if another client has made it, or has removed the parent.
            if error.errno == errno.EACCES or error.retry_after_s is not None:
                raise
            if self.stat(url) is not None:
                raise StorageError(f"{url} exists", errno=errno.EEXIST) from error
            self._check_parent(url)
            if error.errno == errno.ENOENT:
                raise StorageError(error.message, code=FailureCode.SERVER_ERROR) from error
            raise
        if self.stat(url) is None:
            raise _misplaced(url)

    def _check_parent(self, url: StorageUrl) -> None:
        above = url.parent
        file_stat = self.existing(above)
        if file_stat.kind != "directory":
            raise StorageError(f"{above} is not a directory", errno=errno.ENOTDIR)

    def remove(self, url: StorageUrl, *, directory: bool) -> None:
        is_directory = self.existing(url).kind == "directory"
        if is_directory and not directory:
            raise StorageError(f"{url} is a directory", errno=errno.EISDIR)
        if directory and not is_directory:
            raise StorageError(f"{url} is not a directory", errno=errno.ENOTDIR)
        if directory:
            self._check_empty(url, links=True)
        bare = url.without_slash
        self._client.call("DELETE", self._directory_url(url) if directory else bare, ok=(200, 202, 204))

    def _check_empty(self, url: StorageUrl, *, links: bool = False) -> None:
        with contextlib.closing(self.entries(url)) as entries:
            if next(entries, None) is not None:
                if links and self._client.is_xrootd(url) and (link := self.link_at(url, listed=True)):
                    raise StorageError(link, code=FailureCode.UNSUPPORTED)
                raise StorageError(f"{url} is not empty", errno=errno.ENOTEMPTY)

    def rename(self, source: StorageUrl, destination: StorageUrl, *, replace: bool) -> None:
        old = self._last_stat[1] if self._last_stat[0] == source else self.stat(source)
        if old is None:
            raise StorageError(f"{source} does not exist", errno=errno.ENOENT, scope=FailureScope.SOURCE)
        is_directory = old.kind == "directory"
        self._check_name_is_kept(destination)
        replaced = self.stat(destination)
        if replaced is not None and not replace:
            raise StorageError(f"{destination} exists", errno=errno.EEXIST)
        if replaced is not None and replaced.kind == "directory":
            # A MOVE that overwrites would remove the whole directory.
            if not is_directory:
                raise StorageError(f"{destination} is a directory", errno=errno.EISDIR)
            self._check_empty(destination)
        try:
            self.move(source, destination, is_directory=is_directory, replace=replace)
        except StorageError as error:
            if error.errno == errno.EOPNOTSUPP and not replace and self.stat(destination) is not None:
                raise StorageError(f"{destination} exists", errno=errno.EEXIST) from error
            raise
        new = self.stat(destination)
        if new is None or (not is_directory and new.size != old.size):
            raise _misplaced(destination)

    def move(self, source: StorageUrl, destination: StorageUrl, *, is_directory: bool, replace: bool) -> None:
        """MOVE, with ``Destination`` in the first form that the server accepts."""
        if is_directory:
            source, destination = self._directory_url(source), self._directory_url(destination)
        else:
            source, destination = source.without_slash, destination.without_slash
        server = source.authority
        forms = _DESTINATION_FORMS[_accepted_forms.get(server, 0) :]
        if self._client.is_xrootd(source):
            forms = _DESTINATION_FORMS[:1]
        for form in forms:
            try:
                self._client.call("MOVE", source, self._move_headers(destination, form, replace), ok=(200, 201, 204))
            except HttpStatusError as error:
                if error.status not in _WRONG_FORM or form is forms[-1] or self.stat(source) is None:
                    raise
            else:
                _accepted_forms[server] = _DESTINATION_FORMS.index(form)
                return

    def accepted_move_headers(self, destination: StorageUrl, *, replace: bool) -> Mapping[str, str | bytes] | None:
        """Headers of a MOVE of a file, in the form that the server accepts; None if it has accepted none so far."""
        accepted = _accepted_forms.get(destination.authority)
        if accepted is None:
            return None
        return self._move_headers(destination.without_slash, _DESTINATION_FORMS[accepted], replace)

    def _move_headers(self, destination: StorageUrl, form: str, replace: bool) -> Mapping[str, str | bytes]:
        return {"Overwrite": "T" if replace else "F", "Destination": self._destination(destination, form)}

    def _destination(self, url: StorageUrl, form: str) -> str | bytes:
        """The ``Destination`` header."""
        authority, path = url.authority, url.encoded_path
        if not self._client.is_xrootd(url):
            return form.format(authority=authority, path=path)
        self._client.check_name(url)
        return xrootd_http.destination(url)

    def _check_name_is_kept(self, url: StorageUrl) -> None:
        """Raise `StorageError` if the server would store a name under another one, over a file of that name.

        Some end the path in ``Destination`` at ``;`` or ``?``, or decode it twice. So an empty probe file is moved to a
        name of that shape first, in a parent directory of all such names; wherever it ends up, it is none of the user's
        files.
        """
        authority, names = url.authority, url.encoded_path[1:].rstrip("/").split("/")
        odd = [at for at, name in enumerate(names) if is_odd(name)]
        if not odd or self._client.is_xrootd(url):
            return
        directory = StorageUrl("https://" + "/".join((authority, *names[: odd[0]])) + "/")

        def try_name(probe: str, to: str) -> bool | None:
            source, destination = directory.below(probe), directory.below(to)
            try:
                self._client.call("PUT", source, {"Content-Length": "0"}, ok=(200, 201, 204))
            except HttpStatusError as error:
                if error.errno not in (errno.EACCES, errno.EOPNOTSUPP):
                    raise
                # If no file can be made there, none of the user's can be overwritten either.
                return None
            try:
                self.move(source, destination, is_directory=False, replace=False)
                return self.stat(destination) is not None
            except HttpStatusError as error:
                if error.status not in _NAME_REFUSED:
                    raise
                return False
            finally:
                self._remove_probes(directory, probe, to)

        if not all(check_kept(authority, shape_of(names[at]), try_name) for at in odd):
            raise _misplaced(url)

    def _remove_probes(self, directory: StorageUrl, probe: str, to: str) -> None:
        """Remove the probe files, wherever the server has put them."""
        with contextlib.suppress(StorageError):
            self.remove(directory.below(to), directory=False)
            return
        prefix = unquote_to_bytes(probe)
        with contextlib.suppress(StorageError), contextlib.closing(self.entries(directory)) as entries:
            left = [name for name, file_stat in entries if name.startswith(prefix) and file_stat.size == 0]
            for name in left[:_MAX_PROBES]:
                self.remove(directory.child(name), directory=False)

    def size(self, url: StorageUrl) -> int:
        return self.existing(url).size

    def version(self, url: StorageUrl) -> FileVersion:
        return version_of_response(self._client.call("HEAD", url)) or super().version(url)

    def checksum(self, url: StorageUrl, algorithm: ChecksumAlgorithm) -> str:
        """From the server, or by reading the file if it sends none."""
        timeouts = self.timeouts
        # The server may read the whole file before it responds.
        self.timeouts = timeouts.with_slack()
        try:
            head = self._client.call("HEAD", url, {"Want-Digest": HTTP_NAMES[algorithm]})
        finally:
            self.timeouts = timeouts
        return from_http_digest(algorithm, head.header("Digest") or "") or super().checksum(url, algorithm)

    def free_bytes(self, directory_url: StorageUrl) -> int | None:
        headers = {"Depth": "0", "Content-Type": "application/xml"}
        url = self._directory_url(directory_url)
        with _dropped_early(response := self._client.open("PROPFIND", url, headers, QUOTA_REQUEST, ok=(207,))):
            return available_bytes(url, self._body(response), raw=self._client.is_xrootd(url))

    # -- bytes

    def read(self, url: StorageUrl) -> Pieces:
        file_stat = self.stat(url)
        if file_stat is not None and file_stat.kind == "directory":
            # Servers send an HTML page.
            raise StorageError(f"{url} is a directory", errno=errno.EISDIR)
        response = self._client.open("GET", url)
        with _dropped_early(response):
            if file_stat is not None and is_encoded(response, file_stat.size):
                raise StorageError(
                    f"{url}: the server sends it in a content encoding unasked", code=FailureCode.UNSUPPORTED
                )
            while chunk := response.read():
                yield chunk

    def write(self, url: StorageUrl, pieces: Iterator[bytes], size: int) -> None:
        body = exactly(pieces, size)
        headers = {"Content-Length": str(size)}
        self._client.call("PUT", url, headers, b"".join(body) if size <= _SMALL else body, ok=(200, 201, 204))

    def transfer(
        self,
        source: StorageUrl,
        temporary: StorageUrl,
        size: int,
        checksum: ChecksumAlgorithm | None,
        arrived: ProgressCallback,
    ) -> str | None:
        if not self._third_party.may_work(source, temporary):
            return super().transfer(source, temporary, size, checksum, arrived)
        try:
            self._third_party.copy(source, temporary, arrived)
        except NotBegunError:
            digest = super().transfer(source, temporary, size, checksum, arrived)
            # The source was read to its end: the error was not one of the file.
            self._third_party.remember_failure(source, temporary)
            return digest
        return None

    def fetch(self, link: str, source: StorageUrl, temporary: StorageUrl, arrived: ProgressCallback) -> bool:
        return self._third_party.fetch(link, source, temporary, arrived)

    def interrupt(self) -> None:
        super().interrupt()
        self._client.interrupt()

    def resume(self) -> None:
        super().resume()
        self._client.interrupted = False


def version_of_response(response: HttpResponse) -> FileVersion | None:
    """The version of a file that the response to HEAD or GET shows; None if it shows none."""
    tag, modified = (response.header("ETag") or "").removeprefix("W/"), response.header("Last-Modified")
    if not tag and not modified:
        return None
    return FileVersion(0, http_date(modified or ""), f"{response.header('Content-Length')} {tag}")


@contextlib.contextmanager
def _dropped_early(response: HttpResponse) -> Iterator[None]:
    """Close the connection of a response whose body is not read to its end."""
    try:
        yield
    except BaseException:
        response.drop()
        raise


def is_encoded(response: HttpResponse, size: int) -> bool:
    """Whether a response of a file of so many bytes has them in another encoding.

    A file that is stored compressed may have this header, too; then it has the listed size.
    """
    encoding = (response.header("Content-Encoding") or "identity").lower()
    return encoding != "identity" and byte_count(response.header("Content-Length")) != size


def _misplaced(url: StorageUrl) -> StorageError:
    return StorageError(
        f"{url}: the server does not keep this name: it would store the file under another one",
        errno=errno.EILSEQ,
        code=FailureCode.INVALID_NAME,
        scope=FailureScope.DESTINATION,
    )
