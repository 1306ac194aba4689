"""No copy that is not one passes, and no element without its log."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from figures import BenchmarkError
from trees import logs_taken, make_directories_like, make_tree, require_logs, require_same, sizes


@pytest.fixture
def trees(tmp_path: Path) -> tuple[Path, Path]:
    source, copy = tmp_path / "source", tmp_path / "copy"
    make_tree(source, 12, 4, 100)
    shutil.copytree(source, copy)
    return source, copy


def test_a_tree_has_what_was_asked_for(tmp_path: Path) -> None:
    files = make_tree(tmp_path / "tree", 10, 3, 1024)

    assert len(files) == 10
    assert len({file.parent for file in files}) == 3
    assert set(sizes(tmp_path / "tree").values()) == {1024}
    assert len({(tmp_path / "tree" / file).read_bytes() for file in files}) == 10


def test_a_large_file_has_its_size_and_repeats_nothing(tmp_path: Path) -> None:
    (file,) = make_tree(tmp_path / "tree", 1, 0, 3 * 1024 * 1024 + 5)

    content = (tmp_path / "tree" / file).read_bytes()
    assert len(content) == 3 * 1024 * 1024 + 5
    assert content[: 1024 * 1024] != content[1024 * 1024 : 2 * 1024 * 1024]


def test_a_true_copy_passes(trees: tuple[Path, Path]) -> None:
    require_same(*trees)


def test_directories_alone_are_no_copy(trees: tuple[Path, Path], tmp_path: Path) -> None:
    make_directories_like(trees[0], tmp_path / "directories")

    assert {path.name for path in (tmp_path / "directories").iterdir()} == {path.name for path in trees[0].iterdir()}
    with pytest.raises(BenchmarkError):
        require_same(trees[0], tmp_path / "directories")


def test_another_byte_is_found(trees: tuple[Path, Path]) -> None:
    victim = next(path for path in trees[1].rglob("*") if path.is_file())
    content = victim.read_bytes()
    victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    with pytest.raises(BenchmarkError, match="other bytes"):
        require_same(*trees)


def test_a_missing_and_a_further_file_are_found(trees: tuple[Path, Path]) -> None:
    (trees[1] / "left-over.part").touch()
    with pytest.raises(BenchmarkError, match=r"left-over\.part"):
        require_same(*trees)
    (trees[1] / "left-over.part").unlink()
    next(path for path in trees[1].rglob("*") if path.is_file()).unlink()
    with pytest.raises(BenchmarkError):
        require_same(*trees)


def test_each_element_needs_a_log_with_something_in_it(tmp_path: Path) -> None:
    log = tmp_path / "ab" / "abcd" / "log"
    log.parent.mkdir(parents=True)
    with pytest.raises(BenchmarkError, match="element 0"):
        require_logs(tmp_path, "abcd", 1)
    line = "2027-01-15T08:00:00.250Z {}.1 {}\n"
    lines = [line.format(number, text) for text in ("first 5.1 words", "outcome=DONE rc=0") for number in range(3)]
    log.write_text("".join(lines))
    require_logs(tmp_path, "abcd", 3)
    with pytest.raises(BenchmarkError, match="element 3"):
        require_logs(tmp_path, "abcd", 4)
    log.write_text("".join(lines[:4] + lines[5:]))
    with pytest.raises(BenchmarkError, match="element 1"):
        require_logs(tmp_path, "abcd", 3)


def test_what_logs_take_is_counted_with_their_directories(tmp_path: Path) -> None:
    log = tmp_path / "ab" / "abcd" / "log"
    log.parent.mkdir(parents=True)
    log.write_bytes(bytes(3 * 1024**2))
    taken = logs_taken(tmp_path, "abcd")
    assert taken["inodes"] == 3
    assert 3 <= taken["MiB"] < 3.1
