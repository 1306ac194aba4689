"""Third-party copies to WebDAV servers: the destination pulls, with a token of the source, or by a link."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
import urllib.parse
from http import HTTPStatus

from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.backends.http_client import UNREACHABLE, HttpClient, HttpResponse
from pdm.workqueue.helpers.backends.http_errors import HttpStatusError, errno_from_text
from pdm.workqueue.helpers.backends.http_servers import authorization, known_server
from pdm.workqueue.helpers.storage import ProgressCallback, StorageError, Timeouts, at_destination, truncated
from pdm.workqueue.helpers.storage_backend import StorageBackend

#: Seconds without a marker after which a copying server counts as dead; most send one every five seconds.
_MARKER_TIMEOUT_S = 12.0
#: Interval in seconds of checks during a copy, and timeout of a server that may be dead.
_POLL_S, _PROBE_S = 0.5, 3.0
_MAX_LINE = 64 * 1024
_TOKEN_REQUEST = json.dumps({"caveats": ["activity:DOWNLOAD,LIST"], "validity": "PT60M"}).encode()
_MARKER = re.compile(rb"Stripe Bytes Transferred:\s{0,8}([0-9]{1,19})", re.IGNORECASE)
#: Statuses of servers that do not support COPY from another server.
_COPY_UNSUPPORTED = frozenset({400, 404, 405, 409, 500, 501})
#: Pairs of servers that cannot begin a third-party copy → until when this is assumed (`time.monotonic`); shared by
#: all threads.
_failed_pairs: dict[tuple[str, str], float] = {}
_MAX_PAIRS, _FAILED_PAIR_S = 1000, 3600.0


#: What may be a part of a link's query, as it is or encoded again.
_OF_QUERY = re.compile(r"[A-Za-z0-9+/=%_.~&;-]{12,}")


def without_link(text: str, link: str) -> str:
    """A server's message without the query of a link, and without pieces of it: they let their reader in."""
    query = link.partition("?")[2]
    hidden = [query.lower(), urllib.parse.unquote(query).lower()]
    *_, signature = hidden[0].rpartition("x-amz-signature=")

    def kept(found: re.Match[str]) -> str:
        piece = found[0].lower()
        return "..." if signature in piece or any(piece in each for each in hidden) else found[0]

    return _OF_QUERY.sub(kept, text)


class NotBegunError(StorageError):
    """The third-party copy did not begin: the bytes may be streamed."""


