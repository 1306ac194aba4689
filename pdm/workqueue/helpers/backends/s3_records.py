"""Records of multipart uploads under temporary names: by them, what a killed helper has left is found."""

from __future__ import annotations

import errno
import json
from typing import Any, NamedTuple

from pdm.workqueue.helpers.backends.propfind import http_date
from pdm.workqueue.helpers.backends.s3_client import S3Client, S3Error, S3Place
from pdm.workqueue.helpers.backends.s3_documents import uploads_of_key
from pdm.workqueue.helpers.storage import StorageError

#: A record has an id and a key, percent-encoded.
_MAX_RECORD = 16 * 1024
#: Seconds in which an upload begins after its record was written.
_BEGINS_WITHIN_S = 60


class UploadRecord(NamedTuple):
    """What is kept of a multipart upload under the copy's temporary name.

    Attributes:
        key: of the object.
        upload: its id; empty before the upload has begun.
    """

    key: bytes
    upload: str

    def document(self) -> bytes:
        return json.dumps({"pdm_upload": self.upload, "key": self.key.decode()}).encode()

    @classmethod
    def of(cls, document: bytes) -> UploadRecord | None:
        """The record in a document; None if it is none."""
        try:
            fields: Any = json.loads(document)
            return cls(str(fields["key"]).encode(), str(fields["pdm_upload"]))
        except (ValueError, TypeError, KeyError, RecursionError):
            return None


def read_record(client: S3Client, place: S3Place) -> UploadRecord | None:
    """The record under a temporary name; None if there is none."""
    try:
        response = client.send("GET", place, None, {"Range": f"bytes=0-{_MAX_RECORD - 1}"}, ok=(200, 206))
    except StorageError as error:
        if error.is_of_server:
            raise
        return None
    document = b""
    while (chunk := response.read()) and len(document) < _MAX_RECORD:
        document += chunk
    if len(document) >= _MAX_RECORD:
        response.drop()
    return UploadRecord.of(document)


def remove_record(client: S3Client, place: S3Place, known: UploadRecord | None = None) -> None:
    """Abort the upload whose record has a temporary name, and remove what has that name; a known record is not read."""
    found = known or read_record(client, place)
    if found is None:
        # Another object may have such a name.
        client.call("DELETE", place, ok=(200, 202, 204))
        return
    at = place._replace(key=found.key)
    for upload in [found.upload] if found.upload else _begun_since(client, place, at):
        try:
            client.call("DELETE", at, {"uploadId": upload}, ok=(200, 204))
        except S3Error as error:
            if error.errno != errno.ENOENT and error.s3_code != "NoSuchUpload":
                raise
    client.call("DELETE", place, ok=(200, 204))


def _begun_since(client: S3Client, record: S3Place, place: S3Place) -> list[str]:
    """The uploads that may be the one of a record without an id: begun soon after it was written."""
    response, _ = client.call("HEAD", record)
    written_at = http_date(response.header("Last-Modified") or "")
    query = {"uploads": "", "prefix": place.key.decode(), "encoding-type": "url"}
    _, document = client.call("GET", place, query, key=b"")
    return [
        upload
        for upload, begun_at in uploads_of_key(f"GET {place.bucket}", document, place.key)
        if None not in (begun_at, written_at) and 0 <= begun_at - written_at <= _BEGINS_WITHIN_S  # type: ignore[operator]
    ]
