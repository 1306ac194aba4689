"""A small S3 server over TLS, all in memory, with the quirks and faults of real servers on demand."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import http.server
import itertools
import json
import re
import ssl
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, quote, quote_from_bytes, unquote_to_bytes, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from tests.support.loopback import HttpHandler, LoopbackServer, tls_server

ACCESS_KEY = "CANARYACCESS4711"
#: Buckets of the server; the second one keeps no slash at the end of a key.
BUCKET, SLASHLESS = "bucket", "slashless"
_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
_DATE = "Mon, 02 Mar 2026 11:04:05 GMT"
_TIME = "2026-03-02T11:04:05.000Z"


class S3Request(NamedTuple):
    """A received request; the key is decoded."""

    method: str
    bucket: str
    key: bytes
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes

    @property
    def what(self) -> str:
        """The method, and what of the query tells its kind."""
        kinds = [name for name in ("uploads", "uploadId", "partNumber", "list-type", "delete") if name in self.query]
        return " ".join([self.method, *kinds])


class S3Reply(NamedTuple):
    """A response; a status of 0 closes the connection instead. ``cut``: bytes of the body after which it is closed."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = {}
    cut: int | None = None


#: Answers a request instead of the server; None leaves it to the server.
S3Rule = Callable[[S3Request], S3Reply | None]


