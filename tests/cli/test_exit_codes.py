"""Exit codes of ended jobs and of errors."""

from __future__ import annotations

import re

import pytest

from pdm.workqueue.cli.exit_codes import MEANINGS, ExitCode, exit_codes_text
from pdm.workqueue.cli.outcome import WaitingReasons, exit_code_of_job, failure_lines, hint_of, outcome_line
from pdm.workqueue.cli.session import error_text, exit_code_of
from pdm.workqueue.client.errors import (
    CertificateRefusedError,
    ConflictError,
    ConnectionBrokenError,
    DelegationNeededError,
    ForbiddenError,
    InvalidRequestError,
    JobTimeoutError,
    NotAuthenticatedError,
    NotFoundError,
    ServerFaultError,
    SettingsError,
    TemporaryRefusalError,
    UnexpectedAnswerError,
    UnreachableError,
    WorkqueueClientError,
)
from tests.client.samples import failed_element, job_view, progress_of


@pytest.mark.parametrize(
    ("job", "codes", "expected"),
    [
        ({"status": "DONE"}, [], 0),
        ({"status": "DONE", "skipped": 1}, [], 6),
        ({"status": "DONE", "skipped": 1, "type": "LIST"}, [], 6),
        # The listing has failed, for a directory is closed; one file was copied.
        ({"status": "FAILED", "num_done": 1, "progress": progress_of(files_done=1)}, ["PERMISSION_DENIED"], 6),
        ({"status": "CANCELLED", "num_done": 3}, [], 7),
        ({"status": "FAILED", "num_done": 2}, ["EXISTS"], 6),
        ({"status": "FAILED", "num_done": 1}, ["EXISTS"], 1),
        ({"status": "FAILED", "num_done": 0}, ["NOT_FOUND"], 3),
        ({"status": "FAILED", "num_done": 0}, ["CREDENTIAL_REFUSED"], 4),
        ({"status": "FAILED", "num_done": 1}, ["CONNECTION", "CONNECTION"], 5),
        ({"status": "FAILED", "num_done": 1}, ["CONNECTION", "EXISTS"], 1),
        ({"status": "FAILED", "num_done": 0}, ["A_WORD_OF_A_LATER_SERVICE"], 1),
        ({"status": "FAILED", "num_done": 0, "type": "MKDIR"}, ["EXISTS"], 1),
        ({"status": "FAILED", "num_done": 0}, [], 1),
    ],
)
def test_of_a_job(job: dict[str, object], codes: list[str], expected: int) -> None:
    failures = [failed_element(number, code) for number, code in enumerate(codes)]
    assert exit_code_of_job(job_view(**job), failures) == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (SettingsError("x"), 2),
        (InvalidRequestError(400, "Bad", "x"), 2),
        (ConflictError(409, "Conflict", "x"), 2),
        (NotFoundError(404, "Not found", "x"), 3),
        (NotAuthenticatedError(401, "No certificate", "x"), 4),
        (ForbiddenError(403, "Forbidden", "x"), 4),
        (DelegationNeededError(409, "No delegation", "x"), 4),
        (CertificateRefusedError("x"), 4),
        (UnreachableError("x"), 5),
        (ConnectionBrokenError("x"), 5),
        (TemporaryRefusalError(503, "Stopping", "x"), 5),
        (ServerFaultError(500, "Fault", "x"), 1),
        (UnexpectedAnswerError("x"), 1),
        (JobTimeoutError("x", "y", None), 10),
    ],
)
def test_of_an_error(error: WorkqueueClientError, expected: int) -> None:
    assert exit_code_of(error) == expected


def test_the_page_documents_each_code() -> None:
    assert set(MEANINGS) == set(ExitCode)
    page = exit_codes_text()
    assert all(f"{code.value}  {MEANINGS[code]}" in page for code in ExitCode)


def test_failures_are_shown_with_one_hint_a_code_and_without_tricks() -> None:
    elements = [failed_element(3, src_filepath="/a\x1b[2Jb"), failed_element(4), failed_element(5, "EXISTS")]
    lines = failure_lines(elements, job_view(status="FAILED", num_failed=12))
    assert lines[0] == r"  7.3  /a\x1b[2Jb"
    assert "NOT_FOUND (source): No such file" in lines[1]
    assert lines[-3:] == [
        "  and 9 more: pdm status 7 --all",
        "  NOT_FOUND: Check the path: list the directory that should contain it.",
        "  EXISTS: Choose another destination, or allow to overwrite: --overwrite always, or --overwrite different.",
    ]
    assert len(lines) == 9
    assert failure_lines(elements[:1], job_view(num_failed=1))[-1].startswith("  Check the path")


