"""Objects as the service answers them."""

from __future__ import annotations

from typing import Any

import msgspec

from pdm.workqueue.wire.responses import ElementView, JobView


def job_view(**changes: Any) -> JobView:
    """A running job of four elements, two of them done; `changes` are members of its JSON."""
    counts = {f"num_{name}": 0 for name in ("new", "submitted", "running", "done", "failed", "cancelled")}
    values: dict[str, Any] = {
        "id": 7,
        "user_id": 1,
        "src_siteid": 1,
        "dst_siteid": 2,
        "src_filepath": "/data/run7/",
        "dst_filepath": "/archive/run7/",
        "type": "COPY",
        "status": "RUNNING",
        "extra_opts": {},
        "priority": 5,
        "protocol": "GRIDFTP",
        "log_uid": "0123abcd",
        "timestamp": "2026-03-02T11:04:05Z",
        "finished_at": None,
        "label": None,
        "max_tries": 2,
        "cancel_requested": False,
        "num_elements": 4,
        **counts,
        "num_running": 2,
        "num_done": 2,
        "held": 0,
        "skipped": 0,
        "bytes_total": 3000,
        "bytes_done": 1000,
    }
    return msgspec.convert({**values, **changes}, JobView)


def progress_of(**changes: Any) -> dict[str, Any]:
    """How far the job of `job_view` is; `changes` are members of its JSON."""
    values: dict[str, Any] = {
        "listing": False,
        "bytes_done": 1000,
        "bytes_total": 3000,
        "bytes_moving": 380,
        "files_done": 1,
        "files_total": 3,
        "instant": 2048.0,
        "average": 500.0,
        "files_per_second": 2.4,
        "elapsed": 200.0,
        "eta": 65.2,
    }
    return {**values, **changes}


def failed_element(number: int, code: str = "NOT_FOUND", **changes: Any) -> ElementView:
    """An element that has failed."""
    error = {
        "scope": "source",
        "code": code,
        "retryable": False,
        "hint": "Check the path.",
        "message": "No such file",
    }
    values = {
        "id": number,
        "job_id": 7,
        "src_filepath": f"/data/run7/file {number}",
        "size": 10,
        "max_tries": 2,
        "attempts": 1,
        "type": "COPY",
        "status": "FAILED",
        "timestamp": "2026-03-02T11:04:05Z",
        "not_before": None,
        "checksum": None,
        "error": error,
    }
    return msgspec.convert({**values, **changes}, ElementView)
