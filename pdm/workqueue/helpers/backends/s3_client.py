"""Requests to S3 servers: signed, never redirected, errors as `StorageError`.

``PDM_CREDENTIALS`` has the file with the keys for each endpoint: a JSON object with ``access_key``, ``secret_key``, and
the ``session_token`` of temporary keys. A request is signed with the keys of the endpoint that its URL is below, and
with no others.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import urllib.parse
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

from aws_request_signer import UNSIGNED_PAYLOAD, AwsRequestSigner

from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.backends.http_client import Body, Headers, HttpClient, HttpResponse
from pdm.workqueue.helpers.backends.http_errors import HttpStatusError, error_from_response
from pdm.workqueue.helpers.backends.http_servers import known_server
from pdm.workqueue.helpers.backends.s3_documents import MAX_DOCUMENT, error_fields
from pdm.workqueue.helpers.credentials import EndpointCredential, credential_below
from pdm.workqueue.helpers.storage import StorageError, truncated

#: Scheme of URLs whose host begins with the bucket's name; the others have it as the first part of their path.
VIRTUAL_HOST_SCHEME = "s3sv"
#: The region of requests to a bucket whose server has named no other; only AWS, and servers configured so, mind.
_USUAL_REGION = "us-east-1"
#: Bucket → its region, after a server has named it; shared by all threads.
_regions: dict[str, str] = {}
_MAX_REGIONS = 1000
_MAX_ERROR = 64 * 1024
#: Seconds for which a link can be valid.
_LONGEST_LINK_S = 7 * 24 * 3600
_SIGNED = ("x-amz-", "content-md5")
#: What stays as it is in the canonical path of a signature, besides letters, digits, dots, dashes and underscores.
_SAFE = "/~"

_ERRNO_BY_CODE: Mapping[str, int] = {
    "NoSuchKey": errno.ENOENT,
    "NoSuchBucket": errno.ENOENT,
    "NoSuchVersion": errno.ENOENT,
    "AccessDenied": errno.EACCES,
    "AllAccessDisabled": errno.EACCES,
    "AccountProblem": errno.EACCES,
    "KeyTooLongError": errno.ENAMETOOLONG,
    "InvalidObjectName": errno.EILSEQ,
    "XMinioInvalidObjectName": errno.EILSEQ,
    "XMinioInvalidResourceName": errno.EILSEQ,
    "XMinioParentIsObject": errno.ENOTDIR,
    "QuotaExceeded": errno.EDQUOT,
    "XMinioAdminBucketQuotaExceeded": errno.EDQUOT,
    "InsufficientCapacity": errno.ENOSPC,
    "XMinioStorageFull": errno.ENOSPC,
    "PreconditionFailed": errno.EEXIST,
    "MethodNotAllowed": errno.EOPNOTSUPP,
    "NotImplemented": errno.EOPNOTSUPP,
    "InvalidObjectState": errno.EOPNOTSUPP,
}
_CODE_BY_CODE: Mapping[str, FailureCode] = {
    "SignatureDoesNotMatch": FailureCode.CREDENTIAL_REFUSED,
    "InvalidAccessKeyId": FailureCode.CREDENTIAL_REFUSED,
    "InvalidToken": FailureCode.CREDENTIAL_REFUSED,
    "ExpiredToken": FailureCode.CREDENTIAL_EXPIRED,
    "ExpiredTokenException": FailureCode.CREDENTIAL_EXPIRED,
    "RequestTimeTooSkewed": FailureCode.SERVER_ERROR,
    "SlowDown": FailureCode.BUSY,
    "SlowDownRead": FailureCode.BUSY,
    "SlowDownWrite": FailureCode.BUSY,
    "Busy": FailureCode.BUSY,
    "ServiceUnavailable": FailureCode.BUSY,
    "TooManyRequests": FailureCode.BUSY,
    "OperationAborted": FailureCode.BUSY,
    "ConditionalRequestConflict": FailureCode.BUSY,
    "RequestTimeout": FailureCode.TIMEOUT,
    "InternalError": FailureCode.SERVER_ERROR,
    "NoSuchUpload": FailureCode.SERVER_ERROR,
    "InvalidPart": FailureCode.SERVER_ERROR,
    "EntityTooLarge": FailureCode.TOO_LARGE,
    "EntityTooSmall": FailureCode.UNSUPPORTED,
    "BadDigest": FailureCode.CHECKSUM_MISMATCH,
    "XAmzContentSHA256Mismatch": FailureCode.CHECKSUM_MISMATCH,
    "InvalidRange": FailureCode.SIZE_CHANGED,
    "PermanentRedirect": FailureCode.UNSUPPORTED,
    "TemporaryRedirect": FailureCode.UNSUPPORTED,
    "AuthorizationHeaderMalformed": FailureCode.UNSUPPORTED,
    "IllegalLocationConstraintException": FailureCode.UNSUPPORTED,
}
_HINTS: Mapping[str, str] = {
    "SignatureDoesNotMatch": "the secret key is not the one of this access key: store both again with 'pdm s3-key'",
    "InvalidAccessKeyId": "the server does not know this access key: store another one with 'pdm s3-key'",
    "ExpiredToken": "the temporary keys have ended: store others with 'pdm s3-key --session-token'",
    "RequestTimeTooSkewed": "the clocks of the service and the server differ too much: set the wrong one",
    "InvalidObjectState": "the object is archived: restore it at its server first",
    "EntityTooSmall": "the server takes no parts of this size",
}


class S3Error(HttpStatusError):
    """An error of an S3 server.

    Attributes:
        s3_code: its ``Code``; empty if there is none.
        region: for which requests must be signed, if the server says that they were signed for another.
    """

    s3_code = ""
    region = ""


class S3Place(NamedTuple):
    """What a URL names.

    Attributes:
        bucket: URL of the bucket, without a slash at its end.
        key: of the object; empty for the bucket itself.
        keys_file: file with the user's keys for the endpoint that the URL is below; None if there is none.
    """

    bucket: StorageUrl
    key: bytes
    keys_file: str | None

    def url(self, key: bytes | None = None, query: Mapping[str, str] | None = None) -> StorageUrl:
        """The URL of a request about a key of the bucket; an empty key is the bucket itself."""
        encoded = urllib.parse.quote_from_bytes(self.key if key is None else key, safe=_SAFE)
        question = "?" + urllib.parse.urlencode(query, quote_via=urllib.parse.quote) if query else ""
        return StorageUrl(f"{self.bucket}/{encoded}{question}")

    @property
    def bucket_name(self) -> str:
        """The bucket's name, as it is in a URL."""
        if self.bucket.scheme == VIRTUAL_HOST_SCHEME:
            return self.bucket.host.partition(".")[0]
        return self.bucket.encoded_path[1:]


