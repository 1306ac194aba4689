"""Third-party transfer of one file: the bytes are sent from server to server, and the destination reports markers.

A transfer whose connections are lost is resumed (REST), if the destination has reported which bytes it has, and has
replied that its transfer ended. A session that is merely lost might write to the file after it was verified.
"""

from __future__ import annotations

import contextlib
import errno
import re
import time
from collections.abc import Callable

from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.helpers.gridftp.connections import server_path
from pdm.workqueue.helpers.gridftp.control import ControlChannel
from pdm.workqueue.helpers.gridftp.replies import Reply, errno_of_reply, refusal
from pdm.workqueue.helpers.gridftp.session import ControlSession
from pdm.workqueue.helpers.storage import ProgressCallback, StorageError, Timeouts

#: Interval in seconds at which the length of the file at the destination is requested: markers arrive every 5 s only.
_MEASURE_EVERY_S = 1.0
#: Timeout of such a request in seconds.
_MEASURE_S = 5.0
#: Servers send performance markers every 5 s: two of them may be missed.
_LEAST_MARKER_STALL_S = 11.0
#: Seconds to wait for the other server, when one reports a failure without a reason.
_OTHER_S = 1.0
#: How many times a transfer is resumed after its connections were lost.
_MOST_RESTARTS = 5
_PERFORMANCE_MARKER, _RANGE_MARKER = 112, 111
_STRIPE = re.compile(r"Stripe Index: *(\d{1,9})\b.*Stripe Bytes Transferred: *(\d{1,19})\b", re.DOTALL | re.IGNORECASE)
_RANGE = re.compile(r"(\d{1,19})-(\d{1,19})")
_SIZE = re.compile(r"213 ([0-9]{1,19})\Z")
#: Errors of the connection between the servers.
_OF_THE_CONNECTION = frozenset(
    {errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH}
)


class TransferMarkers:
    """The markers of the destination.

    Attributes:
        ranges: received bytes, as pairs of first and end, in ascending order.
    """

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []
        self._stripes: dict[int, int] = {}
        self._before = 0

    @property
    def received(self) -> int:
        """Number of bytes that have arrived."""
        return max(self._before + sum(self._stripes.values()), self.kept)

    @property
    def kept(self) -> int:
        """Number of bytes that need not be sent again."""
        return sum(end - first for first, end in self.ranges)

    @property
    def resume_at(self) -> int:
        """Offset of the first byte that must be sent again."""
        return self.ranges[0][1] if self.ranges and self.ranges[0][0] == 0 else 0

    def take(self, reply: Reply) -> None:
        """Add a marker."""
        if reply.code == _PERFORMANCE_MARKER:
            found = _STRIPE.search(reply.text)
            if found is not None:
                self._stripes[int(found.group(1))] = int(found.group(2))
        elif reply.code == _RANGE_MARKER:
            told = [(int(first), int(end)) for first, end in _RANGE.findall(reply.text)]
            self.ranges = _merged([*self.ranges, *((first, end) for first, end in told if first < end)])

    def restart(self) -> None:
        """Prepare to send the missing ranges."""
        self._stripes.clear()
        self._before = self.kept

    def restart_marker(self) -> bytes:
        """The argument of REST."""
        return ",".join(f"{first}-{end}" for first, end in self.ranges).encode()


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((first, end))
    return merged


class _BrokenTransferError(Exception):
    """The connections were lost.

    Attributes:
        error: the reported error.
        is_over: whether the destination itself has ended the transfer.
    """

    def __init__(self, error: StorageError, *, is_over: bool) -> None:
        super().__init__(error.message)
        self.error = error
        self.is_over = is_over


