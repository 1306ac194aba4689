"""Uploads to an S3 server: no object has its final key before it is complete and proven.

A copy writes to a temporary name, proves what arrived, and renames. S3 cannot rename, but makes an object visible at
once, by the request that has its last byte. So nothing is stored under the temporary name: a small object is kept here,
a larger one goes as a multipart upload for its final name, and the "rename" is the request that makes it visible. The
server has confirmed the MD5 of each part by then; of a small object it confirms it by the request itself, which has the
MD5 in its head.

Under the temporary name of a multipart upload there is a *record* of it, a small object. So what a killed helper has
left can be found: its upload is resumed by the next attempt, or aborted.
"""

from __future__ import annotations

import base64
import errno
import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from http import HTTPStatus
from typing import NamedTuple, Protocol
from xml.sax.saxutils import escape

from pdm.workqueue.domain.enums import ChecksumAlgorithm
from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.helpers.backends.http_client import Headers, HttpResponse
from pdm.workqueue.helpers.backends.http_connection import exactly
from pdm.workqueue.helpers.backends.s3_client import S3Client, S3Error, S3Place
from pdm.workqueue.helpers.backends.s3_documents import (
    NAMESPACE,
    UploadedPart,
    expected,
    text_of,
    uploaded_parts,
)
from pdm.workqueue.helpers.backends.s3_records import UploadRecord, read_record, remove_record
from pdm.workqueue.helpers.backends.s3_workers import PARALLEL_PARTS, PartWorkers, retried
from pdm.workqueue.helpers.checksums import RunningChecksum, checksum_of, running_checksum
from pdm.workqueue.helpers.storage import StorageError

_MIB = 1024 * 1024
#: Bytes of a part, and of the largest object that goes by one request.
PART_SIZE = 8 * _MIB
#: Bytes of parts on their way at once, unless one part is larger.
_MAX_UNDER_WAY = PARALLEL_PARTS * PART_SIZE
#: Parts of an upload at most, and bytes of a part that the server copies itself: 5 TiB are allowed, in 5 GiB at most.
_MAX_PARTS, _COPIED_PART = 10_000, 1024 * _MIB
#: Statuses of servers that do not know ``If-None-Match`` at an upload; others ignore it.
CONDITION_REFUSED = (HTTPStatus.NOT_IMPLEMENTED, HTTPStatus.METHOD_NOT_ALLOWED)


class ObjectState(NamedTuple):
    """An object that was written.

    Attributes:
        tag: its entity tag; empty if the server gave none.
        is_confirmed: whether the server has confirmed the MD5 of its bytes.
    """

    tag: str
    is_confirmed: bool


def is_md5(tag: str, response: HttpResponse | None = None) -> bool:
    """Whether an entity tag is the MD5 of the object's bytes, by its form and the headers of the response."""
    if len(tag) != 2 * hashlib.md5(usedforsecurity=False).digest_size or not tag.isalnum():
        return False
    encryption = (response and response.header("x-amz-server-side-encryption")) or ""
    customer = response and response.header("x-amz-server-side-encryption-customer-algorithm")
    return not encryption.startswith("aws:kms") and not customer


def tag_of(response: HttpResponse) -> str:
    """The entity tag of a response, without quotes."""
    return (response.header("ETag") or "").removeprefix("W/").strip('"')


class StagedObject(Protocol):
    """An object that has no name yet."""

    size: int

    def checksum(self, algorithm: ChecksumAlgorithm) -> str | None:
        """Checksum of its bytes, as they were sent; None if it is not known."""
        ...

    def finish(self, *, replace: bool) -> ObjectState:
        """Make it visible; raises `StorageError` with EEXIST if another object has the name and is not replaced."""
        ...

    def drop(self) -> None:
        """Forget it: nothing of it stays at the server."""
        ...


