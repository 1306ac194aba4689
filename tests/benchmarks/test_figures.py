"""Ratios, the choice of the best contender, and what a result says of its bars."""

from __future__ import annotations

from pathlib import Path

import pytest
from catalogue import CATALOGUE, Bar
from figures import best_of, contenders, load_newest, ratios, save, shown, spread


def test_a_ratio_is_of_a_pair_of_runs() -> None:
    # Both sides were slow in the second round: the ratio does not see it.
    assert ratios([10.0, 1.0, 8.0], [10.0, 1.0, 10.0]) == {"min": 0.8, "median": 1.0, "max": 1.0}


def test_the_best_has_the_highest_median_not_the_luckiest_run() -> None:
    assert best_of({"steady": [9.0, 10.0, 11.0], "lucky": [1.0, 2.0, 99.0]}) == "steady"


def test_contenders_are_near_the_best_of_the_trial() -> None:
    assert contenders({"a": 100.0, "b": 20.0, "c": 80.0, "d": 120.0}) == ["d", "a"]
    assert contenders({"alone": 1.0}) == ["alone"]


def test_a_bar_finds_its_figure_wherever_it_stands() -> None:
    result = {"ratio": {"median": 0.6}, "cpu ms each, ours": {"daemon": 0.7}}

    assert Bar("", "ratio/median", least=0.5).judge(result) == (0.6, True)
    assert Bar("", "cpu ms each, ours/daemon", most=0.5).judge(result) == (0.7, False)
    assert Bar("", "peak MiB/daemon", most=0.5).judge(result) == (None, False)


def test_every_benchmark_has_its_program_and_a_bar() -> None:
    directory = Path(__file__).parents[2] / "benchmarks"
    for benchmark in CATALOGUE.values():
        assert (directory / f"{benchmark.program}.py").exists()
        assert benchmark.bars


def test_of_several_results_the_newest_counts(tmp_path: Path) -> None:
    for at, figure in (("2026-03-01T12:00:00Z", 1), ("2026-03-01T12:00:01Z", 2), ("2026-02-28T12:00:00Z", 3)):
        save({"benchmark": "one", "at": at, "figure": figure}, tmp_path / "results")

    assert load_newest(tmp_path / "results")["one"]["figure"] == 2


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.123"),
        (12345.6, "12,346"),
        (True, "yes"),
        (7, "7"),
        (spread([1.0, 2.0, 4.0]), "2 (1 to 4)"),
        ({"daemon": 0.5, "helper": 20.0}, "daemon 0.5, helper 20"),
    ],
)
def test_figures_are_shown_short(value: object, text: str) -> None:
    assert shown(value) == text
