"""What can go wrong with a test grid, in words for who asked for it."""

from __future__ import annotations


class GridError(Exception):
    """The grid could not be brought up or taken down; the text says why and what to do."""


class GridMissingError(GridError):
    """Programs of the grid are not installed on this machine."""
