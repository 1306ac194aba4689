"""One agent process: JSON lines to and from it, its output to the log, its exit noticed at once.

This module only transports: the listener of a request interprets its events.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import msgspec
from attrs import define, frozen
from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.interfaces import IProcessTransport, IReactorProcess, IReactorTime
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure

from pdm.workqueue.wire.agent_events import AgentEvent, ReadyEvent
from pdm.workqueue.wire.agent_requests import (
    LEASE_OVER_STATUS,
    LONGEST_LINE,
    CancelRequest,
    LeaseRequest,
    ProceedRequest,
    TapeRequest,
    WorkRequest,
)

#: Descriptors of the agent: requests in, stdout and stderr to the log, events out.
_REQUESTS, _NOISE, _EVENTS = 0, (1, 2), 3
#: Inherited lock: the instance stays locked while an agent, or a process that it started, is alive.
_LOCK = 4
_LONGEST_NOISE = 2000

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[AgentEvent] = msgspec.json.Decoder(AgentEvent)


class AgentStartError(Exception):
    """An agent could not be started; the text says why."""


class LeaseOverError(AgentStartError):
    """The lease of this daemon has ended: nothing may be transferred until it is renewed."""

    def __init__(self) -> None:
        super().__init__("the lease of this daemon is over")


class AgentMissingError(AgentStartError):
    """The program of an agent is not installed."""


@frozen
class AgentCommand:
    """How an agent is started.

    Attributes:
        environment: complete; nothing is inherited.
        lock_fd: descriptor of the instance lock that the agent inherits, or None.
    """

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    lock_fd: int | None = None


@define(eq=False)
class BatchListener:
    """Receives the events of one request to an agent.

    Attributes:
        on_events: called with events of the request that arrived together, in order.
        on_end: called with a sentence if the process dies; not after `AgentProcess.detach`.
        on_turn: called when no other request is before it.
        nearly_done: whether the agent may be given another request.
    """

    on_events: Callable[[Sequence[AgentEvent]], None]
    on_end: Callable[[str], None]
    on_turn: Callable[[], None] = lambda: None
    nearly_done: bool = False


class AgentProcess(ProcessProtocol):
    """A started agent.

    Attributes:
        ready: fires with the `ReadyEvent`, or fails with `AgentStartError`.
        ended: fires with a sentence once the process has exited.
        lease_over: whether it has exited because its lease ended.
    """

    _log = Logger()

    def __init__(self, command: AgentCommand) -> None:
        self.command = command
        self.ready: Deferred[ReadyEvent] = Deferred()
        self.ended: Deferred[str] = Deferred()
        #: By request id, in the order of execution.
        self._listeners: dict[int, BatchListener] = {}
        self.pid: int | None = None
        self.alive = False
        self.lease_over = False
        self._transport: IProcessTransport | None = None
        self._buffer: bytearray = bytearray()
        self._why: str | None = None

    def start(self, reactor: IReactorProcess) -> None:
        """Start the process as the leader of its own process group.

        Raises:
            AgentStartError: the program does not exist or cannot be run.
        """
        child_fds: dict[int, Any] = {_REQUESTS: "w", _EVENTS: "r", **dict.fromkeys(_NOISE, "r")}
        if self.command.lock_fd is not None:
            child_fds[_LOCK] = self.command.lock_fd
        # setsid(1) execs: the pid stays, and is also the process group id.
        setsid = shutil.which("setsid") or "/usr/bin/setsid"
        for program in (setsid, self.command.arguments[0]):
            # Checked here: in the child it would be too late for a useful error.
            if shutil.which(program) is None:
                raise AgentMissingError(f"{program} is not there, or cannot be run")
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

    def submit(self, request: WorkRequest | TapeRequest, listener: BatchListener) -> None:
        """Send a request; it is queued behind the running one."""
        if not self.alive:
            listener.on_end("the helper process ended before it was given the work")
            return
        self._listeners[request.id] = listener
        self._send(request)
        if len(self._listeners) == 1:
            listener.on_turn()

    def cancel(self, request_id: int, keys: Sequence[int] | None = None, *, keep: bool = False) -> None:
        """Cancel a request, or some items of it; ``keep``: without what was handed over to another service."""
        self._send(CancelRequest(request_id, None if keys is None else list(keys), keep))

    def withdraw(self, request_id: int, keys: Sequence[int]) -> None:
        """Cancel those of some items of a request that have not started."""
        self._send(CancelRequest(request_id, list(keys), waiting_only=True))

    def proceed(self, request_id: int, key: int) -> None:
        """Let the agent do what it has announced by `BegunEvent` or `HandOverEvent`."""
        self._send(ProceedRequest(request_id, key))

    def detach(self, request_id: int) -> None:
        """Remove the listener of a request that has finished or is not needed any more."""
        was_first = next(iter(self._listeners), None) == request_id
        self._listeners.pop(request_id, None)
        if was_first:
            for listener in self._listeners.values():
                listener.on_turn()
                break

    @property
    def takes_next(self) -> bool:
        """Whether its only request is nearly done."""
        return self.alive and len(self._listeners) == 1 and all(one.nearly_done for one in self._listeners.values())

    def hold_lease(self, until: float) -> None:
        """Tell the agent the end of the lease, by CLOCK_BOOTTIME; it exits then."""
        self._send(LeaseRequest(until))

    def _send(self, request: WorkRequest | TapeRequest | CancelRequest | LeaseRequest | ProceedRequest) -> None:
        # Dropped if the agent is dead: listeners learn of its end anyway.
        if self.alive and self._transport is not None:
            self._transport.writeToChild(_REQUESTS, _encoder.encode(request) + b"\n")

    def pause(self) -> None:
        """Stop reading events until `resume`: the agent blocks once the pipe is full."""
        self._pipe("pauseProducing")

    def resume(self) -> None:
        self._pipe("resumeProducing")

    def _pipe(self, action: str) -> None:
        pipe = getattr(self._transport, "pipes", {}).get(_EVENTS)
        if self.alive and pipe is not None:
            getattr(pipe, action)()

    def end(self) -> None:
        """Close its input: it exits after its requests."""
        if self.alive and self._transport is not None:
            self._transport.closeChildFD(_REQUESTS)

    def kill(self, why: str) -> None:
        """Kill the process group at once."""
        self._why = self._why or why
        if self.pid is None:
            return
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            # The group has exited, or the child has not called setsid yet.
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
        whole, _, rest = data.rpartition(b"\n")
        if whole:
            lines = bytes(self._buffer) + whole
            self._buffer = bytearray(rest)
            self._received(lines)
        else:
            self._buffer += data
        if len(self._buffer) > LONGEST_LINE:
            self._buffer.clear()
            self.kill(f"it wrote a line of more than {LONGEST_LINE} bytes")

    def _received(self, lines: bytes) -> None:
        events, invalid = _decoded(lines)
        for request_id, together in itertools.groupby(events, _request_of):
            if self._why is not None:
                return
            if request_id is None:
                for event in together:
                    if isinstance(event, ReadyEvent) and not self.ready.called:
                        self.ready.callback(event)
                continue
            listener = self._listeners.get(request_id)
            if listener is None:
                # Late events of a detached request.
                self._log.debug(
                    "agent {name}: events without a batch: {events!r}", name=self.command.name, events=list(together)
                )
                continue
            try:
                listener.on_events(list(together))
            except Exception:
                self._log.failure("agent {name}: events not handled", name=self.command.name)
                self.kill("the service could not handle its events")
        if invalid is not None:
            self.kill(invalid)

    def processExited(self, reason: Failure) -> None:
        # Not processEnded: it waits for the pipes, which a grandchild may keep open.
        self.alive = False
        if self.pid is not None:
            # Kill what it started, too.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        signal_number = getattr(reason.value, "signal", None)
        self.lease_over = getattr(reason.value, "exitCode", None) == LEASE_OVER_STATUS
        how = f"signal {signal_number}" if signal_number else f"exit status {getattr(reason.value, 'exitCode', '?')}"
        sentence = f"the helper process {self.pid} ended ({how}{'; ' + self._why if self._why else ''})"
        self._log.debug("agent {name}: {sentence}", name=self.command.name, sentence=sentence)
        if not self.ready.called:
            self.ready.errback(LeaseOverError() if self.lease_over else AgentStartError(sentence))
        listeners, self._listeners = self._listeners, {}
        for listener in listeners.values():
            listener.on_end(sentence)
        self.ended.callback(sentence)


def _request_of(event: AgentEvent) -> int | None:
    return None if isinstance(event, ReadyEvent) else event.id


def _decoded(lines: bytes) -> tuple[list[AgentEvent], str | None]:
    """The events up to the first invalid line, and what is wrong with that, if there is one."""
    try:
        # Decode all lines in one call: one by one would cost more than handling them.
        return _decoder.decode_lines(lines), None
    except (msgspec.DecodeError, UnicodeDecodeError):
        events = []
        for line in lines.split(b"\n"):
            try:
                events.append(_decoder.decode(line))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                return events, f"it wrote a line that is no event ({error}): {line[:200]!r}"
        raise


def watched_start(process: AgentProcess, reactor: IReactorTime, timeout_s: float) -> Deferred[ReadyEvent]:
    """The ``ready`` of a started process, which is killed if it is not ready within ``timeout_s`` seconds."""

    def too_slow() -> None:
        process.kill(f"not ready within {timeout_s:g} s")

    timer = reactor.callLater(timeout_s, too_slow)

    def stop_timer(result: ReadyEvent | Failure) -> ReadyEvent | Failure:
        if timer.active():
            timer.cancel()
        return result

    return process.ready.addBoth(stop_timer)
