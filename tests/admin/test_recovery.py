"""Backups, and instances restored from them; a new key, and a new schema."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic import command
from click.testing import CliRunner, Result
from sqlalchemy.orm import Session

from pdm.testgrid.service import set_keys
from pdm.workqueue.admin.backup import OTHER_KEYS, PUBLIC_KEYS, SECRET_KEYS, path_keys, set_key
from pdm.workqueue.certificates.vault import Vault, VaultError
from pdm.workqueue.cli.admin import admin
from pdm.workqueue.config.reader import read_settings
from pdm.workqueue.domain.credentials import CredentialKind
from pdm.workqueue.execution.credentials import KEY_CHECK, KEY_CHECK_CONTEXT, vault_context
from pdm.workqueue.store import credentials, users
from pdm.workqueue.store.credentials import EncryptedCredential
from pdm.workqueue.store.engines import make_engines, transaction
from pdm.workqueue.store.schema_revisions import config
from tests.support.instances import make_instance

NOW = datetime(2026, 11, 30, tzinfo=UTC)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(admin, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An instance with a database in which a user has a credential; its daemon never ran."""
    directory = tmp_path_factory.mktemp("recovery") / "instance"

    def fill(session: Session, vault: Vault) -> None:
        user = users.register(session, "/DC=org/CN=ada", "user", NOW, "/DC=org/CN=CA").id
        sealed = vault.seal(b"the token", vault_context(user, CredentialKind.TOKEN, 2))
        credentials.put(session, user, EncryptedCredential(CredentialKind.TOKEN, "t", None, sealed, 2), NOW)

    make_instance(directory, fill)
    return directory


