"""The session of ``docs/tour.rst`` is what the commands print."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tour_session import COLUMNS, comparable, play, written


def test_the_page_fits_a_terminal() -> None:
    lines = written().splitlines()
    assert sum(line.startswith("$ pdm ") for line in lines) > 15
    assert [line for line in lines if len(line) > COLUMNS and not line.startswith("$ ")] == []


@pytest.mark.full
def test_the_page_shows_what_is_printed(tmp_path: Path) -> None:
    assert comparable(play(tmp_path)) == comparable(written())