def put_object(client: S3Client, place: S3Place, data: bytes, *, replace: bool) -> ObjectState:
    """Write an object by one request; the server refuses other bytes than those of the MD5 in its head."""
    digest = hashlib.md5(data, usedforsecurity=False)
    headers = put_headers(data, digest.digest(), replace=replace)
    try:
        response, _ = client.call("PUT", place, None, headers, data)
    except S3Error as error:
        if not replace and error.status in CONDITION_REFUSED:
            # The caller has looked right before.
            del headers["If-None-Match"]
            response, _ = client.call("PUT", place, None, headers, data)
        elif error.errno == errno.EEXIST and tag_at(client, place) == digest.hexdigest():
            # The first of two requests was carried out, and its answer was lost; or the same bytes are there.
            return ObjectState(digest.hexdigest(), is_confirmed=True)
        else:
            raise
    return confirmed(place, response, digest.hexdigest())


def put_headers(data: bytes, digest: bytes, *, replace: bool) -> dict[str, str]:
    """The headers of a PUT of an object."""
    headers = {"Content-Length": str(len(data)), "Content-MD5": base64.b64encode(digest).decode()}
    return headers if replace else {**headers, "If-None-Match": "*"}


def confirmed(place: S3Place, response: HttpResponse, digest: str) -> ObjectState:
    """The state of an object or part after its PUT; raises `StorageError` if the server has other bytes."""
    tag = tag_of(response)
    if is_md5(tag, response) and tag.lower() != digest:
        text = f"{place.url()}: MD5 is {digest} of the sent bytes and {tag} at the destination"
        raise StorageError(text, code=FailureCode.CHECKSUM_MISMATCH, scope=FailureScope.TRANSFER)
    return ObjectState(tag, is_confirmed=tag.lower() == digest)


def tag_at(client: S3Client, place: S3Place) -> str | None:
    """The entity tag of an object; None if there is none."""
    try:
        response, _ = client.call("HEAD", place)
    except StorageError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return tag_of(response)


def check_size(client: S3Client, place: S3Place, size: int) -> None:
    """Raise `StorageError` unless an object is there that has a size, whatever the server has answered before."""
    try:
        response, _ = client.call("HEAD", place)
        there = f"{response.header('Content-Length') or 0} bytes are"
    except StorageError as error:
        if error.errno != errno.ENOENT:
            raise
        there = "nothing is"
    if there != f"{size} bytes are":
        text = f"{place.url()}: the server has confirmed {size} bytes, and {there} there"
        raise StorageError(text, code=FailureCode.CHECKSUM_MISMATCH, scope=FailureScope.TRANSFER)


class KeptObject:
    """A small object, whose bytes are kept here until it gets its name."""

    def __init__(self, client: S3Client, place: S3Place, data: bytes) -> None:
        self._client = client
        self._place = place
        self.data = data
        self.size = len(data)

    def checksum(self, algorithm: ChecksumAlgorithm) -> str | None:
        return checksum_of(algorithm, [self.data])

    def finish(self, *, replace: bool) -> ObjectState:
        return put_object(self._client, self._place, self.data, replace=replace)

    def drop(self) -> None:
        self.data = b""


