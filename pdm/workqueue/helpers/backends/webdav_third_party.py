"""Third-party copies between WebDAV servers: the destination pulls, with a token that the source has issued for it."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from http import HTTPStatus

from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.backends.base import StorageBackend
from pdm.workqueue.helpers.backends.webdav_client import WebdavClient, WebdavResponse, server_named, server_of
from pdm.workqueue.helpers.backends.webdav_responses import HttpStatusError, errno_from_text
from pdm.workqueue.helpers.storage import ProgressCallback, StorageError, Timeouts, scoped, truncated

_RESPONSE_CHUNK = 256 * 1024
#: Seconds without a marker after which a server that copies is taken for dead; most send one every five.
_MARKERS_S = 12.0
#: Seconds between two looks at a copy between servers, and for a server to answer that may be dead.
_POLL_S, _SOON_S = 0.5, 3.0
_LONGEST_LINE = 64 * 1024
_TOKEN_REQUEST = json.dumps({"caveats": ["activity:DOWNLOAD,LIST"], "validity": "PT60M"}).encode()
_MARKER = re.compile(rb"Stripe Bytes Transferred:\s{0,8}([0-9]{1,19})", re.IGNORECASE)
#: What a server says to a COPY from elsewhere that it does not know how to do.
_COPY_UNKNOWN = frozenset({400, 404, 405, 409, 500, 501})
#: Pairs of servers between which no third-party copy can be begun, and until when that is believed (`time.monotonic`);
#: for all lanes of the process.
_failed_pairs: dict[tuple[str, str], float] = {}
_MOST_PAIRS, _REMEMBERED_S = 1000, 3600.0


class NotBegunError(StorageError):
    """A third-party copy was not begun: the bytes may go another way."""


class ThirdPartyCopies:
    """Asks servers to copy from one another.

    Args:
        backend: reads the source, to find out whose fault a failure is; says how long to wait.
        client: of the side.
    """

    def __init__(self, backend: StorageBackend, client: WebdavClient) -> None:
        self._backend = backend
        self._client = client

    @staticmethod
    def may_work(source: str, destination: str) -> bool:
        """Whether it is not known that the servers of two URLs cannot begin a copy."""
        return _failed_pairs.get((server_of(source), server_of(destination)), 0.0) <= time.monotonic()

    @staticmethod
    def remember_failure(source: str, destination: str) -> None:
        """Do not ask the servers of two URLs again for a while."""
        if len(_failed_pairs) > _MOST_PAIRS:
            _failed_pairs.clear()
        _failed_pairs[server_of(source), server_of(destination)] = time.monotonic() + _REMEMBERED_S

    def copy(self, source: str, temporary: str, arrived: ProgressCallback) -> None:
        """Have the destination pull; `NotBegunError` if one of the two does not know how."""
        headers = {
            "Source": "https://" + source.partition("://")[2],
            "Overwrite": "F",
            "Credential": "none",
            "RequireChecksumVerification": "false",
        }
        headers["TransferHeaderAuthorization"] = self._token(source)
        self._client.check_name(source)
        verdict = scoped("destination", self._asked_to_copy, source, temporary, headers, arrived)
        if not verdict.lower().startswith("success"):
            raise self._blamed(source, temporary, verdict)

    def _asked_to_copy(self, source: str, temporary: str, headers: dict[str, str], arrived: ProgressCallback) -> str:
        try:
            answer = self._client.open("COPY", temporary, headers=headers, good=(200, 201, 202))
        except HttpStatusError as refused:
            if refused.status in _COPY_UNKNOWN:
                raise NotBegunError(refused.message) from refused
            raise
        watch = SourceWatchdog(source, self._backend.timeouts.stall_s, answer)
        verdict = ""
        try:
            with watch:
                verdict = self._followed(temporary, answer, watch, arrived)
        except StorageError:
            if not watch.gave_up:
                raise
        finally:
            if not verdict:
                answer.drop()
        if not verdict and not watch.gave_up and answer.status in (HTTPStatus.CREATED, HTTPStatus.NO_CONTENT):
            # It tells by its status alone; the proof will show.
            return "success"
        if watch.gave_up and not verdict:
            raise StorageError(
                f"{source}: no byte comes, and the server does not answer", code="STALLED", scope="source"
            )
        return verdict

    def _token(self, source: str) -> str:
        """What lets another server read the source for us."""
        own = self._client.credentials(server_of(source)).get("Authorization")
        if own is not None:
            return own
        headers = {"Content-Type": "application/macaroon-request"}
        try:
            answer = self._client.open("POST", source, headers=headers, body=_TOKEN_REQUEST)
        except HttpStatusError as refused:
            if refused.status < HTTPStatus.INTERNAL_SERVER_ERROR or refused.status == HTTPStatus.NOT_IMPLEMENTED:
                # It does not know what a macaroon is.
                raise NotBegunError(refused.message) from refused
            raise refused.at("source") from refused.__cause__
        except StorageError as error:
            raise error.at("source") from error.__cause__
        said = b""
        while piece := answer.read(_RESPONSE_CHUNK):
            said += piece
            if len(said) > _LONGEST_LINE:
                answer.drop()
                break
        try:
            token = json.loads(said)["macaroon"]
        except (ValueError, KeyError, TypeError):
            token = None
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise NotBegunError(f"{source}: the server gives no macaroon")
        return f"Bearer {token}"

    def _followed(self, url: str, answer: WebdavResponse, watch: SourceWatchdog, arrived: ProgressCallback) -> str:
        """The last line of a COPY's answer; what comes before are markers of its progress."""
        waiting, last = b"", b""
        moved = 0
        while piece := answer.read(_RESPONSE_CHUNK, _MARKERS_S):
            self._backend.check()
            *lines, waiting = (waiting + piece).split(b"\n")
            for line in lines:
                marker = _MARKER.search(line)
                if marker is not None and int(marker.group(1)) > moved:
                    moved = int(marker.group(1))
                    watch.moved_at = time.monotonic()
                    arrived(moved)
                last = line.strip() or last
            if time.monotonic() - watch.moved_at > max(self._backend.timeouts.stall_s, _MARKERS_S):
                raise StorageError(f"{url}: no byte has come for too long", code="STALLED")
            if len(waiting) > _LONGEST_LINE:
                raise StorageError(f"{url}: the server's answer is not valid", code="BAD_LISTING")
        last = waiting.strip() or last
        return last.decode("utf-8", "backslashreplace")

    def _blamed(self, source: str, temporary: str, verdict: str) -> StorageError:
        """Whose fault the failure of a third-party copy is: a source that cannot be read now is at fault."""
        text = truncated(verdict or "the server did not say how the copy ended", 1000)
        try:
            with contextlib.closing(self._backend.read(StorageUrl(source))) as pieces:
                next(pieces, None)
        except StorageError as error:
            return error.at("source")
        if verdict:
            return StorageError(text, errno=errno_from_text(text), scope="destination")
        return self._client.explained(server_named(temporary), StorageError(text, code="CONNECTION", lost=True)).at(
            "destination"
        )


class SourceWatchdog:
    """Ends a copy between servers whose source has died: the destination says nothing of it, for a long time.

    Args:
        source: URL of the file.
        stall_s: seconds without a byte after which the source is asked whether it lives.
        answer: of the destination, which is cut off if it does not.
    """

    def __init__(self, source: str, stall_s: float, answer: WebdavResponse) -> None:
        #: When the last byte came, as far as is known.
        self.moved_at = time.monotonic()
        self.gave_up = False
        self._source = source
        self._stall_s = stall_s
        self._answer = answer
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch")

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_POLL_S):
            if time.monotonic() - self.moved_at < self._stall_s:
                continue
            if self._answers():
                # The others, then: their markers tell.
                return
            self.gave_up = True
            self._answer.cut_off()
            return

    def _answers(self) -> bool:
        """Whether the source's server says anything, soon."""
        client = WebdavClient()
        client.timeouts = Timeouts(_SOON_S, 0, time.monotonic() + _SOON_S)
        try:
            client.call("HEAD", self._source)
        except StorageError as error:
            return error.code not in ("STALLED", "TIMEOUT", "CONNECTION")
        finally:
            client.hang_up(self._source)
        return True
