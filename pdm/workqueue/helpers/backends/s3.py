"""S3 servers as a storage backend: objects as files, prefixes of keys as directories.

S3 has no directories. One is there if a key begins with its path and a slash; an empty one is kept as an object of no
bytes with such a key, its *marker*. Servers that keep their objects as files take the marker for an empty object of the
directory's name: there a hidden object in the directory is its marker.

A key may be an object and the beginning of others: a listing of the directory above has the directory, and counts the
object among those that it does not name; by its own path the object is reached.
"""

from __future__ import annotations

import contextlib
import errno
import math
import secrets
import time
from collections.abc import Iterator, Sequence
from functools import partial

from pdm.workqueue.domain.enums import ChecksumAlgorithm
from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.backends.http_connection import exactly
from pdm.workqueue.helpers.backends.s3_client import S3Client, S3Place, may_copy, presigned, s3_place
from pdm.workqueue.helpers.backends.s3_copies import (
    LARGEST_COPY,
    DirectoryRename,
    StagedCopy,
    copy_object,
    source_at,
)
from pdm.workqueue.helpers.backends.s3_documents import ListingPage, listing_page
from pdm.workqueue.helpers.backends.s3_objects import (
    checksum_in,
    is_temporary,
    length_of,
    modified_at,
    prefix_of,
    version_of,
)
from pdm.workqueue.helpers.backends.s3_reading import ObjectReader
from pdm.workqueue.helpers.backends.s3_records import remove_record
from pdm.workqueue.helpers.backends.s3_uploads import (
    PART_SIZE,
    KeptObject,
    MultipartUpload,
    StagedObject,
    check_size,
    tag_of,
)
from pdm.workqueue.helpers.backends.s3_workers import PartWorkers
from pdm.workqueue.helpers.storage import (
    EntryIterator,
    FileStat,
    FileVersion,
    ProgressCallback,
    StoppedError,
    StorageError,
    Timeouts,
    at_destination,
    at_source,
)
from pdm.workqueue.helpers.storage_backend import Pieces, StorageBackend

_PAGE = 1000
_NO_NAMES = (b"", b".", b"..")
#: Name of the object that is the marker of the directory it is in, at servers that keep no slash at the end of a key.
_HIDDEN_MARKER = b".pdm-directory"
#: Bucket → whether its server keeps a slash at the end of a key; shared by all threads.
_keeps_slashes: dict[str, bool] = {}
_MAX_BUCKETS = 1000
#: Name of the record of an upload for a rename of a very large object.
_RENAME_RECORD = b".pdm-rename.part"


