"""The bytes of one version of an object: the first ones by one request, the rest in ranges, several at once."""

from __future__ import annotations

import contextlib
import errno
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.helpers.backends.http_client import HttpResponse
from pdm.workqueue.helpers.backends.s3_client import S3Client, S3Place
from pdm.workqueue.helpers.backends.s3_objects import total_of
from pdm.workqueue.helpers.backends.s3_uploads import PART_SIZE, tag_of
from pdm.workqueue.helpers.backends.s3_workers import PARALLEL_PARTS, PartWorkers, retried
from pdm.workqueue.helpers.storage import StorageError


class ObjectReader:
    """Reads one object.

    Args:
        client: of the thread.
        workers: for the ranges.
        check: raises an error if the reading must end.
        place: of the object.
    """

    def __init__(self, client: S3Client, workers: PartWorkers, check: Callable[[], None], place: S3Place) -> None:
        self._client = client
        self._workers = workers
        self._check = check
        self._place = place

    def pieces(self) -> Iterator[bytes]:
        """All bytes, in pieces; raises `StorageError` with ENOENT if there is no object."""
        place = self._place
        try:
            response = self._client.send("GET", place, None, {"Range": f"bytes=0-{PART_SIZE - 1}"}, ok=(200, 206))
        except StorageError as error:
            if error.code is not FailureCode.SIZE_CHANGED:
                raise
            # Of an object without bytes there is no range.
            response = self._client.send("GET", place)
        size, tag = total_of(response), tag_of(response)
        if size is None:
            response.drop()
            raise StorageError(f"{place.url()}: the server does not tell its size", code=FailureCode.UNSUPPORTED)
        at = 0
        try:
            with _dropped_early(response):
                while chunk := response.read():
                    at += len(chunk)
                    yield chunk
        except StorageError as error:
            if not error.lost or not tag:
                raise
        if at < size:
            if not tag:
                raise StorageError(f"{place.url()}: the server shows no version", code=FailureCode.UNSUPPORTED)
            yield from self._rest(tag, at, size)

    def _rest(self, tag: str, at: int, size: int) -> Iterator[bytes]:
        """The bytes of one version from an offset on, in their order."""
        starts = iter(range(at, size, PART_SIZE))
        under_way: deque[Future[bytes]] = deque()

        def begin() -> None:
            start = next(starts, None)
            if start is not None:
                end = min(start + PART_SIZE, size)
                under_way.append(self._workers.submit(lambda client: self._range(client, tag, start, end)))

        try:
            for _ in range(PARALLEL_PARTS):
                begin()
            while under_way:
                data = under_way.popleft().result()
                begin()
                yield data
        finally:
            for future in under_way:
                future.cancel()

    def _range(self, client: S3Client, tag: str, start: int, end: int) -> bytes:
        held = bytearray()
        place = self._place
        replaced = f"{place.url()} was replaced while it was read"

        def fetch() -> None:
            headers = {"Range": f"bytes={start + len(held)}-{end - 1}", "If-Match": f'"{tag}"'}
            try:
                response = client.send("GET", place, None, headers, ok=(200, 206))
            except StorageError as error:
                if error.errno == errno.EEXIST:
                    raise StorageError(replaced, code=FailureCode.SIZE_CHANGED, scope=FailureScope.SOURCE) from error
                raise
            with _dropped_early(response):
                if tag_of(response) not in (tag, ""):
                    # A server may ignore the condition.
                    raise StorageError(replaced, code=FailureCode.SIZE_CHANGED, scope=FailureScope.SOURCE)
                if not (response.header("Content-Range") or "").startswith(f"bytes {start + len(held)}-"):
                    text = f"{place.url()}: the server sends another range than was asked for"
                    raise StorageError(text, code=FailureCode.UNSUPPORTED)
                while chunk := response.read():
                    held.extend(chunk)
                    if len(held) > end - start:
                        text = f"{place.url()}: more bytes than were asked for"
                        raise StorageError(text, code=FailureCode.UNSUPPORTED)
            if len(held) != end - start:
                raise StorageError(f"{place.url()}: fewer bytes than were asked for", code=FailureCode.SERVER_ERROR)

        retried(fetch, self._check)
        return bytes(held)


@contextlib.contextmanager
def _dropped_early(response: HttpResponse) -> Iterator[None]:
    """Close the connection of a response whose body is not read to its end."""
    try:
        yield
    except BaseException:
        response.drop()
        raise
