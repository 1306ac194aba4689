"""``python -m pdm.testgrid up DIR`` and ``down DIR``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pdm.testgrid.grid import TestGrid
from pdm.testgrid.processes import GridError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pdm.testgrid", description="A real grid on loopback.")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="bring a grid up and write DIR/grid.json")
    down = commands.add_parser("down", help="end a grid and remove what it made")
    down.add_argument("--keep-files", action="store_true", help="leave certificates, logs and the sites' content")
    for command in (up, down):
        command.add_argument("directory", metavar="DIR", help="the grid's directory: new or empty for up")
    chosen = parser.parse_args(arguments)
    grid = TestGrid(chosen.directory)
    try:
        if chosen.command == "up":
            grid.up()
            print(f"grid is up: {grid.directory / 'grid.json'}")
            for name, value in grid.environment().items():
                print(f"export {name}={value}")
        else:
            ended = grid.down(keep_files=chosen.keep_files)
            print(f"grid is down: {ended} processes ended")
    except GridError as error:
        print(f"pdm.testgrid: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
