"""A real daemon beside a real grid, for tests, the demonstration and benchmarks.

It is run as its users run it: ``pdm admin init`` makes the instance, ``twistd`` serves it, ``pdm`` speaks to it.
Nothing of the service is imported here.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pdm.testgrid.processes import GridError

#: Statuses in which a job stays.
FINAL = ("DONE", "FAILED", "CANCELLED")
_READY = "pdmworkqueue ready "
_API = "/workqueue/api/v1.0"
_SCRIPTS = Path(sys.executable).parent
_SOURCES = Path(__file__).resolve().parents[2]


def service_environment(**more: str) -> dict[str, str]:
    """An environment in which this checkout is found and no user's settings are."""
    keep = {name: os.environ[name] for name in ("LANG", "LC_ALL", "TMPDIR", "TERM") if name in os.environ}
    return {
        "PATH": f"{_SCRIPTS}:/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin",
        "HOME": "/nonexistent",
        "PYTHONPATH": str(_SOURCES),
        **keep,
        **more,
    }


class TestService:
    """An instance of the daemon.

    Args:
        directory: of the instance; made by `init`.
        grid: ``grid.json`` of the test grid it serves; None for local directories only.
    """

    #: Not a test case, whatever its name.
    __test__ = False
    #: Starts the daemon and ``pdm``.
    popen: Callable[..., subprocess.Popen[str]] = subprocess.Popen

    def __init__(
        self, directory: Path, grid: Mapping[str, Any] | None = None, grid_directory: Path | None = None
    ) -> None:
        self.directory = directory
        self.grid = grid
        self.grid_directory = grid_directory
        self.url: str | None = None
        self.process: subprocess.Popen[str] | None = None
        self.log_path = directory / "daemon.log"

    def init(self, **settings: Mapping[str, str]) -> None:
        """Make the instance; ``settings`` are sections with keys that are added to its configuration."""
        command = ["admin", "init", str(self.directory), "--port", "0"]
        if self.grid_directory is not None:
            command += ["--grid", str(self.grid_directory)]
        done = self._pdm(command, service_environment())
        if done.returncode:
            raise GridError(f"pdm admin init failed: {done.stderr}")
        if settings:
            set_keys(self.directory / "workqueue.conf", settings)

    def start(self, timeout_s: float = 30.0, **environment: str) -> str:
        """Start the daemon, with more in its environment; returns its URL once it serves."""
        with self.log_path.open("ab") as log:
            self.process = self.popen(
                [
                    str(_SCRIPTS / "twistd"),
                    "--nodaemon",
                    "pdmworkqueue",
                    "--config",
                    str(self.directory / "workqueue.conf"),
                ],
                env=service_environment(**environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=self.directory,
            )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_pump, args=(self.process, lines), daemon=True).start()
        try:
            while True:
                line = lines.get(timeout=timeout_s)
                if line is None:
                    self.process.wait()
                    self.process = None
                    raise GridError(f"the daemon ended before it was ready:\n{self.tail()}")
                if line.startswith(_READY):
                    self.url = line.removeprefix(_READY).strip()
                    return self.url
        except queue.Empty:
            self.kill()
            raise GridError(f"the daemon was not ready within {timeout_s:g} s:\n{self.tail()}") from None

    def stop(self, timeout_s: float = 20.0) -> int:
        """End the daemon as an operator does; returns its exit status."""
        process = self._require()
        process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise GridError(f"the daemon did not stop within {timeout_s:g} s:\n{self.tail()}") from None
        self.process = None
        return status

    def kill(self) -> None:
        """``kill -9`` the daemon, and nothing else."""
        process = self._require()
        process.kill()
        process.wait()
        self.process = None

    @contextlib.contextmanager
    def running(self) -> Iterator[TestService]:
        self.start()
        try:
            yield self
        finally:
            if self.process is not None:
                self.stop()

    def tail(self, lines: int = 30) -> str:
        """The end of the daemon's log."""
        try:
            return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])
        except FileNotFoundError:
            return "(no log)"

    # -- users

    def credentials(self, user: str) -> tuple[Path, Path]:
        """Certificate and key of a user of the grid, or of the instance (``admin``)."""
        if self.grid is not None and user in self.grid["users"]:
            return Path(self.grid["users"][user]["cert"]), Path(self.grid["users"][user]["key"])
        certificates = self.directory / "certificates"
        return certificates / f"{user}.crt", certificates / f"{user}.key"

    def environment(self, user: str) -> dict[str, str]:
        """The environment in which ``pdm`` is this user, at this daemon."""
        certificate, key = self.credentials(user)
        more: dict[str, str] = {}
        if self.grid is not None:
            more["X509_CERT_DIR"] = self.grid["ca_dir"]
        return service_environment(
            PDM_URL=self.url or "",
            PDM_CERT=str(certificate),
            PDM_KEY=str(key),
            PDM_CA=str(self.directory / "certificates" / "ca.crt"),
            **more,
        )

    def pdm(self, user: str, *arguments: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run ``pdm`` as a user; its output is text."""
        return self._pdm(arguments, self.environment(user), timeout_s)

    def call(self, user: str, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """One REST request over mutual TLS by nothing but the standard library.

        Returns:
            The status and the decoded body.
        """
        parts = urlsplit(self.url or "")
        context = ssl.create_default_context(cafile=str(self.directory / "certificates" / "ca.crt"))
        context.load_cert_chain(*self.credentials(user))
        connection = http.client.HTTPSConnection(parts.hostname or "", parts.port, timeout=30, context=context)
        with contextlib.closing(connection):
            headers = {} if body is None else {"Content-Type": "application/json"}
            content = None if body is None else json.dumps(body)
            connection.request(method, _API + path, content, headers)
            answer = connection.getresponse()
            said = answer.read()
            return answer.status, json.loads(said) if said else None

    def submit(self, user: str, type_: str, **fields: object) -> dict[str, Any]:
        """Register a job through the route of its type (``copy``, ``list``, ...)."""
        status, job = self.call(user, "POST", f"/{type_}", fields)
        if status != HTTPStatus.OK:
            raise GridError(f"POST /{type_}: {status} {job}")
        found: dict[str, Any] = job
        return found

    def wait_for(
        self, user: str, job_id: int, *, timeout_s: float = 60.0, until: Sequence[str] = FINAL
    ) -> dict[str, Any]:
        """Wait until a job has one of the statuses; returns the job."""
        give_up_at = time.monotonic() + timeout_s
        while True:
            _, job = self.call(user, "GET", f"/jobs/{job_id}")
            if job["status"] in until:
                found: dict[str, Any] = job
                return found
            if time.monotonic() > give_up_at:
                raise GridError(f"job {job_id} is still {job} after {timeout_s:g} s\n{self.tail()}")
            time.sleep(0.03)

    def delegate(self, user: str) -> None:
        """Give the service a proxy of the user."""
        done = self.pdm(user, "delegate")
        if done.returncode:
            raise GridError(f"pdm delegate: {done.stderr}")

    def job(self, user: str, *arguments: str) -> dict[str, Any]:
        """The job object that a ``pdm -F json`` command prints, whatever its exit status."""
        done = self.pdm(user, "-F", "json", *arguments)
        try:
            job: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            raise GridError(f"pdm {' '.join(arguments)}: status {done.returncode}: {done.stderr}") from None
        return job

    def _pdm(
        self, arguments: Sequence[str], environment: Mapping[str, str], timeout_s: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pdm.workqueue.cli", *arguments]
        pipe = subprocess.PIPE
        with self.popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
        ) as process:
            try:
                output, errors = process.communicate(timeout=timeout_s)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def _require(self) -> subprocess.Popen[str]:
        if self.process is None:
            raise GridError("the daemon is not running")
        return self.process


def _pump(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    """Read standard output to its end, so that the daemon never blocks on it."""
    if process.stdout is not None:
        with process.stdout:
            for line in process.stdout:
                lines.put(line)
    lines.put(None)


def set_keys(path: Path, settings: Mapping[str, Mapping[str, str]]) -> None:
    """Set keys in a configuration file, in the sections that are there or in new ones."""
    lines = path.read_text().splitlines()
    for section, keys in settings.items():
        header = f"[{section}]"
        if header not in lines:
            lines.append(header)
        at = lines.index(header) + 1
        end = next((n for n in range(at, len(lines)) if lines[n].startswith("[")), len(lines))
        kept = [line for line in lines[at:end] if line.partition("=")[0].strip() not in keys]
        lines[at:end] = [*(f"{key} = {value}" for key, value in keys.items()), *kept]
    path.write_text("\n".join(lines) + "\n")
