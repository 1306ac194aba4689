"""Checks of the machine and the database of an instance: directories, disks, ports, limits, clocks."""

from __future__ import annotations

import errno
import os
import pwd
import re
import resource
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from pdm.workqueue.admin.checks import CheckedInstance, CheckResult, fault, good, warning
from pdm.workqueue.certificates.vault import Vault, VaultError
from pdm.workqueue.config.settings import Settings
from pdm.workqueue.domain.formatting import display_bytes
from pdm.workqueue.execution.credentials import KEY_CHECK_CONTEXT
from pdm.workqueue.store.backup import sqlite_path
from pdm.workqueue.store.inspection import DatabaseState, inspect_database

_LITTLE_SPACE, _NO_SPACE, _FEW_INODES = 1024**3, 64 * 1024**2, 10_000
#: Descriptors that the daemon needs beside those of its connections: files, helpers with three pipes each, database.
_DESCRIPTORS, _DESCRIPTORS_OF_HELPER = 100, 6
#: Of a lease: clocks that differ by more make daemons take each other's work.
_CLOCK_SHARE = 0.1
#: File systems without locks or shared memory that SQLite could rely on.
_NETWORK_FILE_SYSTEMS = re.compile(r"nfs\d?|cifs|smb\w*|9p|fuse\.\w+|lustre|ceph|afs")


def check_private(part: str, path: Path | None) -> Iterator[CheckResult]:
    if path is not None and path.exists():
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            yield warning(part, f"other accounts can read {path} (mode {mode:03o})", f"chmod 600 {path}")


def account_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def check_directories(instance: CheckedInstance) -> Iterator[CheckResult]:
    settings = instance.settings
    directories = {
        "[state] folder": settings.state.folder,
        "[logs] folder": settings.logs.folder,
        "[credentials] folder": settings.credentials.folder,
    }
    for part, directory in directories.items():
        if not directory.is_dir():
            continue
        status = directory.stat()
        if status.st_mode & 0o022:
            yield warning(
                part,
                f"other accounts can write into {directory} (mode {stat.S_IMODE(status.st_mode):03o})",
                f"chmod go-w {directory}",
            )
        if os.geteuid() not in {0, status.st_uid}:
            yield warning(
                part,
                f"{directory} belongs to the account {account_name(status.st_uid)}",
                "run the daemon as that account, or change the owner",
            )
    yield from check_private("[credentials] key_file", settings.credentials.key_file)
    yield from check_private("[ssh] key", settings.ssh.key)
    yield from check_private("[mail] password_file", settings.mail.password_file)
    database = _database_directory(settings)
    for part, directory in {**directories, **({} if database is None else {"[database] url": database})}.items():
        yield from _space(part, directory)


def _database_directory(settings: Settings) -> Path | None:
    url = settings.database.url
    return sqlite_path(url).parent if url.startswith("sqlite") else None


def _space(part: str, directory: Path) -> Iterator[CheckResult]:
    while not directory.exists():
        directory = directory.parent
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    what = f"{display_bytes(free)} are free at {directory}"
    remedy = "make room, or name a directory on another disk"
    if free < _NO_SPACE:
        yield fault(part, what, remedy)
    elif free < _LITTLE_SPACE:
        yield warning(part, what, remedy)
    else:
        yield good(part, what)
    if status.f_files and status.f_favail < _FEW_INODES:
        yield warning(part, f"{status.f_favail} files can be made at {directory}", remedy)


