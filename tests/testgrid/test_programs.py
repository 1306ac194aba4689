"""A missing program is reported with the command that installs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdm.testgrid import GridMissingError, TestGrid, processes


def test_missing_programs_are_named_with_their_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_SEARCH_PATH", str(tmp_path))

    with pytest.raises(
        GridMissingError,
        match=r"apt-get install globus-gridftp-server-progs globus-gass-copy-progs my",
    ):
        TestGrid(tmp_path / "grid").up()

    assert not (tmp_path / "grid").exists()
