"""What faults mean: every text below is what Globus servers and libraries really said."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest

from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.movers import MOVERS
from pdm.workqueue.wire.agent_events import Fault

RECORDED = json.loads((Path(__file__).parent / "data" / "gridftp_faults.json").read_text())


@pytest.mark.parametrize("row", RECORDED, ids=lambda row: row["case"])
def test_what_gridftp_servers_said(row: dict[str, object]) -> None:
    failure = MOVERS[JobProtocol.GRIDFTP].classify(msgspec.convert(row["fault"], Fault))
    assert f"{failure.scope} {failure.code}" == row["expected"]
    # People get one line without what only the log needs.
    assert failure.message
    assert not re.search(r"globus_|GlobusError|GridFTP-|\b\d{3}-|\n|System error in", failure.message)


@pytest.mark.parametrize("protocol", MOVERS)
def test_what_the_helper_knows_counts_first(protocol: JobProtocol) -> None:
    fault = Fault(FailureScope.TRANSFER, "Untrusted self-signed certificate", errno=2, code="CHECKSUM_MISMATCH")
    assert MOVERS[protocol].classify(fault).code is FailureCode.CHECKSUM_MISMATCH


@pytest.mark.parametrize("protocol", MOVERS)
def test_then_the_error_number(protocol: JobProtocol) -> None:
    failure = MOVERS[protocol].classify(Fault(FailureScope.DESTINATION, "530 expired certificate", 28, "NO_SUCH_CODE"))
    assert (failure.scope, failure.code) == (FailureScope.DESTINATION, FailureCode.NO_SPACE)


@pytest.mark.parametrize("protocol", MOVERS)
def test_unknown_failures_are_retried_a_bounded_number_of_times(protocol: JobProtocol) -> None:
    failure = MOVERS[protocol].classify(Fault(FailureScope.TRANSFER, "x" * 5000))
    assert failure.code is FailureCode.UNKNOWN
    assert failure.retryable
    assert len(failure.message) == 2000
