"""Names that servers have mistaken for others, and what is known of the servers that were tried with such.

A server that stores ``a;b`` as ``a`` overwrites another file, and no look afterwards brings that back. So a name with
characters that mean something in URLs or XML is tried first, on a file of our own.
"""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Callable
from urllib.parse import quote_from_bytes, unquote_to_bytes

#: What is plain in a URL, and what no server has been seen to mistake.
_PLAIN = re.compile(rb"[A-Za-z0-9._~ (),=@!$'\x80-\xff-]+")
_AFTER = 4
_LONGEST = 200
_MOST_SHAPES = 2000
_known: dict[tuple[str, bytes], bool] = {}
_guard = threading.Lock()


def is_odd(encoded_name: str) -> bool:
    """Whether a server may take a percent-encoded name for another."""
    return _PLAIN.fullmatch(unquote_to_bytes(encoded_name)) is None


def shape_of(encoded_name: str) -> bytes:
    """What is odd of a name; names of one shape are kept, or not, alike.

    Plain characters are left out, but for those behind ``&`` and ``%``: with them they may be an entity, or an escape.
    """
    name = unquote_to_bytes(encoded_name)
    if b"&" in name or b"%" in name:
        odd = [at for at, byte in enumerate(name) if _PLAIN.fullmatch(bytes([byte])) is None]
        return b"x" + name[odd[0] : odd[-1] + _AFTER][:_LONGEST]
    return _PLAIN.sub(b"x", b"x" + name)[:_LONGEST]


def check_kept(server: str, shape: bytes, moved: Callable[[str, str], bool | None]) -> bool:
    """Whether a server keeps names of a shape; found out once.

    Args:
        server: host and port.
        shape: of `shape_of`.
        moved: makes a file of the first percent-encoded name, moves it to the second, and tells whether it is there;
            None where that could not be tried.
    """
    with _guard:
        known = _known.get((server, shape))
    if known is None:
        probe = f".pdm-{secrets.token_hex(8)}.probe"
        known = moved(probe, probe + quote_from_bytes(shape, safe=""))
        if known is None:
            return True
        with _guard:
            if len(_known) > _MOST_SHAPES:
                _known.clear()
            _known[server, shape] = known
    return known
