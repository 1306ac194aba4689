"""Group operations at S3 servers: several requests at once over kept connections.

A small object costs one request at each end: it is read by one GET, which is of one version, and written by one PUT
under its final name, when the other steps have proven its bytes; until then it is kept here.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
from collections.abc import Sequence
from functools import partial
from http import HTTPStatus

from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.backends.http_client import Headers
from pdm.workqueue.helpers.backends.http_groups import GroupAnswer, GroupRequest, RequestGroup, of_one
from pdm.workqueue.helpers.backends.s3 import S3Backend
from pdm.workqueue.helpers.backends.s3_client import S3Place, s3_place
from pdm.workqueue.helpers.backends.s3_documents import delete_document, deleted_keys
from pdm.workqueue.helpers.backends.s3_objects import is_temporary, version_of
from pdm.workqueue.helpers.backends.s3_uploads import KeptObject, confirmed, put_headers
from pdm.workqueue.helpers.group_backend import FileContent, GroupBackend
from pdm.workqueue.helpers.storage import FileVersion, StorageError

#: Names in one directory from which one listing is cheaper than a HEAD of each.
_FEWEST_TO_LIST = 8

#: Buckets whose servers do not remove many objects by one request, or not for this user; shared by all threads.
_buckets_without_delete: set[StorageUrl] = set()
#: Bucket → whether its server heeds ``If-None-Match``, as it has shown; shared by all threads.
_heeds_conditions: dict[StorageUrl, bool] = {}
_MAX_BUCKETS = 1000
_NOT_IN_XML = re.compile(r"[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class GroupedS3Backend(S3Backend, GroupBackend):
    """The connections of one worker thread of the helper."""

    def __init__(self) -> None:
        super().__init__()
        self._requests = RequestGroup(self._client, self.check, self._signed, self._alone)
        #: URL → version, of the objects that were read last.
        self._read_versions: dict[StorageUrl, FileVersion] = {}

    def _signed(self, request: GroupRequest) -> Headers:
        return self._client.signed(request.method, s3_place(request.url), request.url, request.headers)

    def _alone(self, request: GroupRequest) -> GroupAnswer | None:
        place = s3_place(request.url)

        def send() -> GroupAnswer:
            response = self._client.send(request.method, place, None, request.headers, request.body)
            return RequestGroup.read(request.method, response, request.most)

        return of_one(send, None)

    def read_group(self, files: Sequence[tuple[StorageUrl, int]]) -> list[FileContent | None]:
        there = [(url, size) for url, size in files if url not in self._staged]
        requests = [GroupRequest("GET", s3_place(url).url(), most=size) for url, size in there]
        found: dict[StorageUrl, FileContent] = {}
        for (url, _), answer in zip(there, self._requests.answers(requests), strict=True):
            if answer is not None and answer.response.status == HTTPStatus.OK:
                found[url] = FileContent(answer.body, version_of(s3_place(url), answer.response))
        self._read_versions = {url: content.version for url, content in found.items()}
        for url, _ in files:
            kept = self._staged.get(url)
            if isinstance(kept, KeptObject):
                found[url] = FileContent(kept.data, FileVersion(kept.size))
        return [found.get(url) for url, _ in files]

    def group_versions(self, urls: Sequence[StorageUrl]) -> list[FileVersion | None]:
        # What one GET reads is of one version, whatever is written meanwhile.
        return [self._read_versions.get(url) or of_one(partial(self.version, url), None) for url in urls]

    def write_group(self, files: Sequence[tuple[StorageUrl, bytes]]) -> list[bool]:
        for url, data in files:
            self._staged[url] = KeptObject(self._client, s3_place(url), data)
        return [True] * len(files)

    def group_sizes(self, urls: Sequence[StorageUrl]) -> list[int | None]:
        return [of_one(partial(self.size, url), None) for url in urls]

    def are_free(self, urls: Sequence[StorageUrl]) -> list[bool]:
        by_directory: dict[StorageUrl, list[StorageUrl]] = {}
        for url in urls:
            by_directory.setdefault(url.parent, []).append(url)
        free: dict[StorageUrl, bool] = {}
        for alike in by_directory.values():
            if len(alike) >= _FEWEST_TO_LIST:
                free.update(self._free_in_listing(alike))
        unknown = [url for url in urls if url not in free]
        answers = self._requests.answers([GroupRequest("HEAD", s3_place(url).url()) for url in unknown])
        for url, answer in zip(unknown, answers, strict=True):
            free[url] = answer is not None and answer.response.status == HTTPStatus.NOT_FOUND
        return [free[url] for url in urls]

    def _free_in_listing(self, urls: Sequence[StorageUrl]) -> dict[StorageUrl, bool]:
        """Whether URLs of one directory are free, by one request; empty if their part of it is too long for one."""
        places = [s3_place(url) for url in urls]
        # What the first and the last one have in common, all have; the keys may differ within a letter.
        ends = min(place.key for place in places), max(place.key for place in places)
        common = bytes(
            first for first, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*ends, strict=False))
        )
        prefix = common.decode(errors="ignore").encode()
        page = of_one(lambda: self._page(places[0], prefix, delimiter="/"), None)
        if page is None or page.next_token:
            return {}
        taken = {key for key, _, _ in page.objects} | {key.removesuffix(b"/") for key in page.prefixes}
        return {url: place.key not in taken for url, place in zip(urls, places, strict=True)}

    def renames_groups(self, url: StorageUrl, replace: bool) -> bool:
        return True

    def rename_group(self, files: Sequence[tuple[StorageUrl, StorageUrl, int]], *, replace: bool) -> list[bool]:
        requests, digests = [], []
        free = [True] * len(files)
        if not replace and not all(_heeds_conditions.get(s3_place(url).bucket) for _, url, _ in files):
            # The server may ignore the condition: a look, and soon the act.
            free = self.are_free([destination for _, destination, _ in files])
        wanted = [file for file, is_free in zip(files, free, strict=True) if is_free]
        for temporary, destination, _ in wanted:
            kept = self._staged[temporary]
            data = kept.data if isinstance(kept, KeptObject) else b""
            md5 = hashlib.md5(data, usedforsecurity=False)
            headers = put_headers(data, md5.digest(), replace=replace)
            requests.append(GroupRequest("PUT", s3_place(destination).url(), headers, data))
            digests.append(md5.hexdigest())
        answers = self._requests.answers(requests)
        written = [
            self._is_written(s3_place(destination), digest, answer)
            for (_, destination, _), digest, answer in zip(wanted, digests, answers, strict=True)
        ]
        # Of those without a confirmation the bytes are read: copied alone, they would find their own object there.
        unknown = [request for request, is_written in zip(requests, written, strict=True) if is_written is None]
        gets = [GroupRequest("GET", request.url, most=len(request.body)) for request in unknown]
        there = {
            request.url
            for request, answer in zip(unknown, self._requests.answers(gets), strict=True)
            if answer is not None and answer.response.status == HTTPStatus.OK and answer.body == request.body
        }
        named = {
            temporary
            for (temporary, _, _), request, is_written in zip(wanted, requests, written, strict=True)
            if is_written or request.url in there
        }
        for temporary in named:
            del self._staged[temporary]
        if not replace:
            self._try_conditions([request for request, is_written in zip(requests, written, strict=True) if is_written])
        return [temporary in named for temporary, _, _ in files]

    def _try_conditions(self, written: Sequence[GroupRequest]) -> None:
        """Find out whether a server heeds conditions, once for each bucket: an object of ours is written once more.

        A server that ignores the condition takes the same bytes again.
        """
        for request in written:
            bucket = s3_place(request.url).bucket
            if bucket in _heeds_conditions:
                continue
            (answer,) = self._requests.answers([request])
            if answer is None or answer.response.status not in (200, 201, HTTPStatus.PRECONDITION_FAILED):
                return
            if len(_heeds_conditions) > _MAX_BUCKETS:
                _heeds_conditions.clear()
            _heeds_conditions[bucket] = answer.response.status == HTTPStatus.PRECONDITION_FAILED

    @staticmethod
    def _is_written(place: S3Place, digest: str, answer: GroupAnswer | None) -> bool | None:
        """Whether the server has written an object and confirmed its bytes; None if it may have written it."""
        if answer is None:
            return None
        if answer.response.status not in (200, 201):
            return False
        state = of_one(lambda: confirmed(place, answer.response, digest), None)
        if state is None:
            return False
        return True if state.is_confirmed else None

    def remove_at_once(self, urls: Sequence[StorageUrl]) -> list[bool]:
        places = {url: s3_place(url) for url in urls if url not in self._staged}
        by_bucket: dict[StorageUrl, list[S3Place]] = {}
        for place in places.values():
            if place.bucket not in _buckets_without_delete and place.key and not is_temporary(place):
                by_bucket.setdefault(place.bucket, []).append(place)
        gone = {place for alike in by_bucket.values() for place in self._deleted(alike)}
        return [places.get(url) in gone for url in urls]

    def _deleted(self, places: Sequence[S3Place]) -> list[S3Place]:
        """Remove objects of one bucket by one request; returns those that the server names as removed."""
        # Other characters have no form in XML, or another one after it was read.
        named = [place for place in places if not _NOT_IN_XML.search(place.key.decode())]
        if not named:
            return []
        body = delete_document(place.key for place in named)
        md5 = hashlib.md5(body, usedforsecurity=False).digest()
        headers = {"Content-MD5": base64.b64encode(md5).decode(), "Content-Type": "application/xml"}
        try:
            _, document = self._client.call("POST", named[0], {"delete": ""}, headers, body, key=b"")
            found = deleted_keys(f"POST {named[0].bucket}?delete", document)
        except StorageError as error:
            if error.is_of_server or error.code is FailureCode.BUSY:
                raise
            if len(_buckets_without_delete) > _MAX_BUCKETS:
                _buckets_without_delete.clear()
            _buckets_without_delete.add(named[0].bucket)
            return []
        return [place for place in named if place.key in found]

    def remove_group(self, urls: Sequence[StorageUrl]) -> list[bool]:
        return [of_one(partial(self._remove_one, url), False) for url in urls]

    def _remove_one(self, url: StorageUrl) -> bool:
        self.remove(url, directory=False)
        return True
