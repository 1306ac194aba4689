"""How far running transfers are, in memory."""

from __future__ import annotations

from attrs import frozen


@frozen
class Progress:
    """Bytes that have moved, bytes/s now and on average, seconds since the start."""

    transferred: int
    instant: float
    average: float
    elapsed: float


class ProgressBoard:
    """The newest progress of each running element of this daemon."""

    def __init__(self) -> None:
        self._jobs: dict[int, dict[int, Progress]] = {}

    def update(self, job_id: int, element_id: int, progress: Progress) -> None:
        self._jobs.setdefault(job_id, {})[element_id] = progress

    def drop(self, job_id: int, element_id: int) -> None:
        elements = self._jobs.get(job_id)
        if elements is not None:
            elements.pop(element_id, None)
            if not elements:
                del self._jobs[job_id]

    def of_element(self, job_id: int, element_id: int) -> Progress | None:
        return self._jobs.get(job_id, {}).get(element_id)

    def of_job(self, job_id: int) -> list[Progress]:
        """The running elements of a job that have reported."""
        return list(self._jobs.get(job_id, {}).values())
