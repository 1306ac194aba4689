"""Client of the REST API of FTS3: identity, delegation, jobs with ids known in advance, states, cancellation."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Any, NamedTuple, TypeVar

import msgspec

from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.backends.http_client import UNREACHABLE, HttpClient
from pdm.workqueue.helpers.storage import StorageError, Timeouts, internal_error, truncated

_Answer = TypeVar("_Answer")
#: Seconds for one request, at most.
LONGEST_REQUEST_S = 60.0
#: Bytes of an answer; the states of a thousand files are about one million.
_LONGEST_ANSWER = 64 * 1024 * 1024
#: A delegated proxy that ends sooner is replaced, unless this helper has made it a short time before.
_LEAST_LIFETIME = timedelta(hours=2)
_DELEGATED_AGAIN_S = 600.0
_DELEGATION_TRIES, _DELEGATION_PAUSE_S = 6, (0.1, 1.0)
_LIFETIME_H = 12
_SIGNING_S = 30.0
#: Errors of the FTS3 itself, with which its files wait until it works again.
_AWAY = UNREACHABLE | {FailureCode.SERVER_ERROR, FailureCode.BUSY}
#: Answers that are no error of the connection.
_UNDERSTOOD = (
    *(HTTPStatus.OK, HTTPStatus.CREATED, HTTPStatus.NO_CONTENT, HTTPStatus.MULTI_STATUS, HTTPStatus.BAD_REQUEST),
    *(HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY),
)
#: States that a file does not leave.
FINISHED, FAILED, CANCELED = "FINISHED", "FAILED", "CANCELED"
FINAL_STATES = frozenset({FINISHED, FAILED, CANCELED})


class Identity(msgspec.Struct, frozen=True):
    """What an FTS3 calls its client; ids of jobs are made of the first of ``vos_id``."""

    delegation_id: str
    vos_id: list[str]


class HandedFile(msgspec.Struct, frozen=True):
    """A file of a job: its state, and why it has failed."""

    file_id: int | str
    file_state: str
    dest_surl: str = ""
    reason: str | None = None

    @property
    def is_final(self) -> bool:
        return self.file_state in FINAL_STATES


#: Files have forty more, which cost the FTS3 more than the rest of the request.
_FILE_FIELDS = ",".join(HandedFile.__struct_fields__)


class _JobStatus(msgspec.Struct, frozen=True):
    files: list[HandedFile]


class _Submitted(msgspec.Struct, frozen=True):
    job_id: str


class _Delegation(msgspec.Struct, frozen=True):
    termination_time: str


class NewFile(NamedTuple):
    """A file to transfer: its URLs, and its size in bytes."""

    source: str
    destination: str
    size: int


class RefusedError(Exception):
    """An FTS3 does not accept a job: something in it is invalid, or it is too large."""


class JobExistsError(Exception):
    """A job with this id exists."""


class FtsClient:
    """The connection to one FTS3, with the user's proxy. One thread; `interrupt` may be called from any.

    Methods raise `StorageError` with the scope SERVICE, and `unreachable` if the FTS3 does not answer as it should.

    Attributes:
        timeout_s: seconds for one request.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.timeout_s = LONGEST_REQUEST_S
        self._http = HttpClient()
        self._delegated_at: float | None = None

    def whoami(self) -> Identity:
        """Who the FTS3 takes the client for."""
        found: Identity | None = self._get("/whoami", Identity)
        if found is None or not found.vos_id:
            raise self._away("its answer has no VO")
        return found

    def delegate(self, identity: Identity) -> bool:
        """Delegate the user's proxy, unless one is there that is valid for long; returns whether it was done."""
        path = f"/delegation/{identity.delegation_id}"
        for left in reversed(range(_DELEGATION_TRIES)):
            there = self._get(path, _Delegation | None)
            if there is not None and self._lasts(there):
                return False
            status, request = self._request("GET", f"{path}/request")
            if status != HTTPStatus.OK:
                raise self._away(f"GET {path}/request: {status}")
            if self._put_proxy(path, self._signed(request), may_fail=left > 0):
                break
            # An FTS3 keeps one request for a user, and other helpers delegate at the same time.
            time.sleep(random.uniform(*_DELEGATION_PAUSE_S))  # noqa: S311 - spreads tries, guards nothing
        self._delegated_at = time.monotonic()
        return True

    def submit(self, sid: str, files: Sequence[NewFile]) -> str:
        """Submit a job whose id is `job_id`; returns the id that it got.

        Raises:
            JobExistsError: it was submitted before.
            RefusedError: it is not accepted.
        """
        body = {
            "files": [
                {"sources": [file.source], "destinations": [file.destination], "filesize": file.size} for file in files
            ],
            # The names are temporary, and the proof is made afterwards, by another program.
            "params": {"id_generator": "deterministic", "sid": sid, "overwrite": True, "verify_checksum": "none"},
        }
        status, answer = self._request("POST", "/jobs", msgspec.json.encode(body), "application/json")
        if status == HTTPStatus.CONFLICT:
            raise JobExistsError
        if status >= HTTPStatus.BAD_REQUEST:
            raise RefusedError(f"{status}: {_text(answer)}")
        return self._decoded(answer, _Submitted).job_id

    def files(self, job_id: str) -> list[HandedFile] | None:
        """The files of a job; None if there is no such job."""
        found: _JobStatus | None = self._get(f"/jobs/{job_id}?files={_FILE_FIELDS}", _JobStatus)
        return None if found is None else found.files

    def cancel(self, job_id: str, files: Collection[int | str] | None = None) -> None:
        """Cancel a job, or some files of it; what is final stays."""
        path = f"/jobs/{job_id}" if files is None else f"/jobs/{job_id}/files/{','.join(map(str, files))}"
        self._request("DELETE", path)

    def interrupt(self) -> None:
        """Fail the running request, and all until `resume`, with `StoppedError`."""
        self._http.interrupt()

    def resume(self) -> None:
        self._http.interrupted = False

    # -- requests

    def _get(self, path: str, type_: Any) -> Any:
        """The decoded answer; None for 404."""
        status, answer = self._request("GET", path)
        if status == HTTPStatus.NOT_FOUND:
            return None
        if status >= HTTPStatus.BAD_REQUEST:
            raise self._away(f"GET {path}: {status}: {_text(answer)}")
        return self._decoded(answer, type_)

    def _request(self, method: str, path: str, body: bytes = b"", kind: str = "") -> tuple[int, bytes]:
        self._http.timeouts = Timeouts.within(self.timeout_s)
        headers = {"Accept": "application/json"}
        if body:
            headers |= {"Content-Type": kind, "Content-Length": str(len(body))}
        try:
            response = self._http.open(method, StorageUrl(self.url + path), headers, body, _UNDERSTOOD)
            answer = bytearray()
            while chunk := response.read():
                answer += chunk
                if len(answer) > _LONGEST_ANSWER:
                    response.drop()
                    raise self._away(f"{method} {path}: its answer is longer than {_LONGEST_ANSWER} bytes")
        except StorageError as error:
            error.scope = FailureScope.SERVICE
            if error.code is FailureCode.CERTIFICATE:
                # Its operators will mend it: the files wait.
                error.code = FailureCode.CONNECTION
            error.unreachable = error.unreachable or error.code in _AWAY
            if not error.message.startswith(_PREFIX):
                error.message = f"{_PREFIX} {self.url}: {error.message}"
            raise
        return response.status, bytes(answer)

    def _decoded(self, answer: bytes, type_: type[_Answer]) -> _Answer:
        try:
            return msgspec.json.decode(answer, type=type_)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self._away(f"its answer cannot be read ({error}): {_text(answer)}") from error

    def _away(self, message: str) -> StorageError:
        return StorageError(
            f"{_PREFIX} {self.url}: {message}",
            code=FailureCode.SERVER_ERROR,
            scope=FailureScope.SERVICE,
            unreachable=True,
        )

    # -- delegation

    def _lasts(self, there: _Delegation) -> bool:
        if self._delegated_at is not None and time.monotonic() - self._delegated_at < _DELEGATED_AGAIN_S:
            # The user's own proxy may end soon.
            return True
        with contextlib.suppress(ValueError):
            end = datetime.fromisoformat(there.termination_time.removesuffix("Z")).replace(tzinfo=UTC)
            return end - datetime.now(UTC) >= _LEAST_LIFETIME
        return False

    def _signed(self, request: bytes) -> bytes:
        """The proxy for a request, with its chain, signed by a process: this one has no library for certificates."""
        proxy = os.environ.get("X509_USER_PROXY", "")
        command = [sys.executable, "-m", "pdm.workqueue.certificates.delegation", proxy, str(_LIFETIME_H)]
        try:
            done = subprocess.run(command, input=request, capture_output=True, timeout=_SIGNING_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise internal_error(f"no proxy can be signed: {error}") from error
        if done.returncode:
            raise StorageError(
                f"no proxy can be delegated to {self.url}: {_text(done.stderr)}",
                code=FailureCode.CREDENTIAL_MISSING,
                scope=FailureScope.SERVICE,
            )
        return done.stdout

    def _put_proxy(self, path: str, proxy: bytes, *, may_fail: bool) -> bool:
        """Send a signed proxy; with ``may_fail``, returns whether it was taken."""
        status, answer = self._request("PUT", f"{path}/credential", proxy, "text/plain")
        if status >= HTTPStatus.BAD_REQUEST:
            if may_fail:
                return False
            raise StorageError(
                f"{_PREFIX} {self.url} does not take the user's proxy: {status}: {_text(answer)}",
                code=FailureCode.CREDENTIAL_REFUSED,
                scope=FailureScope.SERVICE,
            )
        return True


_PREFIX = "the FTS3 at"


def _text(answer: bytes) -> str:
    return " ".join(truncated(answer[:4000].decode("utf-8", "backslashreplace"), 500).split())


def job_id(identity: Identity, sid: str) -> str:
    """The id of a job that is submitted with ``sid``."""
    try:
        return str(uuid.uuid5(uuid.UUID(identity.vos_id[0]), sid))
    except ValueError as error:
        text = f"the FTS3 has a VO without a UUID: {truncated(identity.vos_id[0], 100)}"
        raise StorageError(text, code=FailureCode.SERVER_ERROR, scope=FailureScope.SERVICE, unreachable=True) from error


class HandedJob(NamedTuple):
    """A job of an FTS3 as the daemon stores it: its URL, with what it is submitted with."""

    url: str
    id: str
    sid: str

    def __str__(self) -> str:
        return f"{self.url}/jobs/{self.id}?sid={self.sid}"

    @classmethod
    def parse(cls, text: str | None) -> HandedJob | None:
        if text is None:
            return None
        url, _, rest = text.partition("/jobs/")
        number, _, sid = rest.partition("?sid=")
        return cls(url, number, sid)


def end_transfers(client: FtsClient, handed: HandedJob, names: Collection[str]) -> bool:
    """Cancel the transfers of a job to some names; returns whether they have all ended."""
    files = [file for file in client.files(handed.id) or () if file.dest_surl in names and not file.is_final]
    if files:
        client.cancel(handed.id, [file.file_id for file in files])
        files = [file for file in client.files(handed.id) or () if file.dest_surl in names and not file.is_final]
    return not files


def cancel_files(
    client: FtsClient, jobs: Mapping[HandedJob, Mapping[str, int]], keys: Collection[int]
) -> Iterator[tuple[Collection[int], str]]:
    """Cancel some files of jobs, those with names whose keys are named; yields keys and what became of them."""
    wanted = set(keys)
    for job, names in jobs.items():
        there = {name: key for name, key in names.items() if key in wanted}
        if not there:
            continue
        try:
            if len(there) == len(names):
                client.cancel(job.id)
            else:
                end_transfers(client, job, there)
        except StorageError as error:
            yield there.values(), f"not cancelled at the FTS3 yet: {error.message}"
        else:
            yield there.values(), f"cancelled at the FTS3, job {job.id}"
