"""A tape system by the WLCG tape REST API (v1), beside the storage server whose files it keeps.

A file that is only on tape is on disk as zeros of its size, so that a copy that does not wait for it is noticed.
"""

from __future__ import annotations

import itertools
import json
import ssl
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote

from attrs import define, field

from pdm.testgrid.identities import HostFiles
from tests.support.loopback import HttpHandler, LoopbackServer, tls_server

#: Seconds for which a hanging request hangs.
HANG_S = 5.0


@define(eq=False)
class StageRequest:
    """A stage request: its paths, and those that were cancelled and released."""

    paths: list[str]
    lifetimes: list[str]
    cancelled: set[str] = field(factory=set)
    released: set[str] = field(factory=set)


class TapeServer:
    """``https://localhost:PORT``, with its API below ``/api/v1``.

    Attributes:
        recall_s: seconds until a requested file is on disk; None for never.
        migrate_s: seconds until a file that was asked about for the first time is on tape; None for never.
        faults: action → what is done with the next requests: ``500``, a number for 429 with that ``Retry-After``,
            ``hang``, ``lost`` (carried out, and the connection closed), ``garbage``, ``deep``, ``fewer`` and
            ``reversed``.
        recalls: path → how often it was brought from tape.
        log: actions that were carried out, in their order, and how many paths each had.
        arrived: action → requests that have come; a lost one is carried out, and then its answer is delayed.
        errors: path → error text of its recall.
        states: path → what a request says of its state.
    """

    def __init__(self, host: HostFiles) -> None:
        self.recall_s: float | None = 0.0
        self.migrate_s: float | None = 0.0
        self.faults: dict[str, deque[Any]] = defaultdict(deque)
        self.requests: dict[str, StageRequest] = {}
        self.deleted: list[StageRequest] = []
        self.recalls: Counter[str] = Counter()
        self.log: list[tuple[str, int]] = []
        self.arrived: Counter[str] = Counter()
        self.errors: dict[str, str] = {}
        self.states: dict[str, str] = {}
        self.localities: dict[str, str] = {}
        self.names_api = True
        self.resets = 0
        self._contents: dict[str, bytes] = {}
        self._due: dict[str, float] = {}
        self._first_asked: dict[str, float] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(host.certificate, host.key)
        handler = type("Handler", (_Handler,), {"tape": self})
        self._http = LoopbackServer(tls_server(handler, context, handshake_in_thread=True), "https")

    @property
    def root(self) -> str:
        return self._http.url

    @property
    def api(self) -> str:
        return f"{self._http.url}/api/v1"

    @contextmanager
    def running(self) -> Iterator[TapeServer]:
        with self._http:
            yield self

    def reset(self) -> None:
        """Forget all but the files."""
        self.resets += 1
        self.recall_s = self.migrate_s = 0.0
        self.names_api = True
        for part in (self.faults, self.requests, self.deleted, self.recalls, self.log, self.arrived, self.errors):
            part.clear()
        self.states.clear()
        self.localities.clear()
        self._due.clear()
        self._first_asked.clear()

    def put_to_tape(self, path: Path) -> Path:
        """Leave only zeros of a file on disk."""
        self._contents[str(path)] = path.read_bytes()
        with path.open("r+b") as file:
            file.write(bytes(len(self._contents[str(path)])))
        self.localities[str(path)] = "TAPE"
        return path

    def count(self, action: str) -> int:
        return sum(1 for each, _ in self.log if each == action)

    # -- state

    def _locality(self, path: str) -> tuple[str, str]:
        """Locality and error of a path, as of now."""
        due = self._due.get(path)
        if self.localities.get(path) == "TAPE" and due is not None and time.monotonic() >= due:
            if path in self._contents:
                with Path(path).open("r+b") as file:
                    file.write(self._contents[path])
            self.localities[path] = "DISK_AND_TAPE"
            self.recalls[path] += 1
            del self._due[path]
        if path in self.localities:
            return self.localities[path], ""
        if not Path(path).exists():
            return "", "USER ERROR: file does not exist or is not accessible to you"
        first = self._first_asked.setdefault(path, time.monotonic())
        is_there = self.migrate_s is not None and time.monotonic() >= first + self.migrate_s
        return ("DISK_AND_TAPE" if is_there else "DISK"), ""

    def _stage(self, body: Any) -> Any:
        name = f"request {next(self._numbers)}"
        paths = [one["path"] for one in body["files"]]
        self.requests[name] = StageRequest(paths, [one["diskLifetime"] for one in body["files"]])
        for path in paths:
            if self.recall_s is not None and self.localities.get(path) == "TAPE" and path not in self.errors:
                self._due.setdefault(path, time.monotonic() + self.recall_s)
        return {"requestId": name}

    def _status(self, name: str) -> Any:
        request = self.requests[name]
        files = []
        for path in request.paths:
            locality, error = self._locality(path)
            one = {"path": path, "onDisk": locality in ("DISK", "DISK_AND_TAPE")}
            if error or path in self.errors:
                one["error"] = error or self.errors[path]
            if path in self.states:
                one["state"] = self.states[path]
            files.append(one)
        return {"id": name, "createdAt": 1, "startedAt": 1, "files": files}

    def _archiveinfo(self, paths: list[str]) -> Any:
        found = []
        for path in paths:
            locality, error = self._locality(path)
            found.append({"path": path, "error": error} if error else {"path": path, "locality": locality})
        return found

    def act(self, action: str, name: str, body: Any) -> tuple[int, Any]:
        """Carry out a request; status and body of the answer."""
        with self._lock:
            paths = [one["path"] for one in body["files"]] if action == "stage" else (body or {}).get("paths", [])
            self.log.append((action, len(paths)))
            if action == "discover":
                endpoint = {"uri": self.api, "version": "v1", "metadata": {}}
                return (200, {"sitename": "test", "endpoints": [endpoint]}) if self.names_api else (404, {})
            if action == "stage":
                return 201, self._stage(body)
            if action == "archiveinfo":
                return 200, self._archiveinfo(paths)
            request = self.requests.get(name)
            if request is None:
                return 404, {"title": "no such request"}
            if not set(paths) <= set(request.paths):
                return 400, {"title": "a path is not of this request"}
            if action == "status":
                return 200, self._status(name)
            if action == "delete":
                self.deleted.append(self.requests.pop(name))
            elif action == "cancel":
                request.cancelled |= set(paths)
            else:
                request.released |= set(paths)
            return 200, None

    def next_fault(self, action: str) -> Any:
        with self._lock:
            return self.faults[action].popleft() if self.faults[action] else None


