"""``pdm admin backup``: a consistent copy of an instance, and changes of single keys in the text of its configuration.

A backup is a directory: the database, the configuration with what it names, and ``backup.json``. Private keys and
passwords are not in it; they go to a file of their own, and only if that is asked for.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from attrs import frozen
from msgspec.structs import fields

from pdm.workqueue import __version__
from pdm.workqueue.config.settings import SECTIONS, Settings
from pdm.workqueue.store.backup import BackupError, DatabaseSummary, copy_database, database_kind


def set_key(text: str, section: str, key: str, value: str) -> str:
    """The text with a key set: in place of the former line and its continuations, or as the first one of its section.

    ``text``: of a valid file. ``section``: is added at the end if there is none. ``value``: one line.
    """
    lines = text.splitlines()
    header = re.compile(rf"\[{re.escape(section)}\]\s*")
    start = next((number for number, line in enumerate(lines) if header.fullmatch(line)), None)
    if start is None:
        return "\n".join([*lines, "", f"[{section}]", f"{key} = {value}".rstrip()]) + "\n"
    end = next((number for number in range(start + 1, len(lines)) if lines[number].startswith("[")), len(lines))
    same = re.compile(rf"{re.escape(key)}\s*=")
    at = next((number for number in range(start + 1, end) if same.match(lines[number])), None)
    new = f"{key} = {value}".rstrip()
    if at is None:
        return "\n".join([*lines[: start + 1], new, *lines[start + 1 :]]) + "\n"
    after = at + 1
    # Indented lines continue the value; comments and empty lines may be among them.
    last = at
    while after < end and (not lines[after].strip() or lines[after][0] in " \t#;"):
        if lines[after].strip() and lines[after][0] in " \t" and lines[after].lstrip()[0] not in "#;":
            last = after
        after += 1
    return "\n".join([*lines[:at], new, *lines[last + 1 :]]) + "\n"


#: Version of the layout of backups.
FORMAT = 1
MANIFEST = "backup.json"
CONFIGURATION = "workqueue.conf"
#: Kind of database → name of its copy.
DATABASE_NAMES = {"sqlite": "database.sqlite", "postgresql": "database.dump"}
LOGS = "logs"
_FILES = "files"

#: Keys of the configuration that name private keys and passwords.
SECRET_KEYS = frozenset(
    {("tls", "key"), ("credentials", "key_file"), ("ssh", "key"), ("mail", "password_file")},
)
#: Keys that name other files and directories that belong to the instance.
PUBLIC_KEYS = frozenset(
    {
        *{("tls", "certificate"), ("tls", "trust"), ("users", "listed_users"), ("sites", "folder")},
        *{("credentials", "trust_dir"), ("ssh", "known_hosts"), ("webhooks", "ca"), ("mail", "ca"), ("oidc", "ca")},
        ("node", "peers_trust"),
    }
)
#: Keys whose directories the daemon fills, and the interpreter, which belongs to the machine.
OTHER_KEYS = frozenset(
    {("state", "folder"), ("logs", "folder"), ("logs", "file"), ("credentials", "folder"), ("agents", "python")}
)
#: Of an instance made by ``pdm admin init``: its own authority, beside the configuration.
_AUTHORITY = (Path("certificates/ca.crt"), Path("certificates/ca.key"))


class SavedFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the backup or of the file of keys.

    Attributes:
        place: its path in a restored instance, relative to that.
        sha256: of its content, in hexadecimal.
    """

    place: str
    sha256: str


class NamedPath(msgspec.Struct, frozen=True, kw_only=True):
    """A path that the configuration names.

    Attributes:
        place: in a restored instance; null if the path is outside of the instance, and stays as it is.
        secret: whether it is in the file of keys only.
    """

    section: str
    key: str
    original: str
    place: str | None
    secret: bool = False


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """``backup.json``.

    Attributes:
        id: random; the same in the file of keys.
        state: the state directory of a restored instance, relative to that.
        outside: directories of the original machine that the configuration names.
        files: path in the backup → file.
        database_sha256: of the copy of the database.
    """

    format: int
    id: str
    created_at: datetime
    version: str
    host: str
    source: str
    kind: str
    schema: str
    jobs: int
    ended: int
    database_sha256: str
    state: str
    has_logs: bool
    paths: list[NamedPath]
    outside: list[str]
    files: dict[str, SavedFile]


