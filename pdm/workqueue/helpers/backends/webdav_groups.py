"""Group operations at WebDAV servers: several requests at once over kept connections, and sizes by a listing."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from http import HTTPStatus

from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.backends import xrootd_http
from pdm.workqueue.helpers.backends.http_client import Headers
from pdm.workqueue.helpers.backends.http_errors import HttpStatusError
from pdm.workqueue.helpers.backends.http_groups import GroupAnswer, GroupRequest, NextStep, RequestGroup, of_one
from pdm.workqueue.helpers.backends.http_servers import authorization
from pdm.workqueue.helpers.backends.propfind import is_odd
from pdm.workqueue.helpers.backends.webdav import WebdavBackend, is_encoded, version_of_response
from pdm.workqueue.helpers.group_backend import FileContent, GroupBackend
from pdm.workqueue.helpers.storage import FileStat, FileVersion

#: From so many files of a directory on, one listing of it is cheaper than a request for each.
_MIN_FOR_LISTING = 4
#: A directory with more entries than this for each file that is looked for is not read to its end.
_MAX_ENTRIES_EACH = 20
#: So many files are renamed between two looks at their directory, if that has fewer entries than this.
_MOVES_EACH_LISTING, _MOST_LISTED_FOR_MOVES = 32, 256
_GONE = (HTTPStatus.NOT_FOUND, HTTPStatus.GONE)
#: Bytes of the answer to a question about one name that are kept.
_MAX_ANSWER = 64 * 1024


class GroupedWebdavBackend(WebdavBackend, GroupBackend):
    """The connections of one worker thread of the helper."""

    def __init__(self) -> None:
        super().__init__()
        self._requests = RequestGroup(self._client, self.check, self._headers_of, self._alone)
        #: Directories that were made for the batch whose files are renamed.
        self._own: frozenset[StorageUrl] = frozenset()
        #: Headers of the credential, of the requests under way.
        self._credentials: Headers = {}
        #: Servers whose responses show versions (entity tags, times).
        self._shows_versions: set[str] = set()

    # -- requests

    def _answers(self, requests: Sequence[GroupRequest], next_step: NextStep | None = None) -> list[GroupAnswer | None]:
        if requests:
            self._credentials = authorization(requests[0].url.authority)
        return self._requests.answers(requests, next_step)

    def _headers_of(self, request: GroupRequest) -> Headers:
        return {**self._credentials, **request.headers}

    def _alone(self, request: GroupRequest) -> GroupAnswer | None:
        ok = tuple(range(HTTPStatus.OK, HTTPStatus.MULTIPLE_CHOICES))
        method, url, headers, body, most = request
        return of_one(lambda: RequestGroup.read(method, self._client.open(method, url, headers, body, ok), most), None)

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
        answers = self._answers([self._question(url) for url in urls])
        return [
            (answer is not None and _says_free(answer)) or self._is_free(url)
            for url, answer in zip(urls, answers, strict=True)
        ]

    def _question(self, url: StorageUrl) -> GroupRequest:
        """A request that shows whether a name is free."""
        if self._client.is_xrootd(url):
            return GroupRequest("COPY", url, xrootd_http.NOWHERE, most=xrootd_http.MAX_ERROR_TEXT)
        return GroupRequest("PROPFIND", url, {"Depth": "0"}, most=_MAX_ANSWER)

    def _is_free(self, url: StorageUrl) -> bool:
        return of_one(lambda: self.stat(url) is None, False)

    def group_sizes(self, urls: Sequence[StorageUrl]) -> list[int | None]:
        return [found.size if found is not None and found.kind == "file" else None for found in self._stats(urls)]

    def group_versions(self, urls: Sequence[StorageUrl]) -> list[FileVersion | None]:
        if urls[0].authority not in self._shows_versions:
            # The server (XRootD 5.5) shows no more with a file than its listing does.
            return [found and FileVersion(found.size, found.mtime) for found in self._stats(urls)]
        answers = self._answers([GroupRequest("HEAD", url) for url in urls])
        return [version_of_response(each.response) if each and each.is_success else None for each in answers]

    # -- bytes

    def read_group(self, files: Sequence[tuple[StorageUrl, int]]) -> list[FileContent | None]:
        there = self._stats([url for url, _ in files])
        wanted = [
            (number, url, size)
            for number, ((url, size), found) in enumerate(zip(files, there, strict=True))
            if found is not None and found.kind == "file" and found.size == size
        ]
        answers = self._answers([GroupRequest("GET", url, most=size) for _, url, size in wanted])
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
        answers = self._answers(
            [GroupRequest("PUT", url, {"Content-Length": str(len(data))}, data) for url, data in files]
        )
        return [answer is not None and answer.response.status in (200, 201, 204) for answer in answers]

    def expect_own(self, directories: Collection[StorageUrl]) -> None:
        self._own = frozenset(directories)

    def renames_groups(self, url: StorageUrl, replace: bool) -> bool:
        return True

    def rename_group(self, files: Sequence[tuple[StorageUrl, StorageUrl, int]], *, replace: bool) -> list[bool]:
        # Names that a server may take for others are tried first, each alone.
        plain = [file for file in files if not any(map(is_odd, file[1].encoded_path[1:].split("/")))]
        moved = self._move_group([(source, destination) for source, destination, _ in plain], replace)
        left = [(url, size) for _, url, size in plain if url in moved]
        named: set[StorageUrl] = set()
        for (url, size), found in zip(left, self._stats([url for url, _ in left]), strict=True):
            if found is not None and found.kind == "file" and found.size == size:
                named.add(url)
        return [destination in named for _, destination, _ in files]

    def _move_group(self, files: Sequence[tuple[StorageUrl, StorageUrl]], replace: bool) -> set[StorageUrl]:
        """Send a MOVE to each destination that is free; returns those that the server has carried out.

        MOVE may replace what is there, even where the header says that it must not: a look, and at once the act.
        """
        moved: set[StorageUrl] = set()
        moves: dict[StorageUrl, GroupRequest] = {}
        sent: set[StorageUrl] = set()
        for source, destination in files:
            headers = self.accepted_move_headers(destination, replace=replace)
            if headers is not None:
                moves[destination] = GroupRequest("MOVE", source, headers)
            elif self._is_free(destination) and self._move_alone(source, destination, replace):
                moved.add(destination)

        for listed in self._listed_parts(moves):
            answers = self._answers([moves.pop(url) for url in listed])
            moved |= {url for url, answer in zip(listed, answers, strict=True) if _is_carried_out(answer)}

        def next_step(question: GroupRequest, answer: GroupAnswer | None) -> GroupRequest | None:
            if question.method == "MOVE" or answer is None or not _says_free(answer):
                return None
            sent.add(question.url)
            return moves[question.url]

        answers = self._answers([self._question(url) for url in moves], next_step)
        for (destination, move), answer in zip(moves.items(), answers, strict=True):
            if destination in sent:
                is_moved = _is_carried_out(answer)
            else:
                # The server has not said that it is free in the way that most do.
                is_moved = self._is_free(destination) and self._move_alone(move.url, destination, replace)
            if is_moved:
                moved.add(destination)
        return moved

    def _listed_parts(self, moves: Mapping[StorageUrl, GroupRequest]) -> Iterator[list[StorageUrl]]:
        """Destinations of MOVE requests that a listing shows to be free, a few for each listing.

        In a directory of the user a listing of XRootD leaves out what is behind a link that leads in a circle; not in
        one that was made for this batch. A listing that has not all the files to be moved is not relied on.
        """
        for directory, inside in _by_directory(list(moves)).items():
            if directory not in self._own or not self._client.is_xrootd(directory):
                continue
            for start in range(0, len(inside), _MOVES_EACH_LISTING):
                part = inside[start : start + _MOVES_EACH_LISTING]
                listed = self._listed(directory, _MOST_LISTED_FOR_MOVES)
                if len(listed) == _MOST_LISTED_FOR_MOVES or any(moves[url].url.name not in listed for url in part):
                    break
                yield [url for url in part if url.name not in listed]

    def _move_alone(self, source: StorageUrl, destination: StorageUrl, replace: bool) -> bool:
        """Find the form of the header that the server accepts."""
        try:
            self.move(source, destination, is_directory=False, replace=replace)
        except HttpStatusError:
            return False
        return True

    def remove_group(self, urls: Sequence[StorageUrl]) -> list[bool]:
        return [of_one(partial(self._remove_if_there, url), False) for url in urls]

    def _remove_if_there(self, url: StorageUrl) -> bool:
        if self.stat(url) is not None:
            self.remove(url, directory=False)
        return True


def _is_carried_out(move: GroupAnswer | None) -> bool:
    return move is not None and move.response.status in (200, 201, 204)


def _says_free(answer: GroupAnswer) -> bool:
    """Whether the answer to a question about a name says that it is free."""
    if answer.method == "COPY":
        return xrootd_http.says_free(answer.response.status, answer.body)
    return answer.response.status in _GONE


def _by_directory(urls: Sequence[StorageUrl]) -> Mapping[StorageUrl, list[StorageUrl]]:
    found: dict[StorageUrl, list[StorageUrl]] = {}
    for url in urls:
        found.setdefault(url.parent, []).append(url)
    return found
