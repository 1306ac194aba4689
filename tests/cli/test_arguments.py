"""Arguments that are typed: what is understood, and what is refused before anything is sent."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta

import click
import pytest

from pdm.workqueue.cli.arguments import DURATION, SITE_PATH, TIMESTAMP, ExtraOptionType, SitePath, merged_options


@pytest.mark.parametrize(
    ("typed", "place"),
    [
        ("1:/data", SitePath("1", "/data")),
        ("cern:~/x y", SitePath("cern", "~/x y")),
        ("cern:", SitePath("cern", "")),
        ("cern:a:b", SitePath("cern", "a:b")),
        ("cern:-x", SitePath("cern", "-x")),
        ("cern:" + os.fsdecode(b"\xe9"), SitePath("cern", "\uefe9")),
    ],
)
def test_places(typed: str, place: SitePath) -> None:
    assert SITE_PATH.convert(typed, None, None) == place


@pytest.mark.parametrize("typed", ["/local/file", "", ":", ":/x", "./a:b", "cern"])
def test_no_places(typed: str) -> None:
    with pytest.raises(click.BadParameter, match="SITE:path"):
        SITE_PATH.convert(typed, None, None)


@pytest.mark.parametrize(("typed", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("12h", 43200), ("2d", 172800)])
def test_durations(typed: str, seconds: float) -> None:
    assert DURATION.convert(typed, None, None) == seconds


@pytest.mark.parametrize("typed", ["", "-1s", "5 minutes", "h", "nan"])
def test_no_durations(typed: str) -> None:
    with pytest.raises(click.BadParameter):
        DURATION.convert(typed, None, None)


def test_moments() -> None:
    assert TIMESTAMP.convert("2026-03-02T11:04", None, None) == datetime(2026, 3, 2, 11, 4, tzinfo=UTC)
    assert TIMESTAMP.convert("2026-03-02T11:04+01:00", None, None) == datetime(2026, 3, 2, 10, 4, tzinfo=UTC)
    before = datetime.now(UTC)
    ago = TIMESTAMP.convert("12h", None, None)
    assert before <= ago + timedelta(hours=12) <= datetime.now(UTC)
    with pytest.raises(click.BadParameter):
        TIMESTAMP.convert("yesterday", None, None)


def test_extra_options_are_json_and_nest() -> None:
    read = ExtraOptionType()
    pairs = [
        read.convert(text, None, None) for text in ("dummy.delay=1.5", "dummy.hang=true", 'a=[1,"x"]', "verify=size")
    ]
    assert merged_options(pairs) == {"dummy": {"delay": 1.5, "hang": True}, "a": [1, "x"], "verify": "size"}


def test_an_option_is_not_both_a_value_and_an_object() -> None:
    with pytest.raises(click.UsageError, match="dummy already has a value"):
        merged_options([("dummy", 1), ("dummy.delay", 2)])
    with pytest.raises(click.BadParameter):
        ExtraOptionType().convert("novalue", None, None)
