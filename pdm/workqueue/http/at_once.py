"""Coroutines that need not wait are carried out at once, without what waiting costs."""

from __future__ import annotations

from collections.abc import Coroutine
from contextvars import copy_context
from functools import partial
from typing import Any

from twisted.internet.defer import Deferred


def carried_out(coroutine: Coroutine[Deferred[Any], Any, None]) -> Deferred[None] | None:
    """Run a coroutine until it waits for something.

    A Deferred and the machinery around it cost as much as all the rest of a request that is answered from memory; a
    coroutine that reaches its end without waiting needs neither.

    Args:
        coroutine: not yet begun.

    Returns:
        None if it has ended; else what fires when it has. To cancel that cancels what the coroutine waits for.

    Raises:
        Exception: whatever ended it at once.
    """
    context = copy_context()
    try:
        awaited = context.run(coroutine.send, None)
    except StopIteration:
        return None

    async def go_on() -> None:
        nonlocal awaited
        while True:
            try:
                step = partial(coroutine.send, await awaited)
            except BaseException as error:
                step = partial(coroutine.throw, error)
            try:
                awaited = context.run(step)
            except StopIteration:
                return

    return Deferred.fromCoroutine(go_on())
