"""Types of the values in ``workqueue.conf``; each says how its text is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from pdm.workqueue.domain.addresses import AddressRange


def kind(name: str, **limits: Any) -> Meta:
    """Marks how `pdm.workqueue.config.values` reads the text of a key."""
    return Meta(extra={"kind": name}, **limits)


DAY_S = 86400.0

#: Seconds, written ``500ms``, ``30s``, ``5m``, ``12h`` or ``7d``; more than none.
Duration = Annotated[float, kind("duration", gt=0, le=3650 * DAY_S)]
#: Seconds, or 0 for "not at all".
DurationOrZero = Annotated[float, kind("duration", ge=0, le=3650 * DAY_S)]
#: Seconds, or ``forever``, which is infinite.
DurationOrForever = Annotated[float, kind("duration-or-forever", gt=0)]
#: Seconds, or nothing.
OptionalDuration = Annotated[float | None, kind("optional-duration")]
#: Bytes, written ``512``, ``64KiB``, ``1MB``.
Size = Annotated[int, kind("size", ge=1, le=2**62)]
#: A path; a relative one is relative to the directory of the configuration file.
FilePath = Annotated[Path, kind("path")]
#: A path; the default is relative to the state directory.
StatePath = Annotated[Path, kind("state-path")]
#: A path, or nothing.
OptionalPath = Annotated[Path | None, kind("optional-path")]
#: Certificate subjects, one a line, in slash form: ``/C=XX/O=Grid/CN=Name``.
Subjects = Annotated[tuple[str, ...], kind("subjects")]

#: Addresses and networks, one a line: ``10.0.0.0/8``, ``127.0.0.1:8080``, ``[::1]:8080``.
AddressRanges = Annotated[tuple[AddressRange, ...], kind("addresses")]

#: A name for people and for a segment of a URL, or empty.
NodeName = Annotated[str, kind("node-name")]
#: ``https://HOST:PORT``, or empty.
NodeAddress = Annotated[str, kind("node-address")]

Port = Annotated[int, Meta(ge=0, le=65535)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]
#: Streams of work at once: no more than there can be helpers.
StreamCount = Annotated[int, Meta(ge=1, le=1000)]
Text = Annotated[str, Meta(min_length=1)]
#: Certificate subject → share of the work, one a line: ``3 /C=XX/O=Grid/CN=Name``.
Weights = Annotated[Mapping[str, float], kind("weights")]