class _Handler(HttpHandler):
    tape: TapeServer

    def serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        action, name = _action(self.command, self.path)
        fault = self.tape.next_fault(action)
        self.tape.arrived[action] += 1
        if fault == "hang":
            test = self.tape.resets
            time.sleep(HANG_S)
            if self.tape.resets != test:
                # Of an earlier test.
                self.close_connection = True
                return
        elif fault == "500":
            self._answer(500, {"title": "internal"})
            return
        elif isinstance(fault, int):
            self._answer(429, {"title": "too many requests"}, {"Retry-After": str(fault)})
            return
        status, content = self.tape.act(action, name, body)
        if fault in ("hang", "lost"):
            self.close_connection = True
            return
        if fault == "garbage":
            content = "nothing" if action == "archiveinfo" else {"files": [7], "requestId": ["x"]}
        if fault == "deep":
            self._send(200, b'{"files": [], "more": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")
            return
        if fault in ("fewer", "reversed"):
            files = content["files"] if action == "status" else content
            files[:] = files[1:] if fault == "fewer" else files[::-1]
        self._answer(status, content)

    def _answer(self, status: int, content: Any, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        self._send(status, b"" if content is None else json.dumps(content).encode(), headers)

    def _send(self, status: int, text: bytes, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(text))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(text)


def _action(method: str, path: str) -> tuple[str, str]:
    """The action of a request, and the name of the stage request that it is about."""
    parts = [unquote(part) for part in path.split("/")[1:]]
    if parts[0] == ".well-known":
        return "discover", ""
    match method, *parts[2:]:
        case "POST", "archiveinfo":
            return "archiveinfo", ""
        case "POST", "stage":
            return "stage", ""
        case "GET", "stage", name:
            return "status", name
        case "DELETE", "stage", name:
            return "delete", name
        case "POST", "stage", name, "cancel":
            return "cancel", name
        case "POST", "release", name:
            return "release", name
    return "options", ""
