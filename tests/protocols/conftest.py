"""Real servers of SSH, HTTPS and XROOT, shared by the tests of this directory."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdm.testgrid.processes import missing_of
from pdm.testgrid.storages import TestStorages
from tests.helpers.driver import HelperProcess
from tests.protocols.places import Places

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def storages(open_directory: Path) -> Iterator[TestStorages]:
    missing = missing_of("sshd", "ssh", "xrootd", "xrdcp")
    if missing:
        text = f"THE TESTS OF PROTOCOLS CANNOT RUN: {', '.join(missing)} not found: run script/bootstrap as root"
        if os.environ.get("CI") == "true":
            pytest.fail(text, pytrace=False)
        pytest.skip(text)
    with TestStorages(open_directory / "storages") as running:
        yield running


@pytest.fixture
def places(storages: TestStorages) -> Iterator[Places]:
    """A directory at each site for one test; removed afterwards, when all servers are running again."""
    made = Places(storages, f"test{next(_numbers)}")
    yield made
    storages.revive()
    for directory in (made.a, made.b):
        directory.chmod(0o755)
        shutil.rmtree(directory)


@pytest.fixture(scope="module")
def relay(storages: TestStorages) -> Iterator[HelperProcess]:
    with HelperProcess(["-m", "pdm.workqueue.helpers.main_relay"], storages.environment()) as running:
        yield running


@pytest.fixture
def own(storages: TestStorages) -> Iterator[HelperProcess]:
    """A relay of its own for a test that breaks something."""
    with HelperProcess(["-m", "pdm.workqueue.helpers.main_relay"], storages.environment()) as running:
        yield running
