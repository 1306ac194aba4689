"""Copies that an S3 server makes by itself, of objects and of whole directories."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from functools import partial
from typing import NamedTuple
from urllib.parse import quote_from_bytes

from pdm.workqueue.domain.enums import ChecksumAlgorithm
from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.helpers.backends.http_client import Headers
from pdm.workqueue.helpers.backends.http_errors import HttpStatusError
from pdm.workqueue.helpers.backends.s3_client import S3Client, S3Error, S3Place
from pdm.workqueue.helpers.backends.s3_documents import ListingPage, expected, text_of
from pdm.workqueue.helpers.backends.s3_uploads import CONDITION_REFUSED, ObjectState, is_md5, tag_at, tag_of
from pdm.workqueue.helpers.backends.s3_workers import PARALLEL_PARTS, PartWorkers, retried
from pdm.workqueue.helpers.storage import StorageError

#: Bytes of the largest object that a server copies by one request.
LARGEST_COPY = 5 * 1024**3


class CopySource(NamedTuple):
    """One version of an object.

    Attributes:
        place: of the object.
        tag: its entity tag.
        size: its bytes.
        is_md5: whether the tag is the MD5 of the bytes.
    """

    place: S3Place
    tag: str
    size: int
    is_md5: bool

    def headers(self) -> dict[str, str]:
        """The headers that have a server copy this version, and no other."""
        path = f"/{self.place.bucket_name}/{quote_from_bytes(self.place.key, safe='/~')}"
        return {"x-amz-copy-source": path, "x-amz-copy-source-if-match": f'"{self.tag}"', "Content-Length": "0"}


def source_at(client: S3Client, place: S3Place) -> CopySource:
    """The version of an object that is there now; raises `StorageError` with ENOENT for none."""
    response, _ = client.call("HEAD", place)
    tag = tag_of(response)
    return CopySource(place, tag, int(response.header("Content-Length") or "0"), is_md5(tag, response))


def copy_object(client: S3Client, source: CopySource, destination: S3Place, *, replace: bool) -> ObjectState:
    """Have the server copy an object; raises `StorageError` with EEXIST if another has the name and is not replaced."""
    headers = source.headers()
    try:
        with client.patient():
            document = _copied(client, destination, headers, replace=replace)
    except HttpStatusError as error:
        if error.errno == errno.EEXIST and (replace or tag_at(client, destination) is None):
            text = f"{source.place.url()} was replaced while it was copied"
            raise StorageError(text, code=FailureCode.SIZE_CHANGED, scope=FailureScope.SOURCE) from error
        if error.errno == errno.ENOENT:
            raise error.at(FailureScope.SOURCE) from error.__cause__
        raise
    tag = text_of(expected(f"PUT {destination.url()}", document, "CopyObjectResult"), "ETag").strip('"')
    copied = source_at(client, destination)
    if copied.size != source.size or (source.is_md5 and copied.is_md5 and copied.tag != source.tag):
        text = f"{destination.url()} has {copied.size} bytes and the tag {copied.tag} after the server has copied it"
        raise StorageError(text, code=FailureCode.CHECKSUM_MISMATCH, scope=FailureScope.TRANSFER)
    return ObjectState(tag, is_confirmed=source.is_md5 and copied.is_md5)


def _copied(client: S3Client, destination: S3Place, headers: Headers, *, replace: bool) -> bytes:
    """The answer to a request that copies."""
    try:
        return client.call("PUT", destination, None, headers if replace else {**headers, "If-None-Match": "*"})[1]
    except S3Error as error:
        if replace or error.status not in CONDITION_REFUSED:
            raise
    # The caller has looked right before.
    return client.call("PUT", destination, None, headers)[1]


class StagedCopy:
    """A copy that the server makes when it gets its name.

    Args:
        client: of the thread.
        source: what is copied.
        place: of the copy.
        read_checksum: computes a checksum of the source.
    """

    def __init__(
        self,
        client: S3Client,
        source: CopySource,
        place: S3Place,
        read_checksum: Callable[[ChecksumAlgorithm], str],
    ) -> None:
        self._client = client
        self._source = source
        self._place = place
        self._read_checksum = read_checksum
        self.size = source.size

    def checksum(self, algorithm: ChecksumAlgorithm) -> str | None:
        return self._read_checksum(algorithm)

    def finish(self, *, replace: bool) -> ObjectState:
        return copy_object(self._client, self._source, self._place, replace=replace)

    def drop(self) -> None:
        """Nothing was done."""


class DirectoryRename:
    """A rename of all keys of a directory, page by page: each is copied, then removed under its old name.

    What it has done when it ends early is not done again: a key is always at one of its two names.

    Args:
        workers: for the keys.
        check: raises an error if it must end.
        source: place of the directory.
        destination: place of its new name.
    """

    def __init__(self, workers: PartWorkers, check: Callable[[], None], source: S3Place, destination: S3Place) -> None:
        self._workers = workers
        self._check = check
        self._source = source
        self._destination = destination

    def carry_out(self, first_page: Callable[[], ListingPage], *, continues: bool) -> None:
        """Rename all keys.

        Args:
            first_page: lists the first keys of the directory.
            continues: whether an earlier attempt has done a part; else the destination has no keys.
        """
        moved: list[bytes] = []
        while keys := [key for key, _, _ in first_page().objects]:
            if keys == moved:
                text = f"{self._source.url()}: the server still lists keys that were removed"
                raise StorageError(text, code=FailureCode.SERVER_ERROR)
            self._each(partial(self._move, key=key, continues=continues) for key in keys)
            moved = keys

    def _each(self, acts: Iterator[Callable[[S3Client], None]]) -> None:
        under_way: deque[Future[None]] = deque()
        try:
            for act in acts:
                self._check()
                if len(under_way) == PARALLEL_PARTS:
                    under_way.popleft().result()
                under_way.append(self._workers.submit(act))
            while under_way:
                under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()
            wait(under_way)

    def _move(self, client: S3Client, *, key: bytes, continues: bool) -> None:
        new = self._destination._replace(key=self._destination.key + key[len(self._source.key) :])
        source = source_at(client, self._source._replace(key=key))
        if key.endswith(b"/") and not source.size:
            # A marker is made anew: SeaweedFS keeps it, and does not copy it.
            client.call("PUT", new, None, {"Content-Length": "0"})
        elif not continues or not self._is_there(client, source, new):
            retried(lambda: copy_object(client, source, new, replace=False), self._check)
        client.call("DELETE", source.place, ok=(200, 204))

    @staticmethod
    def _is_there(client: S3Client, source: CopySource, new: S3Place) -> bool:
        try:
            there = source_at(client, new)
        except StorageError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        if (there.size, there.tag) != (source.size, source.tag):
            raise StorageError(f"{new.url()} exists", errno=errno.EEXIST, scope=FailureScope.DESTINATION)
        return True