@pytest.fixture
def instance(made: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "instance"
    shutil.copytree(made, directory)
    return directory


def opened(directory: Path) -> bytes:
    """The credential of the user, as a daemon of the instance would read it."""
    settings = read_settings(directory / "workqueue.conf")
    with transaction(settings.database.url, read_only=True) as session:
        (record,) = credentials.of_user(session, 1)
    return Vault.open(settings.credentials.key_file).unseal(
        record.secret, vault_context(1, CredentialKind.TOKEN, record.site_id)
    )


def test_each_path_of_the_configuration_has_its_place() -> None:
    """A new key must say whether it names a secret."""
    assert set(path_keys()) == SECRET_KEYS | PUBLIC_KEYS | OTHER_KEYS


def test_a_backup_has_no_secret_and_the_file_of_keys_has_them(instance: Path, tmp_path: Path) -> None:
    done = run("backup", instance / "workqueue.conf", tmp_path / "backup", "--keys", tmp_path / "keys")
    assert done.exit_code == 0, done.output
    assert stat.S_IMODE((tmp_path / "backup").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o600
    content = b"".join(file.read_bytes() for file in (tmp_path / "backup").rglob("*") if file.is_file())
    assert b"PRIVATE KEY" not in content and b"pdm-vault-1 " not in content
    bundle = json.loads((tmp_path / "keys").read_text())
    assert set(bundle["files"]) == {"var/credentials.key", "certificates/host.key", "certificates/ca.key"}

    restored = run("restore", tmp_path / "backup", tmp_path / "new", "--keys", tmp_path / "keys")
    assert restored.exit_code == 0, restored.output
    assert opened(tmp_path / "new") == b"the token"
    assert f"pdm admin check {tmp_path / 'new' / 'workqueue.conf'}" in restored.output
    # Of the two, only one may go on under the name.
    assert not (tmp_path / "new" / "var" / "worker-name").exists()
    assert run("user", tmp_path / "new", "eve").exit_code == 0


def test_paths_outside_of_the_instance_lead_into_the_restored_one(instance: Path, tmp_path: Path) -> None:
    config_file = tmp_path / "etc" / "pdm.conf"
    config_file.parent.mkdir()
    shutil.copy(instance / "workqueue.conf", config_file)
    (tmp_path / "authorities").mkdir()
    (tmp_path / "password").write_text("of the mail server")
    set_keys(
        config_file,
        {
            "tls": {
                "certificate": str(instance / "certificates" / "host.crt"),
                "key": str(instance / "certificates" / "host.key"),
                "trust": str(instance / "certificates" / "trust"),
            },
            "state": {"folder": str(instance / "var")},
            "sites": {"folder": str(instance / "sites.d")},
            "logs": {"folder": str(tmp_path / "logs"), "file": str(tmp_path / "pdm.log")},
            "credentials": {"trust_dir": str(tmp_path / "authorities"), "folder": str(tmp_path / "run")},
            "mail": {"password_file": str(tmp_path / "password")},
        },
    )
    done = run("backup", config_file, tmp_path / "backup", "--keys", tmp_path / "keys")
    assert done.exit_code == 0, done.output
    assert f"not in it: {tmp_path / 'authorities'} (of the machine)" in done.output
    (tmp_path / "authorities").rmdir()
    done = run("restore", tmp_path / "backup", tmp_path / "new", "--keys", tmp_path / "keys")
    assert done.exit_code == 0, done.output
    assert f"put the authorities of your sites into {tmp_path / 'authorities'}" in done.output
    new = tmp_path / "new"
    settings = read_settings(new / "workqueue.conf")
    for path in (settings.tls.certificate, settings.tls.key, settings.credentials.key_file, settings.sites.folder):
        assert path.is_relative_to(new) and path.exists(), path
    for folder in (settings.logs.folder, settings.credentials.folder, settings.state.folder):
        assert folder.is_relative_to(new)
    assert settings.logs.file == new / "var" / "pdm.log"
    # A hashed directory of authorities belongs to the machine.
    assert settings.tls.trust == instance / "certificates" / "trust"
    assert settings.mail.password_file is not None
    assert settings.mail.password_file.read_text() == "of the mail server"
    assert "made by 'pdm admin init'" in (new / "workqueue.conf").read_text()


@pytest.mark.parametrize("damaged", ["database.sqlite", "workqueue.conf", "files/certificates/host.crt", "backup.json"])
def test_a_damaged_backup_is_refused_and_nothing_is_made(instance: Path, tmp_path: Path, damaged: str) -> None:
    assert run("backup", instance / "workqueue.conf", tmp_path / "backup").exit_code == 0
    with (tmp_path / "backup" / damaged).open("r+b") as file:
        file.write(b"damage")
    done = run("restore", tmp_path / "backup", tmp_path / "new")
    assert done.exit_code == 1 and damaged in done.output and "damaged" in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup", "instance"]


def test_a_manifest_cannot_lead_out_of_the_new_directory(instance: Path, tmp_path: Path) -> None:
    assert run("backup", instance / "workqueue.conf", tmp_path / "backup").exit_code == 0
    manifest = json.loads((tmp_path / "backup" / "backup.json").read_text())
    manifest["files"]["workqueue.conf"]["place"] = "../stolen"
    (tmp_path / "backup" / "backup.json").write_text(json.dumps(manifest))
    done = run("restore", tmp_path / "backup", tmp_path / "new")
    assert done.exit_code == 1 and "leads out" in done.output
    assert not (tmp_path / "stolen").exists()


def test_nothing_is_overwritten(instance: Path, tmp_path: Path) -> None:
    config_file = instance / "workqueue.conf"
    assert run("backup", config_file, tmp_path / "backup", "--keys", tmp_path / "keys").exit_code == 0
    for arguments in (
        ("backup", config_file, tmp_path / "backup"),
        ("backup", config_file, tmp_path / "other", "--keys", tmp_path / "keys"),
        ("restore", tmp_path / "backup", instance),
    ):
        done = run(*arguments)
        assert done.exit_code == 1 and "overwritten" in done.output, done.output
    assert not (tmp_path / "other").exists()
    done = run("backup", config_file, tmp_path / "third", "--keys", tmp_path / "third" / "keys")
    assert done.exit_code == 1 and not (tmp_path / "third").exists()
    other = run("backup", config_file, tmp_path / "fourth", "--keys", tmp_path / "fourth.keys")
    assert other.exit_code == 0
    mixed = run("restore", tmp_path / "backup", tmp_path / "new", "--keys", tmp_path / "fourth.keys")
    assert mixed.exit_code == 1 and "another backup" in mixed.output


def test_numbers_that_were_given_after_the_backup_are_not_given_again(instance: Path, tmp_path: Path) -> None:
    assert run("backup", instance / "workqueue.conf", tmp_path / "backup").exit_code == 0
    assert run("restore", tmp_path / "backup", tmp_path / "new").exit_code == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "new" / "var" / "workqueue.sqlite")) as database:
        given = dict(database.execute("SELECT name, seq FROM sqlite_sequence"))
    assert given["jobs"] == 1000 and given["events"] == 1_000_000 and given["webhooks"] == 1000