def s3_place(url: StorageUrl) -> S3Place:
    """What a URL names, without slashes at its end.

    Raises:
        StorageError: EILSEQ, no key can have this name.
    """
    return _place(url, credential_below(url))


@functools.lru_cache(maxsize=512)
def _place(url: StorageUrl, credential: EndpointCredential | None) -> S3Place:
    path = url.path.rstrip(b"/")
    bucket = b""
    if url.scheme != VIRTUAL_HOST_SCHEME:
        bucket, _, path = path[1:].partition(b"/")
    key = path.removeprefix(b"/")
    try:
        key.decode()
    except UnicodeDecodeError:
        raise StorageError(f"{url}: a key is UTF-8, and this name is not", errno=errno.EILSEQ) from None
    bucket_url = StorageUrl(f"{url.server}/{urllib.parse.quote_from_bytes(bucket, safe='~')}".rstrip("/"))
    return S3Place(bucket_url, key, credential and credential.file)


@functools.lru_cache(maxsize=64)
def _signer(file: str, region: str) -> AwsRequestSigner:
    # An agent has a file of its own for each state of the user's keys.
    try:
        keys = json.loads(Path(file).read_bytes())
        access_key, secret_key = str(keys["access_key"]), str(keys["secret_key"])
        session_token = keys.get("session_token")
    except (OSError, ValueError, KeyError, TypeError) as error:
        text = f"the S3 keys cannot be read: {type(error).__name__}"
        raise StorageError(text, code=FailureCode.CREDENTIAL_MISSING, scope=FailureScope.SERVICE) from error
    return AwsRequestSigner(region, access_key, secret_key, "s3", session_token)


