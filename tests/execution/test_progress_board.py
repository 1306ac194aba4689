"""The progress board: what it shows of elements and jobs, and that it forgets."""

from __future__ import annotations

import pytest
from attrs import define

from pdm.workqueue.domain.progress import Moving
from pdm.workqueue.execution.progress_board import ElementProgress, ProgressBoard, ReportedProgress


@define
class Clock:
    """A time that stands still until it is moved."""

    seconds: float = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def board(clock: Clock) -> ProgressBoard:
    return ProgressBoard(clock)


def moving(board: ProgressBoard, proven: int = 0) -> Moving:
    seen = board.of_job(7, proven)
    assert seen is not None
    return seen


def test_an_element_from_its_beginning_to_its_end(board: ProgressBoard, clock: Clock) -> None:
    assert board.of_element(7, 1) is None
    board.begin(7, 1)
    clock.seconds += 3
    assert board.of_element(7, 1) == ElementProgress(None, None, None, 3.0)
    board.update(7, 1, ReportedProgress(40, 20.0, 10.0, 4.0))
    assert board.of_element(7, 1) == ElementProgress(40, 20.0, 10.0, 4.0)
    board.drop(7, 1, finished=True, proven=100)
    assert board.of_element(7, 1) is None
    assert board.of_element(7, 2) is None
    assert board.of_job(8, 0) is None


def test_a_transfer_that_says_nothing_more_stands_still(board: ProgressBoard, clock: Clock) -> None:
    board.begin(7, 1)
    clock.seconds += 10
    board.update(7, 1, ReportedProgress(600, 60.0, 60.0, 10.0))
    clock.seconds += 20
    board.update(7, 1, ReportedProgress(600, 60.0, 60.0, 10.0))
    assert board.of_element(7, 1) == ElementProgress(600, 0.0, 20.0, 30.0)


def test_small_files_that_never_report_have_rates(board: ProgressBoard, clock: Clock) -> None:
    for number in range(1, 5001):
        board.begin(7, number)
        clock.seconds += 0.001
        board.drop(7, number, finished=True, proven=1024)
    seen = moving(board, 5000 * 1024)
    assert seen.transferred == 0
    assert seen.files_per_second == pytest.approx(1000, rel=0.01)
    assert seen.instant == pytest.approx(1024_000, rel=0.01)


def test_bytes_count_once_whether_reported_or_only_proven(board: ProgressBoard, clock: Clock) -> None:
    board.begin(7, 1)
    for second in range(1, 11):
        clock.seconds += 1
        board.update(7, 1, ReportedProgress(second * 90, 90.0, 90.0, second))
    board.drop(7, 1, finished=True, proven=1000)
    assert moving(board, 1000).instant == pytest.approx(100, rel=0.1)


def test_what_has_ended_moves_until_the_database_counts_it(board: ProgressBoard) -> None:
    board.begin(7, 1)
    board.begin(7, 2)
    board.update(7, 1, ReportedProgress(90, 1.0, 1.0, 1.0))
    board.update(7, 2, ReportedProgress(10, 1.0, 1.0, 1.0))
    assert moving(board).transferred == 100
    board.drop(7, 1, finished=True, proven=90)
    assert moving(board, proven=0).transferred == 100
    assert moving(board, proven=90).transferred == 10


def test_lost_bytes_are_not_shown_any_more(board: ProgressBoard) -> None:
    board.begin(7, 1)
    board.begin(7, 2)
    board.update(7, 1, ReportedProgress(90, 1.0, 1.0, 1.0))
    board.update(7, 2, ReportedProgress(10, 1.0, 1.0, 1.0))
    assert moving(board).transferred == 100
    board.drop(7, 1)
    assert moving(board).transferred == 10


def test_rates_outlive_the_pause_between_two_batches_and_then_go(board: ProgressBoard, clock: Clock) -> None:
    board.begin(7, 1)
    clock.seconds += 1
    board.drop(7, 1, finished=True, proven=1000)
    clock.seconds += 2
    assert moving(board, 1000).instant is not None
    board.begin(7, 2)
    clock.seconds += 100
    board.begin(8, 1)
    board.drop(8, 1)
    assert board.of_job(7, 1000) is not None, "it runs"
    board.drop(7, 2)
    clock.seconds += 61
    board.begin(9, 1)
    board.drop(9, 1)
    assert board.of_job(7, 1000) is board.of_job(8, 0) is None
    assert board.of_job(9, 0) is not None


def test_very_many_jobs_are_not_all_remembered(board: ProgressBoard) -> None:
    for number in range(20_000):
        board.begin(number, 0)
        board.drop(number, 0, finished=True)
        board.remember_listed(number, 3)
    assert sum(board.of_job(number, 0) is not None for number in range(20_000)) == 1000
    assert sum(board.is_listed(number, 3) for number in range(20_000)) == 10_000


def test_a_listing_is_known_for_the_record_that_has_all_of_it(board: ProgressBoard) -> None:
    board.remember_listed(7, 100)
    assert board.is_listed(7, 100)
    assert not board.is_listed(7, 50), "an older record does not count all that was found"
    assert not board.is_listed(8, 100)
