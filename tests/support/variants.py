"""Parameters of which one representative is tested every time, and the others in full runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def usual(values: Iterable[Any], every_time: Collection[Any]) -> list[Any]:
    """The values of a parameter, or tuples of several; all but those of ``every_time`` are marked full."""
    return [
        value
        if value in every_time
        else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.full)
        for value in values
    ]
