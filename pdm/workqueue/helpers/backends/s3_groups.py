"""Group operations at S3 servers: several requests at once over kept connections.

A small object costs one request at each end: it is read by one GET, which is of one version, and written by one PUT
under its final name, when the other steps have proven its bytes; until then it is kept here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from http import HTTPStatus

from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.backends.http_client import Headers
from pdm.workqueue.helpers.backends.http_groups import GroupAnswer, GroupRequest, RequestGroup, of_one
from pdm.workqueue.helpers.backends.s3 import S3Backend, version_of
from pdm.workqueue.helpers.backends.s3_client import S3Place, place_of
from pdm.workqueue.helpers.backends.s3_uploads import KeptObject, confirmed, put_headers
from pdm.workqueue.helpers.group_backend import FileContent, GroupBackend
from pdm.workqueue.helpers.storage import FileVersion


class GroupedS3Backend(S3Backend, GroupBackend):
    """The connections of one worker thread of the helper."""

    def __init__(self) -> None:
        super().__init__()
        self._requests = RequestGroup(self._client, self.check, self._signed, self._alone)
        #: URL → version, of the objects that were read last.
        self._read_versions: dict[StorageUrl, FileVersion] = {}

    def _signed(self, request: GroupRequest) -> Headers:
        return self._client.signed(request.method, place_of(request.url), request.url, request.headers)

    def _alone(self, request: GroupRequest) -> GroupAnswer | None:
        place = place_of(request.url)

        def send() -> GroupAnswer:
            response = self._client.send(request.method, place, None, request.headers, request.body)
            return RequestGroup.read(request.method, response, request.most)

        return of_one(send, None)

    def read_group(self, files: Sequence[tuple[StorageUrl, int]]) -> list[FileContent | None]:
        there = [(url, size) for url, size in files if url not in self._staged]
        requests = [GroupRequest("GET", place_of(url).url(), most=size) for url, size in there]
        found: dict[StorageUrl, FileContent] = {}
        for (url, _), answer in zip(there, self._requests.answers(requests), strict=True):
            if answer is not None and answer.response.status == HTTPStatus.OK:
                found[url] = FileContent(answer.body, version_of(place_of(url), answer.response))
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
            self._staged[url] = KeptObject(self._client, place_of(url), data)
        return [True] * len(files)

    def group_sizes(self, urls: Sequence[StorageUrl]) -> list[int | None]:
        return [of_one(partial(self.size, url), None) for url in urls]

    def are_free(self, urls: Sequence[StorageUrl]) -> list[bool]:
        requests = [GroupRequest("HEAD", place_of(url).url()) for url in urls]
        answers = self._requests.answers(requests)
        return [answer is not None and answer.response.status == HTTPStatus.NOT_FOUND for answer in answers]

    def renames_groups(self, url: StorageUrl, replace: bool) -> bool:
        return True

    def rename_group(self, files: Sequence[tuple[StorageUrl, StorageUrl, int]], *, replace: bool) -> list[bool]:
        requests, digests = [], []
        # Servers may ignore the condition: a look, and soon the act.
        free = [True] * len(files) if replace else self.are_free([destination for _, destination, _ in files])
        wanted = [file for file, is_free in zip(files, free, strict=True) if is_free]
        for temporary, destination, _ in wanted:
            kept = self._staged[temporary]
            data = kept.data if isinstance(kept, KeptObject) else b""
            md5 = hashlib.md5(data, usedforsecurity=False)
            headers = put_headers(data, md5.digest(), replace=replace)
            requests.append(GroupRequest("PUT", place_of(destination).url(), headers, data))
            digests.append(md5.hexdigest())
        named: dict[StorageUrl, bool] = {}
        for (temporary, destination, _), digest, answer in zip(
            wanted, digests, self._requests.answers(requests), strict=True
        ):
            named[temporary] = self._is_written(place_of(destination), digest, answer)
            if named[temporary]:
                del self._staged[temporary]
        return [named.get(temporary, False) for temporary, _, _ in files]

    @staticmethod
    def _is_written(place: S3Place, digest: str, answer: GroupAnswer | None) -> bool:
        """Whether the server has written an object and confirmed its bytes; others are copied alone."""
        if answer is None or answer.response.status not in (200, 201):
            return False
        return of_one(lambda: confirmed(place, answer.response, digest).is_confirmed, False)

    def remove_group(self, urls: Sequence[StorageUrl]) -> list[bool]:
        return [of_one(partial(self._remove_one, url), False) for url in urls]

    def _remove_one(self, url: StorageUrl) -> bool:
        self.remove(url, directory=False)
        return True
