"""Pictures: well-formed markup that says in words what it draws, and that a strict content policy accepts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from xml.etree import ElementTree

import pytest
from markupsafe import Markup

from pdm.workqueue.domain.formatting import display_bytes
from pdm.workqueue.web.charts import (
    BarPart,
    Part,
    RatePoint,
    WaterfallCell,
    WaterfallRow,
    sparkline,
    stacked_bar,
    waterfall,
)

_NOON = datetime(2026, 11, 30, 12, tzinfo=UTC)
_HOSTILE = '"><img src=x onerror=alert(1)>\n\u202e</svg><script>'
_ALL = [BarPart(part=part, files=place + 1, bytes=1000 * place) for place, part in enumerate(Part)]


def _rate(rates: Sequence[float]) -> list[RatePoint]:
    return [RatePoint(at=_NOON + place * timedelta(minutes=1), rate=rate) for place, rate in enumerate(rates)]


def _row(label: str, *counts: tuple[int, int]) -> WaterfallRow:
    cells = [
        WaterfallCell(at=_NOON + place * timedelta(minutes=15), done=done, failed=failed)
        for place, (done, failed) in enumerate(counts)
    ]
    return WaterfallRow(label=label, cells=cells)


def _spark(rates: Sequence[float], title: str = "Rate") -> Markup:
    return sparkline(_rate(rates), key="rate", title=title, describe=lambda rate: f"{display_bytes(rate)}/s")


def _texts(markup: Markup, tag: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(markup).iter(tag)]


@pytest.mark.parametrize(
    "markup",
    [
        stacked_bar(_ALL, key="job", title=_HOSTILE),
        stacked_bar([], key="job", title="Files"),
        _spark([0, 1e6, 3e6], _HOSTILE),
        _spark([]),
        waterfall([_row(_HOSTILE, (3, 1), (0, 0), (0, 2)), _row("b", (1, 0))], key="w", title=_HOSTILE),
        waterfall([], key="w", title="Routes"),
    ],
)
def test_markup_is_whole_labelled_and_has_no_code_or_inline_style(markup: Markup) -> None:
    tree = ElementTree.fromstring(markup)
    ids = [element.get("id") for element in tree.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    for element in tree.iter():
        assert element.tag not in ("script", "style", "img", "foreignObject")
        assert not {name for name in element.attrib if name == "style" or name.startswith("on") or "href" in name}
    for picture in tree.iter("svg"):
        if picture.get("aria-hidden") != "true":
            assert picture.get("role") == "img"
            named = {element.get("id"): element.text for element in picture.iter() if element.tag in ("title", "desc")}
            assert all(named[label] for label in (picture.get("aria-labelledby") or "").split())
    for used in re.findall(r"url\(#([^)]+)\)", markup):
        assert used in ids
    assert "\u202e" not in markup


def test_a_bar_says_each_part_by_files_and_by_bytes() -> None:
    parts = [
        BarPart(part=Part.QUEUED, files=0, bytes=0),
        BarPart(part=Part.FAILED, files=3, bytes=2048),
        BarPart(part=Part.DONE, files=1_000_000, bytes=2**40),
    ]
    markup = stacked_bar(parts, key="job-1", title="Job 1")
    by_files, by_bytes = _texts(markup, "desc")
    assert by_files == "done 1\u202f000\u202f000 files, failed 3 files"
    assert by_bytes == "done 1.0 TiB, failed 2.0 KiB"
    legend = ["".join(item.itertext()) for item in ElementTree.fromstring(markup).iter("li")]
    assert legend == ["done 1\u202f000\u202f000 files, 1.0 TiB", "failed 3 files, 2.0 KiB"]


def test_three_failures_among_a_million_are_seen_and_the_bar_is_full() -> None:
    parts = [BarPart(part=Part.DONE, files=1_000_000), BarPart(part=Part.FAILED, files=3)]
    areas = list(ElementTree.fromstring(stacked_bar(parts, key="k", title="t")).iter("rect"))
    widths = [
        float(area.get("width", "").rstrip("%")) for area in areas if area.get("class") == "area" and area.get("x")
    ]
    assert len(widths) == 2
    assert min(widths) >= 0.5
    assert sum(widths) == pytest.approx(100)


def test_each_part_but_the_plain_ones_has_marks_of_its_own() -> None:
    marks = re.findall(r'class="marks" d="([^"]+)"', stacked_bar(_ALL, key="k", title="t"))
    plain = {Part.DONE, Part.QUEUED}
    assert len(set(marks)) == len(Part) - len(plain)


def test_bytes_that_are_not_known_have_no_bar() -> None:
    markup = stacked_bar([BarPart(part=Part.QUEUED, files=1)], key="k", title="t")
    assert _texts(markup, "desc") == ["queued 1 file"]


def test_a_rate_is_told_with_its_peak_and_its_latest_value() -> None:
    assert _texts(_spark([0, 3 * 2**20, 2**20]), "figcaption") == [
        "Peak 3.0 MiB/s at 2026-11-30 12:01 UTC; latest 1.0 MiB/s at 2026-11-30 12:02 UTC; 2 m shown."
    ]
    assert _texts(_spark([0, 0]), "figcaption") == ["Nothing has ended yet."]


def test_a_route_says_when_most_failed() -> None:
    markup = waterfall([_row("ral → cern", (4, 0), (2, 5), (1, 1))], key="w", title="Attempts")
    assert _texts(markup, "desc") == ["7 done, 6 failed. Most failures, 5, from 2026-11-30 12:15 UTC on."]
    assert _texts(markup, "td")[1:] == ["7", "6"]
    assert "2026-11-30 12:15 UTC: 2 done, 5 failed" in _texts(markup, "title")
