"""Drives a helper as the daemon does: a real process, real pipes, the structs of the wire."""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec

from pdm.workqueue.domain.enums import ChecksumAlgorithm
from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.wire.agent_events import (
    AgentEvent,
    BegunEvent,
    CancelledEvent,
    DoneEvent,
    EntriesEvent,
    FailedEvent,
    FinishedEvent,
    RawEntry,
    ReadyEvent,
)
from pdm.workqueue.wire.agent_requests import (
    LONGEST_LINE,
    AgentRequest,
    CheckItem,
    CheckRequest,
    CopyItem,
    CopyRequest,
    DiscardRequest,
    ListRequest,
    MkdirRequest,
    PathItem,
    ProceedRequest,
    RemoveRequest,
    RenameItem,
    RenameRequest,
    TimeLimits,
    WorkRequest,
)

#: Generous for tests that are not about time.
LIMITS = TimeLimits(stall_s=25.0, total_s=120.0, least_rate=500_000.0)
_EVENT_TIMEOUT_S = 60.0
_UID = "0123456789abcdef"
#: Names that are legal, and have each broken some tool.
ODD_NAMES = [
    b"a b",
    b" lead",
    b"trail ",
    b"-dash",
    b"100%41",
    b"#?*;&'",
    b'"',
    b"new\nline",
    b"tab\t",
    b"cr\rx",
    b"back\\slash",
    b"[x]",
    b"~",
    b"\xe9",
    "é".encode(),
]


