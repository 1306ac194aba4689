"""Pictures as SVG: the parts of a job, its rate over time, the last hours of routes.

Pure functions from numbers to markup. Each picture has a title and a description for screen readers, and says with
words, marks and positions what its colours say. Colours come from classes of the stylesheet, without inline styles.
Widths are percentages, so that a picture fills its column without distorting its marks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from types import MappingProxyType

from attrs import frozen
from markupsafe import Markup

from pdm.workqueue.domain.formatting import display_bytes, display_duration, display_line
from pdm.workqueue.web.rendering import count as count_words

#: Smallest share of a bar, in percent: three failures among a million files must be seen.
_LEAST_SHARE = 0.6
_BAR_HEIGHT = 18
_SPARK_HEIGHT = 48
#: Heights above and below the base line of a row of a waterfall.
_UP, _DOWN = 22, 14
#: Smallest height of a count that is not zero.
_LEAST_HEIGHT = 3.0
_NOTHING = Markup("")


class Part(StrEnum):
    """What has become of files of a job, in the order of the bar."""

    DONE = "done"
    ALREADY_THERE = "already there"
    SKIPPED = "skipped"
    RUNNING = "running"
    RETRYING = "retrying"
    FAILED = "failed"
    HELD = "held"
    CANCELLED = "cancelled"
    QUEUED = "queued"

    @property
    def css_class(self) -> str:
        return f"part-{self.value.replace(' ', '-')}"


#: Lines over the area of a part, in a square of 8 pixels; parts without lines are plain.
_MARKS = MappingProxyType(
    {
        Part.ALREADY_THERE: "M1 4h2M5 4h2",
        Part.SKIPPED: "M4 0v8",
        Part.RUNNING: "M0 8L8 0M-2 2L2 -2M6 10L10 6",
        Part.RETRYING: "M0 0L8 8M0 8L8 0",
        Part.FAILED: "M0 0L8 8M-2 6L2 10M6 -2L10 2",
        Part.HELD: "M0 2h8M0 6h8",
        Part.CANCELLED: "M2 0v8M6 0v8",
    }
)


@frozen(kw_only=True)
class BarPart:
    """Files of a job in one state.

    Attributes:
        bytes: of these files; None if not known.
    """

    part: Part
    files: int
    bytes: int | None = None


@frozen(kw_only=True)
class RatePoint:
    """A rate in the time from `at` until the next point, in any unit."""

    at: datetime
    rate: float


@frozen(kw_only=True)
class WaterfallCell:
    """Attempts that ended in the time from `at` until the next cell."""

    at: datetime
    done: int
    failed: int


@frozen(kw_only=True)
class WaterfallRow:
    """A route; all rows of a picture have the same times.

    Attributes:
        label: such as ``ral → cern``.
    """

    label: str
    cells: Sequence[WaterfallCell]


def stacked_bar(parts: Iterable[BarPart], *, key: str, title: str) -> Markup:
    """Two bars, by files and by bytes, and a legend with the numbers.

    Args:
        key: unique in the page; begins the ids of the markup.
        title: what is shown, for screen readers: ``Files of job 214``.

    Returns:
        A ``figure``. Parts without files are left out; bars without a known byte are.
    """
    order = list(Part)
    shown = sorted((part for part in parts if part.files or part.bytes), key=lambda part: order.index(part.part))
    bars = [_bar(shown, [part.files for part in shown], key=f"{key}-files", title=f"{title}, by files", unit="files")]
    if any(part.bytes for part in shown):
        sizes = [part.bytes or 0 for part in shown]
        bars.append(_bar(shown, sizes, key=f"{key}-bytes", title=f"{title}, by bytes", unit="bytes"))
    entries = [
        Markup('<li>{}<span class="legend-word">{}</span> {}</li>').format(
            _swatch(part.part, f"{key}-legend"), part.part.value, _amount(part)
        )
        for part in shown
    ]
    legend = Markup('<ul class="legend">{}</ul>').format(_joined(entries)) if entries else _NOTHING
    return Markup('<figure class="chart bars">{}{}</figure>').format(_joined(bars), legend)


def _bar(parts: Sequence[BarPart], counts: Sequence[int], *, key: str, title: str, unit: str) -> Markup:
    words = [_amount_of_unit(count, unit) for count in counts]
    said = ", ".join(f"{part.part.value} {text}" for part, text in zip(parts, words, strict=True)) or "nothing yet"
    drawn, left = [], 0.0
    for part, text, share in zip(parts, words, _shares(counts), strict=True):
        if share:
            area = Markup("<title>{}: {}</title>").format(part.part.value, text)
            drawn.append(_filled(part.part, key, left, share, area))
        left += share
    return Markup(
        '<div class="bar"><span class="bar-unit" aria-hidden="true">{unit}</span>'
        '<svg class="bar-picture" width="100%" height="{height}" role="img" aria-labelledby="{key}-t {key}-d">'
        '<title id="{key}-t">{title}</title><desc id="{key}-d">{said}</desc>{defs}'
        '<rect class="track" width="100%" height="{height}"/>{drawn}</svg></div>'
    ).format(
        unit=unit,
        height=_BAR_HEIGHT,
        key=key,
        title=display_line(title),
        said=said,
        defs=_patterns((part.part for part in parts), key),
        drawn=_joined(drawn),
    )


def _shares(counts: Sequence[int]) -> list[float]:
    """Percentages of a bar that sum up to 100; none that is not zero is too small to be seen."""
    total = sum(counts)
    if not total:
        return [0.0] * len(counts)
    shares = [max(100 * count / total, _LEAST_SHARE) if count else 0.0 for count in counts]
    # The largest one gives what the small ones got.
    largest = max(range(len(shares)), key=shares.__getitem__)
    shares[largest] -= sum(shares) - 100
    return shares


def _filled(part: Part, key: str, left: float, width: float, title: Markup) -> Markup:
    size = Markup('x="{}%" width="{}%" height="{}"').format(_number(left), _number(width), _BAR_HEIGHT)
    marks = Markup('<rect {} fill="url(#{}-{})"/>').format(size, key, part.css_class) if part in _MARKS else _NOTHING
    return Markup('<g class="{}">{}<rect class="area" {}/>{}</g>').format(part.css_class, title, size, marks)


def _patterns(parts: Iterable[Part], key: str) -> Markup:
    found = [
        Markup(
            '<pattern id="{}-{}" width="8" height="8" patternUnits="userSpaceOnUse">'
            '<path class="marks" d="{}"/></pattern>'
        ).format(key, part.css_class, _MARKS[part])
        for part in parts
        if part in _MARKS
    ]
    return Markup("<defs>{}</defs>").format(_joined(found)) if found else _NOTHING


def _swatch(part: Part, key: str) -> Markup:
    """The colour and the marks of a part, for the legend; the word beside it says the same."""
    return Markup(
        '<svg class="swatch {}" width="16" height="16" aria-hidden="true">{}<rect class="area" width="16" height="16"/>'
        "{}</svg>"
    ).format(
        part.css_class,
        _patterns([part], key),
        Markup('<rect width="16" height="16" fill="url(#{}-{})"/>').format(key, part.css_class)
        if part in _MARKS
        else _NOTHING,
    )


def _amount(part: BarPart) -> str:
    files = _amount_of_unit(part.files, "files")
    return files if part.bytes is None else f"{files}, {_amount_of_unit(part.bytes, 'bytes')}"


def _amount_of_unit(count: int, unit: str) -> str:
    if unit == "bytes":
        return display_bytes(count)
    return count_words(count, "file")


def sparkline(points: Sequence[RatePoint], *, key: str, title: str, describe: Callable[[float], str]) -> Markup:
    """A rate over time as columns, with its peak and its latest value in words.

    Args:
        points: in the order of time, at equal distances.
        key: unique in the page; begins the ids of the markup.
        title: what is shown: ``Rate of job 214``.
        describe: words for a rate: ``12 MiB/s``.
    """
    peak = max(points, key=lambda point: point.rate, default=None)
    if peak is None or peak.rate <= 0:
        said, drawn = "Nothing has ended yet.", _NOTHING
    else:
        lasted = display_duration((points[-1].at - points[0].at).total_seconds())
        said = (
            f"Peak {describe(peak.rate)} at {_clock(peak.at)}; latest {describe(points[-1].rate)}"
            f" at {_clock(points[-1].at)}; {lasted} shown."
        )
        width = 100 / len(points)
        drawn = _joined(
            Markup('<rect x="{}%" y="{}" width="{}%" height="{}"><title>{} {}</title></rect>').format(
                _number(place * width),
                _number(_SPARK_HEIGHT - height),
                _number(width),
                _number(height),
                _clock(point.at),
                describe(point.rate),
            )
            for place, point in enumerate(points)
            if (height := _height(point.rate, peak.rate, _SPARK_HEIGHT))
        )
    return Markup(
        '<figure class="chart sparkline">'
        '<svg width="100%" height="{height}" role="img" aria-labelledby="{key}-t {key}-d">'
        '<title id="{key}-t">{title}</title><desc id="{key}-d">{said}</desc>'
        '<rect class="track" width="100%" height="{height}"/><g class="rate">{drawn}</g></svg>'
        "<figcaption>{said}</figcaption></figure>"
    ).format(height=_SPARK_HEIGHT, key=key, title=display_line(title), said=said, drawn=drawn)


def waterfall(rows: Sequence[WaterfallRow], *, key: str, title: str) -> Markup:
    """A table of routes, each with columns over time: upwards what succeeded, downwards what failed.

    Columns grow with the square root of the count, up to the largest one of all rows, so that a single failure is seen
    beside many successes.

    Args:
        key: unique in the page; begins the ids of the markup.
        title: the caption: ``Attempts in the last 24 hours``.
    """
    most_done = max((cell.done for row in rows for cell in row.cells), default=0)
    most_failed = max((cell.failed for row in rows for cell in row.cells), default=0)
    lines = [_route_row(row, f"{key}-{place}", most=(most_done, most_failed)) for place, row in enumerate(rows)] or [
        Markup('<tr><td colspan="4">Nothing has ended in this time.</td></tr>')
    ]
    return Markup(
        '<table class="chart waterfall"><caption>{}</caption><thead><tr><th scope="col">Route</th>'
        '<th scope="col">{}</th><th scope="col" class="number">Done</th>'
        '<th scope="col" class="number">Failed</th></tr></thead>'
        "<tbody>{}</tbody></table>"
    ).format(display_line(title), _span(rows), _joined(lines))


def _route_row(row: WaterfallRow, key: str, *, most: tuple[int, int]) -> Markup:
    done, failed = (sum(counts) for counts in zip(*((cell.done, cell.failed) for cell in row.cells), strict=True))
    width = 100 / len(row.cells)
    drawn = [
        _column(cell, place * width, width, most=most, key=key)
        for place, cell in enumerate(row.cells)
        if cell.done or cell.failed
    ]
    worst = max(row.cells, key=lambda cell: cell.failed)
    said = f"{count_words(done)} done, {count_words(failed)} failed."
    if failed:
        said += f" Most failures, {count_words(worst.failed)}, from {_clock(worst.at)} on."
    picture = Markup(
        '<svg width="100%" height="{height}" role="img" aria-labelledby="{key}-t {key}-d">'
        '<title id="{key}-t">{label}</title><desc id="{key}-d">{said}</desc>{defs}'
        '<rect class="track" width="100%" height="{height}"/>{drawn}'
        '<line class="base" x1="0" x2="100%" y1="{up}" y2="{up}"/></svg>'
    ).format(
        height=_UP + _DOWN,
        up=_UP,
        key=key,
        label=display_line(row.label),
        said=said,
        defs=_patterns([Part.FAILED], key),
        drawn=_joined(drawn),
    )
    return Markup(
        '<tr><th scope="row">{}</th><td class="picture">{}</td><td class="number">{}</td>'
        '<td class="number">{}</td></tr>'
    ).format(display_line(row.label), picture, count_words(done), count_words(failed))


def _column(cell: WaterfallCell, left: float, width: float, *, most: tuple[int, int], key: str) -> Markup:
    up = _height(cell.done**0.5, most[0] ** 0.5, _UP)
    down = _height(cell.failed**0.5, most[1] ** 0.5, _DOWN)
    across = Markup('x="{}%" width="{}%"').format(_number(left), _number(width))
    areas = []
    if up:
        area = Markup('<g class="part-done"><rect class="area" {} y="{}" height="{}"/></g>')
        areas.append(area.format(across, _number(_UP - up), _number(up)))
    if down:
        size = Markup('{} y="{}" height="{}"').format(across, _UP, _number(down))
        area = Markup('<g class="part-failed"><rect class="area" {}/><rect {} fill="url(#{}-part-failed)"/></g>')
        areas.append(area.format(size, size, key))
    return Markup("<g><title>{}: {} done, {} failed</title>{}</g>").format(
        _clock(cell.at), count_words(cell.done), count_words(cell.failed), _joined(areas)
    )


def _span(rows: Sequence[WaterfallRow]) -> str:
    """The times between which all cells are, and what is up and down."""
    if not rows or not rows[0].cells:
        return "Time"
    return f"From {_clock(rows[0].cells[0].at)} until now: done upwards, failed downwards"


def _height(value: float, most: float, height: int) -> float:
    return max(height * value / most, _LEAST_HEIGHT) if value > 0 else 0.0


def _clock(timestamp: datetime) -> str:
    return timestamp.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _number(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".")


def _joined(pieces: Iterable[Markup]) -> Markup:
    return _NOTHING.join(pieces)
