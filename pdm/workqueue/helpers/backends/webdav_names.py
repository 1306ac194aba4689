"""Names that WebDAV servers confuse, and what is known of the servers that were tried with such names.

A server that stores ``a;b`` as ``a`` overwrites another file, and no check afterwards restores it. So a name with
characters that have a meaning in URLs or XML is tried first, on a probe file.
"""

from __future__ import annotations

import re
import secrets
import threading
import unicodedata
from collections.abc import Callable
from urllib.parse import quote_from_bytes, unquote_to_bytes

#: Characters that are plain in a URL, and that no server has been seen to confuse.
_PLAIN_NAME = re.compile(rb"[A-Za-z0-9._~ (),=@!$'\x80-\xff-]+")
_CONTEXT_LENGTH = 4
_MAX_SHAPE_LENGTH = 200
_MAX_SHAPES = 2000
#: Authority and shape of a name → whether the server keeps such names.
_name_kept: dict[tuple[str, bytes], bool] = {}
_name_kept_lock = threading.Lock()


def is_odd(encoded_name: str) -> bool:
    """Whether a server may take a percent-encoded name for another."""
    return _PLAIN_NAME.fullmatch(unquote_to_bytes(encoded_name)) is None


def shape_of(encoded_name: str) -> bytes:
    """What is odd in a name: a server keeps all names of one shape, or none.

    Plain characters are left out, but for those behind ``&`` and ``%``: with them they may be an entity, or an escape.
    """
    name = unquote_to_bytes(encoded_name)
    if b"&" in name or b"%" in name:
        odd = [at for at, byte in enumerate(name) if _PLAIN_NAME.fullmatch(bytes([byte])) is None]
        return b"x" + name[odd[0] : odd[-1] + _CONTEXT_LENGTH][:_MAX_SHAPE_LENGTH]
    return _PLAIN_NAME.sub(b"x", b"x" + name)[:_MAX_SHAPE_LENGTH]


def check_kept(authority: str, shape: bytes, try_name: Callable[[str, str], bool | None]) -> bool:
    """Whether a server keeps names of a shape; tried once.

    Args:
        authority: host and port.
        shape: of `shape_of`.
        try_name: makes a file of the first percent-encoded name, moves it to the second, and returns whether it is
            there; None where that could not be tried.
    """
    with _name_kept_lock:
        known = _name_kept.get((authority, shape))
    if known is None:
        probe = f".pdm-{secrets.token_hex(8)}.probe"
        known = try_name(probe, probe + quote_from_bytes(shape, safe=""))
        if known is None:
            return True
        with _name_kept_lock:
            if len(_name_kept) > _MAX_SHAPES:
                _name_kept.clear()
            _name_kept[authority, shape] = known
    return known


def folded(name: bytes) -> str:
    """The same for names that a server takes for one if it ignores case, or composes letters in its own way."""
    return unicodedata.normalize("NFC", name.decode("utf-8", "surrogateescape")).casefold()
