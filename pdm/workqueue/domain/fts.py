"""FTS3's vocabulary: ids, names of storages and VOs, states, priorities, and which parameters of a job mean what."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode
from pdm.workqueue.domain.jobs import DEFAULT_PRIORITY, CancelCode, JobRecord

#: From which FTS3 derives ids that its clients can compute themselves.
BASE_ID = uuid.UUID("01874efb-4735-4595-bc9c-591aef8240c9")

#: Of jobs and files.
FINAL_STATES = frozenset({"FINISHED", "FAILED", "CANCELED", "FINISHEDDIRTY"})
NOT_USED = "NOT_USED"

#: FTS3's priorities, of which 5 is the highest → those of jobs, of which 0 is served first.
_PRIORITIES: Mapping[int, int] = MappingProxyType({1: 9, 2: 7, 3: DEFAULT_PRIORITY, 4: 3, 5: 1})
DEFAULT_FTS_PRIORITY = 3

#: How FTS3 chooses among several sources of a file; here they are tried in the order in which they are given.
SELECTION_STRATEGIES = frozenset(
    {
        *("auto", "orderly", "queue", "success", "throughput", "file-throughput", "pending-data"),
        *("waiting-time", "waiting-time-with-error", "duration"),
    }
)

#: Bits of a file's id that are the number of its element; the rest is the number of the job.
_ELEMENT_BITS = 20
_ROLE = re.compile(r"/(?:role|capability)=.*", re.IGNORECASE)
_DURATION = re.compile(r"([0-9]{1,9})([smh])", re.IGNORECASE)
_UNITS_S = {"s": 1, "m": 60, "h": 3600}
_FILE_STATES: Mapping[JobStatus, str] = MappingProxyType(
    {
        JobStatus.NEW: "SUBMITTED",
        JobStatus.SUBMITTED: "SUBMITTED",
        # Clients know no state for this, except where a tape system works; the reason says what is missing.
        JobStatus.HELD: "SUBMITTED",
        JobStatus.RUNNING: "ACTIVE",
        JobStatus.DONE: "FINISHED",
        JobStatus.FAILED: "FAILED",
        JobStatus.CANCELLED: "CANCELED",
    }
)
#: Why an element is HELD, where FTS3 has a state of the same name.
_TAPE_STATES = frozenset({FailureCode.STAGING, FailureCode.ARCHIVING})


def deterministic_id(vo_name: str, sid: str) -> str:
    """The id of a job for which a client has chosen ``sid``."""
    return str(uuid.uuid5(uuid.uuid5(BASE_ID, vo_name), sid))


def vo_id(vo_name: str) -> str:
    return str(uuid.uuid5(BASE_ID, vo_name))


def vo_of_fqan(fqan: str) -> str:
    """The VO and group of a VOMS attribute: ``/dteam/cern/Role=production`` is of ``dteam/cern``."""
    return _ROLE.sub("", fqan).strip("/")


def vo_of_subject(subject: str) -> str:
    """The virtual VO of a user whose certificate names none: ``CN@domain`` of a subject in slash form."""
    parts = [part.partition("=") for part in subject.split("/") if "=" in part]
    name = next((value for key, _, value in reversed(parts) if key.upper() == "CN"), "anonymous")
    domain = ".".join(value for key, _, value in reversed(parts) if key.upper() == "DC")
    organisation = next((value for key, _, value in parts if key.upper() == "O"), "")
    place = domain or organisation
    return f"{name}@{place}".replace(" ", "") if place else name.replace(" ", "")


def storage_element(surl: str) -> str:
    """``SCHEME://HOST`` of a URL, without its port: how FTS3 names a storage."""
    scheme, _, rest = surl.partition("://")
    authority = rest.partition("/")[0].rpartition("@")[2]
    host = authority.partition("]")[0] + "]" if authority.startswith("[") else authority.partition(":")[0]
    return f"{scheme.lower()}://{host.lower()}"