class ThirdPartyCopies:
    """Third-party copies between servers.

    Args:
        backend: reads the source, to find out which server is at fault; has the timeouts.
        client: of the backend.
    """

    def __init__(self, backend: StorageBackend, client: HttpClient) -> None:
        self._backend = backend
        self._client = client

    @staticmethod
    def may_work(source: StorageUrl, destination: StorageUrl) -> bool:
        """False if the servers of two URLs are known not to begin a copy."""
        return _failed_pairs.get((source.authority, destination.authority), 0.0) <= time.monotonic()

    @staticmethod
    def remember_failure(source: StorageUrl, destination: StorageUrl) -> None:
        """Stop trying the servers of two URLs for some time."""
        if len(_failed_pairs) > _MAX_PAIRS:
            _failed_pairs.clear()
        _failed_pairs[source.authority, destination.authority] = time.monotonic() + _FAILED_PAIR_S

    def copy(self, source: StorageUrl, temporary: StorageUrl, arrived: ProgressCallback) -> None:
        """Have the destination pull; `NotBegunError` if one of the two does not support it."""
        headers = {
            "Source": "https://" + source.partition("://")[2],
            "Overwrite": "F",
            "Credential": "none",
            "RequireChecksumVerification": "false",
            "TransferHeaderAuthorization": self._token(source),
        }
        self._client.check_name(source)
        verdict = at_destination(self._pull, source, temporary, headers, arrived)
        if not verdict.lower().startswith("success"):
            raise self._copy_error(source, temporary, verdict)

    def fetch(self, link: str, source: StorageUrl, temporary: StorageUrl, arrived: ProgressCallback) -> bool:
        """Have the destination read a file of another storage by a link; False if it does not."""
        if not self.may_work(source, temporary):
            return False
        headers = {"Source": link, "Overwrite": "T", "Credential": "none", "RequireChecksumVerification": "false"}
        moved = 0

        def arriving(count: int) -> None:
            nonlocal moved
            moved = count
            arrived(count)

        try:
            verdict = at_destination(self._pull, source, temporary, headers, arriving)
        except (NotBegunError, HttpStatusError):
            # Whatever the reason is, streaming shows whether it is one of the file.
            self.remember_failure(source, temporary)
            return False
        except StorageError as error:
            if not moved:
                self.remember_failure(source, temporary)
            error.message = without_link(error.message, link)
            error.args = (error.message,)
            raise
        if verdict.lower().startswith("success"):
            return True
        if verdict and not moved:
            # It cannot reach the source, does not trust its certificate, or writes the link in another way.
            self.remember_failure(source, temporary)
            return False
        text = without_link(truncated(verdict or "the server did not say how the copy ended", 1000), link)
        raise StorageError(text, errno=errno_from_text(text), scope=FailureScope.TRANSFER)

    def _pull(
        self, source: StorageUrl, temporary: StorageUrl, headers: dict[str, str], arrived: ProgressCallback
    ) -> str:
        """Send the COPY; returns the result line of the destination, empty if there is none."""
        try:
            response = self._client.open("COPY", temporary, headers, ok=(200, 201, 202))
        except HttpStatusError as error:
            if error.status in _COPY_UNSUPPORTED:
                raise NotBegunError(error.message) from error
            raise
        watchdog = SourceWatchdog(source, self._backend.timeouts.stall_s, response)
        verdict = ""
        try:
            with watchdog:
                verdict = self._follow(temporary, response, watchdog, arrived)
        except StorageError:
            if not watchdog.gave_up:
                raise
        finally:
            if not verdict:
                response.drop()
        if watchdog.gave_up and not verdict:
            text = f"{source}: no byte arrives, and the server does not answer"
            raise StorageError(text, code=FailureCode.STALLED, scope=FailureScope.SOURCE)
        if not verdict and response.status == HTTPStatus.CREATED:
            # There is only the status; the verification decides.
            return "success"
        return verdict

    def _token(self, source: StorageUrl) -> str:
        """A token with which another server may read the source."""
        own = authorization(source.authority).get("Authorization")
        if own is not None:
            return own
        headers = {"Content-Type": "application/macaroon-request"}
        try:
            response = self._client.open("POST", source, headers, _TOKEN_REQUEST)
        except HttpStatusError as error:
            if error.status < HTTPStatus.INTERNAL_SERVER_ERROR or error.status == HTTPStatus.NOT_IMPLEMENTED:
                # It does not support macaroons.
                raise NotBegunError(error.message) from error
            raise error.at(FailureScope.SOURCE) from error.__cause__
        except StorageError as error:
            raise error.at(FailureScope.SOURCE) from error.__cause__
        document = b""
        while chunk := response.read():
            document += chunk
            if len(document) > _MAX_LINE:
                response.drop()
                break
        try:
            token = json.loads(document)["macaroon"]
        except (ValueError, KeyError, TypeError, RecursionError):
            token = None
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise NotBegunError(f"{source}: the server issues no macaroon")
        return f"Bearer {token}"

    def _follow(
        self, url: StorageUrl, response: HttpResponse, watchdog: SourceWatchdog, arrived: ProgressCallback
    ) -> str:
        """The last line of a COPY's response; the lines before it are progress markers."""
        incomplete, last = b"", b""
        moved = 0
        while chunk := response.read(_MARKER_TIMEOUT_S):
            self._backend.check()
            *lines, incomplete = (incomplete + chunk).split(b"\n")
            for line in lines:
                marker = _MARKER.search(line)
                if marker is not None and int(marker.group(1)) > moved:
                    moved = int(marker.group(1))
                    watchdog.moved_at = time.monotonic()
                    arrived(moved)
                last = line.strip() or last
            if time.monotonic() - watchdog.moved_at > max(self._backend.timeouts.stall_s, _MARKER_TIMEOUT_S):
                raise StorageError(f"{url}: no byte arrived in time", code=FailureCode.STALLED)
            if len(incomplete) > _MAX_LINE:
                raise StorageError(f"{url}: the server's answer is not valid", code=FailureCode.BAD_LISTING)
        last = incomplete.strip() or last
        return last.decode("utf-8", "backslashreplace")

    def _copy_error(self, source: StorageUrl, temporary: StorageUrl, verdict: str) -> StorageError:
        """The error for a result line: the source is at fault if it cannot be read now."""
        text = truncated(verdict or "the server did not say how the copy ended", 1000)
        try:
            with contextlib.closing(self._backend.read(source)) as chunks:
                next(chunks, None)
        except StorageError as error:
            return error.at(FailureScope.SOURCE)
        if verdict:
            return StorageError(text, errno=errno_from_text(text), scope=FailureScope.DESTINATION)
        lost = StorageError(text, code=FailureCode.CONNECTION, lost=True)
        return self._client.explained(known_server(temporary), lost).at(FailureScope.DESTINATION)


class SourceWatchdog:
    """Ends a third-party copy whose source has died; the destination does not report that for a long time.

    Args:
        source: URL of the file.
        stall_s: seconds without a byte after which the source is probed.
        response: of the destination, which is aborted if the source does not answer.
    """

    def __init__(self, source: StorageUrl, stall_s: float, response: HttpResponse) -> None:
        #: When the last byte was reported to arrive (`time.monotonic`).
        self.moved_at = time.monotonic()
        self.gave_up = False
        self._source = source
        self._stall_s = stall_s
        self._response = response
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog")

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_POLL_S):
            if time.monotonic() - self.moved_at < self._stall_s:
                continue
            if not self._source_answers():
                self.gave_up = True
                self._response.abort()
            # Otherwise the markers show the state of the destination.
            return

    def _source_answers(self) -> bool:
        client = HttpClient()
        client.timeouts = Timeouts.within(_PROBE_S)
        try:
            client.call("HEAD", self._source)
        except StorageError as error:
            return error.code not in UNREACHABLE
        finally:
            client.close_idle(known_server(self._source))
        return True
