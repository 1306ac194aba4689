"""Estimates of copies, from the speed of earlier ones."""

from __future__ import annotations

import pytest

from pdm.workqueue.domain.progress import FinishedCopy, RouteSpeed, route_speed

MB = 1_000_000


def test_nothing_is_known_without_copies() -> None:
    assert route_speed([]) is None
    assert route_speed([FinishedCopy(100, 1, 0.0)]) is None


def test_one_copy() -> None:
    assert route_speed([FinishedCopy(100, 4, 2.0)]) == RouteSpeed(1, 50.0, 2.0)


def test_half_of_the_bytes_were_moved_at_least_so_fast() -> None:
    rates = [10, 20, 30, 40]
    speed = route_speed([FinishedCopy(100 * MB, 100, 100 / rate) for rate in rates])
    assert speed is not None
    assert speed.bytes_per_second == pytest.approx(30 * MB)
    # A trial of one small file, however slow or fast, changes nothing.
    trials = [FinishedCopy(10, 1, 3.0)] * 10 + [FinishedCopy(10_000, 1, 0.00001)] * 10
    with_trials = route_speed([*trials, *(FinishedCopy(100 * MB, 100, 100 / rate) for rate in rates)])
    assert with_trials is not None
    assert with_trials.bytes_per_second == pytest.approx(30 * MB)
    assert with_trials.jobs == 24


def test_large_files_say_nothing_about_files_per_second_nor_small_ones_about_bytes() -> None:
    large, small = FinishedCopy(500_000 * MB, 500, 1000.0), FinishedCopy(1000 * MB, 200_000, 1000.0)
    speed = route_speed([large, small] * 7)
    assert speed == RouteSpeed(14, 500.0 * MB, 200.0)
    assert speed.seconds(1_000_000 * MB, 1000) == 2000.0
    assert speed.seconds(100 * MB, 20_000) == 100.0


@pytest.mark.parametrize(("size", "files"), [(0, 0), (10**30, 1)])
def test_no_time_for_nothing_nor_for_what_would_never_end(size: int, files: int) -> None:
    assert RouteSpeed(1, 10.0, 10.0).seconds(size, files) is None


def test_bytes_without_a_rate_have_no_time() -> None:
    assert RouteSpeed(1, None, 10.0).seconds(1, 1) is None
    assert RouteSpeed(1, None, 10.0).seconds(0, 5) == 0.5
