"""Chains and deadlines over the death of a real daemon."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from pdm.testgrid.service import TestService

_DUMMY = {"src_siteid": 1, "src_filepath": "x", "protocol": "DUMMY"}


def _slow(seconds: float, **options: Any) -> dict[str, Any]:
    return {"extra_opts": {"dummy": {"list_delay": seconds, **options}}}


@pytest.mark.full
def test_nothing_of_a_chain_is_lost_with_the_daemon(tmp_path: Path) -> None:
    service = TestService(tmp_path / "instance")
    service.init(queue={"first_pause": "50ms"})
    service.start()
    try:
        first = service.submit("admin", "list", **_DUMMY, **_slow(0.5))
        bad = service.submit("admin", "list", **_DUMMY, **_slow(0.5, fail="NOT_FOUND", files=1))
        then = service.submit("admin", "mkdir", **_DUMMY, after=[first["id"]])
        last = service.submit("admin", "list", **_DUMMY, after=[then["id"]])
        never = service.submit("admin", "list", **_DUMMY, after=[bad["id"], first["id"]])
        late = service.submit("admin", "list", **_DUMMY, after=[never["id"]], after_any=True)
        hangs = {"dummy": {"hang": True}, "deadline": "8s"}
        submitted_at = time.time()
        overdue = service.submit("admin", "mkdir", **_DUMMY, extra_opts=hangs)
        behind = service.submit("admin", "list", **_DUMMY, after=[overdue["id"]], extra_opts={"deadline": "1h"})
        # At any moment: while they run, while they end, while others are told.
        for pause_s in (0.2, 0.5, 0.05):
            time.sleep(pause_s)
            service.kill()
            service.start()
        ready_at = time.time()
        # It runs again after the restart, and ends at its deadline.
        ended = service.wait_for("admin", overdue["id"])
        assert (ended["status"], ended["cancel_reason"]["code"]) == ("CANCELLED", "DEADLINE"), service.tail()
        assert 0 <= time.time() - max(submitted_at + 8.0, ready_at) < 2.5, service.tail()
        for job in (first, then, last, late):
            assert service.wait_for("admin", job["id"])["status"] == "DONE", service.tail()
        failed = service.wait_for("admin", never["id"])
        assert (failed["status"], failed["cancel_reason"]["code"]) == ("CANCELLED", "PREDECESSOR"), service.tail()
        shown = service.pdm("admin", "status", str(overdue["id"])).stdout
        assert f"reason    DEADLINE: its deadline, {ended['deadline']}, is over" in shown
        followed = service.pdm("admin", "wait", str(behind["id"]))
        assert followed.returncode == 7, followed.stderr
        assert f"PREDECESSOR: job {overdue['id']}, after which it was to begin, ended CANCELLED" in followed.stderr
    finally:
        service.kill()
