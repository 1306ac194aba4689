"""``pdm admin rekey``: encrypt all stored credentials with a new key.

The daemon of the instance may run: it follows the key file. Nodes that share a database have copies of that file, and
must not run: a node that seals with the old key, after the last text was encrypted anew, would store what no key opens.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from attrs import frozen

from pdm.workqueue.certificates.vault import Vault, VaultError
from pdm.workqueue.config.settings import Settings
from pdm.workqueue.domain.credentials import CredentialKind
from pdm.workqueue.domain.oidc import client_secret_context
from pdm.workqueue.execution.credentials import KEY_CHECK, KEY_CHECK_CONTEXT, pending_context, vault_context
from pdm.workqueue.execution.login_secrets import device_context, refresh_context
from pdm.workqueue.execution.webhooks import secret_context
from pdm.workqueue.instance_lock import lock_database, lock_instance, running_daemon, worker_name
from pdm.workqueue.store.backup import database_kind, sqlite_path
from pdm.workqueue.store.engines import transaction
from pdm.workqueue.store.sealed_texts import (
    SealedKind,
    SealedText,
    disable_webhooks,
    forget_credentials,
    other_daemons,
    replace_secret,
    sealed_texts,
)

#: Seconds within which a running daemon has stored what it had sealed with the old key.
_SETTLING_S = 2.0
_MOST_ROUNDS = 10


class RekeyError(Exception):
    """The key cannot be changed; the text is one line that says why and what to do."""


@frozen(kw_only=True)
class Rekeyed:
    """What was encrypted anew, by kind."""

    counts: Mapping[SealedKind, int]


def change_key(settings: Settings) -> Rekeyed:
    """Make a new key, encrypt everything with it, and remove the old keys from the key file.

    A change that was interrupted leaves both keys in the file, and is completed by another one.

    Raises:
        RekeyError: another node runs, or the key file does not open what is stored.
        VaultError: there is no key file that can be used.
        OSError: the key file cannot be written.
        DatabaseUnusableError: the database cannot be used.
    """
    path = settings.credentials.key_file
    if not path.exists():
        raise RekeyError(f"there is no key file {path}: if it is lost, use --lost")
    _require_alone(settings)
    vault = Vault.open(path)
    with transaction(settings.database.url, read_only=True) as session:
        for text in sealed_texts(session):
            try:
                vault.unseal(text.secret, _context(text))
            except VaultError as error:
                raise RekeyError(
                    f"the key file does not open a stored {text.kind.value} ({error}). If the key is lost, use --lost"
                ) from error
    runs = running_daemon(settings.state.folder) is not None
    vault.add_key()
    counts: Counter[SealedKind] = Counter()
    for number in range(_MOST_ROUNDS):
        if number and runs:
            time.sleep(_SETTLING_S)
        changed = _encrypt_anew(settings, vault)
        counts += changed
        if number and not changed:
            break
    vault.drop_old_keys()
    return Rekeyed(counts=counts)


def _encrypt_anew(settings: Settings, vault: Vault) -> Counter[SealedKind]:
    counts: Counter[SealedKind] = Counter()
    with transaction(settings.database.url) as session:
        for text in list(sealed_texts(session)):
            if not vault.is_current(text.secret):
                sealed = vault.seal(vault.unseal(text.secret, _context(text)), _context(text))
                counts[text.kind] += replace_secret(session, text, sealed)
    return counts


def _context(text: SealedText) -> str:
    bound = text.bound_to
    match text.kind:
        case SealedKind.CREDENTIAL:
            return vault_context(bound["user_id"], CredentialKind(bound["kind"]), bound["site_id"])
        case SealedKind.DELEGATION:
            return pending_context(bound["user_id"])
        case SealedKind.WEBHOOK:
            return secret_context(bound["user_id"], bound["uid"])
        case SealedKind.LOGIN:
            return refresh_context(bound["user_id"], bound["site_id"])
        case SealedKind.DEVICE_CODE:
            return device_context(bound["user_id"], bound["site_id"])
        case SealedKind.CLIENT:
            return client_secret_context(bound["oidc"]["issuer"], bound["oidc"]["client_id"])
        case SealedKind.KEY_CHECK:
            return KEY_CHECK_CONTEXT


def _require_alone(settings: Settings) -> None:
    with transaction(settings.database.url, read_only=True) as session:
        others = other_daemons(session, worker_name(settings.state.folder))
    if others:
        raise RekeyError(
            f"other nodes run on this database: stop them first, they have the old key ({', '.join(others)})"
        )


@contextlib.contextmanager
def stopped(settings: Settings) -> Iterator[None]:
    """Keep the daemon of an instance, and any of its SQLite database, from starting.

    Raises:
        InstanceLockedError: it runs.
    """
    locks = [lock_instance(settings.state.folder)]
    try:
        if database_kind(settings.database.url) == "sqlite":
            locks.append(lock_database(sqlite_path(settings.database.url)))
        yield
    finally:
        for lock in locks:
            os.close(lock)


@frozen(kw_only=True)
class Forgotten:
    """What was given up with a lost key.

    Attributes:
        kept: the unusable key file under its new name; None if there was none.
    """

    credentials: int
    webhooks: int
    kept: Path | None


def replace_lost_key(settings: Settings) -> Forgotten:
    """Begin with a new key: what only the lost one opens is deleted, and users store it again.

    Raises:
        InstanceLockedError: the daemon runs.
        RekeyError: another node runs.
        OSError: the key file cannot be written.
        DatabaseUnusableError: the database cannot be used.
    """
    with stopped(settings):
        _require_alone(settings)
        now = datetime.now(UTC)
        path, kept = settings.credentials.key_file, None
        if path.exists():
            kept = path.with_name(f"{path.name}.{now:%Y%m%dT%H%M%SZ}")
            path.rename(kept)
        vault = Vault.open(path)
        with transaction(settings.database.url) as session:
            count = forget_credentials(session)
            disabled = disable_webhooks(
                session, "its secret was lost with the key of the service: remove it, and add it again", now
            )
            for text in list(sealed_texts(session)):
                # A webhook gets a secret that its receiver does not know; it stays disabled.
                plain = KEY_CHECK if text.kind is SealedKind.KEY_CHECK else os.urandom(32)
                replace_secret(session, text, vault.seal(plain, _context(text)))
        return Forgotten(credentials=count, webhooks=disabled, kept=kept)
