"""Errors of the API: one exception for each kind, with its HTTP status, type and title.

Handlers raise them; `pdm.workqueue.http.app` converts them to ``application/problem+json``, and the OpenAPI document
lists them by endpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import ClassVar, NamedTuple

import msgspec

from pdm.workqueue.domain.retention import PurgedJob
from pdm.workqueue.wire.responses import MEDIA_TYPE, PROBLEM_TYPE_PREFIX, Problem

_LONGEST_DETAIL, _LONGEST_POINTER = 1000, 200


class ApiError(Exception):
    """A request that is refused, or that the service failed to process.

    Attributes:
        detail: what is wrong with this request, and what to do about it.
        pointer: JSON path (``$.key``), query parameter (``?name``) or header that is wrong.
        headers: additional headers of the response.
    """

    status: ClassVar[int]
    #: Stable name of the kind; the last part of the problem's ``type``.
    word: ClassVar[str]
    title: ClassVar[str]

    def __init__(self, detail: str, pointer: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.detail = _truncate(detail, _LONGEST_DETAIL)
        self.pointer = None if pointer is None else _truncate(pointer, _LONGEST_POINTER)
        self.headers = headers or {}

    def problem(self, request_id: str, incident: str | None = None) -> Problem:
        return Problem(
            type=PROBLEM_TYPE_PREFIX + self.word,
            title=self.title,
            status=self.status,
            detail=self.detail,
            request_id=request_id,
            pointer=self.pointer,
            incident=incident,
        )


class ErrorFormat(NamedTuple):
    """How the errors of a port are written.

    Attributes:
        media_type: of a body.
        body: the body for an error, the id of the request, and the incident if there is one.
    """

    media_type: str
    body: Callable[[ApiError, str, str | None], bytes]


def _problem_body(error: ApiError, request_id: str, incident: str | None) -> bytes:
    return msgspec.json.encode(error.problem(request_id, incident))


#: That of the service's own API.
PROBLEM_FORMAT = ErrorFormat(MEDIA_TYPE, _problem_body)


def raw_error_response(error: ApiError, request_id: str, form: ErrorFormat) -> bytes:
    """A complete HTTP response for a request that was not received completely; closes the connection."""
    body = form.body(error, request_id, None)
    return (
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\nContent-Type: {form.media_type}\r\n"
        f"Content-Length: {len(body)}\r\nX-Request-Id: {request_id}\r\nConnection: close\r\n\r\n".encode("ascii")
        + body
    )


def _truncate(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[:longest] + "..."


class InvalidInputError(ApiError):
    status, word, title = 400, "invalid-input", "The request is not valid"


class OutputNotReadyError(ApiError):
    status, word, title = 400, "output-not-ready", "There is no such output yet"


class NotAuthenticatedError(ApiError):
    status, word, title = 401, "certificate-needed", "A valid client certificate is needed"


class ForbiddenError(ApiError):
    status, word, title = 403, "forbidden", "Not allowed"


class ForeignOriginError(ForbiddenError):
    """A browser sent the request for a page of another site; `evidence` is the header that says so."""

    def __init__(self, evidence: str) -> None:
        super().__init__(
            f"a page of another site made your browser send this ({evidence}), so nothing was done; act from the pages"
            " of this service, or with a program that sends neither Origin nor Sec-Fetch-Site"
        )


class NotFoundError(ApiError):
    status, word, title = 404, "not-found", "Not found"


class JobNotFoundError(NotFoundError):
    word, title = "job-not-found", "There is no such job"

    def __init__(self, job_id: int) -> None:
        super().__init__(f"you have no job {job_id}; GET /jobs lists yours")


class ElementNotFoundError(NotFoundError):
    word, title = "element-not-found", "There is no such element"

    def __init__(self, job_id: int, element_id: int) -> None:
        super().__init__(f"job {job_id} has no element {element_id}; GET /jobs/{job_id}/elements lists all")


class JobPurgedError(ApiError):
    """The job was removed by its age.

    Attributes:
        job: what is left of it.
    """

    status, word, title = 410, "job-purged", "The job was purged"

    def __init__(self, job: PurgedJob) -> None:
        super().__init__(job.summary())
        self.job = job


class MethodNotAllowedError(ApiError):
    status, word, title = 405, "method-not-allowed", "Method not allowed"


class NotAcceptableError(ApiError):
    status, word, title = 406, "not-acceptable", "The response has no such media type"


class DelegationNeededError(ApiError):
    status, word, title = 409, "delegation-needed", "A delegated credential is needed"


class ConflictError(ApiError):
    status, word, title = 409, "conflict", "The request conflicts with the current state"


class SiteFailedError(ApiError):
    status, word, title = 424, "site-failed", "A server of the site failed"


class RequestTimeoutError(ApiError):
    status, word, title = 408, "too-slow", "The request was not received in time"

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the request was incomplete after {seconds:g} s; nothing was done, send it again")


class BodyTooLargeError(ApiError):
    status, word, title = 413, "body-too-large", "The request is too large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"the body is longer than {limit} bytes; send several smaller requests")


class UnsupportedMediaTypeError(ApiError):
    status, word, title = 415, "unsupported-media-type", "The body is of the wrong type"


class IdempotencyKeyReusedError(ApiError):
    status, word, title = 422, "idempotency-key-used", "The Idempotency-Key was used for another request"

    def __init__(self) -> None:
        super().__init__(
            "this Idempotency-Key was sent with a different request: use a new key for each request", "Idempotency-Key"
        )


class TooManyAttemptsError(ApiError):
    status, word, title = 429, "too-many-attempts", "Too many attempts"

    def __init__(self, wait_s: int) -> None:
        super().__init__(
            f"too many wrong names or passwords: try again in {wait_s} s", None, {"Retry-After": str(wait_s)}
        )


class ServiceStoppingError(ApiError):
    status, word, title = 503, "stopping", "The service is stopping"

    def __init__(self) -> None:
        super().__init__(
            "the service is stopping; nothing was done, try again in a minute", None, {"Retry-After": "10"}
        )


class ServiceBusyError(ApiError):
    status, word, title = 503, "busy", "The service is busy"

    def __init__(self) -> None:
        super().__init__(
            "the service is receiving as many large requests as it can hold; nothing was done, try again in a minute",
            None,
            {"Retry-After": "5"},
        )


class DatabaseOutageError(ApiError):
    """The database cannot be used; `may_be_done` says whether a part of the request may have been carried out."""

    status, word, title = 503, "database-unavailable", "The database is unavailable"

    def __init__(self, *, may_be_done: bool = False) -> None:
        super().__init__(
            (
                "the service's database became unavailable while it carried the request out, which may be done or not;"
                " send the same request again in a few seconds (with its Idempotency-Key nothing is done twice), or"
                " look what was done"
            )
            if may_be_done
            else (
                "the service's database is unavailable; nothing was done, send the same request again in a few seconds"
                " (with its Idempotency-Key nothing is done twice)"
            ),
            None,
            {"Retry-After": "10"},
        )


class AttemptLogMissingError(ApiError):
    status, word, title = 500, "log-missing", "The log was deleted from disk"


class InternalFaultError(ApiError):
    status, word, title = 500, "internal-fault", "Internal error of the service"
