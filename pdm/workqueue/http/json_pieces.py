"""JSON in pieces."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec


def joined(values: Sequence[msgspec.Struct]) -> bytes:
    """Some items of an array, one or more, without its brackets."""
    return msgspec.json.encode(values)[1:-1]


async def array(items: AsyncGenerator[bytes | AsyncGenerator[bytes]]) -> AsyncGenerator[bytes]:
    """The pieces of an array.

    Args:
        items: JSON already; several in one come joined (`joined`), a long one comes as the pieces of it.
    """
    separator = b"["
    async with aclosing(items) as source:
        async for item in source:
            if isinstance(item, bytes):
                yield separator + item
            else:
                yield separator
                async with aclosing(item) as pieces:
                    async for piece in pieces:
                        yield piece
            separator = b","
    yield b"[]" if separator == b"[" else b"]"
