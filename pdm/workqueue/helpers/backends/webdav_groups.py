"""Group operations at WebDAV servers: several requests at once over kept connections, and sizes by a listing."""

from __future__ import annotations

import contextlib
import errno
import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from http import HTTPStatus

from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.backends.http_client import Headers
from pdm.workqueue.helpers.backends.http_connection import HttpStatusError, errno_from_text
from pdm.workqueue.helpers.backends.http_groups import (
    MAX_CONNECTIONS,
    GroupAnswer,
    GroupRequest,
    RequestGroup,
    of_one,
)
from pdm.workqueue.helpers.backends.propfind import is_odd
from pdm.workqueue.helpers.backends.webdav import WebdavBackend, is_encoded, version_of_response
from pdm.workqueue.helpers.group_backend import FileContent, GroupBackend
from pdm.workqueue.helpers.storage import FileStat, FileVersion

#: From so many files of a directory on, one listing of it is cheaper than a request for each.
_MIN_FOR_LISTING = 4
#: A directory with more entries than this for each file that is looked for is not read to its end.
_MAX_ENTRIES_EACH = 20
#: Bytes of the text of an error.
_MAX_ERROR_TEXT = 4000
#: Where a COPY to find out whether a name is free would lead, if there were a file: no server gets there.
_NOWHERE = {"Destination": "none:", "Credential": "none"}