class KeyBundle(msgspec.Struct, frozen=True, kw_only=True):
    """The file of keys.

    Attributes:
        backup: ``id`` of the backup that it belongs to.
        files: path in a restored instance → content in base64.
    """

    backup: str
    files: dict[str, str]


@frozen(kw_only=True)
class Backup:
    """What was made.

    Attributes:
        missing: private files that are not in it.
        outside: paths of the configuration that another machine must have by itself.
    """

    directory: Path
    summary: DatabaseSummary
    missing: Sequence[Path]
    outside: Sequence[Path]


def make_backup(settings: Settings, directory: Path, *, keys: Path | None = None, logs: bool = False) -> Backup:
    """Make a backup, beside a running daemon or without one.

    Args:
        directory: is made; nothing is left of a try that fails.
        keys: file for private keys and passwords, which is made.
        logs: whether to copy the logs of attempts, too.

    Raises:
        BackupError: something exists already, or cannot be read or written.
        DatabaseUnusableError: the database cannot be used by this version.
    """
    directory = directory.absolute()
    if os.path.lexists(directory):
        raise BackupError(f"{directory} exists already: name a directory that does not, nothing is overwritten")
    if keys is not None:
        keys = keys.absolute()
        if os.path.lexists(keys):
            raise BackupError(f"{keys} exists already: name a file that does not, nothing is overwritten")
        if keys.is_relative_to(directory):
            raise BackupError(f"the file of keys {keys} would be in the backup: keep it in another place")
    part = directory.with_name(f"{directory.name}.part-{secrets.token_hex(4)}")
    made: list[Path] = [part]
    try:
        part.mkdir(mode=0o700)
        backup = _Writer(settings, part).write(logs=logs)
        if keys is not None:
            made.append(keys)
            _write_private(keys, msgspec.json.format(msgspec.json.encode(backup.bundle)))
        synchronize(part)
        part.rename(directory)
        sync_directory(directory.parent)
    except BaseException as error:
        for path in made:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise BackupError(f"{error.filename or directory}: {error.strerror}") from error
        raise
    return Backup(
        directory=directory,
        summary=backup.summary,
        missing=[] if keys is not None else backup.secret_files,
        outside=backup.outside,
    )


@frozen(kw_only=True)
class _Written:
    summary: DatabaseSummary
    bundle: KeyBundle
    secret_files: Sequence[Path]
    outside: Sequence[Path]


def path_keys() -> Iterator[tuple[str, str]]:
    """Sections and keys of the configuration that are paths."""
    for section, struct in SECTIONS.items():
        for info in fields(struct):
            if "path" in _kind_of(info.type):
                yield section, info.encode_name


def _kind_of(declared: Any) -> str:
    notes = getattr(declared, "__metadata__", ())
    return next((str(note.extra["kind"]) for note in notes if isinstance(note, msgspec.Meta) and note.extra), "")