class HelperProcess:
    """A running helper.

    Every event is decoded as `AgentEvent`, so each test is also one of the contract.

    Args:
        arguments: after the interpreter.
        environment: on top of what a Python needs.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        events, written_by_helper = os.pipe()
        os.set_inheritable(written_by_helper, True)
        # The shell puts the pipe where the helper expects it, and is gone.
        move = f'exec 3>&{written_by_helper}; exec "$0" "$@"'
        self.process = subprocess.Popen(
            ["/bin/bash", "-c", move, sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(written_by_helper,),
            env={"PATH": os.defpath, "PYTHONPATH": str(Path.cwd()), **environment},
            start_new_session=True,
        )
        os.close(written_by_helper)
        self._events: queue.Queue[tuple[float, AgentEvent | None]] = queue.Queue()
        self._decoder = msgspec.json.Decoder(AgentEvent)
        self._reader = threading.Thread(target=self._read, args=(events,))
        self._ids = 0
        #: Whether it lets items begin that wait for that; and what they have found, by request and key.
        self.lets_go = True
        self.begun: dict[tuple[int, int], Any] = {}
        #: When the event given out last arrived (`time.monotonic`).
        self.at = 0.0
        self.noise = b""
        self._reader.start()

    def __enter__(self) -> Self:
        ready = self.event()
        assert isinstance(ready, ReadyEvent), self.end()
        self.tools = ready.tools
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> str:
        """Kill it; returns its noise."""
        self.process.kill()
        with self.process as process:
            # Unread input of the process does not matter.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()  # type: ignore[union-attr]
            self.noise += b"" if process.stdout.closed else process.stdout.read()  # type: ignore[union-attr]
        self._reader.join()
        return self.noise.decode(errors="replace")

    def _read(self, descriptor: int) -> None:
        with os.fdopen(descriptor, "rb") as lines:
            for line in lines:
                assert len(line) <= LONGEST_LINE
                self._events.put((time.monotonic(), self._decoder.decode(line)))
        self._events.put((time.monotonic(), None))

    def event(self, timeout_s: float = _EVENT_TIMEOUT_S) -> AgentEvent | None:
        """The next event; None once the pipe has closed. An item that is to begin is let go on."""
        while True:
            self.at, event = self._events.get(timeout=timeout_s)
            if not isinstance(event, BegunEvent) or not self.lets_go:
                return event
            self.begun[event.id, event.key] = event.found
            self.send(ProceedRequest(event.id, event.key))

    def new_id(self) -> int:
        self._ids += 1
        return self._ids

    def send(self, request: AgentRequest) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(request) + b"\n")
        self.process.stdin.flush()

    def rest(self, request_id: int) -> list[AgentEvent]:
        """All events of a request that are still to come, without `Finished`."""
        events: list[AgentEvent] = []
        while True:
            event = self.event()
            assert event is not None, f"the helper ended: {self.end()}"
            if isinstance(event, FinishedEvent):
                assert event.id == request_id
                return events
            assert not isinstance(event, ReadyEvent)
            assert event.id == request_id
            events.append(event)

    def run(self, request: WorkRequest) -> list[AgentEvent]:
        self.send(request)
        return self.rest(request.id)

    # -- the requests of most tests

    def list(
        self, url: str, depth: int | None = None, *, follow: bool = True, owners: bool = False, **limits: Any
    ) -> list[AgentEvent]:
        return self.run(ListRequest(self.new_id(), 0, url, depth, _limits(limits), follow=follow, owners=owners))

    def list_both(self, source: str, destination: str) -> Sequence[AgentEvent]:
        return self.run(ListRequest(self.new_id(), 0, source, None, LIMITS, destination=destination))

    def free_bytes(self, source: str, destination: str) -> int | None:
        """What is free at the destination of a copy, as its listing reports it."""
        request = ListRequest(self.new_id(), 0, source, None, LIMITS, True, destination, destination)
        done = self.run(request)[-1]
        assert isinstance(done, DoneEvent), done
        return done.free

    def copy(
        self,
        items: Sequence[CopyItem],
        overwrite: str = "never",
        verify: str = "checksum",
        *,
        checksum: ChecksumAlgorithm = ChecksumAlgorithm.ADLER32,
        **limits: Any,
    ) -> dict[int, AgentEvent]:
        """Copy; the outcome of each key.

        What has stalled is copied again, as by the service: a busy XRootD 5.5 forgets requests, also those of the
        server that reads from it.
        """
        found: dict[int, AgentEvent] = {}
        left = list(items)
        for is_last in (False, True):
            request = CopyRequest(self.new_id(), left, overwrite, verify, _limits(limits), checksum)  # type: ignore[arg-type]
            found |= outcomes(self.run(request))
            left = [_next_attempt(item) for item in items if _has_stalled(found.get(item.key))]
            if is_last or limits or not left:
                break
        return found

    def check(
        self,
        items: Sequence[CheckItem],
        at: str = "destination",
        checksum: ChecksumAlgorithm = ChecksumAlgorithm.ADLER32,
    ) -> dict[int, AgentEvent]:
        """Compare files with what is known of them; the outcome of each key."""
        request = CheckRequest(self.new_id(), list(items), FailureScope(at), LIMITS, checksum)
        return outcomes(self.run(request))

    def remove(self, *items: PathItem) -> dict[int, AgentEvent]:
        return outcomes(self.run(RemoveRequest(self.new_id(), list(items), LIMITS)))

    def discard(self, *urls: str) -> dict[int, AgentEvent]:
        items = [PathItem(number, url) for number, url in enumerate(urls)]
        return outcomes(self.run(DiscardRequest(self.new_id(), items, LIMITS)))

    def rename(self, source: str, destination: str, overwrite: str = "never") -> AgentEvent:
        items = [RenameItem(0, source, destination)]
        return outcomes(self.run(RenameRequest(self.new_id(), items, overwrite, LIMITS)))[0]  # type: ignore[arg-type]

    def make(self, *urls: str, parents: bool = False) -> dict[int, AgentEvent]:
        items = [PathItem(number, url, directory=True) for number, url in enumerate(urls)]
        return outcomes(self.run(MkdirRequest(self.new_id(), items, parents, LIMITS)))


def _has_stalled(event: AgentEvent | None) -> bool:
    return isinstance(event, FailedEvent) and event.fault.code == FailureCode.STALLED


def _next_attempt(item: CopyItem) -> CopyItem:
    return msgspec.structs.replace(item, temporary=f"{item.temporary}.part", stale=[*item.stale, item.temporary])


def _limits(changes: Mapping[str, Any]) -> TimeLimits:
    return msgspec.structs.replace(LIMITS, **changes)


def copy_item(key: int, source: str, destination: str, size: int, attempt: int = 1) -> CopyItem:
    """A copy as the movers ask for it."""
    directory = destination.rpartition("/")[0]
    names = [f"{directory}/.pdm-{_UID}.{key}.{number}.part" for number in range(1, attempt + 1)]
    return CopyItem(key, source, destination, names[-1], names[:-1], size)


def put(path: Path, content: bytes = b"content") -> Path:
    """A file with its directories."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def adler(content: bytes) -> str:
    """A checksum as `DoneEvent` has it."""
    return f"ADLER32:{zlib.adler32(content):08x}"


