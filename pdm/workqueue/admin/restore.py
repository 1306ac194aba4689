"""``pdm admin restore``: a new instance of a backup."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import msgspec
from attrs import frozen

from pdm.workqueue.admin.backup import (
    CONFIGURATION,
    DATABASE_NAMES,
    FORMAT,
    LOGS,
    MANIFEST,
    Manifest,
    NamedPath,
    read_bundle,
    set_key,
    sha256_of,
    sync_directory,
    synchronize,
)
from pdm.workqueue.config.reader import DATABASE_NAME, parse_ini, read_settings
from pdm.workqueue.config.settings import Settings
from pdm.workqueue.logstore.attempt_log import log_name
from pdm.workqueue.store.backup import BackupError, database_kind, restore_database, worker_names


@frozen(kw_only=True)
class Restored:
    """What was made.

    Attributes:
        missing: private files of the original instance that the new one does not have; its own paths of them.
        outside: paths of the configuration that the machine must have, and has not.
        lacks_key: whether the key of the credentials is among those missing.
    """

    directory: Path
    manifest: Manifest
    missing: Sequence[Path]
    outside: Sequence[Path]
    lacks_key: bool

    @property
    def configuration(self) -> Path:
        return self.directory / CONFIGURATION


def restore_backup(backup: Path, directory: Path, *, keys: Path | None = None, database: str | None = None) -> Restored:
    """Make a new instance of a backup.

    Args:
        directory: is made; nothing is left of a try that fails.
        keys: the file of keys that was written with the backup.
        database: URL of an empty PostgreSQL database; None for SQLite in the state directory.

    Raises:
        BackupError: something exists already, the backup is damaged, or nothing can be made of it.
        DatabaseUnusableError: the database cannot be opened, or the backup is of a newer version.
        ConfigError: its configuration is not good any more.
    """
    directory = directory.absolute()
    if os.path.lexists(directory) and (not directory.is_dir() or any(directory.iterdir())):
        raise BackupError(f"{directory} exists and is not empty: name another directory, nothing is overwritten")
    manifest = _read_manifest(backup)
    if database is None and manifest.kind == "postgresql":
        raise BackupError("the backup is of a PostgreSQL database: name an empty one with --database URL")
    if database is not None and database_kind(database) != "postgresql":
        raise BackupError("--database is for PostgreSQL: without it, the database is SQLite in the new directory")
    private = {} if keys is None else _private_files(keys, manifest)
    _verify(backup, manifest)
    part = directory.with_name(f"{directory.name}.part-{secrets.token_hex(4)}")
    try:
        part.mkdir(mode=0o700, parents=True)
        _write(backup, part, manifest, private, database)
        missing = [
            directory / path.place
            for path in manifest.paths
            if path.secret and path.place is not None and path.place not in private
        ]
        state = part / manifest.state
        url = database or f"sqlite:///{state / DATABASE_NAME}"
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        restore_database(backup / DATABASE_NAMES[manifest.kind], manifest.kind, url, state)
        synchronize(part)
        if directory.exists():
            directory.rmdir()
        part.rename(directory)
        sync_directory(directory.parent)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError):
            raise BackupError(f"{error.filename or directory}: {error.strerror}") from error
        raise
    key = next((path.place for path in manifest.paths if (path.section, path.key) == ("credentials", "key_file")), None)
    return Restored(
        directory=directory,
        manifest=manifest,
        missing=missing,
        outside=[Path(path) for path in manifest.outside if not Path(path).exists()],
        lacks_key=key is not None and directory / key in missing,
    )


def _read_manifest(backup: Path) -> Manifest:
    try:
        manifest = msgspec.json.decode((backup / MANIFEST).read_bytes(), type=Manifest)
    except FileNotFoundError as error:
        raise BackupError(f"{backup} is no backup: it has no {MANIFEST}") from error
    except OSError as error:
        raise BackupError(f"{backup / MANIFEST} cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise BackupError(f"{backup / MANIFEST} is damaged: {error}") from error
    if manifest.format != FORMAT or manifest.kind not in DATABASE_NAMES:
        raise BackupError(
            f"{backup} was made by version {manifest.version}: restore it with that version or a newer one"
        )
    for place in [manifest.state, *manifest.files, *(file.place for file in manifest.files.values())]:
        _check_place(place)
    for path in manifest.paths:
        if path.place is not None:
            _check_place(path.place)
    return manifest


def _check_place(place: str) -> None:
    """Raise an error for a path that would leave the directory."""
    if PurePosixPath(place).is_absolute() or ".." in PurePosixPath(place).parts or not place:
        raise BackupError(f"the backup has a path that leads out of its directory: {place[:100]!r}")


def _private_files(keys: Path, manifest: Manifest) -> Mapping[str, bytes]:
    found = dict(read_bundle(keys))
    if found.pop("") != manifest.id.encode():
        raise BackupError(f"{keys} belongs to another backup: name the file of keys that was written with this one")
    for place in found:
        _check_place(place)
    return found


def _verify(backup: Path, manifest: Manifest) -> None:
    digests = {saved: file.sha256 for saved, file in manifest.files.items()}
    digests[DATABASE_NAMES[manifest.kind]] = manifest.database_sha256
    for saved, digest in digests.items():
        try:
            found = sha256_of(backup / saved)
        except OSError as error:
            raise BackupError(f"{backup / saved} cannot be read: {error.strerror}") from error
        if found != digest:
            raise BackupError(f"{backup / saved} is damaged: it is not the file that was written. Use another backup")


def _write(backup: Path, part: Path, manifest: Manifest, private: Mapping[str, bytes], database: str | None) -> None:
    """Write all files but the database."""
    for saved, file in manifest.files.items():
        target = part / file.place
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.copyfile(backup / saved, target)
        target.chmod(0o600)
    for place, content in private.items():
        target = part / place
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as written:
            written.write(content)
    if manifest.has_logs and (backup / LOGS).is_dir():
        logs = next((path.place for path in manifest.paths if (path.section, path.key) == ("logs", "folder")), None)
        shutil.copytree(backup / LOGS, part / (logs or LOGS), dirs_exist_ok=True)
        if database is not None and manifest.kind == "sqlite":
            _name_logs(part / (logs or LOGS), worker_names(backup / DATABASE_NAMES["sqlite"]))
    _adapt(part, manifest, database)


def _name_logs(directory: Path, workers: Sequence[str]) -> None:
    """Give the logs of jobs the names under which daemons that share a database look for them."""
    names = [log_name(worker) for worker in workers]
    for log in directory.glob(f"*/*/{log_name(None)}"):
        for name in names:
            log.with_name(name).hardlink_to(log)
        log.unlink()


def _adapt(part: Path, manifest: Manifest, database: str | None) -> None:
    """Let the paths of the configuration lead into the new directory; unchanged where they do."""
    configuration = part / CONFIGURATION
    # The state directory first: others are relative to it.
    paths = sorted(manifest.paths, key=lambda path: (path.section, path.key) != ("state", "folder"))
    text = configuration.read_text(encoding="utf-8")
    settings = read_settings(configuration)
    if database is not None or parse_ini(configuration).get("database", {}).get("url"):
        text = set_key(text, "database", "url", database or "")
        configuration.write_text(text, encoding="utf-8")
    for path in paths:
        if path.place is not None and _value(settings, path) != part / path.place:
            text = set_key(text, path.section, path.key, path.place)
            configuration.write_text(text, encoding="utf-8")
            settings = read_settings(configuration)


def _value(settings: Settings, path: NamedPath) -> object:
    struct = getattr(settings, path.section)
    info = next(info for info in msgspec.structs.fields(struct) if info.encode_name == path.key)
    return getattr(struct, info.name)