def test_a_new_key_opens_what_the_old_one_has_sealed(instance: Path) -> None:
    path = instance / "var" / "credentials.key"
    former = path.read_text()
    running = Vault.open(path)
    sealed = running.seal(b"before", "x")
    done = run("rekey", instance / "workqueue.conf")
    assert done.exit_code == 0 and "1 key check, 1 credential\n" in done.output, done.output
    assert opened(instance) == b"the token"
    (line,) = path.read_text().splitlines()
    assert line not in former
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    # A daemon that runs meanwhile seals with the new key, and opens what it has sealed.
    assert running.unseal(sealed, "x") == b"before"
    assert Vault.open(path).unseal(running.seal(b"after", "x"), "x") == b"after"
    with pytest.raises(VaultError):
        Vault.open(path).unseal(sealed, "x")


def test_a_wrong_key_changes_nothing_and_a_lost_one_is_given_up(instance: Path) -> None:
    path = instance / "var" / "credentials.key"
    path.unlink()
    done = run("rekey", instance / "workqueue.conf")
    assert done.exit_code == 1 and "--lost" in done.output and not path.exists()
    Vault.open(path)
    wrong = path.read_text()
    done = run("rekey", instance / "workqueue.conf")
    assert done.exit_code == 1 and "--lost" in done.output and path.read_text() == wrong
    done = run("rekey", "--lost", instance / "workqueue.conf")
    assert done.exit_code == 0 and "credentials deleted: 1" in done.output, done.output
    (kept,) = path.parent.glob("credentials.key.*")
    assert kept.read_text() == wrong and path.read_text() != wrong
    settings = read_settings(instance / "workqueue.conf")
    with transaction(settings.database.url, read_only=True) as session:
        assert credentials.of_user(session, 1) == []
        present, _ = credentials.key_check(session, b"", "nobody")
    assert Vault.open(path).unseal(present, KEY_CHECK_CONTEXT) == KEY_CHECK


@pytest.fixture
def older(instance: Path) -> Iterator[Path]:
    """An instance whose database has an older schema."""
    settings = read_settings(instance / "workqueue.conf")
    (instance / "var" / "workqueue.sqlite").unlink()
    engines = make_engines(settings.database.url, 1)
    with engines.writer.begin() as connection:
        command.upgrade(config(connection), "0013_schedules")
    with Session(engines.writer) as session, session.begin():
        users.register(session, "/DC=org/CN=ada", "user", NOW, "/DC=org/CN=CA")
    yield instance
    engines.dispose()


def test_an_upgrade_makes_a_backup_first(older: Path, tmp_path: Path) -> None:
    config_file = older / "workqueue.conf"
    done = run("upgrade", config_file)
    assert done.exit_code == 0 and "it had 0013_schedules" in done.output, done.output
    (backup,) = (older / "var" / "backups").iterdir()
    assert json.loads((backup / "backup.json").read_text())["schema"] == "0013_schedules"
    again = run("upgrade", config_file)
    assert again.exit_code == 0 and "nothing to do" in again.output
    # A backup of an older version can be restored with this one.
    assert run("restore", backup, tmp_path / "new").exit_code == 0
    with transaction(read_settings(tmp_path / "new" / "workqueue.conf").database.url, read_only=True) as session:
        assert users.page(session, 0, 10)[0].subject == "/DC=org/CN=ada"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "\n[s]\nkey = new\n"),
        ("[s]\n", "[s]\nkey = new\n"),
        ("[s]\n# key = old\nkey = old\n", "[s]\n# key = old\nkey = new\n"),
        ("[r]\nkey = old\n[s]\nkeys = x\n", "[r]\nkey = old\n[s]\nkey = new\nkeys = x\n"),
        (
            "[s]\nkey =\n    one\n  # in between\n    two\n\n# of other\nother = 1\n",
            "[s]\nkey = new\n\n# of other\nother = 1\n",
        ),
        ("[s]\nkey = old\n[t]\nkey = old\n", "[s]\nkey = new\n[t]\nkey = old\n"),
    ],
)
def test_one_key_is_set_and_all_else_stays(text: str, expected: str) -> None:
    assert set_key(text, "s", "key", "new") == expected
