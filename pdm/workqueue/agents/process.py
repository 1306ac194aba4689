"""One agent process: lines of JSON to and from it, its noise to the log, its end noticed at once.

This module only carries: what the events mean is decided by who lent the agent.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import msgspec
from attrs import frozen
from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.interfaces import IProcessTransport, IReactorProcess, IReactorTime
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure

from pdm.workqueue.wire.agent_messages import LONGEST_LINE, Event, Ready, Request

#: The agent's descriptors: requests in, noise, noise, events out.
_REQUESTS, _NOISE, _EVENTS = 0, (1, 2), 3
#: The descriptor by which an agent, and all it starts, keeps the instance locked while it lives.
_LOCK = 4
_LONGEST_NOISE = 2000

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)


class AgentStartError(Exception):
    """An agent could not be started; the text says why."""


@frozen
class AgentCommand:
    """How an agent is started.

    Attributes:
        name: for the log.
        arguments: program and arguments.
        environment: all of its environment; nothing is inherited.
        lock_fd: a descriptor of the instance's lock that the agent inherits, or None.
    """

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    lock_fd: int | None = None


class AgentProcess(ProcessProtocol):
    """A started agent.

    Attributes:
        ready: fires with the `Ready` event, or fails with `AgentStartError`.
        ended: fires with a sentence about its end once the process is gone.
        on_event: called with each further event.
        on_end: called with the same sentence as `ended`; set anew by each borrower, so that none is kept for long.
    """

    _log = Logger()

    def __init__(self, command: AgentCommand) -> None:
        self.command = command
        self.ready: Deferred[Ready] = Deferred()
        self.ended: Deferred[str] = Deferred()
        self.on_event: Callable[[Event], None] = self._unexpected
        self.on_end: Callable[[str], None] = _nobody
        self.pid: int | None = None
        self.alive = False
        self._transport: IProcessTransport | None = None
        self._buffer: bytearray = bytearray()
        self._why: str | None = None

    def start(self, reactor: IReactorProcess) -> None:
        """Start the process, as the leader of a process group of its own.

        Raises:
            AgentStartError: there is no such program.
        """
        child_fds: dict[int, Any] = {_REQUESTS: "w", _EVENTS: "r", **dict.fromkeys(_NOISE, "r")}
        if self.command.lock_fd is not None:
            child_fds[_LOCK] = self.command.lock_fd
        # The pid stays the same through setsid(1), so that it is also the number of the group.
        setsid = shutil.which("setsid") or "/usr/bin/setsid"
        try:
            transport = reactor.spawnProcess(
                self,
                setsid,
                [setsid, *self.command.arguments],
                env=dict(self.command.environment),
                childFDs=child_fds,
            )
        except OSError as error:
            raise AgentStartError(f"cannot start {setsid}: {error.strerror}") from error
        self._transport = transport
        self.pid = cast(int, transport.pid)
        self.alive = True
        self._log.debug("agent {name} started, pid {pid}", name=self.command.name, pid=self.pid)

    def send(self, request: Request) -> None:
        """Write a request; one to a dead agent is dropped, for its end is being reported."""
        if self.alive and self._transport is not None:
            self._transport.writeToChild(_REQUESTS, _encoder.encode(request) + b"\n")

    def give_back(self) -> None:
        """Forget the borrower."""
        self.on_event = self._unexpected
        self.on_end = _nobody

    def pause(self) -> None:
        """Read no more events until `resume`: the agent blocks once the pipe is full."""
        self._pipe("pauseProducing")

    def resume(self) -> None:
        self._pipe("resumeProducing")

    def _pipe(self, action: str) -> None:
        pipe = getattr(self._transport, "pipes", {}).get(_EVENTS)
        if self.alive and pipe is not None:
            getattr(pipe, action)()

    def end(self) -> None:
        """Ask it to leave: its requests end."""
        if self.alive and self._transport is not None:
            self._transport.closeChildFD(_REQUESTS)

    def kill(self, why: str) -> None:
        """Kill it and all that it started, at once."""
        self._why = self._why or why
        if self.pid is None:
            return
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            # The group is gone, or the child has not come as far as setsid.
            if self.alive and self._transport is not None:
                with contextlib.suppress(ProcessExitedAlready):
                    self._transport.signalProcess("KILL")

    # -- what Twisted calls

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        if childFD != _EVENTS:
            for line in data[:_LONGEST_NOISE].splitlines():
                self._log.info(
                    "agent {name} pid {pid} says {line!r}",
                    name=self.command.name,
                    pid=self.pid,
                    line=line.decode("utf-8", "replace"),
                )
            return
        self._buffer += data
        *lines, rest = bytes(self._buffer).split(b"\n")
        self._buffer = bytearray(rest)
        for line in lines:
            if self._why is not None:
                return
            self._received(line)
        if len(self._buffer) > LONGEST_LINE:
            self._buffer.clear()
            self.kill(f"it wrote a line of more than {LONGEST_LINE} bytes")

    def _received(self, line: bytes) -> None:
        try:
            event = _decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self.kill(f"it wrote a line that is no event ({error}): {line[:200]!r}")
            return
        if isinstance(event, Ready):
            if not self.ready.called:
                self.ready.callback(event)
            return
        try:
            self.on_event(event)
        except Exception:
            self._log.failure("agent {name}: event not handled", name=self.command.name)
            self.kill("the service could not handle its event")

    def _unexpected(self, event: Event) -> None:
        # A batch that was given up may still have events on their way.
        self._log.debug("agent {name}: event without a batch: {event!r}", name=self.command.name, event=event)

    def processExited(self, reason: Failure) -> None:
        # Not processEnded: that waits for the pipes, which a grandchild may hold open for long.
        self.alive = False
        if self.pid is not None:
            # Whatever it started ends with it.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        signal_number = getattr(reason.value, "signal", None)
        how = f"signal {signal_number}" if signal_number else f"exit status {getattr(reason.value, 'exitCode', '?')}"
        sentence = f"the helper process {self.pid} ended ({how}{'; ' + self._why if self._why else ''})"
        self._log.debug("agent {name}: {sentence}", name=self.command.name, sentence=sentence)
        if not self.ready.called:
            self.ready.errback(AgentStartError(sentence))
        self.on_end(sentence)
        self.ended.callback(sentence)


def _nobody(sentence: str) -> None:
    """An agent that nobody has borrowed ends unwatched."""


def watched_start(process: AgentProcess, reactor: IReactorTime, timeout_s: float) -> Deferred[Ready]:
    """The ``ready`` of a started process; one that is silent for ``timeout_s`` seconds is killed."""

    def too_slow() -> None:
        process.kill(f"not ready within {timeout_s:g} s")

    timer = reactor.callLater(timeout_s, too_slow)

    def stop_timer(result: Ready | Failure) -> Ready | Failure:
        if timer.active():
            timer.cancel()
        return result

    return process.ready.addBoth(stop_timer)