def signer_for(place: S3Place) -> AwsRequestSigner:
    """What signs requests about a place."""
    if place.keys_file is None:
        text = f"there are no S3 keys for {place.bucket}"
        raise StorageError(text, code=FailureCode.CREDENTIAL_MISSING, scope=FailureScope.SERVICE)
    return _signer(place.keys_file, _regions.get(place.bucket, _USUAL_REGION))


def presigned(place: S3Place, seconds: int) -> str:
    """A link by which anybody can read an object for some seconds."""
    url = place.url()
    target = f"https://{url.authority.removesuffix(':443')}{url.encoded_path}"
    expires = min(max(seconds, 1), _LONGEST_LINK_S)
    signer = signer_for(place)
    if signer.session_token is not None:
        target += f"?X-Amz-Security-Token={urllib.parse.quote(signer.session_token, safe='')}"
    link: str = signer.presign_url("GET", target, content_hash=UNSIGNED_PAYLOAD, expires=expires)
    return link


def may_copy(source: S3Place, destination: S3Place) -> bool:
    """Whether the server may be asked to copy: both places are at one server, and reached with the same keys."""
    hosts = [place.bucket.address for place in (source, destination)]
    is_virtual = VIRTUAL_HOST_SCHEME in (source.bucket.scheme, destination.bucket.scheme)
    is_one_server = source.bucket == destination.bucket if is_virtual else hosts[0] == hosts[1]
    return is_one_server and source.keys_file == destination.keys_file


class S3Client(HttpClient):
    """The connections of one worker thread to S3 servers."""

    @staticmethod
    def credentials(authority: str) -> dict[str, str]:
        """Nothing: each request is signed by itself."""
        return {}

    def is_xrootd(self, url: StorageUrl) -> bool:
        return False

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """For requests that the server answers after it has read and written whole objects: a longer timeout."""
        timeouts = self.timeouts
        self.timeouts = timeouts.with_slack()
        try:
            yield
        finally:
            self.timeouts = timeouts

    def signed(self, method: str, place: S3Place, url: StorageUrl, headers: Headers) -> Headers:
        """The headers of a request with its signature."""
        to_sign = {
            name: value
            for name, value in headers.items()
            if isinstance(value, str) and name.lower().startswith(_SIGNED)
        }
        target = f"https://{url.authority.removesuffix(':443')}{url.encoded_path}"
        return {**headers, **signer_for(place).sign_with_headers(method, target, to_sign, UNSIGNED_PAYLOAD)}

    def send(
        self,
        method: str,
        place: S3Place,
        query: Mapping[str, str] | None = None,
        headers: Headers | None = None,
        body: Body = b"",
        *,
        ok: tuple[int, ...] = (200,),
        key: bytes | None = None,
    ) -> HttpResponse:
        """Send a signed request; the response's body is to be read to its end, or dropped.

        Args:
            method: of HTTP.
            place: the bucket, and the key unless ``key`` is given.
            query: of the URL.
            headers: besides those of the signature.
            body: of the request.
            ok: statuses that are no error.
            key: what the request is about, if not the key of ``place``.

        Raises:
            StorageError: there was no response.
            S3Error: the status is an error.
        """
        url, headers = place.url(key, query), headers or {}
        for is_last in (False, True):
            signed = self.signed(method, place, url, headers)
            response = self._request(known_server(url), method, url, signed, body)
            if response.status in ok:
                return response
            error = self._refusal(method, place, url, response, headers)
            region = _named_region(place, response, error)
            if is_last or region is None or not isinstance(body, bytes):
                raise error
            if len(_regions) > _MAX_REGIONS:
                _regions.clear()
            _regions[place.bucket] = region
        raise AssertionError

    def call(  # type: ignore[override]  # about a place, not a URL: each request is signed with its bucket's keys
        self,
        method: str,
        place: S3Place,
        query: Mapping[str, str] | None = None,
        headers: Headers | None = None,
        body: Body = b"",
        *,
        ok: tuple[int, ...] = (200,),
        key: bytes | None = None,
    ) -> tuple[HttpResponse, bytes]:
        """Like `send`; returns the response with its body, a document.

        Raises:
            S3Error: the document is an error, whatever the status is: a copy may fail after its status was sent.
        """
        response = self.send(method, place, query, headers, body, ok=ok, key=key)
        document = self._document(response)
        if document and (fields := error_fields(document)):
            url = place.url(key)
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            raise s3_error(f"{method} {url}", status, "", document, fields, response.header("Retry-After"))
        return response, document

    @staticmethod
    def _document(response: HttpResponse, most: int = MAX_DOCUMENT) -> bytes:
        pieces, size = [], 0
        while chunk := response.read():
            pieces.append(chunk)
            size += len(chunk)
            if size > most:
                response.drop()
                raise StorageError("the server's answer is too long", code=FailureCode.BAD_LISTING)
        return b"".join(pieces)

    def _refusal(
        self, method: str, place: S3Place, url: StorageUrl, response: HttpResponse, headers: Headers
    ) -> StorageError:
        """The error of a response; the one to HEAD has no document, so the reason is asked for by GET."""
        try:
            document = self._document(response, _MAX_ERROR)
        except StorageError:
            document = b""
        status, reason = response.status, response.reason
        asked = f"{method} {url.partition('?')[0]}"
        if method == "HEAD" and status != HTTPStatus.NOT_FOUND:
            again = self.signed("GET", place, url, {"Range": "bytes=0-0"})
            answer = self._request(known_server(url), "GET", url, again, b"")
            if answer.status >= HTTPStatus.BAD_REQUEST:
                document = self._document(answer, _MAX_ERROR)
            else:
                answer.drop()
        fields = error_fields(document)
        retry_after, size = response.header("Retry-After"), headers.get("Content-Length")
        return s3_error(asked, status, reason, document, fields, retry_after, size)


