"""Exceptions of the client, their choice by response, and repetition of what the service refuses for now."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.web.iweb import IResponse

from pdm.workqueue.wire.responses import PROBLEM_TYPE_PREFIX


class WorkqueueClientError(Exception):
    """Base of all errors of the client.

    Attributes:
        what: what happened; a sentence without full stop.
        advice: what to do next; a sentence, or empty.
    """

    def __init__(self, what: str, advice: str = "") -> None:
        super().__init__(what, advice)
        self.what = what
        self.advice = advice

    def __str__(self) -> str:
        return f"{self.what}. {self.advice}" if self.advice else self.what


class SettingsError(WorkqueueClientError):
    """Missing or invalid service URL, or invalid settings."""


class CredentialError(WorkqueueClientError):
    """A certificate or key of the caller is missing, expired, unreadable or insufficient."""


class UnreachableError(WorkqueueClientError):
    """No connection to the service; nothing was sent."""


class ConnectionBrokenError(WorkqueueClientError):
    """The connection broke before the response was complete; the request may have been executed or not."""


class NoAnswerError(ConnectionBrokenError):
    """The service was silent for longer than the timeout."""


class CertificateRefusedError(CredentialError):
    """One side refused the other's certificate in the TLS handshake."""


class UnexpectedAnswerError(WorkqueueClientError):
    """The response is not of this API: another program listens there, or another version."""


class JobTimeoutError(WorkqueueClientError):
    """The job did not end in time; it continues.

    Attributes:
        job: its last known state (`pdm.workqueue.wire.responses.JobView`); None if unknown.
    """

    def __init__(self, what: str, advice: str, job: Any) -> None:
        super().__init__(what, advice)
        self.job = job


class JobFailedError(WorkqueueClientError):
    """A job that was waited for ended FAILED or CANCELLED.

    Attributes:
        job: as it ended (`pdm.workqueue.wire.responses.JobView`).
        code: stable word of its first failure; ``CANCELLED`` for a job that was cancelled.
        hint: what to do about that; a sentence, or empty.
    """

    def __init__(self, what: str, *, job: Any, code: str, hint: str) -> None:
        super().__init__(what, hint)
        self.job = job
        self.code = code
        self.hint = hint


class UnknownSiteError(WorkqueueClientError):
    """No site has this name."""


class NoCommonProtocolError(WorkqueueClientError):
    """No protocol connects the sites."""


class RequestRefusedError(WorkqueueClientError):
    """The service answered with an error.

    Attributes:
        status: HTTP status code.
        word: stable name of the kind of error; empty if unknown.
        title: description of the kind of error.
        detail: what is wrong with this request.
        pointer: JSON path of the invalid value (``$.src_filepath``), or None.
        request_id: identifies the request in the daemon's log; None if unknown.
    """

    def __init__(
        self,
        status: int,
        title: str,
        detail: str,
        *,
        word: str = "",
        pointer: str | None = None,
        request_id: str | None = None,
    ) -> None:
        what = (detail or title or f"the service answered {status}").rstrip(".")
        if pointer is not None and pointer not in what:
            what = f"{pointer}: {what}"
        super().__init__(what, self._advice(status, request_id, detail))
        self.status = status
        self.word = word
        self.title = title
        self.detail = detail
        self.pointer = pointer
        self.request_id = request_id

    def _advice(self, status: int, request_id: str | None, detail: str) -> str:
        """What to do next; empty if the service's own `detail` says it."""
        if status >= 500 and (request_id is None or request_id not in detail):
            return f"Report the number {request_id} to an operator." if request_id else "Report this to an operator."
        return ""


class InvalidRequestError(RequestRefusedError):
    """400, 413, 415, 422: the request is invalid; `pointer` names the value."""


class OutputNotReadyError(InvalidRequestError):
    """400: the attempt has not ended yet, or there is no such attempt."""


class NotAuthenticatedError(RequestRefusedError, CredentialError):
    """401: the service got no valid certificate."""

    def _advice(self, status: int, request_id: str | None, detail: str) -> str:
        return "Run 'pdm help environment' for where certificates are searched."


class ForbiddenError(RequestRefusedError, CredentialError):
    """403: the caller is authenticated, but not allowed to do this."""


class NotFoundError(RequestRefusedError):
    """404: there is no such job, element or site, or it is another user's."""


class JobPurgedError(NotFoundError):
    """410: the job was removed by its age; the text is its summary."""


class ConflictError(RequestRefusedError):
    """409: the request conflicts with the current state; 422: its key belongs to another request."""


