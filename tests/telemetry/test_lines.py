"""Text made safe for a log."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdm.workqueue.telemetry.logging import bounded, escaped, redacted


@given(st.text(st.characters(codec=None), max_size=50))
def test_an_escaped_text_is_one_printable_utf8_line(text: str) -> None:
    line = escaped(text)
    line.encode("utf-8")
    assert len(line.splitlines()) <= 1
    assert not any(ord(character) < 0x20 or 0x7F <= ord(character) < 0xA0 for character in line)


def test_what_is_printable_stays() -> None:
    assert escaped("Zürich \\ 'x' \uef80") == "Zürich \\ 'x' \uef80"


def test_a_key_that_is_cut_off_is_still_a_key() -> None:
    assert redacted("a -----BEGIN PRIVATE KEY-----\nMIIsecret") == "a [private key left out]"


@pytest.mark.parametrize("text", ["-----BEGIN CERTIFICATE-----", "the PRIVATE KEY", "bearer of news", "x@y://z:1"])
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


def test_a_hostile_text_costs_little() -> None:
    """Quadratic patterns would take minutes here."""
    text = "://" * 200_000 + "@" + "PRIVATE KEY" + "-----BEGIN " * 100_000 + "bearer " * 100_000
    assert redacted(text).startswith("://")


def test_bounds() -> None:
    assert bounded("abc", 3) == "abc"
    assert bounded("abcd", 3) == "abc... (1 characters left out)"
