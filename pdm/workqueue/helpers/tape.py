"""Client of the WLCG tape REST API (v1): one `TapeRequest` is one HTTP request.

Answers may be hostile: their sizes and texts are bounded, paths that were not asked about are ignored, and of several
answers about one path the first counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from http import HTTPStatus
from typing import Any
from urllib.parse import quote, unquote_to_bytes

import msgspec

from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.backends.http_client import HttpClient
from pdm.workqueue.helpers.backends.http_errors import HttpStatusError
from pdm.workqueue.helpers.channel import ActiveBatch
from pdm.workqueue.helpers.storage import StoppedError, StorageError, Timeouts, truncated
from pdm.workqueue.wire.agent_events import TapeEvent, TapeFile
from pdm.workqueue.wire.agent_requests import TapeRequest

#: Where a server describes its API, from the root of the server.
_WELL_KNOWN = "/.well-known/wlcg-tape-rest-api"
_LARGEST_ANSWER = 16 * 1024 * 1024
_LONGEST_REQUEST_ID, _LONGEST_ERROR, _LONGEST_URL = 200, 300, 1000
#: Statuses of a server that asks for a later request.
_LATER = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS})
_FAILED_STATES = frozenset({"FAILED", "CANCELLED"})


class _Endpoint(msgspec.Struct):
    uri: str
    version: str = ""


class _Description(msgspec.Struct):
    endpoints: list[_Endpoint] = []


class _Accepted(msgspec.Struct, rename="camel"):
    request_id: str


class _Staged(msgspec.Struct, rename="camel"):
    path: str
    on_disk: bool | None = None
    state: str | None = None
    error: str | None = None


class _Status(msgspec.Struct):
    files: list[_Staged] = []


class _Located(msgspec.Struct):
    path: str
    locality: str | None = None
    error: str | None = None


class TapeClient:
    """Carries out requests of tape APIs, one at a time."""

    def __init__(self) -> None:
        self._http = HttpClient()

    def carry_out(self, batch: ActiveBatch, request: TapeRequest) -> None:
        """Carry out one request, and report its answer."""
        batch.on_stop(self._http.interrupt)
        if not batch.started(request.key):
            return
        self._http.timeouts = Timeouts.of(request.limits)
        try:
            batch.answer(self._answer(request))
        except StoppedError:
            batch.cancelled(request.key)
        except StorageError as error:
            batch.failed(request.key, error)
        finally:
            self._http.interrupted = False

    def _answer(self, request: TapeRequest) -> TapeEvent:
        match request.action:
            case "discover":
                return self._discover(request)
            case "archiveinfo":
                paths = _texts(request)
                located = self._call(request, "POST", "/archiveinfo", list[_Located], {"paths": list(paths)})
                files = _files(paths, ((one.path, one.locality or "", one.error or "") for one in located))
                return TapeEvent(request.id, request.key, files=files)
            case "stage":
                lifetime = f"PT{max(request.lifetime_s, 1)}S"
                wanted = [{"path": path, "diskLifetime": lifetime} for path in _texts(request)]
                accepted = self._call(request, "POST", "/stage", _Accepted, {"files": wanted})
                name = accepted.request_id
                if not 0 < len(name) <= _LONGEST_REQUEST_ID or not name.isprintable():
                    raise _invalid(request, "it names no request")
                return TapeEvent(request.id, request.key, request=name)
            case "status":
                status = self._call(request, "GET", f"/stage/{_name(request)}", _Status)
                states = (_staged_state(one) for one in status.files if not _is_over(one))
                return TapeEvent(request.id, request.key, files=_files(_texts(request), states))
            case "delete":
                self._call(request, "DELETE", f"/stage/{_name(request)}")
            case "cancel":
                self._call(request, "POST", f"/stage/{_name(request)}/cancel", None, {"paths": list(_texts(request))})
            case "release":
                self._call(request, "POST", f"/release/{_name(request)}", None, {"paths": list(_texts(request))})
        return TapeEvent(request.id, request.key)

    def _discover(self, request: TapeRequest) -> TapeEvent:
        """The API of version 1 that a server names; only on its own host: it gets the user's credential."""
        server = StorageUrl(request.api)
        url = StorageUrl(f"https://{server.authority}{_WELL_KNOWN}")
        try:
            found = self._read(request, "GET", url, _Description)
        except HttpStatusError as error:
            if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR or error.status in _LATER:
                raise
            # Servers that do not know the path say so by many statuses.
            return TapeEvent(request.id, request.key)
        uris = [one.uri.rstrip("/") for one in found.endpoints if one.version in ("", "v1")]
        for uri in uris:
            if len(uri) <= _LONGEST_URL and uri.startswith("https://") and uri.isascii() and uri.isprintable():
                if StorageUrl(uri).host != server.host:
                    raise StorageError(
                        f"{url} names a tape API at another host, {truncated(StorageUrl(uri).host, 100)}: that gets no"
                        " credential unless the definition of the site names it (tape = URL)",
                        code=FailureCode.UNSUPPORTED,
                    )
                return TapeEvent(request.id, request.key, api=uri)
        return TapeEvent(request.id, request.key)

    def _call(self, request: TapeRequest, method: str, path: str, type_: Any = None, body: Any = None) -> Any:
        return self._read(request, method, StorageUrl(request.api + path), type_, body)

    def _read(self, request: TapeRequest, method: str, url: StorageUrl, type_: Any, body: Any = None) -> Any:
        headers = {"Accept": "application/json"}
        content = b""
        if body is not None:
            content = msgspec.json.encode(body)
            headers["Content-Type"] = "application/json"
            headers["Content-Length"] = str(len(content))
        response = self._http.open(method, url, headers, content, ok=(200, 201, 202, 204))
        if type_ is None:
            response.finish()
            return None
        pieces = []
        left = _LARGEST_ANSWER
        while piece := response.read():
            pieces.append(piece)
            left -= len(piece)
            if left < 0:
                response.drop()
                raise _invalid(request, f"it has more than {_LARGEST_ANSWER} bytes")
        try:
            return msgspec.json.decode(b"".join(pieces), type=type_)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _invalid(request, str(error)) from error


