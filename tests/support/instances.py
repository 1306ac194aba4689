"""Instances of the service: made without a daemon, and what a running one says of itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy.orm import Session

from pdm.testgrid.service import TestService
from pdm.workqueue.certificates.vault import Vault
from pdm.workqueue.config.reader import read_settings
from pdm.workqueue.execution.credentials import KEY_CHECK, KEY_CHECK_CONTEXT
from pdm.workqueue.store import credentials
from pdm.workqueue.store.engines import make_engines, transaction
from pdm.workqueue.store.schema_revisions import migrate


def make_instance(directory: Path, fill: Callable[[Session, Vault], None] = lambda session, vault: None) -> None:
    """Make an instance with a database and the check of its key; its daemon never ran.

    ``fill``: writes more into the database.
    """
    TestService(directory).init()
    settings = read_settings(directory / "workqueue.conf")
    engines = make_engines(settings.database.url, 1)
    with engines.writer.begin() as connection:
        migrate(connection)
    engines.dispose()
    vault = Vault.open(settings.credentials.key_file)
    with transaction(settings.database.url) as session:
        fill(session, vault)
        credentials.key_check(session, vault.seal(KEY_CHECK, KEY_CHECK_CONTEXT), "nobody")


def until(service: TestService, what: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until something is true; else fail with the end of the daemon's log."""
    give_up_at = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < give_up_at, service.tail()
        time.sleep(0.05)


def health(service: TestService) -> tuple[str, list[str]]:
    """Status of a daemon, and its faulty parts."""
    _, found = service.call("admin", "GET", "/health")
    return found["status"], [each["part"] for each in found["faults"]]