class ThirdPartyTransfer:
    """The transfer of one file.

    Args:
        session: with both servers.
        source: URL.
        temporary: URL of the temporary file.
        timeouts: for the transfer.
        arrived: called with the number of bytes that have arrived.
        log: called with a line for each resumption.

    Attributes:
        begun: whether any byte has arrived.
        restarts: number of times it was resumed.
    """

    def __init__(
        self,
        session: ControlSession,
        source: str,
        temporary: str,
        timeouts: Timeouts,
        arrived: ProgressCallback,
        log: Callable[[str], None],
    ) -> None:
        self.begun = False
        self.restarts = 0
        self._session = session
        self._urls = {FailureScope.SOURCE: source, FailureScope.DESTINATION: temporary}
        self._timeouts = timeouts
        self._arrived = arrived
        self._log = log
        self._markers = TransferMarkers()
        self._replies: dict[FailureScope, Reply] = {}
        self._refused_at = 0.0
        self._received = 0
        self._moved_at = 0.0
        self._measured_at = 0.0
        #: Whether the destination reports the length of the file; False after one error.
        self._measures = True

    def run(self, may_restart: Callable[[ControlChannel, ControlChannel], bool]) -> None:
        """Run the transfer.

        Args:
            may_restart: whether the two servers can verify a file that was sent in parts.

        Raises:
            StorageError: with the scope of the server at fault, if that is known.
            StoppedError: it was interrupted.
        """
        while True:
            kept = self._markers.kept
            channels = self._session.pair(
                self._urls[FailureScope.SOURCE], self._urls[FailureScope.DESTINATION], self._timeouts
            )
            try:
                self._once(*channels)
            except _BrokenTransferError as broken:
                progressed = self._markers.kept > kept
                may = broken.is_over and progressed and self.restarts < _MOST_RESTARTS and may_restart(*channels)
                if not may:
                    raise broken.error from None
                self._log(
                    f"{broken.error.message}; the transfer resumes at byte {self._markers.resume_at}:"
                    f" {self._markers.kept} bytes are at the destination"
                )
            else:
                return
            self.restarts += 1
            self._markers.restart()

    def _once(self, at_source: ControlChannel, at_destination: ControlChannel) -> None:
        self._replies.clear()
        self._moved_at = self._measured_at = time.monotonic()
        channels = {FailureScope.DESTINATION: at_destination, FailureScope.SOURCE: at_source}
        commands = {FailureScope.DESTINATION: b"STOR ", FailureScope.SOURCE: b"RETR "}
        for scope, channel in channels.items():
            if self._markers.ranges:
                channel.send(b"REST " + self._markers.restart_marker(), lambda reply: None)
            command = commands[scope] + server_path(self._urls[scope])
            channel.send(command, self._noting(scope), None, self._markers.take, many_lines=True)
        # The source sends no reply during a transfer: arriving bytes show that it is alive.
        endless = Timeouts(float("inf"), 0.0, float("inf"))
        complete = False
        try:
            self._session.run((at_source, at_destination), endless, self._watch, keep=True)
            complete = True
        except StorageError as error:
            if error.code is not None or error.scope is not None or not error.lost:
                raise
            self._hear(at_destination)
            self._raise_named()
            error.code = FailureCode.CONNECTION
            raise _BrokenTransferError(error, is_over=FailureScope.DESTINATION in self._replies) from None
        finally:
            if not complete:
                self._session.connections.drop(at_source, at_destination)

    def _hear(self, at_destination: ControlChannel) -> None:
        """Wait up to `_OTHER_S` for the destination's reply, after a connection was lost."""
        if FailureScope.DESTINATION not in self._replies:
            soon = Timeouts(_OTHER_S, 0.0, time.monotonic() + _OTHER_S)
            with contextlib.suppress(StorageError):
                self._session.run((at_destination,), soon, keep=True)

    def _noting(self, scope: FailureScope) -> Callable[[Reply], None]:
        def answered(reply: Reply) -> None:
            self._replies[scope] = reply
            if not reply.good and not self._refused_at:
                self._refused_at = time.monotonic()

        self._refused_at = 0.0
        return answered

    def _watch(self) -> None:
        now = time.monotonic()
        if self._refused_at:
            self._judge(now)
            return
        if len(self._replies) == len(self._urls):
            return
        measured: int | None = None
        if self._measures and not self._replies and now - self._measured_at > _MEASURE_EVERY_S:
            measured = self._length_so_far()
            self._measures = measured is not None
            self._measured_at = now = time.monotonic()
        received = max(self._markers.received, measured or 0)
        if received > self._received:
            self._received, self._moved_at, self.begun = received, now, True
            self._arrived(received)
        stall_s = self._timeouts.stall_s if self._measures else max(self._timeouts.stall_s, _LEAST_MARKER_STALL_S)
        if now - self._moved_at > stall_s:
            raise StorageError(
                f"no byte arrived for {stall_s:.0f} s", code=FailureCode.STALLED, scope=FailureScope.TRANSFER, lost=True
            )
        if now > self._timeouts.until:
            why = f"not finished in time; {self._received} bytes had arrived"
            raise StorageError(why, code=FailureCode.TIMEOUT, scope=FailureScope.TRANSFER, lost=True)

    def _judge(self, now: float) -> None:
        """Raise the error if its reason is known, or if no further reply will arrive."""
        errors = self._raise_named()
        if len(self._replies) < len(self._urls) and now - self._refused_at < _OTHER_S:
            return
        for scope, error in errors.items():
            if not error.lost and error.errno is None:
                raise error.at(scope)
        error = next(iter(errors.values()))
        error.errno = None
        error.code = FailureCode.CONNECTION
        raise _BrokenTransferError(error, is_over=FailureScope.DESTINATION in self._replies)

    def _raise_named(self) -> dict[FailureScope, StorageError]:
        """Raise the error of a server that gives a reason; returns the errors that give none."""
        errors = {scope: refusal(reply) for scope, reply in self._replies.items() if not reply.good}
        for scope, error in errors.items():
            if error.errno is not None and error.errno not in _OF_THE_CONNECTION:
                raise error.at(scope)
        return errors

    def _length_so_far(self) -> int | None:
        """Length in bytes of the temporary file; None if the server does not report it at once."""
        until = min(self._timeouts.until, time.monotonic() + _MEASURE_S)
        temporary = self._urls[FailureScope.DESTINATION]
        try:
            reply = self._session.ask(
                temporary, b"SIZE " + server_path(temporary), timeouts=Timeouts(_MEASURE_S, 0.0, until), beside=True
            )
        except StorageError:
            return None
        found = _SIZE.match(reply.text)
        if found is None:
            return 0 if errno_of_reply(reply.text) == errno.ENOENT else None
        return int(found.group(1))


def size_in(reply: Reply) -> int:
    """Bytes in a reply to SIZE; raises `StorageError`."""
    if not reply.good:
        raise refusal(reply)
    found = _SIZE.match(reply.text)
    if found is None:
        raise StorageError(f"the server gives no size: {reply.text[:200]}", code=FailureCode.BAD_LISTING)
    return int(found.group(1))