def _invalid(request: TapeRequest, why: str) -> StorageError:
    text = f"{request.api}: the answer to {request.action} is not one of a tape API: {truncated(why, 200)}"
    return StorageError(text, code=FailureCode.SERVER_ERROR)


def _name(request: TapeRequest) -> str:
    return quote(request.request, safe="")


def _texts(request: TapeRequest) -> dict[str, int]:
    """The paths of a request as JSON has them → their places in it.

    Raises:
        StorageError: one is not UTF-8; the daemon asks for none of those.
    """
    try:
        return {unquote_to_bytes(path).decode(): at for at, path in enumerate(request.paths)}
    except UnicodeDecodeError as error:
        raise StorageError("a tape API takes names in UTF-8 only", code=FailureCode.INVALID_NAME) from error


def _files(paths: dict[str, int], found: Iterable[tuple[str, str, str]]) -> list[TapeFile]:
    return list(_first_answers(paths, found))


def _first_answers(paths: dict[str, int], found: Iterable[tuple[str, str, str]]) -> Iterator[TapeFile]:
    left = dict(paths)
    for path, locality, error in found:
        # Some servers write a path with one slash less, or more.
        at = left.pop(path, None)
        if at is None:
            at = left.pop("/" + path.strip("/"), None)
        if at is not None:
            yield TapeFile(at, truncated(locality, 40), truncated(" ".join(error.split()), _LONGEST_ERROR))


def _is_over(one: _Staged) -> bool:
    """Whether a file was brought to disk, and has left it again: this request brings it no more."""
    return one.on_disk is False and not one.error and (one.state or "").upper() == "COMPLETED"


def _staged_state(one: _Staged) -> tuple[str, str, str]:
    state = (one.state or "").upper()
    if one.on_disk or (one.on_disk is None and state == "COMPLETED"):
        return one.path, "DISK", ""
    if one.error or state in _FAILED_STATES:
        return one.path, "", one.error or f"the tape system says {state}"
    return one.path, "", ""