class S3Backend(StorageBackend):
    """The connections of one worker thread, and the objects that it has under way."""

    unnamed_are = "keys that no path leads to, or that are objects and directories at once"

    def __init__(self) -> None:
        super().__init__()
        self._client = S3Client()
        self._workers = PartWorkers()
        #: Temporary URL → the object that will get its name.
        self._staged: dict[StorageUrl, StagedObject] = {}
        #: Temporary URL → the name that its object will get, and the algorithm of its checksum.
        self._expected: dict[StorageUrl, tuple[StorageUrl, ChecksumAlgorithm | None]] = {}
        #: The version of an object that was read last for its checksum, and the checksum.
        self._last_read: tuple[tuple[str, str, ChecksumAlgorithm] | None, str] = None, ""

    @property
    def timeouts(self) -> Timeouts:  # a property here, so that the clients have them too
        return self._client.timeouts

    @timeouts.setter
    def timeouts(self, timeouts: Timeouts) -> None:
        self._client.timeouts = timeouts
        self._workers.set_timeouts(timeouts)

    # -- names

    def stat(self, url: StorageUrl) -> FileStat | None:
        staged = self._staged.get(url)
        if staged is not None:
            return FileStat("file", staged.size)
        place = s3_place(url)
        if place.key and (found := self._object_stat(place)) is not None:
            return found
        # Where there is no bucket, this is an error: no directory can be made instead.
        return FileStat("directory") if self._has_keys(place) or not place.key else None

    def _object_stat(self, place: S3Place) -> FileStat | None:
        try:
            response, _ = self._client.call("HEAD", place)
        except StorageError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return FileStat("file", length_of(place, response), None, modified_at(response))

    def _has_keys(self, place: S3Place) -> bool:
        """Whether a key begins with the path of a directory."""
        page = self._page(place, prefix_of(place), most=1)
        return bool(page.objects or page.prefixes)

    def _page(
        self, place: S3Place, prefix: bytes, *, delimiter: str = "", token: str = "", most: int = _PAGE
    ) -> ListingPage:
        query = {"list-type": "2", "prefix": prefix.decode(), "max-keys": str(most), "encoding-type": "url"}
        if delimiter:
            query["delimiter"] = delimiter
        if token:
            query["continuation-token"] = token
        _, document = self._client.call("GET", place, query, key=b"")
        return listing_page(f"GET {place.bucket}", document)

    def pages(self, place: S3Place, prefix: bytes, *, delimiter: str = "") -> Iterator[ListingPage]:
        """All pages of the keys that begin with a prefix."""
        token = ""
        #: Hashes of the pages and tokens so far.
        seen: set[int] = set()
        while True:
            page = self._page(place, prefix, delimiter=delimiter, token=token)
            names = (*(key for key, _, _ in page.objects), *page.prefixes)
            # A page without names may come again.
            if seen & {hash(each) for each in (names, page.next_token) if each}:
                raise StorageError(f"{place.bucket}: the server's listing does not end", code=FailureCode.BAD_LISTING)
            yield page
            if not page.next_token:
                return
            token = page.next_token
            seen |= {hash(names), hash(token)}
            self.check()

    def entries(self, url: StorageUrl) -> EntryIterator:
        place = s3_place(url)
        prefix = prefix_of(place)
        self.unnamed = 0
        is_there = not place.key
        #: Objects of which the next page may have a directory of the same name.
        held: dict[bytes, FileStat] = {}
        for page in self.pages(place, prefix, delimiter="/"):
            directories = {key.removesuffix(b"/") for key in page.prefixes}
            files = held | {key: file_stat for key, file_stat, _ in page.objects}
            last = max([*files, *page.prefixes], default=b"") if page.next_token else b""
            held = {key: files[key] for key in files if last.startswith(key) and key not in directories}
            is_there = is_there or bool(files or directories)
            for key, file_stat in (*files.items(), *((key, FileStat("directory")) for key in directories)):
                if not key.startswith(prefix.removesuffix(b"/")):
                    text = f"{place.bucket}: the server lists {key[:200]!r} below {prefix[:200]!r}"
                    raise StorageError(text, code=FailureCode.BAD_LISTING)
                name = key[len(prefix) :]
                is_marker = file_stat.kind == "file" and name in (b"", _HIDDEN_MARKER)
                if key in held or is_marker:
                    continue
                is_hidden = file_stat.kind == "file" and key in directories
                if is_hidden or name in _NO_NAMES or b"/" in name or b"\0" in name:
                    self.unnamed += 1
                    continue
                yield name, file_stat
        if not is_there:
            if self._object_stat(place) is not None:
                raise StorageError(f"{url} is not a directory", errno=errno.ENOTDIR)
            raise StorageError(f"{url} does not exist", errno=errno.ENOENT)

    def make_directory(self, url: StorageUrl) -> None:
        place = s3_place(url)
        if self.stat(url) is not None:
            raise StorageError(f"{url} exists", errno=errno.EEXIST)
        above = s3_place(url.parent)
        if above.key and not self._has_keys(above):
            is_object = self._object_stat(above) is not None
            text = f"{url.parent} {'is not a directory' if is_object else 'does not exist'}"
            raise StorageError(text, errno=errno.ENOTDIR if is_object else errno.ENOENT)
        self._put_marker(place)

    def _put_marker(self, place: S3Place) -> None:
        """Keep a directory that has no keys."""
        key = prefix_of(place) if self._keeps_slashes(place) else prefix_of(place) + _HIDDEN_MARKER
        self._client.call("PUT", place, None, {"Content-Length": "0"}, key=key)

    def _keeps_slashes(self, place: S3Place) -> bool:
        """Whether a server keeps a key with a slash at its end; tried once for each bucket, with a key of ours."""
        known = _keeps_slashes.get(place.bucket)
        if known is None:
            directory = place.key.rpartition(b"/")[0]
            probe = (directory + b"/" if directory else b"") + f".pdm-{secrets.token_hex(8)}.probe".encode()
            with_slash = probe + b"/"
            self._client.call("PUT", place, None, {"Content-Length": "0"}, key=with_slash)
            known = self._object_stat(place._replace(key=probe)) is None
            self.delete(place, with_slash)
            if not known:
                self.delete(place, probe)
            if len(_keeps_slashes) > _MAX_BUCKETS:
                _keeps_slashes.clear()
            _keeps_slashes[place.bucket] = known
        return known

    def has_temporary(self, temporary: StorageUrl) -> bool:
        # Small objects, and those that the server copies, are not.
        return isinstance(self._staged.get(temporary), MultipartUpload)

    def remove(self, url: StorageUrl, *, directory: bool) -> None:
        place = s3_place(url)
        self._expected.pop(url, None)
        staged = self._staged.pop(url, None)
        if staged is not None:
            staged.drop()
        elif not place.key:
            raise StorageError(f"{url} is a bucket: it is not removed", errno=errno.EOPNOTSUPP)
        elif directory:
            self._remove_directory(url, place)
        elif is_temporary(place):
            # What an earlier attempt has left: an upload that did not end.
            remove_record(self._client, place)
        else:
            # Also where there is no such object: S3 does not tell.
            self.delete(place)

    def delete(self, place: S3Place, key: bytes | None = None) -> None:
        """Remove an object, whether there is one or not."""
        self._client.call("DELETE", place, ok=(200, 202, 204), key=key)

    def _remove_directory(self, url: StorageUrl, place: S3Place) -> None:
        prefix = prefix_of(place)
        markers = (prefix, prefix + _HIDDEN_MARKER)
        page = self._page(place, prefix, most=len(markers) + 1)
        if page.prefixes or any(key not in markers for key, _, _ in page.objects):
            raise StorageError(f"{url} is not empty", errno=errno.ENOTEMPTY)
        # Without a marker it was gone when its last key was.
        for key, _, _ in page.objects:
            self.delete(place, key)

    # -- bytes

    def size(self, url: StorageUrl) -> int:
        staged = self._staged.get(url)
        return self.existing(url).size if staged is None else staged.size

    def version(self, url: StorageUrl) -> FileVersion:
        place = s3_place(url)
        try:
            response, _ = self._client.call("HEAD", place)
        except StorageError as error:
            if error.errno == errno.ENOENT and self._has_keys(place):
                raise StorageError(f"{url} is a directory", errno=errno.EISDIR) from error
            raise
        return version_of(place, response)

    def checksum(self, url: StorageUrl, algorithm: ChecksumAlgorithm) -> str:
        staged = self._staged.get(url)
        if staged is not None:
            known = staged.checksum(algorithm)
            if known is None:
                raise StorageError(f"{url}: its checksum is not known yet", code=FailureCode.NO_CHECKSUM)
            return known
        response, _ = self._client.call("HEAD", s3_place(url), None, {"x-amz-checksum-mode": "ENABLED"})
        shown = checksum_in(response, algorithm)
        if shown is not None:
            return shown
        version = (url, tag_of(response), algorithm)
        if self._last_read[0] != version:
            self._last_read = version, super().checksum(url, algorithm)
        return self._last_read[1]

    def read(self, url: StorageUrl) -> Pieces:
        reader = ObjectReader(self._client, self._workers, self.check, s3_place(url))
        try:
            yield from reader.pieces()
        except StorageError as error:
            if error.errno == errno.ENOENT and self._has_keys(s3_place(url)):
                raise StorageError(f"{url} is a directory", errno=errno.EISDIR) from error
            raise

    def link_to(self, url: StorageUrl) -> str | None:
        return presigned(s3_place(url), math.ceil(self.timeouts.until - time.monotonic()))

    def expect_rename(
        self,
        temporary: StorageUrl,
        destination: StorageUrl,
        stale: Sequence[StorageUrl],
        algorithm: ChecksumAlgorithm | None,
    ) -> None:
        self._expected[temporary] = destination, algorithm
        if not stale:
            return
        upload = self._new_upload(temporary, destination)
        if any(upload.adopt(s3_place(each)) for each in stale):
            self._staged[temporary] = upload

    def forget_rename(self, temporary: StorageUrl) -> None:
        self._expected.pop(temporary, None)
        staged = self._staged.pop(temporary, None)
        if staged is not None:
            # If it fails, the record under the temporary name stays, for the next attempt.
            with contextlib.suppress(StorageError, StoppedError):
                staged.drop()

    def _new_upload(self, temporary: StorageUrl, destination: StorageUrl) -> MultipartUpload:
        return MultipartUpload(self._client, self._workers, self.check, s3_place(destination), s3_place(temporary))

    def write(self, url: StorageUrl, pieces: Iterator[bytes], size: int) -> None:
        destination, algorithm = self._expected.get(url, (url, None))
        upload = self._staged.get(url)
        if size <= PART_SIZE:
            data = b"".join(exactly(pieces, size))
            if upload is not None:
                upload.drop()
            self._staged[url] = KeptObject(self._client, s3_place(destination), data)
            return
        if not isinstance(upload, MultipartUpload):
            upload = self._staged[url] = self._new_upload(url, destination)
            upload.begin()
        upload.write(pieces, size, algorithm)

    def transfer(
        self,
        source: StorageUrl,
        temporary: StorageUrl,
        size: int,
        checksum: ChecksumAlgorithm | None,
        arrived: ProgressCallback,
    ) -> str | None:
        destination, _ = self._expected.get(temporary, (temporary, None))
        from_place, place = s3_place(source), s3_place(destination)
        if not may_copy(from_place, place):
            return super().transfer(source, temporary, size, checksum, arrived)
        found = at_source(source_at, self._client, from_place)
        if found.size <= LARGEST_COPY:
            read_checksum = partial(self.checksum, source)
            self._staged[temporary] = StagedCopy(self._client, found, place, read_checksum)
            return None
        upload = self._staged[temporary] = self._new_upload(temporary, destination)
        at_destination(upload.begin)
        read_checksum = partial(self.checksum, source)
        at_destination(upload.copy_parts, found.headers(), found.size, read_checksum, arrived)
        return None

    def rename(self, source: StorageUrl, destination: StorageUrl, *, replace: bool) -> None:
        staged = self._staged.get(source)
        if staged is not None:
            if not replace and self.stat(destination) is not None:
                raise StorageError(f"{destination} exists", errno=errno.EEXIST)
            self._finish(source, destination, staged, replace=replace)
            return
        old, new = s3_place(source), s3_place(destination)
        what, there = self.existing(source), self.stat(destination)
        if there is not None and not replace:
            raise StorageError(f"{destination} exists", errno=errno.EEXIST)
        if not may_copy(old, new):
            raise StorageError(f"{source} and {destination} are of two servers", errno=errno.EXDEV)
        if what.kind == "directory":
            if there is not None and there.kind != "directory":
                raise StorageError(f"{destination} is not a directory", errno=errno.ENOTDIR)
            if there is not None:
                # It is empty, or it stays.
                self._remove_directory(destination, new)
            self._rename_directory(old, new, continues=False)
            return
        if there is not None and there.kind == "directory":
            raise StorageError(f"{destination} is a directory", errno=errno.EISDIR)
        self._copy_and_remove(old, new, replace=replace)

    def _copy_and_remove(self, old: S3Place, new: S3Place, *, replace: bool) -> None:
        found = at_source(source_at, self._client, old)
        if found.size <= LARGEST_COPY:
            copy_object(self._client, found, new, replace=replace)
        else:
            record = new._replace(key=prefix_of(new)[:-1].rpartition(b"/")[0] + b"/" + _RENAME_RECORD)
            upload = MultipartUpload(self._client, self._workers, self.check, new, record)
            try:
                upload.begin()
                upload.copy_parts(found.headers(), found.size, None, lambda _: None)
                upload.finish(replace=replace)
            except BaseException:
                with contextlib.suppress(StorageError, StoppedError):
                    upload.drop()
                raise
        self.delete(old)

    def continue_rename(self, source: StorageUrl, destination: StorageUrl) -> bool:
        self._rename_directory(s3_place(source), s3_place(destination), continues=True)
        return True

    def _rename_directory(self, old: S3Place, new: S3Place, *, continues: bool) -> None:
        if prefix_of(new).startswith(prefix_of(old)):
            raise StorageError(f"{new.url()} is inside {old.url()}", errno=errno.EINVAL)
        rename = DirectoryRename(self._workers, self.check, old, new)
        rename.carry_out(lambda: self._page(old, prefix_of(old)), continues=continues)

    def _finish(self, temporary: StorageUrl, destination: StorageUrl, staged: StagedObject, *, replace: bool) -> None:
        """Give an object its name, and read it where the server has not confirmed its bytes."""
        state = staged.finish(replace=replace)
        _, algorithm = self._expected.pop(temporary, (None, None))
        del self._staged[temporary]
        place = s3_place(destination)
        if state.is_confirmed:
            return
        if algorithm is None:
            # The size of others was looked at.
            if isinstance(staged, KeptObject):
                check_size(self._client, place, staged.size)
            return
        sent = staged.checksum(algorithm)
        if sent is not None and super().checksum(destination, algorithm) != sent:
            raise StorageError(
                f"{place.url()}: other bytes arrived", code=FailureCode.CHECKSUM_MISMATCH, scope=FailureScope.TRANSFER
            )

    def interrupt(self) -> None:
        super().interrupt()
        self._client.interrupt()
        self._workers.set_interrupted(interrupted=True)

    def resume(self) -> None:
        super().resume()
        self._client.interrupted = False
        self._workers.set_interrupted(interrupted=False)
