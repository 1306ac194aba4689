"""What names of objects and answers about them say: prefixes, versions, checksums."""

from __future__ import annotations

from http import HTTPStatus

from pdm.workqueue.domain.enums import ChecksumAlgorithm
from pdm.workqueue.helpers.backends.http_client import HttpResponse
from pdm.workqueue.helpers.backends.propfind import byte_count, http_date
from pdm.workqueue.helpers.backends.s3_client import S3Place
from pdm.workqueue.helpers.backends.s3_uploads import is_md5, tag_of
from pdm.workqueue.helpers.checksums import from_base64
from pdm.workqueue.helpers.storage import FileVersion


def prefix_of(place: S3Place) -> bytes:
    """What all keys of a directory begin with."""
    return place.key + b"/" if place.key else b""


def is_temporary(place: S3Place) -> bool:
    """Whether a key has the form of a copy's temporary name."""
    name = place.key.rpartition(b"/")[2]
    return name.startswith(b".pdm-") and name.endswith(b".part")


def length_of(place: S3Place, response: HttpResponse) -> int:
    """Bytes of the object of a HEAD; servers leave the header out of an empty one."""
    return byte_count(response.header("Content-Length") or "0") or 0


def modified_at(response: HttpResponse) -> int | None:
    """When an object was written, in seconds since 1970 UTC."""
    return http_date(response.header("Last-Modified") or "")


def version_of(place: S3Place, response: HttpResponse) -> FileVersion:
    """The version of an object that the response to HEAD or GET shows."""
    tag = tag_of(response)
    # Made of the bytes, or new with each write: no two writes have the same one but of the same bytes.
    return FileVersion(length_of(place, response), modified_at(response), tag, is_exact=bool(tag))


def checksum_in(response: HttpResponse, algorithm: ChecksumAlgorithm) -> str | None:
    """The checksum of an object that the response to HEAD shows; None if it shows none."""
    if algorithm is ChecksumAlgorithm.MD5 and is_md5(tag := tag_of(response), response):
        return tag.lower()
    if algorithm is ChecksumAlgorithm.SHA256 and "-" not in (value := response.header("x-amz-checksum-sha256") or "-"):
        return from_base64(algorithm, value)
    return None


def total_of(response: HttpResponse) -> int | None:
    """Bytes of the whole object in a response to a request of a range; None if it is not told."""
    # gofakes3 answers with 200 and a range.
    content_range = response.header("Content-Range")
    if content_range is None and response.status == HTTPStatus.OK:
        return byte_count(response.header("Content-Length"))
    return byte_count((content_range or "").rpartition("/")[2])
