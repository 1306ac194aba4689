"""Makes the table of ``docs/performance.rst`` out of results, so that it is never typed.

Run: ``.venv/bin/python benchmarks/table.py [DIR] [--page docs/performance.rst]``; without a page the table is printed.
A row of the page stays as it is where the directory has no result of its benchmark.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from catalogue import CATALOGUE, Benchmark
from figures import load_newest, shown

_RESULTS = Path(__file__).resolve().parent / "results"
_BEGIN, _END = ".. the table begins", ".. the table ends"
_HEAD = """\
.. list-table::
   :header-rows: 1
   :widths: 24 16 14 24 22

   * - What, and its command
     - Bar, and what is
     - Ratio
     - Rate of the service; of what it is compared with
     - CPU ms for each, peak memory
"""
#: What names of bare contenders begin with that are commands.
_COMMANDS = ("curl", "gfal-rm", "globus-url-copy", "rclone", "sftp", "xrdcp", "xrdfs")
#: Figures that have a place of their own, or say nothing that a reader asks for.
_TOLD = frozenset(
    {
        "benchmark", "at", "quick", "sizes", "machine", "bars", "unit", "ratio", "ours", "bare", "bare is",
        "bare modes", "cpu ms each, ours", "cpu ms each, bare", "peak MiB", "checksums", "elements",
    }
)  # fmt: skip


def table(results: Mapping[str, Mapping[str, Any]], kept: Mapping[str, str] = MappingProxyType({})) -> str:
    """The table of some results, in the order of the catalogue; a benchmark without a result has a row that says so.

    `kept`: rows, by the name of the benchmark, that stand in for results that are not there.
    """
    rows = [_HEAD]
    for benchmark in CATALOGUE.values():
        result = results.get(benchmark.name)
        if result is None and benchmark.name in kept:
            rows.append(kept[benchmark.name])
            continue
        cells = [[_title(benchmark), f"``script/bench {benchmark.name}``"]]
        if result is None:
            cells += [[bar.text for bar in benchmark.bars], ["not measured"], [""], [""]]
        else:
            cells[0] += list(_conditions(result))
            ratio = [shown(result["ratio"])] if "ratio" in result else [""]
            cells += [list(_bars(result)), ratio, list(_rates(result)), list(_costs(result)) or [""]]
        rows.append(_row(cells))
    return "\n".join(rows)


def rows_of(page: str) -> dict[str, str]:
    """Rows of the table of a page, by the name of the benchmark."""
    inner = page.partition(f"{_BEGIN}\n")[2].partition(_END)[0]
    rows = re.split(r"^(?=   \* - )", inner, flags=re.MULTILINE)
    named = ((re.search(r"``script/bench (\w+)``", row), row) for row in rows)
    return {found[1]: row.rstrip() for found, row in named if found}


def _title(benchmark: Benchmark) -> str:
    return f"**{benchmark.title}**"


def _conditions(result: Mapping[str, Any]) -> Iterator[str]:
    if "checksums" in result:
        yield f"Checksums: {result['checksums']}."
    sizes = ", ".join(f"{name} {shown(value)}" for name, value in result["sizes"].items())
    yield f"Measured {str(result['at'])[:10]}, load {result['machine']['load']}: {sizes}" + (
        " (quick)." if result["quick"] else "."
    )


def _bars(result: Mapping[str, Any]) -> Iterator[str]:
    for bar in result["bars"]:
        yield f"{bar['bar']}: {shown(bar['figure'])}" + ("" if bar["met"] else " **(missed)**")


def _rates(result: Mapping[str, Any]) -> Iterator[str]:
    if "ours" in result:
        yield f"{shown(result['ours'])} {result['unit']}"
    if "bare" in result:
        yield f"{shown(result['bare'])}: {_literal(result['bare is'])}"
    others = {name: rate for name, rate in result.get("bare modes", {}).items() if name != result.get("bare is")}
    for name, rate in others.items():
        yield f"(slower: {shown(rate)}: {_literal(name)})"
    for name, value in result.items():
        if name not in _TOLD and not isinstance(value, (bool, str)):
            yield f"{name}: {shown(value)}"


def _literal(name: str) -> str:
    return f"``{name}``" if name.startswith(_COMMANDS) else name


def _costs(result: Mapping[str, Any]) -> Iterator[str]:
    for side, title in (("ours", "service"), ("bare", "compared")):
        cpu = {part: value for part, value in result.get(f"cpu ms each, {side}", {}).items() if value}
        if cpu:
            yield f"{title}: {shown(cpu)}"
    if result.get("peak MiB"):
        yield f"MiB: {shown(result['peak MiB'])}"


def _row(cells: list[list[str]]) -> str:
    lines = []
    for number, paragraphs in enumerate(cells):
        mark = "   * - " if number == 0 else "     - "
        blank = "\n\n       "
        lines.append((mark + blank.join(paragraphs)).rstrip())
    return "\n".join(lines)


def machine_line(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A sentence about what the results came to be on; each row has its day, and the load of the machine before it."""
    machine = next(iter(results.values()))["machine"]
    return (
        f"Measured on {machine['cores']} cores ({machine['processor']}), Linux {machine['kernel']}, "
        f"Python {machine['python']}."
    )


def replaced(page: str, inner: str) -> str:
    """A page with another table between its marks.

    Raises:
        ValueError: the page has no marks.
    """
    before, begun, rest = page.partition(f"{_BEGIN}\n")
    _, ended, after = rest.partition(_END)
    if not begun or not ended:
        raise ValueError(f"the page has no lines {_BEGIN!r} and {_END!r}")
    return f"{before}{_BEGIN}\n\n{inner.strip()}\n\n{_END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "results", nargs="?", type=Path, default=_RESULTS, metavar="DIR", help="directory of the results"
    )
    parser.add_argument("--page", type=Path, help="page whose table is replaced")
    options = parser.parse_args()
    results = load_newest(options.results)
    if not results:
        print(f"{options.results} has no results: run script/bench", file=sys.stderr)
        return 1
    page = "" if options.page is None else options.page.read_text(encoding="utf-8")
    made = f"{machine_line(results)}\n\n{table(results, rows_of(page))}"
    if options.page is None:
        print(made)
    else:
        options.page.write_text(replaced(page, made), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
