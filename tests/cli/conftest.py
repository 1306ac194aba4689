"""A daemon on two local directories, for the tests of commands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdm.testgrid.service import TestService, set_keys


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestService]:
    """One daemon for all tests of a module."""
    service = TestService(tmp_path_factory.mktemp("cli") / "instance")
    service.init()
    set_keys(service.directory / "workqueue.conf", {"queue": {"first_pause": "50ms"}})
    with service.running():
        yield service
    assert "Traceback" not in service.log_path.read_text()


@pytest.fixture
def directory(service: TestService, request: pytest.FixtureRequest) -> Path:
    """A directory of its own at site 1; at the site it is ``/<its name>``."""
    directory = service.directory / "storage" / "a" / re.sub(r"\W", "_", request.node.name)
    directory.mkdir(parents=True)
    return directory
