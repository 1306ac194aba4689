"""JSON in pieces."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing


async def array(items: AsyncGenerator[bytes | AsyncGenerator[bytes]]) -> AsyncGenerator[bytes]:
    """The pieces of an array.

    Args:
        items: JSON already; a long item comes as the pieces of it.
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
