"""Jobs and files as FTS3 gives them out: its field names, states and times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.fts import (
    FINAL_STATES,
    NOT_USED,
    file_id,
    file_state,
    fts_priority,
    is_unused,
    job_state,
    storage_element,
)
from pdm.workqueue.domain.jobs import CancelReason, ElementRecord
from pdm.workqueue.http.endpoints.delegations import delegation_id
from pdm.workqueue.store.fts import FtsFile, FtsJob

_CANCELED = "Job canceled by the user"
_SOME_FAILED = "One or more files failed. Please have a look at the details for more information"
_ALL_FAILED = "All files failed. Please have a look at the details for more information"
#: Rucio recognises a file that was there before by these words.
_WORDS_OF_CODES: Mapping[FailureCode, str] = MappingProxyType(
    {FailureCode.EXISTS: "Destination file exists and overwrite is not enabled"}
)
_PHASES: Mapping[FailureScope, str] = MappingProxyType(
    {
        FailureScope.SOURCE: "SOURCE",
        FailureScope.DESTINATION: "DESTINATION",
        FailureScope.TRANSFER: "TRANSFER",
        FailureScope.SERVICE: "GENERAL",
    }
)
_LONGEST_REASON = 2048


def fts_time(at: datetime | None) -> str | None:
    """A time as FTS3 writes it: UTC, in seconds, without a zone."""
    return None if at is None else f"{at:%Y-%m-%dT%H:%M:%S}"


def fts_reason(failure: AttemptFailure | None) -> str:
    """Why an attempt failed: FTS3's phase, the service's code, and what was said."""
    if failure is None:
        return ""
    words = _WORDS_OF_CODES.get(failure.code)
    text = failure.message if words is None else f"{words}: {failure.message}"
    return f"{_PHASES[failure.scope]} [{failure.code}] {text}"[:_LONGEST_REASON]


def job_object(job: FtsJob, service: str) -> dict[str, Any]:
    """A job.

    Args:
        service: host name of the service.
    """
    details, parts = job.details, job.parts
    state = job_state(parts)
    finished = [part.finished_at for part in parts if part.finished_at is not None] if state in FINAL_STATES else []
    deadline = next((part.deadline for part in parts if part.deadline is not None), None)
    return {
        "job_id": job.fts_id,
        "source_se": details.get("source_se"),
        "dest_se": details.get("dest_se"),
        "job_state": state,
        "job_type": details.get("job_type", "N"),
        "cancel_job": any(part.cancel_requested for part in parts) and state == "CANCELED",
        "submit_host": service,
        "user_dn": job.user_dn,
        "cred_id": delegation_id(job.user_dn),
        "vo_name": job.vo_name,
        "reason": _job_reason(job, state),
        "submit_time": fts_time(job.submitted_at),
        "priority": fts_priority(parts[0].priority),
        "max_time_in_queue": None if deadline is None else int(deadline.timestamp()),
        "destination_spacetoken": "",
        "source_spacetoken": "",
        "space_token": "",
        "source_space_token": "",
        "internal_job_params": None,
        "dst_file_report": False,
        "overwrite_flag": details.get("overwrite_flag"),
        "job_finished": fts_time(max(finished, default=None)),
        "copy_pin_lifetime": details.get("copy_pin_lifetime", -1),
        "verify_checksum": details.get("verify_checksum", "n"),
        "bring_online": details.get("bring_online", -1),
        "archive_timeout": details.get("archive_timeout", -1),
        "target_qos": None,
        "job_metadata": details.get("job_metadata"),
        "retry": details.get("retry", 0),
        "retry_delay": details.get("retry_delay", 0),
    }


def _job_reason(job: FtsJob, state: str) -> str | None:
    if state == "CANCELED":
        reasons = [part.cancel_reason for part in job.parts if part.cancel_reason is not None and not is_unused(part)]
        return reasons[0].message if reasons else _CANCELED
    if state == "FINISHEDDIRTY":
        return _SOME_FAILED
    return _ALL_FAILED if state == "FAILED" else None


#: Fields that need the times of attempts.
TIMES = frozenset({"start_time", "finish_time"})


def file_object(job: FtsJob, found: FtsFile, fields: Sequence[str] = ()) -> dict[str, Any]:
    """A file, an element of a part of a job; all fields if none is named, and no unknown ones."""
    element = found.element
    state = NOT_USED if is_unused(found.job) else file_state(element.status, element.failure)
    brief = {
        "file_id": file_id(element.job_id, element.id),
        "file_state": state,
        "source_surl": found.file.source_surl,
        "dest_surl": found.file.dest_surl,
        "reason": _file_reason(state, _failure(element), found.job.cancel_reason),
    }
    if fields and brief.keys() >= set(fields):
        return {name: brief[name] for name in fields}
    value = _whole_file(job, found, state) | brief
    return {name: value[name] for name in fields if name in value} if fields else value


def _failure(element: ElementRecord) -> AttemptFailure | None:
    return element.failure if element.status is not JobStatus.DONE else None


def _whole_file(job: FtsJob, found: FtsFile, state: str) -> dict[str, Any]:
    """The fields that few clients ask for."""
    element, file, details = found.element, found.file, found.file.details
    is_final = state in FINAL_STATES
    elapsed_s = element.elapsed_s if is_final else None
    moved = element.transferred if is_final else None
    failure = _failure(element)
    return {
        "file_index": file.file_index,
        "job_id": job.fts_id,
        "dest_surl_uuid": None,
        "vo_name": job.vo_name,
        "source_se": storage_element(file.source_surl),
        "dest_se": storage_element(file.dest_surl),
        "priority": fts_priority(found.job.priority),
        "transfer_host": None,
        "staging_host": None,
        "recoverable": failure.retryable if failure is not None and state == "FAILED" else None,
        "filesize": element.size,
        "checksum": _checksum(details.get("checksum"), element.checksum),
        "finish_time": fts_time(found.ended or found.job.finished_at) if is_final else None,
        "start_time": fts_time(found.began),
        "archive_start_time": None,
        "archive_finish_time": None,
        "internal_file_params": None,
        "pid": None,
        "tx_duration": elapsed_s,
        "throughput": round(moved / elapsed_s / 2**20, 3) if moved is not None and elapsed_s else None,
        "retry": max(element.attempts - 1, 0),
        "user_filesize": details.get("filesize", 0),
        "file_metadata": details.get("metadata"),
        "staging_metadata": details.get("staging_metadata"),
        "archive_metadata": details.get("archive_metadata"),
        "scitag": details.get("scitag"),
        "staging_start": None,
        "staging_finished": None,
        "selection_strategy": details.get("selection_strategy", "auto"),
        "bringonline_token": None,
        "log_file": None,
        "log_debug": 0,
        "activity": details.get("activity", "default"),
        "transferred": moved,
    }


def _file_reason(state: str, failure: AttemptFailure | None, cancelled: CancelReason | None) -> str:
    if state == NOT_USED:
        return ""
    if state == "CANCELED":
        return cancelled.message if cancelled is not None else _CANCELED
    return fts_reason(failure)


def _checksum(given: str | None, proven: str | None) -> str | None:
    """The checksum as it was given; one without a value gets that which was computed."""
    if given is None or ":" in given or proven is None:
        return given
    return proven
