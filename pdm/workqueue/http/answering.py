"""From values to bytes on the connection: whole where they are small, in pieces with bounded memory where not."""

from __future__ import annotations

from contextlib import aclosing

import msgspec
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IPushProducer
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from pdm.workqueue.http.endpoint import JsonStream
from pdm.workqueue.http.problems import ApiError
from pdm.workqueue.http.request import ApiRequest
from pdm.workqueue.telemetry.background import ReportedError
from pdm.workqueue.telemetry.logging import log_incident
from pdm.workqueue.wire.problems import MEDIA_TYPE

JSON = b"application/json"
TEXT = b"text/plain; charset=us-ascii"
_PROBLEM = MEDIA_TYPE.encode("ascii")

_PIECE = 64 * 1024

_log = Logger()


def answer(request: ApiRequest, status: int, body: bytes, content_type: bytes = JSON) -> None:
    """Write a whole answer; twisted.web itself leaves the body out for HEAD."""
    request.setResponseCode(status)
    if body:
        request.setHeader(b"Content-Type", content_type)
    if status != 204:
        request.setHeader(b"Content-Length", b"%d" % len(body))
    request.write(body)


def answer_problem(request: ApiRequest, error: ApiError, incident: str | None = None) -> None:
    """Write why a request was not carried out."""
    for name, value in error.headers.items():
        request.setHeader(name, value)
    answer(request, error.status, msgspec.json.encode(error.problem(request.request_id, incident)), _PROBLEM)


async def answer_stream(request: ApiRequest, status: int, stream: JsonStream) -> None:
    """Write pieces at the pace of the client.

    Raises:
        Exception: whatever the pieces raise before the first byte has gone out. Later the connection is cut, so that
            nobody takes half an answer for a whole one.
    """
    collected: list[bytes] = []
    size = 0
    flow: _Flow | None = None
    try:
        async with aclosing(stream.pieces) as source:
            async for piece in source:
                collected.append(piece)
                size += len(piece)
                if size < (stream.held if flow is None else _PIECE):
                    continue
                if flow is None:
                    if request.method == b"HEAD":
                        break
                    request.setResponseCode(status)
                    request.setHeader(b"Content-Type", JSON)
                    flow = _Flow()
                    request.registerProducer(flow, True)
                request.write(b"".join(collected))
                collected, size = [], 0
                await flow.open()
    except CancelledError:
        raise
    except Exception as error:
        if flow is None:
            raise
        if not isinstance(error, ReportedError):
            log_incident(_log, Failure())
        request.abort()
        # The connection's end cancels this handler; until then nothing may be added to what was sent.
        await Deferred()
    if flow is None:
        answer(request, status, b"".join(collected))
    else:
        request.write(b"".join(collected))
        request.unregisterProducer()


@implementer(IPushProducer)
class _Flow:
    """Lets a writer wait while the client does not read."""

    def __init__(self) -> None:
        self._paused: Deferred[None] | None = None

    async def open(self) -> None:
        while self._paused is not None:
            await self._paused

    def pauseProducing(self) -> None:
        if self._paused is None:
            self._paused = Deferred()

    def resumeProducing(self) -> None:
        paused, self._paused = self._paused, None
        if paused is not None:
            paused.callback(None)

    def stopProducing(self) -> None:
        """The client is gone: Klein cancels the handler, which may be waiting here."""