def s3_error(status: int, code: str, more: str = "", **headers: str) -> S3Reply:
    """An error of S3."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>words</Message>{more}</Error>".encode()
    return S3Reply(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


def once(rule: S3Rule) -> S3Rule:
    """A rule that is in force until it has answered once."""
    left = [rule]

    def first(request: S3Request) -> S3Reply | None:
        reply = left[0](request) if left else None
        if reply is not None:
            left.clear()
        return reply

    return first


class SmallS3Server(LoopbackServer):
    """``s3s://localhost:PORT/bucket``, and ``s3sv://bucket.HOST:PORT``.

    Args:
        certificate: of the host.
        key: of the certificate.
        secret: the secret key of `ACCESS_KEY`.

    Attributes:
        objects: key → bytes and entity tag.
        uploads: id → key and parts.
        rules: called in turn before the server answers itself.
        seen: all requests.
        has_conditions: whether it heeds ``If-None-Match``.
        region: that requests must be signed for.
        page: keys of a page of a listing, at most.
        session_token: that requests must have.
        locked: keys that may not be removed.
        tag_of: makes the entity tag of bytes.
    """

    def __init__(self, certificate: Path, key: Path, secret: str) -> None:
        outer = self

        class Handler(HttpHandler):
            def serve(self) -> None:
                outer._serve(self)

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server = tls_server(Handler, context, handshake_in_thread=True)
        server.daemon_threads = True
        super().__init__(server, "s3s")
        self._secret = secret
        self._guard = threading.Lock()
        self._ids = itertools.count(1)
        self.reset()

    def reset(self) -> None:
        """Forget all, as a new server."""
        self.objects: dict[bytes, tuple[bytes, str]] = {}
        self.uploads: dict[str, tuple[bytes, dict[int, bytes]]] = {}
        self.rules: list[S3Rule] = []
        self.seen: list[S3Request] = []
        self.has_conditions = True
        self.region = "us-east-1"
        self.page = 1000
        self.session_token: str | None = None
        self.locked: set[bytes] = set()
        self.tag_of: Callable[[bytes], str] = lambda data: hashlib.md5(data, usedforsecurity=False).hexdigest()

    @property
    def endpoint(self) -> str:
        return f"{self.url}/{BUCKET}"

    @property
    def slashless(self) -> str:
        """The URL of the bucket whose keys have no slash at their end; it has the same objects."""
        return f"{self.url}/{SLASHLESS}"

    def put(self, key: str | bytes, data: bytes = b"content") -> None:
        name = key.encode() if isinstance(key, str) else key
        self.objects[name] = data, self.tag_of(data)

    def whats(self, key: bytes | None = None) -> list[str]:
        """Kinds of the requests, all or those about a key."""
        return [request.what for request in self.seen if key is None or request.key == key]

    def _serve(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        parts = urlsplit(handler.path)
        length = int(handler.headers.get("Content-Length") or 0)
        body = handler.rfile.read(length)
        label, is_virtual, _ = handler.headers.get("Host", "").partition(".")
        bucket, key = label, parts.path[1:]
        if not is_virtual:
            bucket, _, key = key.partition("/")
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        headers = {name.lower(): value for name, value in handler.headers.items()}
        request = S3Request(handler.command, bucket, unquote_to_bytes(key), query, headers, body)
        if handler.command == "OPTIONS":
            reply: S3Reply | None = S3Reply(200)
        else:
            self.seen.append(request)
            reply = next((found for rule in self.rules if (found := rule(request)) is not None), None)
        if reply is None:
            with self._guard:
                reply = self._refusal(request, handler.path) or self._own(request)
        if reply.status == 0:
            handler.close_connection = True
            return
        handler.send_response(reply.status)
        for name, value in reply.headers.items():
            handler.send_header(name, value)
        if not {"Content-Length", "Transfer-Encoding"} & reply.headers.keys():
            handler.send_header("Content-Length", str(len(reply.body)))
        handler.end_headers()
        if request.method != "HEAD":
            # A client may close the connection early.
            with contextlib.suppress(OSError):
                handler.wfile.write(reply.body[: reply.cut])
        if reply.cut is not None:
            handler.close_connection = True

    # -- signatures, computed here by the words of the specification

    def _refusal(self, request: S3Request, target: str) -> S3Reply | None:
        asked, moment = request.headers.get("authorization", ""), request.headers.get("x-amz-date", "")
        payload = request.headers.get("x-amz-content-sha256", "")
        if "X-Amz-Signature" in request.query:
            named = {name.removeprefix("X-Amz-"): value for name, value in request.query.items()}
            asked = "{Algorithm} Credential={Credential}, SignedHeaders={SignedHeaders}, Signature={Signature}".format(
                **named
            )
            moment, payload = named["Date"], "UNSIGNED-PAYLOAD"
            until = datetime.strptime(moment, "%Y%m%dT%H%M%S%z") + timedelta(seconds=int(named["Expires"]))
            if datetime.now(UTC) > until:
                return s3_error(403, "AccessDenied")
        found = re.fullmatch(
            r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\d+)/([^/]+)/s3/aws4_request, "
            r"SignedHeaders=([^,]+), Signature=([0-9a-f]+)",
            asked,
        )
        if found is None:
            return s3_error(403, "AccessDenied")
        access_key, day, region, names, signature = found.groups()
        if access_key != ACCESS_KEY:
            return s3_error(403, "InvalidAccessKeyId")
        token = request.headers.get("x-amz-security-token") or request.query.get("X-Amz-Security-Token")
        if token != self.session_token:
            return s3_error(400, "InvalidToken")
        if region != self.region:
            return s3_error(400, "AuthorizationHeaderMalformed", f"<Region>{self.region}</Region>")
        path, _, query = target.partition("?")
        pairs = sorted(pair for pair in parse_qsl(query, keep_blank_values=True) if pair[0] != "X-Amz-Signature")
        canonical = "\n".join(
            [
                request.method,
                path,
                "&".join(f"{quote(name, safe='-_.~')}={quote(value, safe='-_.~')}" for name, value in pairs),
                *(f"{name}:{request.headers[name].strip()}" for name in names.split(";")),
                "",
                names,
                payload,
            ]
        )
        scope = f"{day}/{region}/s3/aws4_request"
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        text = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{digest}"
        key = f"AWS4{self._secret}".encode()
        for part in (day, region, "s3", "aws4_request"):
            key = hmac.new(key, part.encode(), hashlib.sha256).digest()
        if hmac.new(key, text.encode(), hashlib.sha256).hexdigest() != signature:
            return s3_error(403, "SignatureDoesNotMatch")
        return None if request.bucket in (BUCKET, SLASHLESS) else s3_error(404, "NoSuchBucket")

    # -- objects

    def _own(self, request: S3Request) -> S3Reply:
        key = request.key.rstrip(b"/") if request.bucket == SLASHLESS else request.key
        query = request.query
        match request.method:
            case "GET" if "list-type" in query:
                return self._listing(query)
            case "GET" if "uploads" in query:
                return self._uploads(query)
            case "GET" if "uploadId" in query:
                return self._parts(query["uploadId"])
            case "GET" | "HEAD":
                return self._object(request, key)
            case "PUT" if "uploadId" in query:
                return self._put_part(request)
            case "PUT":
                return self._put(request, key)
            case "POST" if "delete" in query:
                return self._delete(request)
            case "POST" if "uploads" in query:
                upload = f"upload{next(self._ids)}"
                self.uploads[upload] = key, {}
                return _document("InitiateMultipartUploadResult", f"<UploadId>{upload}</UploadId>")
            case "POST" if "uploadId" in query:
                return self._complete(request, key)
            case "DELETE" if "uploadId" in query:
                if self.uploads.pop(query["uploadId"], None) is None:
                    return s3_error(404, "NoSuchUpload")
                return S3Reply(204)
            case "DELETE" if key in self.locked:
                return s3_error(403, "AccessDenied")
            case "DELETE":
                self.objects.pop(key, None)
                return S3Reply(204)
        return s3_error(405, "MethodNotAllowed")

    def _object(self, request: S3Request, key: bytes) -> S3Reply:
        there = self.objects.get(key)
        if there is None:
            return s3_error(404, "NoSuchKey")
        data, tag = there
        if request.headers.get("if-match", f'"{tag}"') != f'"{tag}"':
            return s3_error(412, "PreconditionFailed")
        headers = {"ETag": f'"{tag}"', "Last-Modified": _DATE}
        if request.method == "HEAD":
            return S3Reply(200, b"", {**headers, "Content-Length": str(len(data))})
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
        if asked is None:
            return S3Reply(200, data, headers)
        start, end = int(asked[1]), min(int(asked[2]) + 1, len(data))
        if start >= len(data):
            return s3_error(416, "InvalidRange")
        return S3Reply(206, data[start:end], {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})

    def _exists(self, request: S3Request, key: bytes) -> bool:
        return self.has_conditions and request.headers.get("if-none-match") == "*" and key in self.objects

    def _source(self, request: S3Request) -> bytes | S3Reply:
        path = unquote_to_bytes(request.headers["x-amz-copy-source"])
        there = self.objects.get(path.removeprefix(f"/{BUCKET}/".encode()))
        if there is None:
            return s3_error(404, "NoSuchKey")
        if request.headers.get("x-amz-copy-source-if-match") != f'"{there[1]}"':
            return s3_error(412, "PreconditionFailed")
        return there[0]

    def _put(self, request: S3Request, key: bytes) -> S3Reply:
        if self._exists(request, key):
            return s3_error(412, "PreconditionFailed")
        if "x-amz-copy-source" not in request.headers:
            self.put(key, request.body)
            return S3Reply(200, b"", {"ETag": f'"{self.objects[key][1]}"'})
        data = self._source(request)
        if isinstance(data, S3Reply):
            return data
        self.put(key, data)
        return _document("CopyObjectResult", f"<ETag>&quot;{self.objects[key][1]}&quot;</ETag>")

    def _put_part(self, request: S3Request) -> S3Reply:
        upload = self.uploads.get(request.query["uploadId"])
        if upload is None:
            return s3_error(404, "NoSuchUpload")
        number = int(request.query["partNumber"])
        if "x-amz-copy-source" in request.headers:
            data = self._source(request)
            if isinstance(data, S3Reply):
                return data
            first, last = request.headers["x-amz-copy-source-range"].removeprefix("bytes=").split("-")
            upload[1][number] = data[int(first) : int(last) + 1]
            return _document("CopyPartResult", f"<ETag>&quot;{self.tag_of(upload[1][number])}&quot;</ETag>")
        upload[1][number] = request.body
        return S3Reply(200, b"", {"ETag": f'"{self.tag_of(request.body)}"'})

    def _complete(self, request: S3Request, key: bytes) -> S3Reply:
        if request.query["uploadId"] not in self.uploads:
            return s3_error(404, "NoSuchUpload")
        if self._exists(request, key):
            return s3_error(412, "PreconditionFailed")
        _, parts = self.uploads[request.query["uploadId"]]
        named = [
            (int(part.findtext("{*}PartNumber") or 0), (part.findtext("{*}ETag") or "").strip('"'))
            for part in ElementTree.fromstring(request.body)
        ]
        if any(number not in parts or self.tag_of(parts[number]) != tag for number, tag in named):
            return s3_error(400, "InvalidPart")
        del self.uploads[request.query["uploadId"]]
        tags = b"".join(hashlib.md5(parts[number], usedforsecurity=False).digest() for number, _ in named)
        tag = f"{hashlib.md5(tags, usedforsecurity=False).hexdigest()}-{len(named)}"
        self.objects[key] = b"".join(parts[number] for number, _ in named), tag
        return _document("CompleteMultipartUploadResult", f"<ETag>&quot;{tag}&quot;</ETag>")

    def _delete(self, request: S3Request) -> S3Reply:
        md5 = hashlib.md5(request.body, usedforsecurity=False).digest()
        if request.headers.get("content-md5") != base64.b64encode(md5).decode():
            return s3_error(400, "InvalidRequest")
        rows = ""
        for each in ElementTree.fromstring(request.body).iterfind("{*}Object"):
            key = (each.findtext("{*}Key") or "").encode()
            if key in self.locked:
                rows += f"<Error><Key>{escape(key.decode())}</Key><Code>AccessDenied</Code></Error>"
                continue
            self.objects.pop(key, None)
            rows += f"<Deleted><Key>{escape(key.decode())}</Key></Deleted>"
        return _document("DeleteResult", rows)

    def _parts(self, upload: str) -> S3Reply:
        if upload not in self.uploads:
            return s3_error(404, "NoSuchUpload")
        rows = "".join(
            f"<Part><PartNumber>{number}</PartNumber><Size>{len(data)}</Size><ETag>{self.tag_of(data)}</ETag></Part>"
            for number, data in sorted(self.uploads[upload][1].items())
        )
        return _document("ListPartsResult", f"<IsTruncated>false</IsTruncated>{rows}")

    def _uploads(self, query: Mapping[str, str]) -> S3Reply:
        rows = "".join(
            f"<Upload><Key>{_url(key)}</Key><UploadId>{upload}</UploadId><Initiated>{_TIME}</Initiated></Upload>"
            for upload, (key, _) in self.uploads.items()
            if key.decode().startswith(query.get("prefix", ""))
        )
        return _document("ListMultipartUploadsResult", f"<EncodingType>url</EncodingType>{rows}")

    def _listing(self, query: Mapping[str, str]) -> S3Reply:
        prefix, delimiter = query.get("prefix", "").encode(), query.get("delimiter", "").encode()
        found: dict[bytes, str] = {}
        for key in sorted(self.objects):
            if not key.startswith(prefix):
                continue
            inner, is_deeper, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, b"", b"")
            if is_deeper:
                common = prefix + inner + delimiter
                found[common] = f"<CommonPrefixes><Prefix>{_url(common)}</Prefix></CommonPrefixes>"
                continue
            data, tag = self.objects[key]
            found[key] = (
                f"<Contents><Key>{_url(key)}</Key><Size>{len(data)}</Size><LastModified>{_TIME}</LastModified>"
                f"<ETag>&quot;{tag}&quot;</ETag></Contents>"
            )
        names = [name for name in found if name.hex() > query.get("continuation-token", "")]
        most = min(self.page, int(query["max-keys"]))
        rows = "".join(found[name] for name in names[:most])
        more = ""
        if len(names) > most:
            more = f"<NextContinuationToken>{names[most - 1].hex()}</NextContinuationToken>"
        cut = f"<IsTruncated>{json.dumps(bool(more))}</IsTruncated>{more}"
        return _document("ListBucketResult", f"<EncodingType>url</EncodingType>{cut}{rows}")


def _url(key: bytes) -> str:
    return quote_from_bytes(key, safe="/").replace("%20", "+")


def _document(root: str, content: str) -> S3Reply:
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n<{root} xmlns="{_NAMESPACE}">{content}</{root}>'
    return S3Reply(200, text.encode())