def digest(algorithm: ChecksumAlgorithm, content: bytes) -> str:
    """A checksum of any algorithm as `DoneEvent` has it."""
    if algorithm is ChecksumAlgorithm.ADLER32:
        return adler(content)
    return f"{algorithm}:{hashlib.new(algorithm.lower(), content, usedforsecurity=False).hexdigest()}"


def check_items(url_of: Callable[[Path], str], directory: Path) -> list[CheckItem]:
    """Files to check: ``good`` twice (by its checksum, and by its size only), an empty one, and three that fail.

    Of ``changed`` a byte differs, ``short`` has another size, ``gone`` is missing.
    """
    contents = {"good": b"content", "empty": b"", "changed": b"content", "short": b"content", "gone": b"content"}
    items = [
        CheckItem(key, url_of(directory / name), len(content), adler(content))
        for key, (name, content) in enumerate(contents.items())
    ]
    for name, content in (contents | {"changed": b"cOntent", "short": b"conten"}).items():
        if name != "gone":
            put(directory / name, content)
    return [*items, CheckItem(len(items), items[0].url, items[0].size), CheckItem(6, url_of(directory), 0)]


def assert_checked(ended: Mapping[int, AgentEvent], scope: str, judge: Callable[[AgentEvent], str]) -> None:
    """The outcomes of `check_items` are right."""
    for key, size, checksum in ((0, 7, adler(b"content")), (1, 0, adler(b"")), (5, 7, None)):
        done = ended[key]
        assert isinstance(done, DoneEvent), done
        assert (done.size, done.transferred, done.checksum, done.already_there) == (size, 0, checksum, True)
    codes = {2: "DIFFERS", 3: "DIFFERS", 4: "NOT_FOUND", 6: "IS_A_DIRECTORY"}
    assert {key: judge(ended[key]) for key in codes} == {key: f"{scope} {code}" for key, code in codes.items()}


def tree(directory: Path) -> dict[str, bytes]:
    """The content of all files below a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def outcomes(events: Sequence[AgentEvent]) -> dict[int, AgentEvent]:
    """The outcome of each key; fails if a key has none, two, or events after it."""
    ended: dict[int, AgentEvent] = {}
    seen: set[int] = set()
    for event in events:
        key = event.key  # type: ignore[union-attr]
        assert key not in ended, f"{event} after {ended[key]}"
        seen.add(key)
        if isinstance(event, (DoneEvent, FailedEvent, CancelledEvent)):
            ended[key] = event
    assert seen == set(ended)
    return ended


def entries(events: Sequence[AgentEvent], *, destination: bool = False) -> dict[str, RawEntry]:
    """The entries of a listing, which must have been done, by path; of its source, or of the destination."""
    assert isinstance(events[-1], DoneEvent), events[-1]
    listed = [event for event in events if isinstance(event, EntriesEvent)]
    assert [event.destination for event in listed] == sorted((event.destination for event in listed), reverse=True)
    found = [entry for event in listed if event.destination is destination for entry in event.entries]
    by_path = {entry.path: entry for entry in found}
    assert len(by_path) == len(found), "an entry came twice"
    return by_path


def fault(event: AgentEvent) -> tuple[str, str | int | None]:
    """Scope of a failure, and its code or error number."""
    assert isinstance(event, FailedEvent), event
    return event.fault.scope, event.fault.code or event.fault.errno