class MultipartUpload:
    """An object that is uploaded, or copied by its server, in parts, several at once.

    Args:
        client: of the thread.
        workers: for the parts.
        check: raises an error if the copy must end.
        place: of the object.
        record: place of the copy's temporary name.
    """

    def __init__(
        self,
        client: S3Client,
        workers: PartWorkers,
        check: Callable[[], None],
        place: S3Place,
        record: S3Place,
    ) -> None:
        self._client = client
        self._workers = workers
        self._check = check
        self._place = place
        self._record = record
        self.size = 0
        self._upload = ""
        #: The parts that an earlier attempt has uploaded, by number.
        self._present: Mapping[int, UploadedPart] = {}
        #: Number → state of each part that the server has.
        self._parts: dict[int, ObjectState] = {}
        self._digest: RunningChecksum | None = None
        self._algorithm: ChecksumAlgorithm | None = None
        self._read_checksum: Callable[[ChecksumAlgorithm], str] | None = None

    # -- begin

    def begin(self) -> None:
        """Begin the upload; its record is written before and after."""
        self._write_record()
        where = f"POST {self._place.url()}"
        _, document = self._client.call("POST", self._place, {"uploads": ""}, {"Content-Length": "0"})
        # The second is the name that gofakes3 gives it, which is in rclone.
        root = expected(where, document, "InitiateMultipartUploadResult", "InitiateMultipartUpload")
        self._upload = text_of(root, "UploadId")
        if not self._upload:
            raise StorageError(f"{where}: the server names no upload", code=FailureCode.SERVER_ERROR)
        self._write_record()

    def adopt(self, stale: S3Place) -> bool:
        """Continue the upload of an earlier attempt, if its record is there and is about the same object.

        Each part that the server has is compared with the bytes to send, so it does not matter what was sent before.
        """
        found = read_record(self._client, stale)
        if found is None or found.key != self._place.key or not found.upload:
            return False
        try:
            self._present = _present_parts(self._client, self._place, found.upload)
        except StorageError as error:
            if error.is_of_server:
                raise
            return False
        self._upload = found.upload
        self._write_record()
        self._client.call("DELETE", stale, ok=(200, 204))
        return True

    def _write_record(self) -> None:
        put_object(self._client, self._record, UploadRecord(self._place.key, self._upload).document(), replace=True)

    # -- bytes

    def write(self, pieces: Iterator[bytes], size: int, algorithm: ChecksumAlgorithm | None) -> None:
        """Upload all bytes, but for the parts that an earlier attempt has uploaded."""
        self.size = size
        part_size = max(PART_SIZE, (self.size // (_MAX_PARTS - 1) // _MIB + 1) * _MIB)
        self._algorithm = algorithm
        self._digest = None if algorithm is None else running_checksum(algorithm)

        def acts() -> Iterator[Callable[[S3Client], tuple[int, ObjectState]]]:
            for number, data in enumerate(_cut(exactly(pieces, self.size), part_size), start=1):
                if self._digest is not None:
                    self._digest.update(data)
                yield partial(self._put, number=number, data=data)

        self._carry_out(acts(), max(1, _MAX_UNDER_WAY // part_size))

    def copy_parts(
        self,
        headers: Headers,
        size: int,
        read_checksum: Callable[[ChecksumAlgorithm], str] | None,
        arrived: Callable[[int], None],
    ) -> None:
        """Have the server copy all bytes from another object.

        Args:
            headers: name the source and its version.
            size: bytes of the source.
            read_checksum: computes a checksum of the source.
            arrived: called with the bytes that were copied so far.
        """
        self.size = size
        self._read_checksum = read_checksum
        starts = range(0, size, _COPIED_PART)
        acts = (
            partial(self._copy, number=number, start=start, headers=headers) for number, start in enumerate(starts, 1)
        )
        self._carry_out(acts, PARALLEL_PARTS, lambda: arrived(min(len(self._parts) * _COPIED_PART, self.size)))

    def _carry_out(
        self,
        acts: Iterable[Callable[[S3Client], tuple[int, ObjectState]]],
        most: int,
        advanced: Callable[[], None] = lambda: None,
    ) -> None:
        under_way: deque[Future[tuple[int, ObjectState]]] = deque()

        def take() -> None:
            number, state = under_way.popleft().result()
            self._parts[number] = state
            advanced()

        try:
            for act in acts:
                if len(under_way) == most:
                    take()
                under_way.append(self._workers.submit(act))
            while under_way:
                take()
        finally:
            for future in under_way:
                future.cancel()
            # Nothing of an upload may be on its way when it is aborted.
            wait(under_way)

    def _put(self, client: S3Client, *, number: int, data: bytes) -> tuple[int, ObjectState]:
        digest = hashlib.md5(data, usedforsecurity=False)
        present = self._present.get(number)
        if present is not None and (present.size, present.tag.lower()) == (len(data), digest.hexdigest()):
            return number, ObjectState(present.tag, is_confirmed=True)
        query = {"partNumber": str(number), "uploadId": self._upload}
        headers = put_headers(data, digest.digest(), replace=True)

        def put() -> ObjectState:
            response, _ = client.call("PUT", self._place, query, headers, data)
            return confirmed(self._place, response, digest.hexdigest())

        return number, retried(put, self._check)

    def _copy(self, client: S3Client, *, number: int, start: int, headers: Headers) -> tuple[int, ObjectState]:
        last = min(start + _COPIED_PART, self.size) - 1
        query = {"partNumber": str(number), "uploadId": self._upload}
        ranged = {**headers, "x-amz-copy-source-range": f"bytes={start}-{last}", "Content-Length": "0"}

        def copy() -> ObjectState:
            with client.patient():
                _, document = client.call("PUT", self._place, query, ranged)
            root = expected(f"PUT {self._place.url()}", document, "CopyPartResult")
            # The source has no MD5 of this part.
            return ObjectState(text_of(root, "ETag").strip('"'), is_confirmed=False)

        return number, retried(copy, self._check)

    def checksum(self, algorithm: ChecksumAlgorithm) -> str | None:
        if self._read_checksum is not None:
            return self._read_checksum(algorithm)
        return self._digest.hexdigest() if self._digest is not None and algorithm == self._algorithm else None

    # -- end

    def finish(self, *, replace: bool) -> ObjectState:
        """Make the object visible; raises `StorageError` with EEXIST if another has the name and is not replaced."""
        tags = [self._parts[number].tag for number in sorted(self._parts)]
        body = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>{escape(tag)}</ETag></Part>"
            for number, tag in enumerate(tags, start=1)
        )
        document = f'<CompleteMultipartUpload xmlns="{NAMESPACE}">{body}</CompleteMultipartUpload>'.encode()
        headers = {} if replace else {"If-None-Match": "*"}
        try:
            answer = self._complete(document, headers)
        except S3Error as error:
            if headers and error.status in CONDITION_REFUSED:
                # The caller has looked right before.
                answer = self._complete(document, {})
            elif error.s3_code not in ("NoSuchUpload", "PreconditionFailed") or not self._is_complete(tags):
                raise
            else:
                # The first of two requests was carried out, and its answer was lost.
                return ObjectState(_tag_of_parts(tags), self._is_confirmed)
        root = expected(f"POST {self._place.url()}", answer, "CompleteMultipartUploadResult")
        check_size(self._client, self._place, self.size)
        self._remove_record()
        return ObjectState(text_of(root, "ETag").strip('"'), self._is_confirmed)

    @property
    def _is_confirmed(self) -> bool:
        return all(part.is_confirmed for part in self._parts.values())

    def _complete(self, document: bytes, headers: Headers) -> bytes:
        # Some servers write the whole object now.
        with self._client.patient():
            _, answer = self._client.call("POST", self._place, {"uploadId": self._upload}, headers, document)
        return answer

    def _is_complete(self, tags: Sequence[str]) -> bool:
        if tag_at(self._client, self._place) != _tag_of_parts(tags):
            return False
        check_size(self._client, self._place, self.size)
        self._remove_record()
        return True

    def _remove_record(self) -> None:
        self._client.call("DELETE", self._record, ok=(200, 204))

    def drop(self) -> None:
        """Abort the upload, if it has begun, and remove its record."""
        known = UploadRecord(self._place.key, self._upload) if self._upload else None
        remove_record(self._client, self._record, known)


def _cut(pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
    """The pieces, joined and cut to a size; the last one may be smaller."""
    held: list[bytes] = []
    length = 0
    for piece in pieces:
        held.append(piece)
        length += len(piece)
        while length >= size:
            joined = b"".join(held)
            yield joined[:size]
            held, length = [joined[size:]], length - size
    if length:
        yield b"".join(held)


def _tag_of_parts(tags: Sequence[str]) -> str:
    """The entity tag of an object that was uploaded in parts; empty if those of its parts are no MD5."""
    try:
        joined = b"".join(map(bytes.fromhex, tags))
    except ValueError:
        return ""
    return f"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(tags)}"


def _present_parts(client: S3Client, place: S3Place, upload: str) -> dict[int, UploadedPart]:
    """The parts of an upload that the server has, by number."""
    found: dict[int, UploadedPart] = {}
    marker, where = "", f"GET {place.url()}"
    while True:
        query = {"uploadId": upload, **({"part-number-marker": marker} if marker else {})}
        _, document = client.call("GET", place, query)
        parts, following = uploaded_parts(where, document)
        known = len(found)
        found.update((part.number, part) for part in parts)
        # A page without a new part: the server ignores the marker, or names the same ones in turn.
        if not following or len(found) == known or len(found) > _MAX_PARTS:
            return found
        marker = following
