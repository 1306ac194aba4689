"""How enumerations are read from the wire."""

from __future__ import annotations

import pytest

from pdm.workqueue.domain.enums import JobProtocol, JobStatus, JobType


def test_the_numbers_are_those_of_the_wire() -> None:
    assert [(member.name, member.value) for member in JobType] == [
        ("LIST", 0), ("COPY", 1), ("REMOVE", 2), ("RENAME", 3), ("MKDIR", 4),
    ]  # fmt: skip
    assert [(member.name, member.value) for member in JobProtocol] == [
        ("GRIDFTP", 0), ("SSH", 1), ("DUMMY", 2), ("FILE", 3), ("HTTPS", 4), ("XROOT", 5), ("S3", 6),
    ]  # fmt: skip
    assert [(member.name, member.value) for member in JobStatus] == [
        ("NEW", 0), ("DONE", 1), ("FAILED", 2), ("SUBMITTED", 3), ("RUNNING", 4), ("CANCELLED", 5), ("HELD", 6),
    ]  # fmt: skip


@pytest.mark.parametrize("value", [1, "1", "COPY", "copy", "CoPy", JobType.COPY, "01"])
def test_numbers_digits_and_names_are_taken(value: object) -> None:
    assert JobType.parse(value) is JobType.COPY


@pytest.mark.parametrize("value", [5, -1, "5", "", "COPYY", None, True, 1.0, [], "١", "1" * 5000, 2**70])
def test_anything_else_is_refused_and_the_known_are_named(value: object) -> None:
    with pytest.raises(ValueError, match=r"LIST \(0\), COPY \(1\)"):
        JobType.parse(value)