class DelegationNeededError(ConflictError, CredentialError):
    """409: the service holds no valid credential of the caller."""

    def _advice(self, status: int, request_id: str | None, detail: str) -> str:
        return "" if detail else "Run 'pdm delegate', then submit again."


class TemporaryRefusalError(RequestRefusedError):
    """429, 502, 503, 504: temporarily unavailable; the same request may be repeated.

    Attributes:
        retry_after_s: seconds after which to retry; None if unknown.
    """

    retry_after_s: float | None = None

    def _advice(self, status: int, request_id: str | None, detail: str) -> str:
        return "" if detail else "Try again in a minute."


class ServerFaultError(RequestRefusedError):
    """500: internal error of the service; `request_id` is in its log."""


_BY_STATUS: Mapping[int, type[RequestRefusedError]] = {
    401: NotAuthenticatedError,
    403: ForbiddenError,
    404: NotFoundError,
    409: ConflictError,
    410: JobPurgedError,
    429: TemporaryRefusalError,
    502: TemporaryRefusalError,
    503: TemporaryRefusalError,
    504: TemporaryRefusalError,
}
#: Kinds of errors that share a status with others.
_BY_WORD: Mapping[str, type[RequestRefusedError]] = {
    "delegation-needed": DelegationNeededError,
    "output-not-ready": OutputNotReadyError,
    "idempotency-key-used": ConflictError,
}


class _ReceivedProblem(msgspec.Struct):
    """An ``application/problem+json`` body; all keys may be missing."""

    type: str = ""
    title: str = ""
    detail: str = ""
    pointer: str | None = None
    request_id: str | None = None
    incident: str | None = None


def error_for_response(response: IResponse, body: bytes) -> WorkqueueClientError:
    """The error for a response whose status is not 2xx; the status line replaces what its body lacks."""
    status = response.code
    try:
        problem = msgspec.json.decode(body, type=_ReceivedProblem)
    except (msgspec.DecodeError, UnicodeDecodeError):
        problem = _ReceivedProblem()
    if status < 400 or (status < 500 and not problem.title):
        return UnexpectedAnswerError(
            f"the service answered {status} {response.phrase.decode('latin-1')}, which is not of this API",
            "Check that PDM_URL is the address of a workqueue.",
        )
    word = problem.type.removeprefix(PROBLEM_TYPE_PREFIX)
    by_status = _BY_STATUS.get(status, ServerFaultError if status >= 500 else InvalidRequestError)
    error = _BY_WORD.get(word, by_status)(
        status,
        problem.title or response.phrase.decode("latin-1"),
        problem.detail,
        word=word,
        pointer=problem.pointer,
        request_id=problem.incident or problem.request_id,
    )
    if isinstance(error, TemporaryRefusalError):
        after = (response.headers.getRawHeaders("Retry-After") or [""])[0]
        error.retry_after_s = float(after) if after.isdecimal() else None
    return error


#: A Retry-After is honoured up to the first, and all waits for one request up to the second.
_MAX_RETRY_PAUSE_S, _MAX_WAIT_S = 10.0, 60.0
#: If the service says "at once": doubles each time, up to the second number.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0
#: Shorter waits are not worth a sentence.
_MENTIONED_WAIT_S = 1.0


class RefusalWaits:
    """The waits for one request; `on_wait` is called with a sentence before each."""

    def __init__(self, reactor: IReactorTime, on_wait: Callable[[str], object]) -> None:
        self._reactor = reactor
        self._on_wait = on_wait
        self._left_s = _MAX_WAIT_S
        self._least_s = _FIRST_PAUSE_S

    async def over(self, send: Callable[[], Awaitable[bytes]]) -> bytes:
        """The result of an idempotent request, which may be sent several times.

        Raises:
            TemporaryRefusalError: the service still refuses it, or does not say when to retry.
        """
        while True:
            try:
                return await send()
            except TemporaryRefusalError as error:
                asked_s = error.retry_after_s
                if asked_s is None or asked_s > _MAX_RETRY_PAUSE_S or asked_s >= self._left_s:
                    raise
                # Not all clients at the same time.
                pause_s = max(asked_s, self._least_s) * random.uniform(1.0, 1.2)  # noqa: S311
                self._left_s -= pause_s
                self._least_s = min(2 * self._least_s, _LONGEST_PAUSE_S)
                if pause_s >= _MENTIONED_WAIT_S:
                    why = error.title or error.what
                    self._on_wait(f"{why}: the request is sent again in {pause_s:.0f} s")
            await deferLater(self._reactor, pause_s)