@pytest.mark.parametrize(
    ("code", "type_", "words"),
    [
        ("IS_A_DIRECTORY", "REMOVE", "pdm rm -r"),
        ("EXISTS", "MKDIR", "-p"),
        ("NOT_FOUND", "MKDIR", "-p"),
        ("EXISTS", "COPY", "--overwrite different"),
        ("EXISTS", "RENAME", "--overwrite always."),
        ("UNSUPPORTED", "COPY", "--verify size"),
        ("UNSUPPORTED", "LIST", "ask the site"),
        ("NO_SPACE", "COPY", "'pdm retry 7'"),
        ("NOT_EMPTY", "REMOVE", "'pdm retry 7 --force'"),
        ("A_WORD_OF_A_LATER_SERVICE", "COPY", "said by the service"),
    ],
)
def test_hints_name_the_options_of_the_command(code: str, type_: str, words: str) -> None:
    hint = hint_of(code, "said by the service", type_, 7)
    assert words in hint
    assert "=" not in hint


@pytest.mark.parametrize(
    ("detail", "pointer", "words"),
    [
        (
            "you have no job 9; GET /jobs lists yours",
            None,
            "you have no job 9; 'pdm jobs' lists yours",
        ),
        ("job 9 has no element 3; GET /jobs/9/elements lists all", None, "'pdm status 9' lists all"),
        ("only operators may list the jobs of other users", "?user", "only operators may list the jobs of other users"),
        ("not one of never, always", "$.extra_opts.overwrite", "--overwrite: not one of never, always"),
        (
            "there is no site 9; GET /sites lists all",
            "?site",
            "--site: there is no site 9; 'pdm sites' lists",
        ),
        ("too long", "$.src_filepath", "source path: too long"),
    ],
)
def test_refusals_are_said_in_words_of_the_command_line(detail: str, pointer: str | None, words: str) -> None:
    said = error_text(InvalidRequestError(400, "Not valid", detail, pointer=pointer))
    assert words in said
    assert not re.search(r"[$?]|GET", said)


def test_reasons_are_said_once_a_kind_and_what_is_held_too(capsys: pytest.CaptureFixture[str]) -> None:
    reasons = WaitingReasons(7)
    for place in (12, 11, 3):
        reasons.report(job_view(status="SUBMITTED", num_running=0, waiting=[f"it is number {place} of its user"]))
    hold = {"count": 1, "code": "CREDENTIAL_EXPIRED", "reason": "the proxy expired.", "hint": "x"}
    for _ in range(2):
        reasons.report(job_view(status="HELD", num_running=0, held=1, hold=hold))
    first, held = capsys.readouterr().err.splitlines()
    assert first == "job 7 waits: it is number 12 of its user"
    assert held.startswith("job 7 is held: the proxy expired. Run 'pdm delegate'")


def test_the_last_line_counts_what_was_done_and_what_was_not() -> None:
    counts = {"LINK_OUTSIDE": 1, "SPECIAL_FILE": 2, "NO_SUCH_CODE_YET": 1}
    copied = job_view(
        status="DONE",
        num_done=5,
        already_there=1,
        skipped=4,
        skipped_by_code=counts,
        progress=progress_of(files_done=4),
    )
    assert outcome_line(copied) == (
        "copied 3, already there 1, skipped 4 (1 link out of the tree, 2 special files, 1 directory"
        " (NO_SUCH_CODE_YET)), failed 0"
    )
    removed = job_view(type="REMOVE", status="FAILED", num_done=2, num_failed=1, num_cancelled=3)
    assert outcome_line(removed) == "removed 1, skipped 0, failed 1, cancelled 3"
    assert outcome_line(job_view(type="RENAME", status="DONE", num_done=1)) == ""
    assert outcome_line(job_view(type="LIST", status="DONE", skipped=1)) == "skipped 1"
