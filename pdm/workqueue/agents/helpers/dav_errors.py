"""What a WebDAV server's refusal means: its status, its words, and when it wants to be asked again.

Statuses that say something of one request or one file have codes of their own. None of them is CONNECTION: that code
says that the server is away, and pauses the site for all its users.
"""

from __future__ import annotations

import email.utils
import errno
import time
from collections.abc import Mapping
from http import HTTPStatus

from pdm.workqueue.agents.helpers.propfind import MultistatusParser
from pdm.workqueue.agents.helpers.storage import StorageError, shortened

_LONGEST_WAIT_S = 7 * 86400.0
_BY_STATUS: Mapping[int, int] = {
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
#: These mean what they say, whatever the page that comes with them speaks of.
_CODES: Mapping[int, str] = {
    408: "TIMEOUT",
    413: "TOO_LARGE",
    417: "UNSUPPORTED",
    423: "LOCKED",
    425: "BUSY",
    429: "BUSY",
    503: "BUSY",
    504: "SERVER_ERROR",
}
#: What servers write into the body of any status; XRootD says so in the words of the system.
_BY_TEXT = (
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


class RefusedError(StorageError):
    """A server answered with a status that is no success.

    Attributes:
        status: of HTTP.
    """

    status = 0


def errno_of(text: str) -> int | None:
    """The error that a sentence of a server tells of.

    What comes before the last semicolon names the file, which may be called ``permission denied``.
    """
    lowered = text.rpartition(";")[2].lower()
    return next((number for words, number in _BY_TEXT if words in lowered), None)


def refusal(
    method: str, url: str, status: int, reason: str, said: str, retry_after: str | None, sent: str | None
) -> RefusedError:
    """The error for an answer.

    Args:
        method: of the request.
        url: of the request, without a query.
        status: of the answer.
        reason: the words beside it.
        said: the beginning of its body.
        retry_after: its ``Retry-After``.
        sent: ``Content-Length`` of the request.
    """
    text = f"{method} {url}: {status} {reason}: {shortened(said, 500)}"
    if status == HTTPStatus.MULTI_STATUS:
        status = _inner_status(url, said) or status
    code, number = _CODES.get(status), None
    if code is None:
        number = errno_of(said) or _BY_STATUS.get(status)
    if status == HTTPStatus.UNAUTHORIZED and errno_of(said) is None:
        code = "CREDENTIAL_REFUSED"
    elif number is None and code is None and status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        code = "SERVER_ERROR"
    if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        text = (
            f"the server, or a proxy before it, takes no request of {sent or 'that many'} bytes"
            f" (as set by client_max_body_size of nginx, LimitRequestBody of Apache and the like): {text}"
        )
    error = RefusedError(text, errno=number, code=code, retry_after_s=seconds_of(retry_after))
    error.status = status
    return error


def _inner_status(url: str, said: str) -> int | None:
    """The first status in a multistatus that is no success: the resource that was in the way."""
    try:
        found = MultistatusParser(url).feed(said.encode("utf-8", "replace"))
    except StorageError:
        return None
    return next((resource.status for resource in found if resource.status >= HTTPStatus.BAD_REQUEST), None)


def seconds_of(retry_after: str | None) -> float | None:
    """``Retry-After`` in seconds from now, given as a number or as a date; None if there is none, or no such thing."""
    text = (retry_after or "").strip()
    if text.isascii() and text.isdecimal():
        return min(float(text[:10]), _LONGEST_WAIT_S)
    try:
        moment = email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(moment - time.time(), 0.0), _LONGEST_WAIT_S)
