"""Storage errors for the statuses of HTTP responses."""

from __future__ import annotations

import email.utils
import errno
import time
from collections.abc import Mapping
from contextlib import suppress
from http import HTTPStatus

from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.helpers.backends.propfind import resources
from pdm.workqueue.helpers.storage import StorageError, truncated

_MAX_RETRY_AFTER_S = 7 * 86400.0
_ERRNO_BY_STATUS: Mapping[int, int] = {
    403: errno.EACCES,
    404: errno.ENOENT,
    405: errno.EOPNOTSUPP,
    409: errno.ENOENT,
    410: errno.ENOENT,
    412: errno.EEXIST,
    414: errno.ENAMETOOLONG,
    415: errno.EOPNOTSUPP,
    501: errno.EOPNOTSUPP,
    507: errno.ENOSPC,
}
#: Statuses with a reliable meaning, whatever the text is.
_CODE_BY_STATUS: Mapping[int, FailureCode] = {
    408: FailureCode.TIMEOUT,
    413: FailureCode.TOO_LARGE,
    417: FailureCode.UNSUPPORTED,
    423: FailureCode.LOCKED,
    425: FailureCode.BUSY,
    429: FailureCode.BUSY,
    503: FailureCode.BUSY,
    504: FailureCode.SERVER_ERROR,
}
#: Error texts in bodies; XRootD's are the system's.
_ERRNO_BY_TEXT = (
    ("no space left", errno.ENOSPC),
    ("quota exceeded", errno.EDQUOT),
    ("permission denied", errno.EACCES),
    ("operation not permitted", errno.EACCES),
    ("no such file", errno.ENOENT),
    ("not empty", errno.ENOTEMPTY),
    ("not a directory", errno.ENOTDIR),
    ("is a directory", errno.EISDIR),
    ("file exists", errno.EEXIST),
    ("name too long", errno.ENAMETOOLONG),
    ("too many levels of symbolic links", errno.ELOOP),
    ("read-only", errno.EROFS),
    ("cross-device link", errno.EXDEV),
)


class HttpStatusError(StorageError):
    """The response's status is not a success.

    Attributes:
        status: of HTTP.
    """

    status = 0


def errno_from_text(text: str) -> int | None:
    """The errno for an error text of a server.

    The part before the last semicolon names the file, which may be called ``permission denied``.
    """
    lowered = text.rpartition(";")[2].lower()
    return next((number for words, number in _ERRNO_BY_TEXT if words in lowered), None)


def error_from_response(
    request: str, status: int, reason: str, text: str, retry_after: str | None, size: object
) -> HttpStatusError:
    """The error for a response.

    Args:
        request: method and URL, for the message.
        status: of the response.
        reason: its reason phrase.
        text: the beginning of its body.
        retry_after: its ``Retry-After``.
        size: ``Content-Length`` of the request; None if there was none.
    """
    message = f"{request}: {status} {reason}: {truncated(text, 500)}"
    if status == HTTPStatus.MULTI_STATUS:
        status = _inner_error(text) or status
    code, number = _CODE_BY_STATUS.get(status), None
    if code is None:
        number = errno_from_text(text) or _ERRNO_BY_STATUS.get(status)
    if status == HTTPStatus.UNAUTHORIZED and errno_from_text(text) is None:
        code = FailureCode.CREDENTIAL_REFUSED
    elif number is None and code is None and status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        code = FailureCode.SERVER_ERROR
    if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        message = (
            f"the server, or a proxy before it, takes no request of {size or 'that many'} bytes"
            f" (as set by client_max_body_size of nginx, LimitRequestBody of Apache and the like): {message}"
        )
    error = HttpStatusError(message, errno=number, code=code, retry_after_s=retry_after_seconds(retry_after))
    error.status = status
    return error


def _inner_error(multistatus: str) -> int | None:
    """The first status in a multistatus that is not a success: of the resource that caused the failure."""
    with suppress(StorageError):
        for resource in resources("", [multistatus.encode("utf-8", "replace")]):
            if resource.status >= HTTPStatus.BAD_REQUEST:
                return resource.status
    return None


def retry_after_seconds(retry_after: str | None) -> float | None:
    """``Retry-After``, a number or a date, in seconds from now; None if it is missing or invalid."""
    text = (retry_after or "").strip()
    if text.isascii() and text.isdecimal():
        return min(float(text[:10]), _MAX_RETRY_AFTER_S)
    try:
        then = email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(then - time.time(), 0.0), _MAX_RETRY_AFTER_S)