class GroupedWebdavBackend(WebdavBackend, GroupBackend):
    """The connections of one worker thread of the helper."""

    def __init__(self) -> None:
        super().__init__()
        self._requests = RequestGroup(self._client, self.check, self._headers_of, self._alone)
        #: Servers whose responses show versions (entity tags, times).
        self._shows_versions: set[str] = set()

    # -- requests

    def _headers_of(self, request: GroupRequest) -> Headers:
        return {**self._client.credentials(request.url.authority), **request.headers}

    def _alone(self, request: GroupRequest) -> GroupAnswer | None:
        ok = tuple(range(HTTPStatus.OK, HTTPStatus.MULTIPLE_CHOICES))
        method, url, headers, body, most = request
        return of_one(lambda: RequestGroup.read(self._client.open(method, url, headers, body, ok), most), None)

    # -- what is there

    def _stats(self, urls: Sequence[StorageUrl]) -> list[FileStat | None]:
        """What is at each URL, None if that is not known or nothing; of many in one directory by a listing of it."""
        found: dict[StorageUrl, FileStat | None] = {}
        for directory, inside in _by_directory(urls).items():
            if len(inside) >= _MIN_FOR_LISTING:
                listed = self._listed(directory, _MAX_ENTRIES_EACH * len(inside))
                found |= {url: listed[url.name] for url in inside if url.name in listed}
        # Servers may leave names out: these are looked at.
        for url in urls:
            if url not in found:
                found[url] = of_one(partial(self.stat, url), None)
        return [found[url] for url in urls]

    def _listed(self, directory: StorageUrl, most: int) -> Mapping[bytes, FileStat]:
        """Some of the entries of a directory; none if it cannot be listed."""

        def listed() -> Mapping[bytes, FileStat]:
            with contextlib.closing(self.entries(directory)) as entries:
                return dict(itertools.islice(entries, most))

        return of_one(listed, {})

    def are_free(self, urls: Sequence[StorageUrl]) -> list[bool]:
        # Not by a listing: some servers leave links out, and XRootD ends it at one that leads in a circle.
        free = [False] * len(urls)
        if urls and self._client.is_xrootd(urls[0]):
            # Its responses 404 end the connection. A COPY that finds no file is refused with another status.
            answers = self._requests.answers(
                [GroupRequest("COPY", url, _NOWHERE, most=_MAX_ERROR_TEXT) for url in urls]
            )
            free = [answer is not None and _says_absent(answer) for answer in answers]
        return [is_free or self._is_free(url) for is_free, url in zip(free, urls, strict=True)]

    def _is_free(self, url: StorageUrl) -> bool:
        return of_one(lambda: self.stat(url) is None, False)

    def group_sizes(self, urls: Sequence[StorageUrl]) -> list[int | None]:
        return [found.size if found is not None and found.kind == "file" else None for found in self._stats(urls)]

    def group_versions(self, urls: Sequence[StorageUrl]) -> list[FileVersion | None]:
        if urls[0].authority not in self._shows_versions:
            # The server (XRootD 5.5) shows no more with a file than its listing does.
            return [found and FileVersion(found.size, found.mtime) for found in self._stats(urls)]
        answers = self._requests.answers([GroupRequest("HEAD", url) for url in urls])
        return [version_of_response(each.response) if each and each.is_success else None for each in answers]

    # -- bytes

    def read_group(self, files: Sequence[tuple[StorageUrl, int]]) -> list[FileContent | None]:
        there = self._stats([url for url, _ in files])
        wanted = [
            (number, url, size)
            for number, ((url, size), found) in enumerate(zip(files, there, strict=True))
            if found is not None and found.kind == "file" and found.size == size
        ]
        answers = self._requests.answers([GroupRequest("GET", url, most=size) for _, url, size in wanted])
        contents: list[FileContent | None] = [None] * len(files)
        for (number, url, size), answer in zip(wanted, answers, strict=True):
            found = there[number]
            if answer is None or found is None or answer.response.status != HTTPStatus.OK:
                continue
            version = version_of_response(answer.response)
            if version is not None:
                self._shows_versions.add(url.authority)
            if not is_encoded(answer.response, size):
                contents[number] = FileContent(answer.body, version or FileVersion(found.size, found.mtime))
        return contents

    def write_group(self, files: Sequence[tuple[StorageUrl, bytes]]) -> list[bool]:
        # Of an empty body HTTP needs the length, too.
        answers = self._requests.answers(
            [GroupRequest("PUT", url, {"Content-Length": str(len(data))}, data) for url, data in files]
        )
        return [answer is not None and answer.response.status in (200, 201, 204) for answer in answers]

    def renames_groups(self, url: StorageUrl, replace: bool) -> bool:
        return True

    def rename_group(self, files: Sequence[tuple[StorageUrl, StorageUrl, int]], *, replace: bool) -> list[bool]:
        # Names that a server may take for others are tried first, each alone.
        plain = [file for file in files if not any(map(is_odd, file[1].encoded_path[1:].split("/")))]
        named: dict[StorageUrl, bool] = {}
        for start in range(0, len(plain), MAX_CONNECTIONS):
            # MOVE may replace what is there, even where the header says that it must not: a look, and soon the act.
            part = [(source, destination) for source, destination, _ in plain[start : start + MAX_CONNECTIONS]]
            free = self.are_free([destination for _, destination in part])
            moved = self._move_group([pair for pair, is_free in zip(part, free, strict=True) if is_free], replace)
            named |= {destination: moved.get(destination, False) for _, destination in part}
        left = [(url, size) for _, url, size in plain if named[url]]
        for (url, size), found in zip(left, self._stats([url for url, _ in left]), strict=True):
            named[url] = found is not None and found.kind == "file" and found.size == size
        return [named.get(destination, False) for _, destination, _ in files]

    def _move_group(self, files: Sequence[tuple[StorageUrl, StorageUrl]], replace: bool) -> dict[StorageUrl, bool]:
        """Send a MOVE for each file; destination → whether the server has carried it out."""
        moved: dict[StorageUrl, bool] = {}
        requests: dict[StorageUrl, GroupRequest] = {}
        for source, destination in files:
            headers = self.accepted_move_headers(destination, replace=replace)
            if headers is not None:
                requests[destination] = GroupRequest("MOVE", source, headers)
                continue
            # It finds the form of the header that the server accepts.
            try:
                self.move(source, destination, is_directory=False, replace=replace)
            except HttpStatusError:
                moved[destination] = False
            else:
                moved[destination] = True
        for destination, answer in zip(requests, self._requests.answers(list(requests.values())), strict=True):
            moved[destination] = answer is not None and answer.response.status in (200, 201, 204)
        return moved

    def remove_group(self, urls: Sequence[StorageUrl]) -> list[bool]:
        return [of_one(partial(self._remove_if_there, url), False) for url in urls]

    def _remove_if_there(self, url: StorageUrl) -> bool:
        if self.stat(url) is not None:
            self.remove(url, directory=False)
        return True


def _says_absent(answer: GroupAnswer) -> bool:
    """Whether it is an error of XRootD, which ends in the words of the system, for a file that is not there."""
    text = answer.body.decode("utf-8", "replace")
    return answer.response.status == HTTPStatus.BAD_REQUEST and errno_from_text(text) == errno.ENOENT


def _by_directory(urls: Sequence[StorageUrl]) -> Mapping[StorageUrl, list[StorageUrl]]:
    found: dict[StorageUrl, list[StorageUrl]] = {}
    for url in urls:
        found.setdefault(url.parent, []).append(url)
    return found
