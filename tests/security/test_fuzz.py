"""A small part of ``script/fuzz``: no request made from the OpenAPI document is answered with a fault."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pdm.testgrid.service import TestService
from tests.security import fuzzing

#: Requests that a run of this size makes at least, whatever the versions of its libraries.
_LEAST = 120


@pytest.fixture
def service(open_directory: Path) -> Iterator[TestService]:
    service = TestService(open_directory / "fuzzed")
    service.init()
    with service.running():
        yield service


@pytest.mark.full
@pytest.mark.timeout(120)
def test_requests_made_from_the_openapi_document(service: TestService, tmp_path: Path) -> None:
    outcome = fuzzing.run(service, tmp_path, ["--phases", "fuzzing", "--max-examples", "5", "--seed", "1"])
    assert outcome.passed, outcome.text
    assert outcome.cases >= _LEAST, outcome.text
    assert not outcome.faults
