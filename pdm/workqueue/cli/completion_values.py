"""Sites, jobs and paths for completion in a shell: from a cache, else from the service within a short time."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from attrs import frozen

#: Where the settings of the client come from, besides client.conf.
_VARIABLES = ("PDM_URL", "PDM_CERT", "X509_USER_PROXY", "X509_USER_CERT", "XDG_CONFIG_HOME", "HOME")
#: Longest time to wait for the service.
_LIMIT_S = 3
#: After a failure the service is left alone for this time: the next TAB must not wait again.
_PAUSE_S = 30.0
#: How long values are used without asking again.
_SITES_S, _JOBS_S, _ENTRIES_S = 600.0, 5.0, 60.0
#: Files in the cache that are older are removed.
_FORGET_S = 86400.0
_MAX_JOBS = 50
#: Entries of a directory that are offered.
_MAX_ENTRIES = 2000


@frozen
class ServiceValues:
    """Values of one service, as one user sees them.

    Attributes:
        cache: directory of this user.
        identity: of service and user, in names of files.
    """

    cache: Path
    identity: str

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> ServiceValues:
        # Without the modules of the client, which take longer to import than an answer from the cache may take.
        config = Path(environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "pdm" / "client.conf"
        identity = " ".join([str(_written_at(config)), *(environ.get(name, "") for name in _VARIABLES)])
        return cls(Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pdm" / "completion", identity)

    def sites(self) -> Sequence[tuple[str, str]]:
        return [(name, text) for name, text, _folder in self._sites()]

    def jobs(self) -> Sequence[tuple[str, str]]:
        return self._cached(
            "jobs",
            _JOBS_S,
            lambda client: [
                (str(job.id), f"{job.status} {job.type} {job.src_filepath or ''}")
                for job in client.jobs(limit=_MAX_JOBS)
            ],
        )

    def entries(self, site: str, directory: str) -> tuple[str, Sequence[tuple[str, bool]]]:
        if not directory:
            directory = next((default for name, _text, default in self._sites() if name == site), "") or "/"
            directory = f"{directory.rstrip('/')}/"
        found = self._cached(
            f"entries {site} {directory}",
            _ENTRIES_S,
            lambda client: [
                (entry.name, entry.type == "directory") for entry in client.ls(site, directory)[:_MAX_ENTRIES]
            ],
        )
        return directory, found

    def _sites(self) -> Sequence[tuple[str, str, str]]:
        return self._cached(
            "sites",
            _SITES_S,
            lambda client: [(site.name, site.description, site.default_folder or "") for site in client.sites()],
        )

    def _cached(self, what: str, fresh_s: float, fetch: Callable[[Any], list[Any]]) -> Sequence[Any]:
        file = self._file(f"{what}.json")
        failed = self._file("failed")
        if _age_s(file) < fresh_s:
            return _read(file)
        if _age_s(failed) < _PAUSE_S or not self._prepare_cache():
            return _read(file)
        try:
            found = _ask(fetch)
        except Exception:  # whatever it is: the command itself will report it
            failed.touch()
            return _read(file)
        _write(file, found)
        return found

    def _file(self, what: str) -> Path:
        named = f"{self.identity} {what}".encode(errors="surrogateescape")
        return self.cache / hashlib.sha256(named).hexdigest()[:32]

    def _prepare_cache(self) -> bool:
        """Make the directory, and remove old files; False where it cannot be made."""
        try:
            self.cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            for file in self.cache.iterdir():
                if _age_s(file) > _FORGET_S:
                    file.unlink(missing_ok=True)
        except OSError:
            return False
        return True


def _ask(fetch: Callable[[Any], list[Any]]) -> list[Any]:
    """Values from the service.

    Raises:
        TimeoutError: it did not answer in time.
        Exception: any error of the client.
    """

    def give_up(*_: object) -> NoReturn:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(_LIMIT_S)
    try:
        # Twisted and OpenSSL: most completions need no service.
        from pdm.workqueue.blocking import BlockingWorkqueueClient

        return fetch(BlockingWorkqueueClient.from_environment())
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _age_s(file: Path) -> float:
    """Seconds since it was written; without end where it is not there."""
    return abs(time.time() - _written_at(file))


def _written_at(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return float("-inf")


def _read(file: Path) -> list[Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else []


def _write(file: Path, values: list[Any]) -> None:
    fresh = file.with_suffix(f".{os.getpid()}")
    try:
        fresh.write_text(json.dumps(values), encoding="ascii")
        fresh.replace(file)
    except OSError:
        fresh.unlink(missing_ok=True)