def check_ports(instance: CheckedInstance) -> Iterator[CheckResult]:
    for section in ("server", "admin"):
        listener = getattr(instance.settings, section, None)
        if listener is None or not listener.port:
            continue
        part, where = f"[{section}] port", f"{listener.host}:{listener.port}"
        try:
            family, kind, _, _, address = socket.getaddrinfo(
                listener.host, listener.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except socket.gaierror as error:
            yield fault(part, f"{listener.host} is no address of this machine ({error.strerror})", "name another one")
        except OSError as error:
            if error.errno == errno.EADDRINUSE and instance.daemon is not None:
                yield good(part, f"{where} is in use, by the running daemon")
            elif error.errno == errno.EADDRINUSE:
                yield fault(part, f"{where} is in use by another program", "end that (ss -ltnp), or name another port")
            elif error.errno == errno.EACCES:
                yield fault(part, f"{where} needs a privilege", "name a port from 1024 on, or let systemd grant it")
            else:
                yield fault(part, f"{where} cannot be listened on ({error.strerror})", "name another address")
        else:
            yield good(part, f"{where} is free")


def check_limits(instance: CheckedInstance) -> Iterator[CheckResult]:
    settings = instance.settings
    agents = settings.agents.max_agents + settings.agents.list_agents + settings.agents.idle_agents
    needed = settings.server.connections + _DESCRIPTORS + _DESCRIPTORS_OF_HELPER * agents
    limit = _descriptors_of(instance.daemon) if instance.daemon else None
    whose = "the running daemon" if limit is not None else "this session"
    if limit is None:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    what = f"{whose} may open {limit:,} files, and needs up to {needed:,} with [server] connections"
    if limit < needed:
        yield warning("descriptors", what, "raise the limit (LimitNOFILE=65536 of the unit), or lower connections")
    else:
        yield good("descriptors", what)


def _descriptors_of(pid: str) -> int | None:
    try:
        text = Path(f"/proc/{int(pid)}/limits").read_text()
    except (OSError, ValueError):
        return None
    found = re.search(r"^Max open files +(\d+)", text, re.MULTILINE)
    return None if found is None else int(found[1])


def check_database(instance: CheckedInstance) -> Iterator[CheckResult]:
    settings = instance.settings
    state = inspect_database(settings.database.url)
    if state is None:
        yield good("database", "there is none yet: the daemon makes it at its first start")
        return
    yield good("database", f"{state.server}, schema {state.schema or 'none yet'}, {display_bytes(state.size)}")
    if state.schema is not None and state.schema != state.newest:
        yield warning(
            "database",
            f"it has the older schema {state.schema}, and the start of the daemon will upgrade it to {state.newest}",
            f"upgrade it with a backup first: pdm admin upgrade {settings.source}",
        )
    yield from _clock(state, settings)
    if state.connections is not None and state.connections < settings.database.threads + 3:
        yield warning(
            "database",
            f"it accepts {state.connections} connections, and this node makes up to {settings.database.threads + 3}",
            "raise max_connections of PostgreSQL, or lower [database] threads",
        )
    if state.key_check is not None and settings.credentials.key_file.exists():
        try:
            Vault.open(settings.credentials.key_file).unseal(state.key_check, KEY_CHECK_CONTEXT)
        except VaultError as error:
            yield fault(
                "[credentials] key_file",
                f"it does not open the credentials in this database ({error})",
                "restore the right file, or copy it from a node that shares the database",
            )
        else:
            yield good("[credentials] key_file", "it opens the credentials in this database")
    elif state.key_check is not None:
        yield fault(
            "[credentials] key_file",
            f"there is no {settings.credentials.key_file}, and the database has credentials that it opens",
            f"restore it; if it is lost: pdm admin rekey --lost {settings.source}",
        )
    directory = _database_directory(settings)
    if directory is not None:
        yield from check_private("[database] url", sqlite_path(settings.database.url))
        kind = _file_system(directory)
        if kind is not None and _NETWORK_FILE_SYSTEMS.fullmatch(kind):
            yield fault(
                "[database] url",
                f"{directory} is a network file system ({kind})",
                "SQLite needs a local disk, or use PostgreSQL",
            )


def _clock(state: DatabaseState, settings: Settings) -> Iterator[CheckResult]:
    ahead = state.clock_ahead_s
    if ahead is None:
        return
    words = (
        f"the clock of this machine is {abs(ahead):.1f} s {'behind' if ahead > 0 else 'ahead of'} that of the database"
    )
    most = settings.queue.lease_s * _CLOCK_SHARE
    if abs(ahead) > most:
        yield fault("clock", f"{words}, more than a tenth of the lease", "let NTP set both (timedatectl)")
    elif abs(ahead) > 1:
        yield warning("clock", words, "let NTP set both (timedatectl)")
    else:
        yield good("clock", f"it differs by {abs(ahead):.2f} s from that of the database")


def _file_system(directory: Path) -> str | None:
    """The type of the file system of a directory; None if it cannot be found."""
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    best, kind = "", None
    resolved = str(directory.resolve())
    for line in mounts.splitlines():
        _, where, found, *_ = line.split(" ")
        where = where.encode().decode("unicode_escape")
        if (resolved == where or resolved.startswith(where.rstrip("/") + "/")) and len(where) >= len(best):
            best, kind = where, found
    return kind
