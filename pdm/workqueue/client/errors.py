"""Exceptions of the client, each with what happened and what to do about it, and their choice from a response."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from twisted.web.iweb import IResponse

from pdm.workqueue.wire.responses import PROBLEM_TYPE_PREFIX


class WorkqueueClientError(Exception):
    """Base of all errors of the client.

    Attributes:
        what: what happened, a sentence without its full stop.
        advice: what to do next, a sentence, or empty.
    """

    def __init__(self, what: str, advice: str = "") -> None:
        super().__init__(what, advice)
        self.what = what
        self.advice = advice

    def __str__(self) -> str:
        return f"{self.what}. {self.advice}" if self.advice else self.what


class SettingsError(WorkqueueClientError):
    """The client is not told where the service is, or is told so wrongly."""


class CredentialError(WorkqueueClientError):
    """A certificate or key of the caller is missing, expired, unreadable or not enough."""


class UnreachableError(WorkqueueClientError):
    """No connection to the service: nothing was sent."""


class ConnectionBrokenError(WorkqueueClientError):
    """The connection ended before the answer was complete: what was asked may have been done, or not."""


class NoAnswerError(ConnectionBrokenError):
    """The service was silent for longer than the timeout."""


class CertificateRefusedError(CredentialError):
    """One side refused the other's certificate in the TLS handshake."""


class UnexpectedAnswerError(WorkqueueClientError):
    """What came back is not what the API answers: another program listens there, or another version."""


class JobTimeoutError(WorkqueueClientError):
    """The job had not ended when the time was up; it goes on.

    Attributes:
        job: as last seen (`pdm.workqueue.wire.responses.JobView`), None if it was never seen.
    """

    def __init__(self, what: str, advice: str, job: Any) -> None:
        super().__init__(what, advice)
        self.job = job


class RequestRefusedError(WorkqueueClientError):
    """The service answered with an error.

    Attributes:
        status: HTTP status code.
        word: stable name of the kind of error, empty where the answer had none.
        title: the kind of error, the same for all of a kind.
        detail: what is wrong with this request.
        pointer: JSON path of the wrong value (``$.src_filepath``), None where it is not about one.
        request_id: what an operator finds in the daemon's log, None where the answer had none.
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
        """What to do, as far as the service's own words (`detail`) do not say it: no advice comes twice."""
        if status >= 500 and (request_id is None or request_id not in detail):
            return f"Tell an operator the number {request_id}." if request_id else "Tell an operator."
        return ""


class InvalidRequestError(RequestRefusedError):
    """400, 413, 415, 422: the request itself is wrong; `pointer` names the place."""


class OutputNotReadyError(InvalidRequestError):
    """400: the attempt has not ended yet, or there is no such attempt."""


class NotAuthenticatedError(RequestRefusedError, CredentialError):
    """401: the service saw no certificate."""

    def _advice(self, status: int, request_id: str | None, detail: str) -> str:
        return "See 'pdm help environment' for where a certificate is looked for."


class ForbiddenError(RequestRefusedError, CredentialError):
    """403: the service knows who calls, and does not allow this."""


class NotFoundError(RequestRefusedError):
    """404: there is no such job, element or site, or it is another user's."""


class ConflictError(RequestRefusedError):
    """409: the request does not fit what the service has now; 422: its key belongs to another request."""


class DelegationNeededError(ConflictError, CredentialError):
    """409: the service holds no valid credential of the caller."""

    def _advice(self, status: int, request_id: str | None, detail: str) -> str:
        return "" if detail else "Run 'pdm delegate', then submit again."


class TemporaryRefusalError(RequestRefusedError):
    """429, 502, 503, 504: not now; the same request may be repeated.

    Attributes:
        retry_after_s: seconds after which the service asks to be called again, None if it does not say.
    """

    retry_after_s: float | None = None

    def _advice(self, status: int, request_id: str | None, detail: str) -> str:
        return "" if detail else "Try again in a minute."


class ServerFaultError(RequestRefusedError):
    """500: a fault of the service; `request_id` stands in its log."""


_BY_STATUS: Mapping[int, type[RequestRefusedError]] = {
    401: NotAuthenticatedError,
    403: ForbiddenError,
    404: NotFoundError,
    409: ConflictError,
    429: TemporaryRefusalError,
    502: TemporaryRefusalError,
    503: TemporaryRefusalError,
    504: TemporaryRefusalError,
}
#: Kinds that share their status with others.
_BY_WORD: Mapping[str, type[RequestRefusedError]] = {
    "delegation-needed": DelegationNeededError,
    "output-not-ready": OutputNotReadyError,
    "idempotency-key-used": ConflictError,
}


class _ReceivedProblem(msgspec.Struct):
    """What is read of an ``application/problem+json`` body; all of it may be missing."""

    type: str = ""
    title: str = ""
    detail: str = ""
    pointer: str | None = None
    request_id: str | None = None
    incident: str | None = None


def error_for_response(response: IResponse, body: bytes) -> WorkqueueClientError:
    """The error for an answer whose status is not 2xx; what its body lacks is made up from the status line."""
    status = response.code
    try:
        problem = msgspec.json.decode(body, type=_ReceivedProblem)
    except (msgspec.DecodeError, UnicodeDecodeError):
        problem = _ReceivedProblem()
    if status < 400 or (status < 500 and not problem.title):
        return UnexpectedAnswerError(
            f"the service answered {status} {response.phrase.decode('latin-1')}, which is not of this API",
            "Check PDM_URL: does a workqueue listen there?",
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
