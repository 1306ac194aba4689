"""What XRootD servers do with HTTP that no other WebDAV server does."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType
from urllib.parse import unquote_to_bytes

from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.backends.http_client import HttpClient
from pdm.workqueue.helpers.backends.http_errors import errno_from_text
from pdm.workqueue.helpers.storage import StorageError

#: Headers of a COPY to find out whether a name is free: a file would be copied to where no server gets. A response 404
#: to any other request ends the connection; to this one XRootD responds 400 with the words of the system.
NOWHERE: Mapping[str, str] = MappingProxyType({"Destination": "none:", "Credential": "none"})
#: Bytes of the text of an error.
MAX_ERROR_TEXT = 4000
_BLANK = 0x20


def says_free(status: int, text: bytes) -> bool:
    """Whether a response to a COPY with `NOWHERE` says that nothing is at the name."""
    is_error = status == HTTPStatus.BAD_REQUEST
    return is_error and errno_from_text(text.decode("utf-8", "replace")) == errno.ENOENT


def is_free(client: HttpClient, url: StorageUrl) -> bool:
    """Whether nothing is at a URL; False if the server does not say.

    Raises:
        StorageError: there was no response, or the status is an unexpected one.
    """
    response = client.open("COPY", url, NOWHERE, ok=(HTTPStatus.BAD_REQUEST,))
    text = response.read()
    response.finish()
    return says_free(response.status, text[:MAX_ERROR_TEXT])


def destination(url: StorageUrl) -> bytes:
    """The ``Destination`` header. XRootD does not decode it: an encoded blank would be stored as ``%20``.

    Raises:
        StorageError: EILSEQ, the server cannot rename to such a name.
    """
    raw = unquote_to_bytes(f"https://{url.authority}{url.encoded_path}")
    if any(byte < _BLANK for byte in raw):
        raise StorageError(f"{url}: this server cannot rename to such a name", errno=errno.EILSEQ)
    # XRootD strips blanks, and non-ASCII characters with them, from the end; but not before a query.
    return raw + b"?pdm=1"
