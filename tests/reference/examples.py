"""The examples of the REST reference as data: request, reply, and the status codes that it names.

Copied from the reference by hand, key for key; where its example writes ``somelonghash`` any text will do. Numbers in
paths stand for what the test made before: ``12345`` a COPY job that is done, ``12`` one whose element 1 needed two
attempts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

_JOB: Mapping[str, Any] = {
    "id": 12345,
    "user_id": 123,
    "src_siteid": 13,
    "dst_siteid": 15,
    "src_filepath": "~/file1.txt",
    "dst_filepath": "~/file2.txt",
    "type": "COPY",
    "status": "DONE",
    "extra_opts": {},
    "priority": 5,
    "protocol": "GRIDFTP",
    "log_uid": "somelonghash",
    "timestamp": "2012-03-21T13:35",
}
_ELEMENT: Mapping[str, Any] = {
    "id": 1,
    "job_id": 12345,
    "src_filepath": "~/file1.txt",
    "dst_filepath": "~/file2.txt",
    "size": 123354523,
    "max_tries": 2,
    "attempts": 1,
    "type": "COPY",
    "status": "DONE",
    "timestamp": "2012-03-21T13:35",
    "listing": [{"root": ["file1", "file2"]}],
}
_OUTPUT: Mapping[str, Any] = {
    "jobid": 12,
    "elementid": 1,
    "attempt": 2,
    "type": "COPY",
    "status": "DONE",
    "log": "The output from the copy command run on the worker",
}


@frozen
class Read:
    """A GET of the reference.

    Attributes:
        path: with the reference's numbers.
        reply: its example.
        statuses: all codes that it names.
    """

    path: str
    reply: Any
    statuses: tuple[int, ...]


READS = (
    Read("/jobs", [_JOB], (200,)),
    Read("/jobs/12345", _JOB, (200, 404)),
    Read("/jobs/12345/elements", [_ELEMENT], (200,)),
    Read("/jobs/12345/elements/1", _ELEMENT, (200, 404)),
    Read(
        "/jobs/12/output",
        [
            {
                "jobid": 12,
                "elementid": 0,
                "attempt": 1,
                "type": "LIST",
                "status": "DONE",
                "log": "The output from the list command run on the worker",
                "listing": {"root": ["file1", "file2"]},
            },
            {**_OUTPUT, "log": "The output from the copy command for file1 run on the worker"},
        ],
        (200, 404, 500),
    ),
    Read("/jobs/12/elements/1/output", _OUTPUT, (200, 400, 404, 500)),
    Read("/jobs/12/elements/1/output/1", {**_OUTPUT, "attempt": 1, "status": "FAILED"}, (200, 400, 404, 500)),
    Read("/jobs/12/status", {"jobid": 12, "status": "DONE"}, (200, 404)),
    Read("/jobs/12/elements/1/status", {"jobid": 12, "elementid": 1, "status": "DONE", "attempts": 2}, (200, 404)),
)


@frozen
class Submission:
    """A POST of the reference; all name the codes 200, 400 and 500."""

    path: str
    request: Mapping[str, Any]
    reply: Mapping[str, Any]


def _registered(**keys: Any) -> Mapping[str, Any]:
    """The reply that all submissions share."""
    return {
        "id": 1,
        "user_id": 123,
        "src_siteid": 12,
        **keys,
        "status": "SUBMITTED",
        "extra_opts": {},
        "priority": 5,
        "protocol": "GRIDFTP",
        "log_uid": "somelonghash",
        "timestamp": "2012-03-21T13:35",
    }


SUBMISSIONS = (
    Submission(
        "/jobs",
        {"src_siteid": 12, "src_filepath": "somefile", "type": "0"},
        _registered(src_filepath="somefile", type="LIST"),
    ),
    Submission(
        "/list",
        {"src_siteid": 12, "src_filepath": "somefile"},
        _registered(src_filepath="somefile", type="LIST"),
    ),
    Submission(
        "/copy",
        {"src_siteid": 12, "dst_siteid": 14, "src_filepath": "somefile", "dst_filepath": "someotherfile"},
        _registered(dst_siteid=14, src_filepath="somefile", dst_filepath="someotherfile", type="COPY"),
    ),
    Submission(
        "/remove",
        {"src_siteid": 12, "src_filepath": "somefile"},
        _registered(src_filepath="somefile", type="REMOVE"),
    ),
    Submission(
        "/rename",
        {"src_siteid": 12, "src_filepath": "somefile", "dst_filepath": "someotherfile"},
        _registered(dst_siteid=12, src_filepath="somefile", dst_filepath="someotherfile", type="RENAME"),
    ),
    Submission(
        "/mkdir",
        {"src_siteid": 12, "src_filepath": "~/somedir"},
        _registered(src_filepath="~/somedir", type="MKDIR"),
    ),
)