class _Writer:
    """Writes one backup.

    Args:
        part: the directory, which is empty.
    """

    def __init__(self, settings: Settings, part: Path) -> None:
        self._settings = settings
        self._part = part
        self._base = settings.source.parent
        state = settings.state.folder
        self._state = state.relative_to(self._base) if state.is_relative_to(self._base) else Path("var")
        self._id = secrets.token_hex(8)
        self._files: dict[str, SavedFile] = {}
        self._secrets: dict[str, Path] = {}
        self._outside: list[Path] = []

    def write(self, *, logs: bool) -> _Written:
        settings = self._settings
        database = self._part / DATABASE_NAMES[database_kind(settings.database.url)]
        # First: what ends while the rest is copied is not in it, and neither are its files.
        summary = copy_database(settings.database.url, database)
        self._save_configuration()
        paths = [self._save_named(section, key) for section, key in sorted(SECRET_KEYS | PUBLIC_KEYS | OTHER_KEYS)]
        for path in _AUTHORITY:
            if (self._base / path).exists():
                self._save(self._base / path, path, secret=path.suffix == ".key")
        if logs:
            self._copy_logs()
        manifest = Manifest(
            format=FORMAT,
            id=self._id,
            created_at=datetime.now(UTC).replace(microsecond=0),
            version=__version__,
            host=socket.gethostname(),
            source=str(settings.source),
            kind=summary.kind,
            schema=summary.schema,
            jobs=summary.jobs,
            ended=summary.ended,
            database_sha256=sha256_of(database),
            state=str(self._state),
            has_logs=logs,
            paths=[path for path in paths if path is not None],
            outside=[str(path) for path in self._outside],
            files=self._files,
        )
        _write_private(self._part / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest)))
        bundle = {place: base64.b64encode(path.read_bytes()).decode() for place, path in self._secrets.items()}
        return _Written(
            summary=summary,
            bundle=KeyBundle(backup=self._id, files=bundle),
            secret_files=list(self._secrets.values()),
            outside=self._outside,
        )

    def _save_configuration(self) -> None:
        text = self._settings.source.read_text(encoding="utf-8-sig")
        if database_kind(self._settings.database.url) == "postgresql":
            # It may have a password.
            text = set_key(text, "database", "url", "")
        _write_private(self._part / CONFIGURATION, text.encode())
        self._files[CONFIGURATION] = SavedFile(place=CONFIGURATION, sha256=sha256_of(self._part / CONFIGURATION))

    def _save_named(self, section: str, key: str) -> NamedPath | None:
        struct = getattr(self._settings, section)
        original = next(getattr(struct, info.name) for info in fields(struct) if info.encode_name == key)
        if original is None:
            return None
        is_secret = (section, key) in SECRET_KEYS
        place = self._place(section, key, original)
        if place is not None and (section, key) not in OTHER_KEYS:
            self._save(original, place, secret=is_secret)
        return NamedPath(
            section=section,
            key=key,
            original=str(original),
            place=None if place is None else str(place),
            secret=is_secret,
        )

    def _place(self, section: str, key: str, original: Path) -> Path | None:
        """Where a path is in a restored instance."""
        if original.is_relative_to(self._settings.state.folder):
            return self._state / original.relative_to(self._settings.state.folder)
        if original.is_relative_to(self._base):
            return original.relative_to(self._base)
        if (section, key) == ("logs", "file"):
            return self._state / original.name
        if (section, key) in {("logs", "folder"), ("credentials", "folder")}:
            return self._state / ("logs" if section == "logs" else "credentials")
        if (section, key) == ("sites", "folder"):
            return Path("sites.d")
        if original.is_file() and (section, key) != ("agents", "python"):
            return Path(_FILES) / f"{section}-{key}" / original.name
        # Directories of authorities, and the interpreter, belong to the machine.
        if original.is_dir():
            self._outside.append(original)
        return None

    def _save(self, original: Path, place: Path, *, secret: bool) -> None:
        if not original.exists():
            return
        if secret:
            self._secrets[str(place)] = original
            return
        for file in sorted(original.rglob("*")) if original.is_dir() else [original]:
            if file.is_file():
                relative = place / file.relative_to(original) if original.is_dir() else place
                saved = Path(_FILES) / relative
                target = self._part / saved
                target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                shutil.copyfile(file, target)
                self._files[str(saved)] = SavedFile(place=str(relative), sha256=sha256_of(target))

    def _copy_logs(self) -> None:
        """Copy what there is; the daemon appends meanwhile, and an operator may remove old directories."""
        root = self._settings.logs.folder
        for directory, _, names in os.walk(root):
            for name in names:
                source = Path(directory) / name
                target = self._part / LOGS / source.relative_to(root)
                target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                try:
                    shutil.copyfile(source, target)
                except FileNotFoundError:
                    continue


def sha256_of(path: Path) -> str:
    """Of the content of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_private(path: Path, content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def synchronize(directory: Path) -> None:
    """Write all files of a directory to the disk."""
    for parent, _, names in os.walk(directory):
        for name in names:
            descriptor = os.open(Path(parent) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(parent))


def sync_directory(directory: Path) -> None:
    """Write the entries of a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_bundle(path: Path) -> Mapping[str, bytes]:
    """Path in a restored instance → content, of a file of keys; and its backup's id under an empty path.

    Raises:
        BackupError: the file cannot be read.
    """
    try:
        bundle = msgspec.json.decode(path.read_bytes(), type=KeyBundle)
        return {"": bundle.backup.encode(), **{place: base64.b64decode(text) for place, text in bundle.files.items()}}
    except OSError as error:
        raise BackupError(f"{path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, ValueError) as error:
        raise BackupError(f"{path} is no file of keys of a backup") from error
