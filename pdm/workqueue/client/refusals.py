"""An answer that is not a success, as the error that says it."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from twisted.web.iweb import IResponse

from pdm.workqueue.client.errors import (
    ConflictError,
    DelegationNeededError,
    ForbiddenError,
    InvalidRequestError,
    NotAuthenticatedError,
    NotFoundError,
    OutputNotReadyError,
    RequestRefusedError,
    ServerFaultError,
    TemporaryRefusalError,
    UnexpectedAnswerError,
    WorkqueueClientError,
)
from pdm.workqueue.wire.problems import PROBLEM_TYPE_PREFIX

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


class _Problem(msgspec.Struct):
    """What is read of an ``application/problem+json`` body; all of it may be missing."""

    type: str = ""
    title: str = ""
    detail: str = ""
    pointer: str | None = None
    request_id: str | None = None
    incident: str | None = None


def refusal(response: IResponse, body: bytes) -> WorkqueueClientError:
    """The error for an answer whose status is not 2xx; what its body lacks is made up from the status line."""
    status = response.code
    try:
        problem = msgspec.json.decode(body, type=_Problem)
    except (msgspec.DecodeError, UnicodeDecodeError):
        problem = _Problem()
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
