"""One agent process: lines of JSON to and from it, its noise to the log, its end noticed at once.

This module only carries: what the events mean is decided by who lent the agent.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import msgspec
from attrs import define, frozen
from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.interfaces import IProcessTransport, IReactorProcess, IReactorTime
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure

from pdm.workqueue.wire.agent_messages import (
    LEASE_OVER_STATUS,
    LONGEST_LINE,
    AgentEvent,
    CancelRequest,
    LeaseRequest,
    ProceedRequest,
    ReadyEvent,
    WorkRequest,
)

#: The agent's descriptors: requests in, noise, noise, events out.
_REQUESTS, _NOISE, _EVENTS = 0, (1, 2), 3
#: The descriptor by which an agent, and all it starts, keeps the instance locked while it lives.
_LOCK = 4
_LONGEST_NOISE = 2000

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[AgentEvent] = msgspec.json.Decoder(AgentEvent)


class AgentStartError(Exception):
    """An agent could not be started; the text says why."""


class LeaseOverError(AgentStartError):
    """The lease of this daemon is over: nothing may be moved until it is renewed."""

    def __init__(self) -> None:
        super().__init__("the lease of this daemon is over")


class AgentMissingError(AgentStartError):
    """The program of an agent is not installed."""


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


@define(eq=False)
class BatchListener:
    """Who has given an agent work, and is told what becomes of it.

    Attributes:
        on_event: called with each event about the work.
        on_end: called with a sentence when the process is gone; not after the work was taken back.
        on_turn: called when there is no other work before it any more.
        nearly_done: whether the agent may be given the next work by now.
    """

    on_event: Callable[[AgentEvent], None]
    on_end: Callable[[str], None]
    on_turn: Callable[[], None] = lambda: None
    nearly_done: bool = False


class AgentProcess(ProcessProtocol):
    """A started agent.

    Attributes:
        ready: fires with the `ReadyEvent` event, or fails with `AgentStartError`.
        ended: fires with a sentence about its end once the process is gone.
        lease_over: whether it has ended itself because the lease that it was told of was over.
    """

    _log = Logger()

    def __init__(self, command: AgentCommand) -> None:
        self.command = command
        self.ready: Deferred[ReadyEvent] = Deferred()
        self.ended: Deferred[str] = Deferred()
        #: By the number of the request, the one that is carried out first.
        self._listeners: dict[int, BatchListener] = {}
        self.pid: int | None = None
        self.alive = False
        self.lease_over = False
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
        for program in (setsid, self.command.arguments[0]):
            # The child would find out too late for an error that says what is missing.
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

    def submit(self, request: WorkRequest, listener: BatchListener) -> None:
        """Hand work over; what is under way is carried out first."""
        if not self.alive:
            listener.on_end("the helper process ended before it was given the work")
            return
        self._listeners[request.id] = listener
        self._send(request)
        if len(self._listeners) == 1:
            listener.on_turn()

    def cancel(self, request_id: int, keys: Sequence[int] | None = None) -> None:
        """Ask it to end some work, or some items of it."""
        self._send(CancelRequest(request_id, None if keys is None else list(keys)))

    def proceed(self, request_id: int, key: int) -> None:
        """Let it do what it has told of by `Begun`."""
        self._send(ProceedRequest(request_id, key))

    def detach(self, request_id: int) -> None:
        """Forget who gave some work: it is finished, or nobody waits for it any more."""
        was_first = next(iter(self._listeners), None) == request_id
        self._listeners.pop(request_id, None)
        if was_first:
            for listener in self._listeners.values():
                listener.on_turn()
                break

    @property
    def takes_next(self) -> bool:
        """Whether the only work that it has is nearly done."""
        return self.alive and len(self._listeners) == 1 and all(one.nearly_done for one in self._listeners.values())

    def hold_lease(self, until: float) -> None:
        """Tell it until when it may work, a moment of CLOCK_BOOTTIME; it ends itself then."""
        self._send(LeaseRequest(until))

    def _send(self, request: WorkRequest | CancelRequest | LeaseRequest | ProceedRequest) -> None:
        # To a dead agent it is dropped, for its end is being reported.
        if self.alive and self._transport is not None:
            self._transport.writeToChild(_REQUESTS, _encoder.encode(request) + b"\n")

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
        for event in self._decoded(lines):
            if self._why is not None:
                return
            if isinstance(event, ReadyEvent):
                if not self.ready.called:
                    self.ready.callback(event)
                continue
            listener = self._listeners.get(event.id)
            if listener is None:
                # A batch that was given up may still have events on their way.
                self._log.debug("agent {name}: event without a batch: {event!r}", name=self.command.name, event=event)
                continue
            try:
                listener.on_event(event)
            except Exception:
                self._log.failure("agent {name}: event not handled", name=self.command.name)
                self.kill("the service could not handle its event")

    def _decoded(self, lines: bytes) -> Iterator[AgentEvent]:
        try:
            # All at once: one by one they would cost more than what is done about them.
            yield from _decoder.decode_lines(lines)
        except (msgspec.DecodeError, UnicodeDecodeError):
            # What comes before the bad one counts.
            for line in lines.split(b"\n"):
                try:
                    yield _decoder.decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    self.kill(f"it wrote a line that is no event ({error}): {line[:200]!r}")
                    return

    def processExited(self, reason: Failure) -> None:
        # Not processEnded: that waits for the pipes, which a grandchild may hold open for long.
        self.alive = False
        if self.pid is not None:
            # Whatever it started ends with it.
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


def watched_start(process: AgentProcess, reactor: IReactorTime, timeout_s: float) -> Deferred[ReadyEvent]:
    """The ``ready`` of a started process; one that is silent for ``timeout_s`` seconds is killed."""

    def too_slow() -> None:
        process.kill(f"not ready within {timeout_s:g} s")

    timer = reactor.callLater(timeout_s, too_slow)

    def stop_timer(result: ReadyEvent | Failure) -> ReadyEvent | Failure:
        if timer.active():
            timer.cancel()
        return result

    return process.ready.addBoth(stop_timer)