def storage_elements(surls: Iterable[str]) -> set[str]:
    """The storages of URLs; a few servers may have all of very many."""
    return {storage_element(server) for server in {"/".join(surl.split("/", 3)[:3]) for surl in surls}}


def common_storage(surls: Iterable[str]) -> str | None:
    """The storage of all URLs; None if there are several."""
    found = storage_elements(surls)
    return found.pop() if len(found) == 1 else None


def file_id(job_id: int, element_id: int) -> int:
    """The id of a file, unique in the service, and exact in JavaScript for 2^33 jobs."""
    return (job_id << _ELEMENT_BITS) | element_id


def element_of_file(number: int) -> tuple[int, int]:
    """The job and the element of a file's id."""
    return number >> _ELEMENT_BITS, number & ((1 << _ELEMENT_BITS) - 1)


def clipped_priority(value: int) -> int:
    """One of FTS3's priorities, 1 to 5, as FTS3 itself bounds them."""
    return max(min(value, 5), 1)


def job_priority(value: int) -> int:
    """The priority of a job for one of FTS3's."""
    return _PRIORITIES[clipped_priority(value)]


def fts_priority(priority: int) -> int:
    """FTS3's priority that is nearest to one of a job."""
    return min(_PRIORITIES, key=lambda each: abs(_PRIORITIES[each] - priority))


def seconds_in_queue(value: object) -> int | None:
    """Seconds of ``max_time_in_queue``: a number is hours, a text has its unit (``90s``, ``30m``, ``2h``).

    Returns:
        None for no bound.

    Raises:
        ValueError: it is neither.
    """
    if not value:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 24 * 3650:
        return value * 3600
    found = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if found is None or not int(found[1]):
        raise ValueError("hours, or a number with s, m or h, are expected")
    return int(found[1]) * _UNITS_S[found[2].lower()]


def file_state(status: JobStatus, failure: AttemptFailure | None = None) -> str:
    """The state of a file.

    Args:
        status: of its element.
        failure: of its element; says what an element waits for that is HELD.
    """
    if status is JobStatus.HELD and failure is not None and failure.code in _TAPE_STATES:
        return failure.code.value
    return _FILE_STATES[status]


def is_alternative(job: JobRecord) -> bool:
    """Whether a job begins only if another source of its file has failed."""
    return job.after is not None and job.after.on_failure


def is_unused(job: JobRecord) -> bool:
    """Whether a job tries a source that is not needed, or not needed yet."""
    if not is_alternative(job) or job.started_at is not None:
        return False
    if job.status is JobStatus.CANCELLED:
        return job.cancel_reason is not None and job.cancel_reason.code is CancelCode.PREDECESSOR
    return not job.status.is_final


def job_state(parts: Sequence[JobRecord]) -> str:
    """The state of a job of FTS3 that these jobs carry out, in their order."""
    if any(map(is_alternative, parts)):
        parts = _parts_that_count(parts)
    if any(not part.status.is_final for part in parts):
        return "ACTIVE" if any(part.started_at is not None for part in parts) else "SUBMITTED"
    counts = [part.counters for part in parts]
    if any(each.cancelled for each in counts):
        return "CANCELED"
    if not any(each.failed for each in counts):
        return "FINISHED"
    return "FINISHEDDIRTY" if any(each.done for each in counts) else "FAILED"


def _parts_that_count(parts: Sequence[JobRecord]) -> Sequence[JobRecord]:
    """Of jobs for several sources of one file, those that decide: the one that has copied it, else the last used."""
    for part in parts:
        if part.status is JobStatus.DONE:
            return [part]
    used = [part for part in parts if not is_unused(part)]
    waiting = [part for part in parts if not part.status.is_final]
    # Between the end of one and the begin of the next, the job is still running.
    return [used[-1], *waiting[:1]] if used else parts[:1]
