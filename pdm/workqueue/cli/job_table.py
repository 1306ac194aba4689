"""The table of jobs that ``pdm jobs`` prints, as wide as the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from msgspec import UNSET

from pdm.workqueue.cli.arguments import common_name
from pdm.workqueue.cli.display import display_width, table, truncate
from pdm.workqueue.domain.formatting import (
    display_bytes,
    display_name,
    display_time,
)
from pdm.workqueue.wire.responses import JobView

#: Minimum columns of WHAT; those below which WHAT takes precedence over LABEL; minimum columns of one path.
_MIN_WHAT, _GOOD_WHAT, _MIN_PATH = 16, 30, 6


def job_table(found: Sequence[JobView], names: dict[int, str], width: int | None) -> str:
    """The jobs, one line each; on a narrow terminal without empty columns, and with shortened paths."""
    header = ["ID", "TYPE", "STATUS", "DONE", "FAILED", "BYTES", "SUBMITTED (UTC)", "WHAT", "LABEL"]
    rows = [_row(job, names) for job in found]
    if any(job.owner for job in found):
        header.insert(1, "OWNER")
        for row, job in zip(rows, found, strict=True):
            row.insert(1, common_name(job.owner or str(job.user_id)))
    whole = table(header, rows, right=_number_columns(header))
    if width is None or max(map(display_width, whole.splitlines())) <= width:
        return whole
    header[header.index("SUBMITTED (UTC)")] = "UTC"
    for row, job in zip(rows, found, strict=True):
        row[header.index("BYTES")] = display_bytes(job.bytes_total)
        row[header.index("UTC")] = _short_time(job.timestamp)
    for name, nothing in (("FAILED", "0"), ("LABEL", "")):
        column = header.index(name)
        if all(row[column] == nothing for row in rows) or (
            name == "LABEL" and _columns_left(header, rows, width) < _GOOD_WHAT
        ):
            del header[column]
            for row in rows:
                del row[column]
    what = header.index("WHAT")
    columns = max(_columns_left(header, rows, width), _MIN_WHAT)
    for row, job in zip(rows, found, strict=True):
        row[what] = paths_cell(job, names, columns)
    flexible = [header.index(name) for name in ("OWNER", "LABEL", "WHAT") if name in header]
    return table(header, rows, right=_number_columns(header), width=width, flexible=flexible)


def _short_time(timestamp: datetime) -> str:
    """``16:05`` today, ``11-28`` this year, ``2025-11`` before."""
    now, then = datetime.now(UTC), timestamp.astimezone(UTC)
    if then.date() == now.date():
        return f"{then:%H:%M}"
    return f"{then:%m-%d}" if then.year == now.year else f"{then:%Y-%m}"


def _columns_left(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> int:
    """Columns of a terminal that the others leave to WHAT."""
    what = header.index("WHAT")
    others = [[*row[:what], *row[what + 1 :]] for row in [header, *rows]]
    return width - sum(2 + max(map(display_width, cells)) for cells in zip(*others, strict=True))


def _number_columns(header: Sequence[str]) -> list[int]:
    return [header.index(name) for name in ("ID", "DONE", "FAILED", "BYTES") if name in header]


def _row(job: JobView, names: dict[int, str]) -> list[str]:
    return [
        str(job.id),
        job.type,
        job.status,
        f"{job.num_done}/{job.num_elements}",
        str(job.num_failed),
        _bytes_cell(job),
        display_time(job.timestamp.timestamp()),
        paths_cell(job, names),
        display_name(job.label or ""),
    ]


def _bytes_cell(job: JobView) -> str:
    """``1.5 GiB of 3.4 GiB``, verified bytes only; one number if both are equal."""
    if job.bytes_done == job.bytes_total:
        return display_bytes(job.bytes_done)
    return f"{display_bytes(job.bytes_done)} of {display_bytes(job.bytes_total)}"


def paths_cell(job: JobView, names: dict[int, str], width: int | None = None) -> str:
    """``cern:/data -> ral:/data``; in at most `width` columns ``cern:.../run7 -> ral:.../run7``."""
    places = [(f"{names.get(job.src_siteid, job.src_siteid)}:", display_name(job.src_filepath))]
    if job.dst_filepath is not UNSET and job.dst_siteid is not UNSET:
        places.append((f"{names.get(job.dst_siteid, job.dst_siteid)}:", display_name(job.dst_filepath)))
    texts = [site + path for site, path in places]
    arrow = " -> "
    if width is not None and display_width(arrow.join(texts)) > width:
        # The end of a path is more significant; columns that one place does not need go to the other.
        share = (width - len(arrow) * (len(places) - 1)) // len(places)
        if names and any(share - display_width(site) < _MIN_PATH for site, _ in places):
            # Numbers of sites are shorter than their names.
            return paths_cell(job, {}, width)
        spare = sum(max(share - display_width(text), 0) for text in texts)
        texts = [
            site + truncate(path, max(share + spare - display_width(site), _MIN_PATH), keep_end=True)
            if display_width(site + path) > share
            else site + path
            for site, path in places
        ]
    return arrow.join(texts)
