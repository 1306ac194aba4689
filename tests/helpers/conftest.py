"""Helpers for tests: real processes that end with the test."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.helpers.driver import HelperProcess

#: Starts a helper: ``start_helper("relay", {"NAME": "value"})``.
StartHelper = Callable[..., HelperProcess]


@pytest.fixture
def start_helper() -> Iterator[StartHelper]:
    with ExitStack() as stack:

        def start(name: str, environment: dict[str, str] | None = None) -> HelperProcess:
            arguments = ["-m", f"pdm.workqueue.helpers.main_{name}"]
            return stack.enter_context(HelperProcess(arguments, environment or {}))

        yield start


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The root of a FILE site; beside it are files that the site must not touch."""
    root = tmp_path / "site"
    root.mkdir()
    return root


@pytest.fixture
def file_helper(start_helper: StartHelper, site: Path) -> HelperProcess:
    return start_helper("relay", {"PDM_FILE_ROOTS": json.dumps([str(site)])})