def s3_error(
    request: str,
    status: int,
    reason: str,
    document: bytes,
    fields: Mapping[str, str],
    retry_after: str | None,
    size: object = None,
) -> StorageError:
    """The error for a response; its arguments are those of `error_from_response`, and the fields of the document."""
    code = fields.get("Code", "")
    text = truncated(document.decode("utf-8", "backslashreplace"), 500)
    if code:
        # Not all fields: some servers send back what was signed.
        parts = [code, fields.get("Message", ""), _HINTS.get(code, ""), _redirection(code, fields)]
        text = ": ".join(part for part in parts if part)
    plain = error_from_response(request, status, reason, text, retry_after, size)
    found = S3Error(
        plain.message,
        errno=_ERRNO_BY_CODE.get(code, plain.errno),
        code=plain.code,
        retry_after_s=plain.retry_after_s,
    )
    if code in _CODE_BY_CODE:
        found.errno, found.code = None, _CODE_BY_CODE[code]
        if found.code is FailureCode.CREDENTIAL_EXPIRED:
            found.scope = FailureScope.SERVICE
    elif code in _ERRNO_BY_CODE:
        found.code = None
    found.status, found.s3_code = status, code
    if code == "AuthorizationHeaderMalformed":
        found.region = fields.get("Region", "")
    return found


def _redirection(code: str, fields: Mapping[str, str]) -> str:
    if code in ("PermanentRedirect", "TemporaryRedirect") and (endpoint := fields.get("Endpoint")):
        return f"the bucket is at {endpoint}: the site's URL must name that host"
    return ""


def _named_region(place: S3Place, response: HttpResponse, error: StorageError) -> str | None:
    """The region of a bucket, if the server refuses a request because it was signed for another one."""
    if not isinstance(error, S3Error) or error.status not in (301, 307, 400, 403):
        return None
    region = response.header("x-amz-bucket-region") or error.region
    known = _regions.get(place.bucket, _USUAL_REGION)
    return region if region and region != known and region.isascii() and region.isprintable() else None
