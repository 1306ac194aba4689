"""A lean client: one kept connection with a user's certificate, nothing but the standard library and msgspec."""

from __future__ import annotations

import http.client
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import msgspec
from figures import BenchmarkError

from pdm.testgrid.service import TestService

API = "/workqueue/api/v1.0"
FINAL = ("DONE", "FAILED", "CANCELLED")
#: A job is looked at when its age has grown by this part, which is how late its end may be seen. Each look costs the
#: daemon something: more of them would measure themselves.
_GROWTH = 0.02
_LONGEST_WAIT_S = 60
_LEAST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.1
#: After so much silence a request takes a new connection: the service ends those that idle, and a POST that meets the
#: end of one cannot be sent twice.
_KEPT_S = 10


def tls_context(service: TestService, user: str) -> ssl.SSLContext:
    """What a client needs to be this user."""
    certificate, key = service.credentials(user)
    context = ssl.create_default_context(cafile=str(service.directory / "certificates" / "ca.crt"))
    context.load_cert_chain(certificate, key)
    return context


class Caller:
    """A user at a daemon."""

    def __init__(self, service: TestService, user: str) -> None:
        parts = urlsplit(service.url or "")
        self.logs: Path = service.directory / "var" / "logs"
        self._connection = http.client.HTTPSConnection(
            parts.hostname or "", parts.port, timeout=120, context=tls_context(service, user)
        )
        self._answered_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def call(self, method: str, path: str, body: object = None) -> Any:
        """One request; the decoded answer.

        Raises:
            BenchmarkError: the status is not 200.
        """
        content = None if body is None else msgspec.json.encode(body)
        headers = {} if body is None else {"Content-Type": "application/json"}
        try:
            answer = self._exchange(method, path, content, headers)
        except (http.client.RemoteDisconnected, ConnectionError):
            # A kept connection that was silent for too long; only questions are asked twice.
            self._connection.close()
            if method != "GET":
                raise
            answer = self._exchange(method, path, content, headers)
        status, text = answer
        if status != http.HTTPStatus.OK:
            raise BenchmarkError(f"{method} {path}: {status} {text[:500]!r}")
        return msgspec.json.decode(text)

    def _exchange(self, method: str, path: str, content: bytes | None, headers: dict[str, str]) -> tuple[int, bytes]:
        if time.monotonic() - self._answered_at > _KEPT_S:
            self._connection.close()
        self._connection.request(method, API + path, content, headers)
        answer = self._connection.getresponse()
        text = answer.read()
        self._answered_at = time.monotonic()
        return answer.status, text

    def submit(self, type_: str, **fields: object) -> dict[str, Any]:
        """Register a job through the route of its type; the job."""
        job: dict[str, Any] = self.call("POST", f"/{type_}", fields)
        return job

    def job(self, number: int) -> dict[str, Any]:
        found: dict[str, Any] = self.call("GET", f"/jobs/{number}")
        return found

    def wait(
        self,
        number: int,
        timeout_s: float,
        until: Callable[[dict[str, Any]], bool] = lambda job: job["status"] in FINAL,
    ) -> dict[str, Any]:
        """Look at a job until it is as wished; the job.

        Raises:
            BenchmarkError: it is not so in time.
        """
        found: dict[str, Any] = wait_for(lambda: self.job(number), until, timeout_s)
        return found

    def done(self, number: int, timeout_s: float) -> dict[str, Any]:
        """Wait for a job to be DONE.

        Raises:
            BenchmarkError: it ends otherwise, or not in time.
        """
        return self.checked(self.wait(number, timeout_s))

    def wait_until_listed(self, number: int) -> None:
        """Wait until the listing of a job (its element 0) is done."""
        path = f"/jobs/{number}/elements/0/status"
        wait_for(lambda: self.call("GET", path), lambda seen: seen["status"] == "DONE", 60)

    def ended(self, number: int) -> dict[str, Any]:
        """Wait for a job to be DONE as a user's client does: the service answers once its status changes.

        Raises:
            BenchmarkError: it ends otherwise.
        """
        job = self.job(number)
        while job["status"] not in FINAL:
            job = self.call("GET", f"/jobs/{number}?wait={_LONGEST_WAIT_S}")
        return self.checked(job)

    @staticmethod
    def checked(job: dict[str, Any]) -> dict[str, Any]:
        """The job, if it is DONE with all its elements.

        Raises:
            BenchmarkError: it is not.
        """
        if job["status"] != "DONE" or job["num_done"] != job["num_elements"]:
            raise BenchmarkError(f"job {job['id']} did not do its work: {job}")
        return job

    def cancel(self, number: int) -> None:
        """Cancel a job."""
        self.call("DELETE", f"/jobs/{number}")

    def wait_until_idle(self, timeout_s: float) -> None:
        """Wait until no job of the user waits or runs."""
        wait_for(lambda: self.call("GET", "/jobs?status=SUBMITTED,RUNNING&limit=1"), lambda found: not found, timeout_s)


def wait_for(look: Callable[[], Any], good: Callable[[Any], bool], timeout_s: float) -> Any:
    """Look until what is seen is good; the pauses grow with the time that has passed.

    Raises:
        BenchmarkError: it is not good in time.
    """
    began = time.perf_counter()
    while True:
        seen = look()
        if good(seen):
            return seen
        age_s = time.perf_counter() - began
        if age_s > timeout_s:
            raise BenchmarkError(f"not ready after {timeout_s:g} s: {str(seen)[:1000]}")
        time.sleep(min(max(age_s * _GROWTH, _LEAST_PAUSE_S), _LONGEST_PAUSE_S))


def take_all_places(caller: Caller, elements: int = 1_000) -> int:
    """Have all places for work at site 1 alone taken by elements that never end, so that what is submitted there waits.

    Returns the job's number. The job comes before all other jobs of the same user. Cancelling it frees the places.
    """
    job = caller.submit(
        "remove",
        src_siteid=1,
        src_filepath="/hold",
        protocol="DUMMY",
        priority=0,
        extra_opts={"dummy": {"files": elements, "hang": True}},
    )
    number: int = job["id"]
    caller.wait(number, 60, lambda seen: seen["num_elements"] > elements and seen["num_running"] > 0)
    return number
