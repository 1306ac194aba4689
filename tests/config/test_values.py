"""How values are written: durations, sizes, numbers, decisions, subjects, paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdm.workqueue.config.values import (
    duration,
    one_line,
    optional_path_below,
    path_below,
    size,
    subjects,
    weights,
    whole,
    yes_or_no,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("30s", 30), ("5m", 300), ("12h", 43200), ("7d", 604800), ("1.5 h", 5400), ("0", 0)],
)
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "30", "s", "-5s", "5 minutes", "5S", "1e3s", "٣s", "5s 5s", "nan", "1" * 50 + "s"]
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="a duration is expected"):
        duration(text)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("512", 512), ("64KiB", 65536), ("1MiB", 1048576), ("2GB", 2 * 10**9), ("1.5kB", 1500), ("0", 0)],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1mib", "1 Mio", "0x10", "1_000"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="a size is expected"):
        size(text)


def test_half_a_byte() -> None:
    with pytest.raises(ValueError, match="whole number of bytes"):
        size("0.5")


@pytest.mark.parametrize("text", ["", "1.0", "0x10", "1_000", " 1", "٣", "9" * 30])
def test_what_is_no_whole_number(text: str) -> None:
    with pytest.raises(ValueError, match="a whole number is expected"):
        whole(text)


def test_decisions() -> None:
    assert yes_or_no("Yes")
    assert not yes_or_no("off")
    with pytest.raises(ValueError, match="yes or no"):
        yes_or_no("maybe")


def test_subjects() -> None:
    assert subjects("\n /C=XX/CN=One, Two\n\n /DC=org/CN=x = y ") == ("/C=XX/CN=One, Two", "/DC=org/CN=x = y")
    with pytest.raises(ValueError, match="'CN=One,C=XX' is no subject"):
        subjects("/C=XX/CN=One\nCN=One,C=XX")


def test_weights() -> None:
    text = "\n3 /C=XX/CN=One, Two\n 0.5  /DC=org/CN=x = y "
    assert weights(text) == {"/C=XX/CN=One, Two": 3.0, "/DC=org/CN=x = y": 0.5}
    assert weights("") == {}


@pytest.mark.parametrize("text", ["0 /CN=A", "x /CN=A", "-1 /CN=A", "101 /CN=A", "/CN=A", "2", "1e1 /CN=A"])
def test_what_is_no_weight(text: str) -> None:
    with pytest.raises(ValueError, match=r"subject.* expected"):
        weights(text)


def test_a_weight_for_an_unknown_user_or_twice() -> None:
    with pytest.raises(ValueError, match="'CN=A' is no subject"):
        weights("2 CN=A")
    with pytest.raises(ValueError, match="each subject once"):
        weights("2 /CN=A\n3 /CN=A")


def test_one_line() -> None:
    with pytest.raises(ValueError, match="indented by mistake"):
        one_line("localhost\nport = 1")


def test_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/one")
    read = path_below(Path("/etc/pdm"))
    assert read("a/b") == Path("/etc/pdm/a/b")
    assert read("/a") == Path("/a")
    assert read("~/a") == Path("/home/one/a")
    with pytest.raises(ValueError, match="a path is expected"):
        read("")
    with pytest.raises(ValueError, match="NUL"):
        read("a\0b")
    assert optional_path_below(Path("/etc"))("") is None
